"""Rollouts → dataset: one streaming pass, every document that is left out counted by its reason.

lopd dataset --recipe …        scored rollouts (OPD) or plain rollouts (SFT)
write_dataset(prefix, documents)                documents made by a program
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lopd_megatron.data.alignment import AlignmentReport, Sample, refuse_misaligned, sample_indices
from lopd_megatron.data.filters import Filters, rows_of, select
from lopd_megatron.data.held_out import (
    NONE,
    SMALLEST,
    TRAIN,
    VALID,
    HeldOut,
    Split,
    split_prompts,
    valid_prefix,
)
from lopd_megatron.data.manifest import Manifest, read_manifest
from lopd_megatron.data.shard_reader import RolloutBatch, read_shards
from lopd_megatron.data.stops import StopCounts
from lopd_megatron.data.writer import DatasetWriter, existing_manifest
from lopd_megatron.errors import UserError
from lopd_megatron.lineage import Lineage
from lopd_megatron.progress import progress, say
from lopd_megatron.records import COLUMNS


class Source(Protocol):
    """A finished file of rollouts: `shards.Shard`, `official.OfficialFile`."""

    @property
    def path(self) -> Path: ...

    @property
    def tokens(self) -> int:
        """For the progress bar."""
        ...

    @property
    def sha256(self) -> str: ...

    def prompt_ids(self) -> Sequence[str]:
        """Of every row, in order."""
        ...

    def batches(self) -> Iterator[RolloutBatch]: ...


Proof = Callable[[list[Sample]], AlignmentReport]
"""Takes a sample of the documents just built; a report that does not hold refuses the dataset."""


@dataclass(frozen=True)
class Document:
    """One document of s tokens, token-aligned; see `records.COLUMNS`."""

    tokens: np.ndarray  # [s]
    loss_mask: np.ndarray  # [s]
    teacher_logprobs: np.ndarray | None = None  # [s]
    rollout_logprobs: np.ndarray | None = None  # [s]
    teacher_topk_ids: np.ndarray | None = None  # [s, k]
    teacher_topk_logprobs: np.ndarray | None = None  # [s, k] float


def write_dataset(
    prefix: str | Path, documents: Iterable[Document], lineage: Lineage | None = None
) -> Manifest:
    """Write documents that a program makes; all must have the columns of the first. Replaces what was there.

    Memory: 512 documents and 4 bytes for each.
    """
    existing_manifest(prefix)
    stream = iter(documents)
    first = next(stream, None)
    if first is None:
        raise UserError(f"{prefix}: there is no document to write")
    columns = [name for name in COLUMNS if getattr(first, name) is not None]
    topk = 0 if first.teacher_topk_ids is None else int(np.asarray(first.teacher_topk_ids).shape[1])
    with DatasetWriter(prefix, columns, topk, {"source": "documents"}) as writer:
        for chunk in _chunks(_with_first(first, stream), 512):
            values = {
                name: np.concatenate([column_of(document, name, topk) for document in chunk])
                for name in columns
            }
            writer.append(np.array([len(document.tokens) for document in chunk]), values)
        return writer.commit(lineage or Lineage())


def build_dataset(
    folder: Path,
    prefix: str | Path,
    *,
    filters: Filters,
    held_out: HeldOut = NONE,
    special_ids: Collection[int] | None = None,
    proof: Proof | None = None,
    proof_documents: int = 0,
    allow_mismatch: str = "",
) -> Manifest:
    """The dataset of a folder of finished shards of rollouts or scored rollouts; see `build_from`."""
    shards = read_shards(folder)
    lineage = shards[0].lineage
    if allow_mismatch:
        lineage = lineage.model_copy(update={"allow_mismatch": allow_mismatch})
    return build_from(
        shards,
        prefix,
        filters=filters,
        held_out=held_out,
        special_ids=special_ids,
        lineage=lineage,
        proof=proof,
        proof_documents=proof_documents,
    )


def build_from(
    sources: Sequence[Source],
    prefix: str | Path,
    *,
    filters: Filters,
    lineage: Lineage,
    held_out: HeldOut = NONE,
    special_ids: Collection[int] | None = None,
    proof: Proof | None = None,
    proof_documents: int = 0,
) -> Manifest:
    """Build the dataset of all sources, or return the one that is there already.

    `held_out` keeps back a share of the prompts as a second dataset, `valid` in the same folder; it is
    complete before the one for training is. `special_ids` asks for the counts of `stops`. Restart it after a
    kill: it goes on behind the last finished source and gives the same bytes. A dataset of other sources,
    filters or another split at a prefix is refused, never overwritten. Memory: one batch of rows and what the
    source holds, and four bytes a document; with `held_out` eight more.
    """
    parents = [hashlib.sha256(" ".join(source.sha256 for source in sources).encode()).hexdigest()]
    done = existing_manifest(prefix)
    if done is not None and _is_whole(done, prefix, parents, filters, held_out):
        return done
    split = split_prompts(held_out, (source.prompt_ids() for source in sources))
    if held_out.fraction and split.cutoff is None:
        say(f"{prefix}: too few documents to keep {SMALLEST} back; nothing is held out (data.valid_fraction)")
    described = filters.as_dict() | ({"held_out": split.as_dict()} if held_out.fraction else {})
    made = lineage.model_copy(update={"parents": parents})
    columns, topk = _columns(sources[0])
    with contextlib.ExitStack() as stack:
        parts = []
        for name in (VALID, TRAIN):  # the one for training last: with it the dataset is complete
            where = prefix if name == TRAIN else valid_prefix(prefix)
            if name == VALID and split.cutoff is None:
                continue
            there = done if name == TRAIN else existing_manifest(where)
            if there is not None:
                _refuse_other(there, where, parents, described)
                continue
            settings = {"sources": parents, "filters": described}
            writer = stack.enter_context(DatasetWriter(where, columns, topk, settings))
            parts.append(_Part(name, writer, split, filters, special_ids))
        _fill(parts, sources, prefix)
        alignment = None
        trained = parts[-1].writer
        if parts[-1].name == TRAIN and proof is not None and proof_documents and trained.documents:
            report = proof(trained.samples(sample_indices(trained.documents, proof_documents)))
            refuse_misaligned(report, sources[0].path.parent)
            alignment = report.as_dict()
        for part in parts:
            if part.writer.documents or part.name == TRAIN:
                part.commit(made, described, alignment if part.name == TRAIN else None)
    return read_manifest(prefix)


def _is_whole(
    done: Manifest, prefix: str | Path, parents: list[str], filters: Filters, held_out: HeldOut
) -> bool:
    """Is there nothing left to build? Refuses a dataset that was made otherwise."""
    split = done.filters.get("held_out")  # a dataset of an older version has none and is taken as it is
    asked = {"fraction": held_out.fraction, "seed": held_out.seed}
    expected = filters.as_dict() | ({"held_out": split | asked} if split else {})
    _refuse_other(done, prefix, parents, expected)
    has_valid = split is not None and split["cutoff"] is not None
    if has_valid and existing_manifest(valid_prefix(prefix)) is None:
        return False
    note = "" if has_valid or not held_out.fraction else ", none held out"
    say(f"{prefix}: already built, {done.documents} documents{note}")
    return True


def _refuse_other(done: Manifest, prefix: str | Path, parents: list[str], filters: dict[str, Any]) -> None:
    if done.lineage.parents != parents or done.filters != filters:
        what = "with other data.* settings" if done.lineage.parents == parents else "from other files"
        raise UserError(f"{prefix} was built {what}; delete {prefix}.* or set another run_dir")


class _Part:
    """One side of a split while it is built, with its own save point."""

    def __init__(
        self,
        name: str,
        writer: DatasetWriter,
        split: Split,
        filters: Filters,
        special_ids: Collection[int] | None,
    ) -> None:
        self.name, self.writer, self.split, self.filters = name, writer, split, filters
        state = writer.state or {"sources": 0, "dropped": dict.fromkeys(filters.reasons, 0), "kept": {}}
        self.sources: int = state["sources"]
        self.dropped, self.kept = Counter(state["dropped"]), Counter(state["kept"])
        counted = special_ids is not None
        self.stops = StopCounts(special_ids or (), state.get("stops")) if counted else None

    def add(self, batch: RolloutBatch) -> None:
        """Append the rows of this side; ValueError where one does not fit."""
        held_out = self.split.is_held_out(batch.prompt_ids.tolist())
        if self.name == TRAIN and held_out.any():
            self.dropped["held_out"] += int(held_out.sum())
        chosen = select(
            rows_of(batch, held_out if self.name == VALID else ~held_out),
            self.filters,
            self.dropped,
            self.kept,
        )
        if batch.topk != self.writer.topk and batch.response_lengths.any():
            raise ValueError(f"k = {batch.topk} teacher tokens, the first file has {self.writer.topk}")
        self.writer.append(chosen.prompt_lengths + chosen.response_lengths, flat_columns(chosen))
        if self.stops is not None:
            self.stops.add(chosen)

    def save_point(self, sources: int) -> None:
        self.sources = sources
        state = {"sources": sources, "dropped": dict(self.dropped), "kept": dict(self.kept)}
        if self.stops is not None:
            state["stops"] = self.stops.state
        self.writer.save_point(state)

    def commit(self, lineage: Lineage, filters: dict[str, Any], alignment: dict[str, Any] | None) -> None:
        has_teacher = "teacher_logprobs" in self.writer.columns
        has_k2 = has_teacher and "rollout_logprobs" in self.writer.columns
        self.writer.commit(
            lineage,
            filters=filters,
            dropped=dict(self.dropped),
            kept=dict(self.kept),
            alignment=alignment,
            stops=self.stops.summary(has_teacher, has_k2) if self.stops else None,
        )


def _fill(parts: list[_Part], sources: Sequence[Source], prefix: str | Path) -> None:
    """Append every source to the parts that lack it."""
    first = min((part.sources for part in parts), default=len(sources))
    if first:
        say(f"{prefix}: going on behind file {first} of {len(sources)}")
    with progress(sum(source.tokens for source in sources), "build", "tok") as bar:
        for index, source in enumerate(sources):
            # A kill between two save points leaves one part a file ahead.
            lacking = [part for part in parts if part.sources <= index]
            if lacking:
                _append(lacking, source)
            for part in lacking:
                part.save_point(index + 1)
            bar.update(source.tokens)


def _columns(source: Source) -> tuple[list[str], int]:
    """Which columns the dataset gets, and k: read off the first rows that have a response."""
    batch = next((batch for batch in source.batches() if batch.response_lengths.any()), None)
    if batch is None:
        raise UserError(f"{source.path} holds no response at all; look at the stage that wrote it")
    names = {"tokens", "loss_mask", *batch.logprobs}
    if batch.topk:
        names |= {"teacher_topk_ids", "teacher_topk_logprobs"}
    return [name for name in COLUMNS if name in names], batch.topk


def _append(parts: list[_Part], source: Source) -> None:
    row = 0
    for batch in source.batches():
        try:
            for part in parts:
                part.add(batch)
        except ValueError as error:
            rows = f"rows {row} to {row + len(batch.prompt_lengths) - 1}"
            raise UserError(f"{source.path}, {rows}: {error}; make the file again") from None
        row += len(batch.prompt_lengths)


def flat_columns(batch: RolloutBatch) -> dict[str, np.ndarray]:
    """Token-aligned columns of a batch: prompt then response of each document, end to end."""
    both = np.stack([batch.prompt_lengths, batch.response_lengths], axis=1).ravel()
    is_response = np.repeat(np.tile([False, True], len(batch.prompt_lengths)), both)
    tokens = np.empty(len(is_response), np.int32)
    tokens[~is_response] = batch.prompt_tokens
    tokens[is_response] = batch.response_tokens
    columns: dict[str, np.ndarray] = {"tokens": tokens, "loss_mask": is_response.astype(np.uint8)}
    columns["loss_mask"][is_response] = batch.response_mask
    for name, values in batch.logprobs.items():
        columns[name] = np.zeros(len(is_response), np.float32)
        columns[name][is_response] = values
    if batch.topk:
        ids = np.full((len(is_response), batch.topk), -1, np.int32)
        ids[is_response] = batch.topk_ids.reshape(-1, batch.topk)
        logprobs = np.zeros((len(is_response), batch.topk), np.float16)
        logprobs[is_response] = batch.topk_logprobs.reshape(-1, batch.topk)
        columns["teacher_topk_ids"] = ids
        columns["teacher_topk_logprobs"] = logprobs.view(np.uint16)
    return columns


def column_of(document: Document, name: str, topk: int) -> np.ndarray:
    """The values of a column as they are stored, flat; ValueError where a token has not one (or k)."""
    values = getattr(document, name)
    if values is None:
        raise ValueError(f"a document lacks {name}, which the first one has")
    values = np.asarray(values)
    tokens = len(document.tokens)
    if values.shape != ((tokens, topk) if COLUMNS[name].per_topk else (tokens,)):
        # Not left to the sum over documents: one that is short and one that is long would pass it, shifted.
        what = f"{tokens} tokens" + (f" and k = {topk}" if COLUMNS[name].per_topk else "")
        raise ValueError(f"{name} has the shape {values.shape}, its document has {what}")
    if name == "teacher_topk_logprobs":
        values = values.astype(np.float16).view(np.uint16)
    return values.reshape(-1)


def _with_first(first: Document, rest: Iterator[Document]) -> Iterator[Document]:
    yield first
    yield from rest


def _chunks(stream: Iterator[Document], size: int) -> Iterator[list[Document]]:
    while chunk := list(islice(stream, size)):
        yield chunk
