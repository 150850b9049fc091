"""The oldest versions that pyproject.toml allows, one `name==version` a line: `.ci/oldest` runs the tests with them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_BOUND = re.compile(r"([\w-]+)>=(\d+(?:\.\d+)+)(?:; .*)?")


def oldest() -> dict[str, str]:
    """The lower bound of each dependency by its name; one that is written in another way is an error."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {}
    for text in (*project["dependencies"], *project["optional-dependencies"]["test"]):
        bound = _BOUND.fullmatch(text)
        if bound is None:
            raise ValueError(f"pyproject.toml: {text!r}; wanted name>=version, so that the bound can be tested")
        found[bound[1]] = bound[2]
    return found


if __name__ == "__main__":
    print("\n".join(f"{name}=={version}" for name, version in oldest().items()))
