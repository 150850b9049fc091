"""The small pieces that pages are made of: escaped text, shares in percent, sections and cards."""

from __future__ import annotations

import re
from html import escape

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]")


def text(value: object) -> str:
    """Escaped text that cannot turn the direction of what follows it."""
    return f"<bdi>{attribute(value)}</bdi>"


def attribute(value: object) -> str:
    """Escaped text for inside quotes; what no page may hold becomes a question mark or a space."""
    return escape(_CONTROL.sub(" ", str(value)).encode("utf-8", "replace").decode())


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}"


def section(title: str, body: str, intro: str = "") -> str:
    """A part of the page under its title; nothing where there is no body."""
    if not body:
        return ""
    return f"<section><h2>{attribute(title)}</h2>{_intro(intro)}{body}</section>"


def card(title: str, body: str, intro: str = "") -> str:
    """A framed part of a section; nothing where there is no body."""
    return f'<div class="card"><h3>{attribute(title)}</h3>{_intro(intro)}{body}</div>' if body else ""


def _intro(words: str) -> str:
    return f'<p class="soft">{attribute(words)}</p>' if words else ""
