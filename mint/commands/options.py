"""Options that several commands share: those of a training run and those of preference pairs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any

import click

from ..config import AlignSettings
from .frame import Command

_KINDS: dict[str, Any] = {"str": str, "int": int, "float": float}


def settings_options(leave_out: Collection[str] = (), defaults: bool = True) -> Callable[[Command], Command]:
    """An option for every setting of a run. One that is not given stays None or (), so that --config can fill it; without
    `defaults` the help does not name those of AlignSettings, since the command has others."""

    def decorate(body: Command) -> Command:
        for setting in reversed(fields(AlignSettings)):
            if setting.name in leave_out:
                continue
            kind = str(setting.type).removesuffix(" | None")
            name, meaning = setting.name.replace("_", "-"), setting.metadata["help"]
            unsaid = not defaults or setting.default is None or setting.default is False or setting.default in ("", ())
            shown = "" if unsaid else f"  [default: {_written(setting.default)}]"
            if kind == "bool":
                body = click.option(f"--{name}/--no-{name}", setting.name, default=None, help=meaning + shown)(body)
            elif setting.default == ():
                body = click.option(f"--{name}", setting.name, multiple=True, help=meaning)(body)
            else:
                body = click.option(f"--{name}", setting.name, type=_KINDS.get(kind, str), help=meaning + shown)(body)
        return body

    return decorate


def _written(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def given_settings(given: dict[str, Any]) -> dict[str, Any]:
    """The settings that were given, in the types of AlignSettings."""
    values = {name: value for name, value in given.items() if value not in (None, ())}
    if isinstance(values.get("targets"), str):
        values["targets"] = tuple(part.strip() for part in values["targets"].split(",") if part.strip())
    return values


PAIR_CHOICES = ("chosen_k", "rejected_q", "rejected", "label_first", "label_within")


def given_choices(given: dict[str, Any], *more: str) -> dict[str, Any]:
    """How a ranking becomes a pair, and `more`, where it was said and is not what holds anyway; taken out of `given`."""
    taken = {name: given.pop(name) for name in (*PAIR_CHOICES, *more)}
    return {name: value for name, value in taken.items() if value not in (None, False, "bottom")}


def pair_options(body: Command) -> Command:
    """How a ranking becomes a pair."""
    for option in reversed((
        click.option(
            "--chosen-k", type=click.IntRange(1), help="Classes of the chosen answer [default: 10, tissues 5]."
        ),
        click.option(
            "--rejected-q", type=click.IntRange(1), help="Classes of the rejected answer [default: 15, tissues 5]."
        ),
        click.option("--rejected", type=click.Choice(["bottom", "near", "random"]), default="bottom", show_default=True,
                     help="Where rejected classes come from: the end of the ranking, just below the chosen, anywhere."),
        click.option("--label-first", is_flag=True, help="Put the known label before the teacher's classes."),
        click.option(
            "--label-within", type=click.IntRange(1), help="Leave out cases whose label the teacher ranks lower."
        ),
    )):  # fmt: skip
        body = option(body)
    return body
