"""Reads finished Parquet shards of rollouts or scored rollouts as a stream of flat arrays.

Memory is that of one compressed row group and one batch of rows, whatever the size of the folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lopd_megatron.errors import UserError
from lopd_megatron.files import sha256_file
from lopd_megatron.lineage import Lineage, parse_lineage
from lopd_megatron.records import ROLLOUT_SCHEMA, SCHEMA_VERSION, SCORE_SCHEMA

_SCHEMAS = {"rollouts": ROLLOUT_SCHEMA, "scores": SCORE_SCHEMA}
_BATCH_ROWS = 256


@dataclass(frozen=True)
class RolloutBatch:
    """n rollouts, column by column; values of all rows end to end."""

    document_ids: np.ndarray  # str objects [n]
    prompt_ids: np.ndarray  # str objects [n]; equal for all samples of a prompt
    prompt_lengths: np.ndarray  # int32 [n]
    response_lengths: np.ndarray  # int32 [n]
    is_truncated: np.ndarray  # bool [n]
    prompt_tokens: np.ndarray  # int32 [Σ prompt_lengths]
    response_tokens: np.ndarray  # int32 [Σ response_lengths]
    response_mask: np.ndarray  # uint8 [Σ response_lengths]; 1 where the token is trained
    logprobs: dict[str, np.ndarray]  # float32 [Σ response_lengths] by column name
    topk: int
    topk_ids: np.ndarray  # int32 [Σ response_lengths · k]
    topk_logprobs: np.ndarray  # float32 [Σ response_lengths · k]


@dataclass(frozen=True)
class Shard:
    path: Path
    kind: str  # "rollouts" | "scores"
    rows: int
    tokens: int
    sha256: str
    lineage: Lineage
    num_shards: int

    def prompt_ids(self) -> list[str]:
        """Of every row, in order. Reads one column."""
        return pq.read_table(self.path, columns=["prompt_id"])["prompt_id"].to_pylist()

    def batches(self) -> Iterator[RolloutBatch]:
        """The rows in order, a few hundred at a time; the file's hash is checked first."""
        if not self.path.is_file() or sha256_file(self.path) != self.sha256:
            raise UserError(
                f"{self.path} is not the file that its JSON describes; delete both, make them again"
            )
        with pq.ParquetFile(self.path) as file:
            schema = _SCHEMAS[self.kind]
            names = [name for name in schema.names if name in _READ]
            missing = sorted(set(names) - set(file.schema_arrow.names))
            if missing:
                raise UserError(f"{self.path} has no column {missing[0]}; make the shard again")
            for name in names:
                # numpy would cast silently: an id of 64 bits comes out as another token.
                found, needed = file.schema_arrow.field(name).type, schema.field(name).type
                if found != needed:
                    raise UserError(f"{self.path}: {name} is {found}, not {needed}; make the shard again")
            row = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=names):
                yield _rollout_batch(batch, self.path, row)
                row += batch.num_rows
        if row != self.rows:
            raise UserError(f"{self.path} has {row} rows, its JSON says {self.rows}; make the shard again")


_READ = {
    "document_id",
    "prompt_id",
    "prompt_tokens",
    "response_tokens",
    "finish_reason",
    "rollout_logprobs",
    "teacher_logprobs",
    "teacher_topk_ids",
    "teacher_topk_logprobs",
}


def read_shards(folder: Path) -> list[Shard]:
    """All shards of a finished stage, in order; one that is missing or of another lineage is refused."""
    paths = sorted(folder.glob("shard-*.json"))
    if not paths:
        raise UserError(f"{folder} holds no shard-*.json; run the stage that writes it first")
    shards = [_read_shard(path) for path in paths]
    if len(paths) != shards[0].num_shards:
        raise UserError(
            f"{folder} holds {len(paths)} of {shards[0].num_shards} shards; "
            "run the stage that writes it to its end"
        )
    for shard in shards[1:]:
        # Workers may run their engines differently: smaller after an out-of-memory, another scoring path.
        lineage = shard.lineage.model_copy(update={"engine": shards[0].lineage.engine})
        same = (shard.kind, shard.num_shards) == (shards[0].kind, shards[0].num_shards)
        if not same or not lineage.same_content(shards[0].lineage):
            raise UserError(
                f"{shard.path} has another kind, number of shards or lineage than {shards[0].path.name}: "
                f"two runs wrote into {folder}; delete it and make it again"
            )
    _refuse_repeated_documents(shards)
    return shards


