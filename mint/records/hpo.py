"""The names of the terms of the Human Phenotype Ontology, from a table of ids and labels, hp.obo or hp.json."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import RecordError
from ..files import read_json
from .rows import refuse_link_out
from .sources import head, lines, opened

FILE_NAMES = ("hpo_terms.tsv", "hp.obo", "hp.json")
"""Looked for beside a table of HPO ids."""
_JSON_LIMIT = 256 << 20
_ID = re.compile(r"HP[:_](\d{7})")
_OBO_LINE = re.compile(r"(id|alt_id|name): *(.*)")


def read_hpo(path: str | Path) -> dict[str, str]:
    """{"HP:0000316": "Hypertelorism", …}; in hp.obo the alternative ids of a term are there too."""
    with opened(path) as file:
        start = head(file, path).lstrip()
        if start[:1] == b"{":
            names = dict(_json_terms(read_json(path, RecordError, _JSON_LIMIT)))
        else:
            text = (_decoded(line, f"{path}:{number}") for number, line in lines(file, path))
            names = dict(_obo_terms(text) if start.startswith(b"format-version:") else _table_terms(text, path))
    if not names:
        raise RecordError(f"{path}: no HPO term in it; give a table with the columns id and label, hp.obo or hp.json")
    return names


def marked_terms(path: str | Path, column: str) -> frozenset[str]:
    """The labels, in small letters, of the terms of a TSV that have a 1 in a column."""
    with opened(path) as file:
        text = (_decoded(line, f"{path}:{number}").rstrip("\r\n") for number, line in lines(file, path))
        rows = (line.split("\t") for line in text if line and not line.startswith("#"))
        header = next(rows, [])
        if "label" not in header or column not in header:
            raise RecordError(
                f"{path}: the columns are {', '.join(header)[:80]}; wanted label and {column}, tabs between"
            )
        label, mark = header.index("label"), header.index(column)
        return frozenset(row[label].lower() for row in rows if len(row) > max(label, mark) and row[mark] == "1")


def hpo_beside(folder: Path) -> dict[str, str]:
    """The terms of the HPO file in `folder`, or none where there is none."""
    path = next((folder / name for name in FILE_NAMES if (folder / name).is_file()), None)
    if path is None:
        return {}
    refuse_link_out(path, folder, "give what it leads to with --hpo")
    return read_hpo(path)


def _table_terms(text: Iterable[str], path: str | Path) -> Iterator[tuple[str, str]]:
    """(id, label) of each row below a header line; lines before it that begin with '#' are remarks."""
    rows = (line for line in text if not line.startswith("#") and not line.isspace())
    first = next(rows, "")
    names = [name.strip().lower() for name in first.split("\t" if "\t" in first else ",")]
    if "id" not in names or "label" not in names:
        raise RecordError(f"{path}: the columns are {', '.join(names)[:80]}; wanted id and label among them")
    id_at, label_at = names.index("id"), names.index("label")
    try:
        for row in csv.reader(chain(rows), delimiter="\t" if "\t" in first else ","):
            if len(row) > max(id_at, label_at) and _ID.fullmatch(row[id_at]):
                yield row[id_at].replace("_", ":"), row[label_at].strip()
    except csv.Error as fault:
        raise RecordError(f"{path}: not a table ({fault}); see its quotes") from fault


def _obo_terms(text: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(id, name) of each [Term] stanza, once for its id and once for each alternative id."""
    ids: list[str] = []
    name = ""  # of this stanza, once it was read: an alternative id may stand before it or after it
    for line in text:
        found = _OBO_LINE.match(line)
        if line.startswith("["):
            ids, name = [], ""
        elif found and found[1] == "name":
            name = found[2].strip()
            yield from ((one, name) for one in ids)
        elif found and _ID.match(found[2]):
            ids.append(found[2][:10])
            if name:
                yield ids[-1], name


def _json_terms(value: Any) -> Iterator[tuple[str, str]]:
    """(id, label) of each node of an OBO graphs document: the id is the end of the node's address."""
    graphs = value.get("graphs") if isinstance(value, dict) else None
    for graph in graphs if isinstance(graphs, list) else ():
        nodes = graph.get("nodes") if isinstance(graph, dict) else None
        for node in nodes if isinstance(nodes, list) else ():
            label = node.get("lbl") if isinstance(node, dict) else None
            found = _ID.search(str(node.get("id"))) if isinstance(label, str) else None
            if found and isinstance(label, str):
                yield f"HP:{found[1]}", label


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as fault:
        raise RecordError(f"{where}: not UTF-8; save the file again as UTF-8") from fault
