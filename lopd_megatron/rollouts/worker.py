"""One worker of a sharded stage: claim a shard, feed the engine, commit the shard.

Requests of the next shard enter the engine while the last answers of the one before are still being made, so
the engine never drains between shards. A kill at any moment loses the shards in the engine and nothing else;
the same command goes on. Any number of workers share a folder through `leases`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from lopd_megatron.config import EngineConfig
from lopd_megatron.errors import UserError
from lopd_megatron.files import write_json
from lopd_megatron.inference.requests import Engine, EngineLost, Failure
from lopd_megatron.lineage import Lineage
from lopd_megatron.progress import log_line, progress
from lopd_megatron.rollouts import shard_files
from lopd_megatron.rollouts.leases import Leases

ATTEMPTS = 2
"""Times that a document is tried before it is set aside."""
POLL_SECONDS = 2.0


class ShardJob(Protocol):
    """How one kind of shard is made from another."""

    kind: shard_files.Kind
    source_schema: pa.Schema
    lineage: Lineage

    @property
    def requests_per_row(self) -> int: ...

    def requests(self, index: int, source: pa.Table) -> list[Any]:
        """The requests of shard `index`; `key = (index, position)` with positions from 0."""
        ...

    def document_id(self, source: pa.Table, position: int) -> str: ...

    def answers(self, engine: Engine, requests: Iterable[Any]) -> Iterator[Any]: ...

    def table(self, source: pa.Table, answers: dict[int, Any]) -> pa.Table:
        """The finished shard, in the order of the positions; failed positions are missing."""
        ...


OpenEngine = Callable[[EngineConfig], Engine]


@dataclass
class _PendingShard:
    """A claimed shard whose documents are in the engine."""

    source: pa.Table
    requests: list[Any]
    answers: dict[int, Any] = field(default_factory=dict)
    errors: dict[int, list[str]] = field(default_factory=dict)

    def is_resolved(self, position: int) -> bool:
        return position in self.answers or len(self.errors.get(position, ())) >= ATTEMPTS

    def remaining_requests(self) -> list[Any]:
        return [request for request in self.requests if not self.is_resolved(request.key[1])]


class Worker:
    """Makes the shards of `folder` that are missing, with worker `index` of `count` others."""

    def __init__(
        self,
        job: ShardJob,
        source_folder: Path,
        folder: Path,
        num_shards: int,
        *,
        worker: tuple[int, int] = (0, 1),
        leases: Leases | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shard_files.refuse_other_lineage(folder, num_shards, job.lineage)
        self.job = job
        self.source_folder = source_folder
        self.folder = folder
        self.num_shards = num_shards
        self.worker = worker
        self.leases = leases or Leases(folder)
        self._pending: dict[int, _PendingShard] = {}
        self._tokens = 0
        self._started = time.monotonic()

    def run(self, engine: Engine, config: EngineConfig, open_engine: OpenEngine) -> int:
        """Work until every shard exists, whoever makes it. Returns the number of documents set aside.

        An engine that runs out of memory is replaced by one with half the batch; `config` is that of
        `engine`. The last engine is left open, in `self.engine`.
        """
        self.engine = engine
        missing = [i for i in range(self.num_shards) if shard_files.read_manifest(self.folder, i) is None]
        total = sum(self._source_rows(index) for index in missing)
        try:
            with progress(total, self.job.kind, "doc") as bar:
                while not self._all_committed():
                    self.engine.on_step = self.leases.renew
                    try:
                        for answer in self.job.answers(self.engine, self._feed()):
                            self._record(answer)
                            bar.set_postfix_str(f"{self._tokens_per_second():.0f} tok/s", refresh=False)
                            bar.update(1)
                    except EngineLost as lost:
                        self.engine.close()
                        config = _halved(config, lost)
                        self.engine = open_engine(config)
                        continue
                    if not self._pending and not self._all_committed():
                        time.sleep(POLL_SECONDS)  # others hold the rest; their leases may yet expire
        finally:
            self.leases.release_all()
        self.leases.clear()
        return sum(manifest["failed"] for manifest in shard_files.manifests(self.folder, self.num_shards))

    def _feed(self) -> Iterator[Any]:
        """Requests that are open from before, then those of every shard that can be claimed."""
        for shard in list(self._pending.values()):
            yield from shard.remaining_requests()
        index, count = self.worker
        order = sorted(range(self.num_shards), key=lambda i: ((i - index) % count, i))
        for index in order:
            if shard_files.read_manifest(self.folder, index) is not None or index in self._pending:
                continue
            if not self.leases.take(index):
                continue
            if shard_files.read_manifest(self.folder, index) is not None:
                self.leases.release(index)  # committed before the lease was taken
                continue
            source = shard_files.read_table(self.source_folder, index, self.job.source_schema)
            self._pending[index] = _PendingShard(source, self.job.requests(index, source))
            if not self._pending[index].requests:
                self._commit(index)
                continue
            yield from self._pending[index].requests

    def _record(self, answer: Any) -> None:
        index, position = answer.key
        shard = self._pending[index]
        if isinstance(answer, Failure):
            shard.errors.setdefault(position, []).append(answer.error)
        else:
            shard.answers[position] = answer
            self._tokens += len(answer.logprobs)
        if all(shard.is_resolved(request.key[1]) for request in shard.requests):
            self._commit(index)

    def _commit(self, index: int) -> None:
        shard = self._pending.pop(index)
        failures = {
            self.job.document_id(shard.source, position): errors[-1]
            for position, errors in sorted(shard.errors.items())
            if position not in shard.answers
        }
        if failures:
            aside = shard_files.failures_path(self.folder, index)
            write_json(aside, failures)
            first = next(iter(failures.values()))
            log_line(
                f"{self.job.kind} shard {index}: {len(failures)} documents set aside in {aside}: {first}"
            )
        manifest = shard_files.write_shard(
            self.folder,
            index,
            self.job.table(shard.source, shard.answers),
            kind=self.job.kind,
            num_shards=self.num_shards,
            lineage=self.job.lineage,
            failed=len(failures),
        )
        self.leases.release(index)
        self._log(index, manifest)

    def _log(self, index: int, manifest: dict[str, Any]) -> None:
        """One line per committed shard; a file per worker, because appends of several hosts can mix."""
        line = {
            "time": round(time.time(), 3),
            "seconds": round(time.monotonic() - self._started, 3),
            "shard": index,
            "rows": manifest["rows"],
            "failed": manifest["failed"],
            "tokens": manifest["tokens"],
            "tokens_per_second": round(self._tokens_per_second(), 1),
        }
        number, count = self.worker
        with (self.folder / f"metrics-{number}-of-{count}.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def _tokens_per_second(self) -> float:
        """Response tokens of this worker since it started."""
        return self._tokens / max(time.monotonic() - self._started, 1e-9)

    def _source_rows(self, index: int) -> int:
        manifest = shard_files.read_manifest(self.source_folder, index)
        return 0 if manifest is None else manifest["rows"] * self.job.requests_per_row

    def _all_committed(self) -> bool:
        return all(shard_files.manifest_path(self.folder, i).exists() for i in range(self.num_shards))


def _halved(config: EngineConfig, lost: EngineLost) -> EngineConfig:
    """The same engine with half the batch; refused when there is nothing left to halve."""
    if config.max_num_seqs == 1 and config.max_num_batched_tokens <= 256:
        raise UserError(
            f"the engine failed with the smallest batch too ({lost}); "
            "give it more memory, raise engine.tensor_parallel_size or lower engine.max_model_len"
        ) from lost
    smaller = config.model_copy(
        update={
            "max_num_seqs": max(config.max_num_seqs // 2, 1),
            "max_num_batched_tokens": max(config.max_num_batched_tokens // 2, 256),
        }
    )
    log_line(
        f"engine lost ({lost}); starting it again with "
        f"max_num_batched_tokens={smaller.max_num_batched_tokens}, max_num_seqs={smaller.max_num_seqs}"
    )
    return smaller
