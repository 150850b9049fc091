"""GA4GH phenopackets (schema 1 and 2) and the flat case files made from them, into Records.

Findings marked excluded (schema 2) or negated (schema 1) are those the patient does not have, and are kept apart. The
group is the publication: two patients of one paper are never split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import RecordError
from ..types import Record
from .rows import Reading, plain, sex_of, shown

_MARKS = frozenset(("phenotypicFeatures", "subject", "metaData", "phenotypic_features", "meta_data"))


def is_phenopacket(value: Mapping[str, Any]) -> bool:
    return not _MARKS.isdisjoint(value)


def is_case(value: Mapping[str, Any]) -> bool:
    """A case as one flat object: findings under `hpo`, the diagnosis under `disease`."""
    return "hpo" in value and "disease" in value


def phenopacket_record(packet: Mapping[str, Any], reading: Reading, where: str, name: str = "") -> Record:
    """The record of a phenopacket; `name` serves as its id where it has none."""
    if snake := next((name for name in ("phenotypic_features", "meta_data") if name in packet), None):
        camel = "phenotypicFeatures" if snake == "phenotypic_features" else "metaData"
        raise RecordError(
            f"{where}: found {snake}, wanted {camel}; write the phenopacket with the names of its JSON format"
        )
    subject = _object(packet, "subject", where)
    features = [
        (_object(feature, "type", where), bool(feature.get("excluded", feature.get("negated"))), feature)
        for feature in _objects(packet, "phenotypicFeatures", where)
    ]
    labels = _diagnoses(packet, where)
    return _record(
        identity=plain(packet.get("id"), "id", where).strip() or name,
        labels=labels,
        findings=[(kind, excluded) for kind, excluded, _ in features],
        sex=plain(subject.get("sex"), "sex", where),
        age=_age(packet, subject, [feature for _, excluded, feature in features if not excluded], where),
        group=_publication(packet, where),
        reading=reading,
        where=where,
    )


def case_record(case: Mapping[str, Any], reading: Reading, where: str) -> Record:
    """The record of a flat case: id, sex, age, hpo [{id, label, excluded}], disease {id, label}, pmid."""
    disease = _term(_object(case, "disease", where), {}, where)
    findings = [(finding, bool(finding.get("excluded"))) for finding in _objects(case, "hpo", where)]
    return _record(
        identity=plain(case.get("id"), "id", where).strip(),
        labels=[disease] if disease else [],
        findings=findings,
        sex=plain(case.get("sex"), "sex", where),
        age=plain(case.get("age"), "age", where),
        group=plain(case.get("pmid"), "pmid", where),
        reading=reading,
        where=where,
    )


def _record(
    *,
    identity: str,
    labels: list[str],
    findings: list[tuple[Mapping[str, Any], bool]],
    sex: str,
    age: str,
    group: str,
    reading: Reading,
    where: str,
) -> Record:
    if not identity:
        raise RecordError(f"{where}: no id, every record needs one of its own")
    if not labels and not reading.undiagnosed:
        raise RecordError(
            f"{where}: no diagnosis, one was wanted in interpretations[].diagnosis.disease or diseases[]; "
            f"add it, or leave the case out"
        )
    named = [(_term(term, reading.terms, where), excluded) for term, excluded in findings]
    return Record(
        id=identity,
        label=labels[0] if labels else None,
        labels=tuple(labels) if len(labels) > 1 else (),
        terms=tuple(dict.fromkeys(name for name, excluded in named if name and not excluded)),
        excluded=tuple(dict.fromkeys(name for name, excluded in named if name and excluded)),
        sex=sex_of(sex),
        age=age.strip() or None,
        group=group.strip() or None,
    )


def _diagnoses(packet: Mapping[str, Any], where: str) -> list[str]:
    """What the interpretations found; without any, the diseases that are not excluded."""
    found: list[Mapping[str, Any]] = []
    for interpretation in _objects(packet, "interpretations", where):
        diagnosis = interpretation.get("diagnosis")
        one = [diagnosis] if isinstance(diagnosis, dict) else _objects(interpretation, "diagnosis", where)
        found += [_object(each, "disease", where) for each in one]
    names = [_term(disease, {}, where) for disease in found]
    if not any(names):
        diseases = (disease for disease in _objects(packet, "diseases", where) if not disease.get("excluded"))
        names = [_term(_object(disease, "term", where), {}, where) for disease in diseases]
    return list(dict.fromkeys(name for name in names if name))


def _age(packet: Mapping[str, Any], subject: Mapping[str, Any], present: list[Mapping[str, Any]], where: str) -> str:
    """Age when last seen; else when collected; else at the onset of the disease; else of the first finding with one."""
    times: Iterator[Any] = iter(
        [
            subject.get("timeAtLastEncounter"),
            subject.get("ageAtCollection"),
            *(disease.get("onset") for disease in _objects(packet, "diseases", where)),
            *(feature.get("onset") for feature in present),
        ]
    )
    return next((age for time in times if (age := _time(time, where))), "")


def _time(time: Any, where: str) -> str:
    """An ISO 8601 duration for an age or a range of ages (its start), a name for a stage of life."""
    if not isinstance(time, dict):
        return ""
    age = time.get("age")
    if isinstance(age, dict):
        return _time(age, where)
    for name in ("ageRange", "start"):
        if isinstance(time.get(name), dict):
            return _time(time[name], where)
    if isinstance(time.get("ontologyClass"), dict):
        return _term(time["ontologyClass"], {}, where)
    return plain(time.get("iso8601duration", age), "age", where)


def _publication(packet: Mapping[str, Any], where: str) -> str:
    references = _objects(_object(packet, "metaData", where), "externalReferences", where)
    names = (plain(reference.get("id"), "externalReferences.id", where) for reference in references)
    return next((name for name in names if name.upper().startswith("PMID:")), "")


def _term(term: Mapping[str, Any], names: Mapping[str, str], where: str) -> str:
    """The term's label; without one the label that the HPO gives its id; without that the id."""
    identity = plain(term.get("id"), "id", where).strip()
    return plain(term.get("label"), "label", where).strip() or names.get(identity, identity)


def _object(value: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    found = value.get(name)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise RecordError(f"{where}: {name} is {shown(found)}, an object was wanted; see the schema")
    return found


def _objects(value: Mapping[str, Any], name: str, where: str) -> list[Mapping[str, Any]]:
    found = value.get(name)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise RecordError(
            f"{where}: {name} is {shown(found)}, a list of objects was wanted; write it as the schema says"
        )
    return found
