"""The whole story on one screen: teach, prefer, align, predict, evaluate. Each verb is what the command of its name calls.

records --encoder--> scores --> ranking --> pairs --> token trees --> decoder + LoRA --> adapter --> predictions --> report
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from . import parallel
from .builtin.cases import cases as builtin_cases
from .builtin.cases import is_builtin
from .config import AlignSettings
from .decoders import Decoder, load_decoder, lora, open_adapter, stored_dtype
from .decoders.spread import load_spread
from .decoders.vision_cache import FeatureStore
from .devices import free_memory
from .encoders import Encoder, load_encoder
from .errors import ConfigError, RecordError
from .evaluation import measure
from .evaluation.predictions import read_predictions
from .files import alone, locked
from .jsonlines import refuse
from .labels import LabelSet, read_labels
from .pairs import prefer_pairs
from .pairs.files import read_pairs
from .predicting import Questioner, check_mode
from .progress import progress, say
from .ranking import rank
from .records import read_records
from .retrieval import Retriever, open_retriever
from .teaching import Taught, usable
from .teaching import teach as train_teacher
from .training import Trainer, runs
from .training.audit import activation_bytes, audit, tower_bytes
from .training.batches import TokenPair, token_pairs
from .types import Prediction, PreferencePair, Record, Report
from .weights.shards import write_checkpoint

READING: Mapping[str, Any] = MappingProxyType({})
"""How files of cases are read, where nothing is said of it: the options of `read_records`."""


def teach(
    cases: str | Path | Iterable[Record],
    *,
    out: str | Path,
    skipped: list[str] | None = None,
    reading: Mapping[str, Any] = READING,
    **choices: Any,
) -> Taught:
    """Train the fusion encoder on cases that have photo, note and label. `choices` are those of `teaching.teach`."""
    records = _records(cases, reading, skipped)
    return train_teacher(records if skipped is None else usable(records, skipped), out=out, **choices)


def prefer(
    cases: str | Path | Iterable[Record],
    *,
    teacher: str | Path | Encoder,
    skipped: list[str] | None = None,
    reading: Mapping[str, Any] = READING,
    candidates: Mapping[str, Sequence[str]] | None = None,
    temperature: float | None = None,
    **choices: Any,
) -> Iterator[PreferencePair]:
    """The teacher ranks the classes of each case; its ranking becomes a pair. `choices` are those of `prefer_pairs`.

    `candidates` names, by the id of a case, the classes that it is ranked on; cases that it does not have, on all.
    """
    encoder = load_encoder(teacher) if isinstance(teacher, str | Path) else teacher
    for records, scores in encoder.score_batches(_records(cases, reading, skipped), skipped):
        for record, row in zip(records, scores, strict=True):
            few = None if candidates is None else [candidates.get(record.id)]
            try:
                _check_label(record, encoder)
                ranked = rank([record.id], row[None], encoder.classes, candidates=few, temperature=temperature)
                yield from prefer_pairs(ranked, [record], **choices)
            except RecordError as fault:
                refuse(fault, skipped)


def _check_label(record: Record, teacher: Encoder) -> None:
    """Refuse a case whose label the teacher cannot name: what it would teach of that case is wrong."""
    if record.label is not None and record.label not in teacher.classes:
        raise RecordError(
            f"case {record.id!r}: its label {record.label!r} is none of the teacher's {len(teacher.classes)} classes; "
            f"correct the label, teach with a teacher that has it, or leave such cases out with --skip-bad"
        )


def align(
    settings: AlignSettings,
    pairs: Iterable[PreferencePair] | None = None,
    *,
    resume: bool = False,
    dry_run: bool = False,
    skipped: list[str] | None = None,
) -> dict[str, Any]:
    """Pairs (by default the file `settings.pairs`) -> an adapter in `settings.out`; with `dry_run` only the audit of them."""
    folder = Path(settings.out)
    if not dry_run:
        settings = _admitted(folder, settings, resume)
    source = list(read_pairs(settings.pairs, skipped=skipped)) if pairs is None else pairs  # before what takes long
    decoder, adapter_config = _student(settings, weights=not (dry_run and settings.spread))
    everything = token_pairs(source, decoder.tokenizer, settings, skipped)
    held_out = [pair for pair in everything if _share(pair.id) < settings.held_out]
    training = [pair for pair in everything if _share(pair.id) >= settings.held_out]
    if not training:
        why = f" (left out: {skipped[0]})" if skipped else ""
        raise ConfigError(
            f"{settings.pairs or 'pairs'}: no pair to train on{why}; give at least one, or a smaller --held-out"
        )
    if dry_run:
        return audit(decoder, training, settings)
    settings = _resolved(decoder, settings, training)
    _report_cuts(everything)
    if decoder.eyes is not None and settings.cache_gb:
        decoder.eyes.store = FeatureStore(folder / "features", int(settings.cache_gb * 1e9))
    parallel.barrier()  # every rank has seen the folder as it was
    with locked(folder) if parallel.first() else nullcontext():
        if parallel.first():
            if not resume:
                runs.check_new(folder)  # again, now that no other run can begin here
            runs.write_run(folder, settings.as_dict(), {"pairs": len(training), "held_out_pairs": len(held_out)})
        Trainer(decoder, settings, folder, training, held_out, adapter_config).run(resume)
    last = runs.read_metrics(folder / "metrics.jsonl")[-1]
    return {"out": str(folder), "adapter": str(folder / "adapter"), "steps": last["step"], "loss": last["loss"]}


def _admitted(folder: Path, settings: AlignSettings, resume: bool) -> AlignSettings:
    """The settings of the run that is to be continued in the folder, or those given if the folder is free for them."""
    if not resume:
        runs.check_new(folder)
    elif runs.holds_run(folder):
        return runs.settings_to_resume(folder, settings)
    else:
        say(f"{folder}: holds no run yet, so one is begun")
    return settings


def _student(settings: AlignSettings, weights: bool = True) -> tuple[Decoder, dict[str, Any]]:
    """The decoder with the adapter that will be trained, and what PEFT has to know of it; or its shapes without weights."""
    if not settings.model:
        raise ConfigError("--model: no decoder given; wanted a checkpoint folder or a hub name")
    if settings.spread and weights:
        return _spread_student(settings)
    parallel.apart()
    decoder = load_decoder(
        settings.model,
        device=settings.device if weights else "meta",
        dtype=settings.dtype,
        date=settings.date,
        meta_masking=settings.meta_masking,
    )
    return decoder, _adapt(decoder.network, settings)[0]


def _spread_student(settings: AlignSettings) -> tuple[Decoder, dict[str, Any]]:
    """The same, with each rank holding a part of it."""
    _check_several(settings.shard)
    config: dict[str, Any] = {}

    def adapt(network: Any) -> Callable[[Any], None]:
        made, values = _adapt(network, settings)
        config.update(made)
        return values

    decoder = load_spread(
        settings.model,
        adapt,
        device=settings.device,
        dtype=settings.dtype,
        date=settings.date,
        meta_masking=settings.meta_masking,
        shard=settings.shard,
        tensor=settings.tensor_parallel,
    )
    return decoder, config


def _check_several(shard: bool) -> None:
    if parallel.size() == 1:
        option = "--shard" if shard else "--tensor-parallel"
        raise ConfigError(
            f"{option}: spreads the decoder over several processes; start them with torchrun, or leave it out (a run that is "
            f"gone on with by one process takes --no-shard --tensor-parallel 1)"
        )


def _adapt(network: Any, settings: AlignSettings) -> tuple[dict[str, Any], Callable[[Any], None]]:
    """Put the adapter that will be trained on a network: what PEFT has to know of it, and what gives it its values."""
    if settings.adapter is not None:
        adapter = open_adapter(network, settings.adapter)
        lora.load(network, adapter, trainable=True)
        return dict(adapter.config), lambda network: lora.take_up(network, adapter)
    names = lora.attach(
        network,
        settings.targets,
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        rslora=settings.rslora,
        seed=settings.seed,
    )
    config: dict[str, Any] = {"r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
    config |= {"use_rslora": settings.rslora, "target_modules": lora.short_names(network, names)}
    return config, lambda network: lora.start(network, settings.seed)


def _resolved(decoder: Decoder, settings: AlignSettings, pairs: Sequence[TokenPair]) -> AlignSettings:
    """The settings with what was left open decided: run.json holds them, so a run can be repeated on another day."""
    decoder.network.model.recompute = _recompute(decoder, settings, pairs)
    return replace(
        settings,
        date=decoder.tokenizer.date,
        dtype=str(decoder.dtype).removeprefix("torch."),
        device=decoder.device.type,
        recompute=decoder.network.model.recompute,
        nll=settings.scope,
    )


def _recompute(decoder: Decoder, settings: AlignSettings, pairs: Sequence[TokenPair]) -> bool:
    """Activation checkpointing by choice, or when a batch would take more than half of the free memory."""
    if settings.recompute is not None:
        return settings.recompute
    tokens = min(max(settings.tokens_per_batch, *(pair.size for pair in pairs)), sum(pair.size for pair in pairs))
    needed = activation_bytes(decoder, tokens) + tower_bytes(decoder, pairs, settings)
    free = free_memory(decoder.device)
    wanted = bool(parallel.highest(needed > free / 2)[0])  # the same on all ranks
    if wanted:
        sizes = f"activations of {needed / 2**30:.1f} GiB against {free / 2**30:.1f} GiB free"
        say(f"{sizes}: they are computed again in backward")
    return wanted


def _report_cuts(pairs: Sequence[TokenPair]) -> None:
    """Say how many texts the limits have cut."""
    prompts, answers = sum(pair.cut_prompt > 0 for pair in pairs), sum(pair.cut_answers > 0 for pair in pairs)
    if prompts or answers:
        say(f"of {len(pairs):,} pairs {prompts:,} had their prompt cut and {answers:,} an answer; see --max-length")


def _share(name: str) -> float:
    """A number in [0, 1) that the name alone decides: which pairs are held out never changes."""
    return int.from_bytes(hashlib.sha256(f"held-out|{name}".encode()).digest()[:8], "big") / 2**64


def predict(
    cases: str | Path | Iterable[Record],
    *,
    model: str | Path | Decoder,
    adapter: str | Path | None = None,
    labels: str | Path | Sequence[str] | LabelSet | None = None,
    mode: str = "rank",
    modality: str = "note",
    kind: str = "disease",
    template: str | None = None,
    top: int | None = 10,
    normalise: str = "sum",
    opening: str = "",
    alone: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    retrieve: str | Path | Retriever | None = None,
    retriever: str | Path | None = None,
    passages: int = 3,
    done: Collection[str] = (),
    skipped: list[str] | None = None,
    shard: bool = False,
    tensor_parallel: int | None = None,
    reading: Mapping[str, Any] = READING,
    **loading: Any,
) -> Iterator[Prediction]:
    """One modality of each case in, classes best first out.

    `mode`: "rank" is exact over `labels`, "list" the aligned list of `top` of them, "text" free text, with a `temperature`
    above 0 sampled, and the names found in it, those that are no label marked `outside`. `retrieve` is a file or folder of
    documents, of which the best `passages` stand before each case, found by words, or by meaning with the encoder
    `retriever`. Cases whose ids are in `done` are passed over. A decoder, LabelSet or Retriever that is
    given as such is used as it is, so that many calls can share them. `opening` is how an answer begins, for a model
    whose answers are lists: in rank mode a label is then scored as the first name, or with `alone` as the only one. With
    `shard` all ranks hold the decoder together, with `tensor_parallel` so many of them.
    """
    known = closed_set(labels)  # what is small is read before the decoder, so that its faults cost no wait
    check_mode(mode, known, temperature)
    if retriever is not None and retrieve is None:
        raise ConfigError(f"--retriever {retriever}: finds passages in the documents of --retrieve; give them too")
    if isinstance(retrieve, str | Path):
        retrieve = open_retriever(retrieve, retriever, str(loading.get("device", "auto")))
    decoder = model if isinstance(model, Decoder) else _answering(model, adapter, shard, tensor_parallel, **loading)
    questioner = Questioner(
        decoder, known, mode=mode, modality=modality, kind=kind, template=template, top=top, normalise=normalise,
        opening=opening, alone=alone, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        retriever=retrieve, passages=passages,
    )  # fmt: skip
    records = (record for record in _records(cases, reading, skipped) if record.id not in done)
    answers = _answered(questioner, records, skipped)
    yield from answers if isinstance(cases, list | tuple) else progress(answers, "predicting", unit="case")


def _answering(
    model: str | Path, adapter: str | Path | None, shard: bool, tensor: int | None, **loading: Any
) -> Decoder:
    """The decoder that is asked, of which each rank holds a part where it is spread."""
    if not shard and tensor is None:
        parallel.apart()
        return load_decoder(model, adapter=adapter, **loading)
    _check_several(shard)

    def adapt(network: Any) -> Callable[[Any], None]:
        if adapter is None:
            return lambda _: None
        stored = open_adapter(network, adapter)
        lora.load(network, stored)
        return lambda network: lora.take_up(network, stored)

    return load_spread(model, adapt, shard=shard, tensor=tensor, **loading)


def _answered(questioner: Questioner, records: Iterable[Record], skipped: list[str] | None) -> Iterator[Prediction]:
    """The answer to each case; several ranks share the work, and each has it all."""
    if parallel.size() == 1:
        yield from questioner.answers(records, skipped)
        return

    def answered(turn: list[Record], left_out: list[str] | None) -> list[dict[str, Any]]:
        made = [asdict(answer) for answer in questioner.answers(turn, left_out)]
        parallel.in_turn().finish()
        return made

    for row in parallel.shared_out(records, answered, skipped):
        yield Prediction(row["id"], tuple(row["ranking"]), row["text"], tuple(row["passages"]))


def evaluate(
    predictions: str | Path | Iterable[Prediction],
    *,
    truth: str | Path | Iterable[Record],
    labels: str | Path | Sequence[str] | None = None,
    **choices: Any,
) -> Report:
    """Predictions against what is true of the same cases. `choices` are those of `evaluation.measure`."""
    answers = read_predictions(predictions) if isinstance(predictions, str | Path) else predictions
    return measure(answers, _records(truth), labels=closed_set(labels), **choices)


def merge(
    model: str | Path, adapter: str | Path, out: str | Path, *, dtype: str = "auto", **loading: Any
) -> dict[str, Any]:
    """Base and adapter as one plain checkpoint in the official layout, unless told otherwise in the dtypes of the base."""
    with alone(out):
        _merge(model, adapter, out, dtype, **loading)
    return {"out": str(out), "bytes": sum(file.stat().st_size for file in Path(out).glob("*.safetensors"))}


def _merge(model: str | Path, adapter: str | Path, out: str | Path, dtype: str, **loading: Any) -> None:
    decoder = load_decoder(model, adapter=adapter, dtype=dtype, **loading)
    folder, stored = decoder.checkpoint.folder, decoder.checkpoint.tensors
    if Path(out).resolve() == folder.resolve():
        raise ConfigError(f"--out {out}: is the base model itself; give a new folder")
    usual = stored_dtype(decoder.checkpoint) if dtype == "auto" else decoder.dtype
    config = {**decoder.checkpoint.config, "torch_dtype": str(usual).removeprefix("torch.")}
    config.pop("dtype", None)
    if isinstance(decoder.network.lm_head, lora.LoRALinear):
        config["tie_word_embeddings"] = False
    kinds = {decoder.stored_name(info.name): info.dtype for info in stored.values()} if dtype == "auto" else {}
    merged = ((decoder.stored_name(name), tensor) for name, tensor in lora.merged_tensors(decoder.network))
    tensors = ((name, tensor.to(kinds.get(name, usual))) for name, tensor in merged)
    write_checkpoint(out, tensors, config, copy_from=folder)


def _records(
    cases: str | Path | Iterable[Record], reading: Mapping[str, Any] = READING, skipped: list[str] | None = None
) -> Iterable[Record]:
    if isinstance(cases, str | Path) and not is_builtin(cases):
        return read_records(cases, undiagnosed=True, skipped=skipped, **reading)
    if reading:
        given = cases if isinstance(cases, str | Path) else "what was given"
        raise ConfigError(f"{', '.join(reading)}: say how a file is read, and {given} is none; leave it out")
    return builtin_cases(cases) if isinstance(cases, str | Path) else cases


def closed_set(labels: str | Path | Sequence[str] | LabelSet | None) -> LabelSet | None:
    """The labels of a file, or given as such."""
    if labels is None or isinstance(labels, LabelSet):
        return labels
    return read_labels(labels) if isinstance(labels, str | Path) else LabelSet(labels)
