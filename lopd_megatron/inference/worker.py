"""One worker of a sharded stage: claim a shard, feed the engine, commit the shard.

Requests of the next shard enter the engine while the last answers of the one before are still decoding, so
the engine never drains between shards. A kill at any moment loses the shards in the engine and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from lopd_megatron.inference import shards
from lopd_megatron.inference.requests import Engine, Failure
from lopd_megatron.progress import progress


class Stage(Protocol):
    """How one kind of shard is made from another."""

    kind: shards.Kind
    source_schema: pa.Schema
    lineage: dict[str, Any]

    def requests(self, index: int, source: pa.Table) -> list[Any]:
        """The requests of shard `index`; `key = (index, position)` with positions from 0."""
        ...

    def answers(self, engine: Engine, requests: Iterable[Any]) -> Iterator[Any]: ...

    def table(self, source: pa.Table, answers: dict[int, Any]) -> pa.Table:
        """The finished shard, in the order of the positions; failed positions are missing."""
        ...


@dataclass
class _InHand:
    source: pa.Table
    total: int
    answers: dict[int, Any] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        return len(self.answers) + len(self.failures) == self.total


def run_worker(stage: Stage, engine: Engine, source_folder: Path, folder: Path, num_shards: int) -> int:
    """Make every shard of `folder` that is missing. Returns the number of failed documents."""
    folder.mkdir(parents=True, exist_ok=True)
    shards.refuse_other_lineage(folder, num_shards, stage.lineage)
    in_hand: dict[int, _InHand] = {}
    failed = 0

    def commit(index: int) -> None:
        nonlocal failed
        done = in_hand.pop(index)
        failed += len(done.failures)
        shards.write_shard(
            folder,
            index,
            stage.table(done.source, done.answers),
            kind=stage.kind,
            num_shards=num_shards,
            lineage=stage.lineage,
            failed=len(done.failures),
        )

    def feed() -> Iterator[Any]:
        for index in range(num_shards):
            if shards.read_manifest(folder, index) is not None:
                continue
            source = shards.read_table(source_folder, index, stage.source_schema)
            requests = stage.requests(index, source)
            in_hand[index] = _InHand(source, len(requests))
            if not requests:
                commit(index)
            yield from requests

    with progress(None, stage.kind, "tok") as bar:
        for answer in stage.answers(engine, feed()):
            index, position = answer.key
            shard = in_hand[index]
            if isinstance(answer, Failure):
                shard.failures[position] = answer.error
            else:
                shard.answers[position] = answer
                bar.update(len(answer.logprobs))
            if shard.is_complete:
                commit(index)
    return failed