def _refuse_repeated_documents(shards: list[Shard]) -> None:
    """A shard that was copied over another would double its documents and lose the other's."""
    home: dict[str, Path] = {}
    for shard in shards:
        try:
            names = pq.read_table(shard.path, columns=["document_id"])["document_id"].to_pylist()
        except (pa.ArrowException, OSError, KeyError):
            continue  # not the file that was written: its hash is checked when it is read
        for name in names:
            if name in home:
                raise UserError(
                    f"{shard.path} holds the document {name}, as does {home[name].name}: a shard was copied "
                    "over another; make both again"
                )
            home[name] = shard.path


def _read_shard(path: Path) -> Shard:
    try:
        value: dict[str, Any] = json.loads(path.read_text())
        version, kind = value["schema_version"], value["kind"]
        if version != SCHEMA_VERSION or kind not in _SCHEMAS:
            raise UserError(
                f"{path} describes {kind} of schema version {version}; rollouts or scored rollouts "
                f"of version {SCHEMA_VERSION} are needed"
            )
        if path.name != f"shard-{int(value['index']):05d}.json":
            raise UserError(
                f"{path} describes shard {value['index']}: a shard was copied over another; "
                "make the shard again"
            )
        return Shard(
            path.with_suffix(".parquet"),
            kind,
            int(value["rows"]),
            int(value["tokens"]),
            str(value["sha256"]),
            parse_lineage(value["lineage"], path),
            int(value["num_shards"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the JSON of a shard ({error}); make the shard again") from None


def _rollout_batch(batch: pa.RecordBatch, path: Path, row: int) -> RolloutBatch:
    prompt_tokens, prompt_lengths = _flat(batch, "prompt_tokens")
    response_tokens, response_lengths = _flat(batch, "response_tokens")
    logprobs = {}
    for name in ("teacher_logprobs", "rollout_logprobs"):
        if name in batch.schema.names:
            values, lengths = _flat(batch, name)
            _same_lengths(lengths, response_lengths, name, path, row)
            logprobs[name] = values
    ids, topk_logprobs, topk = np.empty(0, np.int32), np.empty(0, np.float32), 0
    if "teacher_topk_ids" in batch.schema.names:
        ids, lengths = _flat(batch, "teacher_topk_ids")
        total = int(response_lengths.sum())
        topk = len(ids) // total if total else 0
        _same_lengths(lengths, response_lengths * topk, "teacher_topk_ids", path, row)
        topk_logprobs, lengths = _flat(batch, "teacher_topk_logprobs")
        _same_lengths(lengths, response_lengths * topk, "teacher_topk_logprobs", path, row)
    truncated = np.array(batch["finish_reason"].to_pylist(), object) == "length"
    return RolloutBatch(
        np.array(batch["document_id"].to_pylist(), object),
        np.array(batch["prompt_id"].to_pylist(), object),
        prompt_lengths,
        response_lengths,
        truncated,
        prompt_tokens,
        response_tokens,
        np.ones(len(response_tokens), np.uint8),
        logprobs,
        topk,
        ids,
        topk_logprobs,
    )


def _flat(batch: pa.RecordBatch, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Values end to end, and how many each row has."""
    column = batch[name]
    values = column.flatten().to_numpy(zero_copy_only=False)
    offsets = column.offsets.to_numpy()
    return values, np.diff(offsets).astype(np.int32)


def _same_lengths(lengths: np.ndarray, expected: np.ndarray, name: str, path: Path, row: int) -> None:
    bad = np.flatnonzero(lengths != expected)
    if len(bad):
        raise UserError(
            f"{path}: row {row + bad[0]} has {lengths[bad[0]]} values of {name}, its response asks for "
            f"{expected[bad[0]]}; make the shard again"
        )
