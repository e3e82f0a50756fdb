"""Rollouts → dataset: one streaming pass, every document that is left out counted by its reason.

lopd dataset --recipe …        scored rollouts (OPD) or plain rollouts (SFT)
write_dataset(prefix, documents)                documents made by a program
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lopd_megatron.data.alignment import (
    AlignmentReport,
    Sample,
    check_teacher_shift,
    refuse_misaligned,
    sample_indices,
)
from lopd_megatron.data.documents import Document, column_of, flat_columns
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
from lopd_megatron.data.teacher_proof import PROOF_FILE, read_teacher_proof
from lopd_megatron.data.vocabulary import check_batch
from lopd_megatron.data.writer import DatasetWriter, existing_manifest
from lopd_megatron.errors import UserError
from lopd_megatron.lineage import Lineage
from lopd_megatron.progress import log_line, progress
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


def write_dataset(
    prefix: str | Path, documents: Iterable[Document], lineage: Lineage | None = None
) -> Manifest:
    """Write documents that a program makes. Replaces what was there.

    All must have the columns of the first, and an id where the first has one.

    Memory: 512 documents and 4 bytes for each.
    """
    existing_manifest(prefix)
    stream = iter(documents)
    first = next(stream, None)
    if first is None:
        raise UserError(f"{prefix}: there is no document to write")
    columns = [name for name in COLUMNS if getattr(first, name) is not None]
    topk = 0 if first.teacher_topk_ids is None else int(np.asarray(first.teacher_topk_ids).shape[1])
    has_ids = bool(first.document_id)
    with DatasetWriter(prefix, columns, topk, {"source": "documents"}, has_ids=has_ids) as writer:
        for chunk in _chunks(_with_first(first, stream), 512):
            values = {
                name: np.concatenate([column_of(document, name, topk) for document in chunk])
                for name in columns
            }
            lengths = np.array([len(document.tokens) for document in chunk])
            writer.append(lengths, values, [document.document_id for document in chunk])
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
    vocab_size: int | None = None,
    allow_mismatch: str = "",
) -> Manifest:
    """The dataset of a folder of finished shards of rollouts or scored rollouts; see `build_from`."""
    shards = read_shards(folder)
    lineage = shards[0].lineage
    teacher_proof = None
    if shards[0].kind == "scores":
        teacher_proof = read_teacher_proof(folder, common_hash(shards))
        if teacher_proof is None:
            log_line(
                f"{folder}: the teacher's column is not proved (no {PROOF_FILE}); lopd scores makes the proof"
            )
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
        vocab_size=vocab_size,
        teacher_proof=teacher_proof,
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
    vocab_size: int | None = None,
    teacher_proof: dict[str, Any] | None = None,
) -> Manifest:
    """Build the dataset of all sources, or return the one that is there already.

    `held_out` keeps back a share of the prompts as a second dataset, `valid` in the same folder; it is
    complete before the one for training is. `special_ids` asks for the counts of `stops`. Restart it after a
    kill: it goes on behind the last finished source and gives the same bytes. A dataset of other sources,
    filters or another split at a prefix is refused, never overwritten. A token id of `vocab_size` or more
    is refused, as is a teacher's column that lies a token off. Memory: one batch of rows and what the
    source holds, and four bytes a document; with `held_out` eight more.
    """
    parents = [common_hash(sources)]
    done = existing_manifest(prefix)
    if done is not None and _is_whole(done, prefix, parents, filters, held_out):
        return done
    split = split_prompts(held_out, (source.prompt_ids() for source in sources))
    if held_out.fraction and split.cutoff is None:
        log_line(
            f"{prefix}: too few documents to keep {SMALLEST} back; nothing is held out (data.valid_fraction)"
        )
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
            writer = stack.enter_context(DatasetWriter(where, columns, topk, settings, has_ids=True))
            parts.append(_Part(name, writer, split, filters, special_ids))
        _fill(parts, sources, prefix, vocab_size)
        for part in parts:
            alignment = None
            if part.name == TRAIN and "rollout_logprobs" in columns:
                alignment = _prove(part.writer, proof, proof_documents, sources[0].path.parent)
            if part.writer.documents or part.name == TRAIN:
                part.commit(made, described, alignment, vocab_size, teacher_proof)
    return read_manifest(prefix)


def _prove(writer: DatasetWriter, proof: Proof | None, documents: int, origin: Path) -> dict[str, Any] | None:
    """The report of the alignment proof, where one is asked for; the columns are compared in any case."""
    if not writer.documents:
        return None
    check_teacher_shift(writer.samples(sample_indices(writer.documents, _COMPARED)), origin)
    if proof is None or not documents:
        return None
    report = proof(writer.samples(sample_indices(writer.documents, documents)))
    refuse_misaligned(report, origin)
    return report.as_dict()


_COMPARED = 64
"""Documents whose two columns of log-probs are compared."""


def common_hash(sources: Sequence[Source]) -> str:
    """One hash for all sources."""
    return hashlib.sha256(" ".join(source.sha256 for source in sources).encode()).hexdigest()


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
    log_line(f"{prefix}: already built, {done.documents} documents{note}")
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
        state = writer.state or {
            "sources": 0,
            "dropped": dict.fromkeys(filters.reasons, 0),
            "flagged_kept": {},
        }
        self.sources: int = state["sources"]
        self.dropped, self.flagged_kept = Counter(state["dropped"]), Counter(state["flagged_kept"])
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
            self.flagged_kept,
        )
        if batch.topk != self.writer.topk and batch.response_lengths.any():
            raise ValueError(f"k = {batch.topk} teacher tokens, the first file has {self.writer.topk}")
        lengths = chosen.prompt_lengths + chosen.response_lengths
        self.writer.append(lengths, flat_columns(chosen), chosen.document_ids.tolist())
        if self.stops is not None:
            self.stops.add(chosen)

    def save_point(self, sources: int) -> None:
        self.sources = sources
        state = {"sources": sources, "dropped": dict(self.dropped), "flagged_kept": dict(self.flagged_kept)}
        if self.stops is not None:
            state["stops"] = self.stops.state
        self.writer.save_point(state)

    def commit(
        self,
        lineage: Lineage,
        filters: dict[str, Any],
        alignment: dict[str, Any] | None,
        vocab_size: int | None,
        teacher_proof: dict[str, Any] | None,
    ) -> None:
        has_teacher = "teacher_logprobs" in self.writer.columns
        has_k2 = has_teacher and "rollout_logprobs" in self.writer.columns
        self.writer.commit(
            lineage,
            filters=filters,
            dropped=dict(self.dropped),
            flagged_kept=dict(self.flagged_kept),
            alignment=alignment,
            stops=self.stops.summary(has_teacher, has_k2) if self.stops else None,
            vocab_size=vocab_size,
            teacher_proof=teacher_proof,
        )


def _fill(parts: list[_Part], sources: Sequence[Source], prefix: str | Path, vocab_size: int | None) -> None:
    """Append every source to the parts that lack it."""
    first = min((part.sources for part in parts), default=len(sources))
    if first:
        log_line(f"{prefix}: going on behind file {first} of {len(sources)}")
    with progress(sum(source.tokens for source in sources), "build", "tok") as bar:
        for index, source in enumerate(sources):
            # A kill between two save points leaves one part a file ahead.
            lacking = [part for part in parts if part.sources <= index]
            if lacking:
                _append(lacking, source, vocab_size)
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


def _append(parts: list[_Part], source: Source, vocab_size: int | None) -> None:
    row = 0
    for batch in source.batches():
        if vocab_size is not None:
            check_batch(batch, vocab_size, source.path, row)
        try:
            for part in parts:
                part.add(batch)
        except ValueError as error:
            rows = f"rows {row} to {row + len(batch.prompt_lengths) - 1}"
            raise UserError(f"{source.path}, {rows}: {error}; make the file again") from None
        row += len(batch.prompt_lengths)


def _with_first(first: Document, rest: Iterator[Document]) -> Iterator[Document]:
    yield first
    yield from rest


def _chunks(stream: Iterator[Document], size: int) -> Iterator[list[Document]]:
    while chunk := list(islice(stream, size)):
        yield chunk
