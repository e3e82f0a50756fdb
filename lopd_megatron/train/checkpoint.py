"""Checkpoints in Megatron's `torch_dist` format: written whole or not at all, loaded under any layout.

`model/checkpoint_files.py` has the layout of the folder. `.iter_0000200.*.tmp/` is being written, or is what
a killed writer left; it is never read.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.files import atomic_path, explained, fsync_path
from lopd_megatron.fingerprints import Fingerprint
from lopd_megatron.model import checkpoint_files
from lopd_megatron.model.checkpoint_files import LATEST, iteration_name, list_iterations
from lopd_megatron.parallel.topology import Topology
from lopd_megatron.progress import log_line
from lopd_megatron.train import checkpoint_state
from lopd_megatron.train.state import Trainer


class Checkpoints:
    """The checkpoints of one run. Every method is collective over the world unless it says otherwise."""

    def __init__(self, config: RunConfig, topology: Topology) -> None:
        self.folder = config.paths.checkpoints
        self.settings = config.checkpoint
        self.topology = topology
        self.inputs: dict[str, Any] = {}
        """`Inputs.describe()`: `load` refuses a checkpoint of another model or dataset."""
        # The persistent writer divides by the number of GPUs and copies CPU tensors through shared memory.
        self._queue = AsyncCallsQueue(persistent=False)
        self._being_written = self.folder

    def save(self, trainer: Trainer) -> None:
        """Write the state after `trainer.iteration`; with async_save the files appear while training goes on.

        Cost on the training thread: synchronous, the whole write; asynchronous, one copy to host memory and a
        fork. A save that is still being written is finished first.
        """
        self.finish()
        temporary = self._temporary_folder(trainer.iteration)
        description = {
            "iteration": trainer.iteration,
            "consumed_train_samples": trainer.consumed_train_samples,
            "layout": checkpoint_state.layout(trainer),
            **self.inputs,
        }
        publish = self._publisher(temporary, description)
        with self._one_line(temporary):
            request = checkpoint_state.write(
                trainer, temporary, description, async_save=self.settings.async_save
            )
            if request is None:
                publish()
            else:
                request.add_finalize_fn(publish)
                self._queue.schedule_async_request(request)
                self._being_written = temporary

    def poll(self) -> None:
        """Publish an asynchronous save that every rank has written; one small all-reduce if one is open."""
        self._finalize(blocking=False)

    def finish(self) -> None:
        """Wait for an asynchronous save and publish it."""
        self._finalize(blocking=True)

    def _finalize(self, *, blocking: bool) -> None:
        if self._queue.get_num_unfinalized_calls():
            with self._one_line(self._being_written):
                self._queue.maybe_finalize_async_calls(blocking=blocking)

    def _temporary_folder(self, iteration: int) -> Path:
        """A new empty folder. Its name is never used again: the forked writer of a killed run may live on."""
        name = [f".{iteration_name(iteration)}.{uuid.uuid4().hex[:8]}.tmp"]
        dist.broadcast_object_list(name, src=0)
        if self.topology.rank == 0:
            with explained(self.folder):
                (self.folder / name[0]).mkdir(parents=True)
        dist.barrier()
        return self.folder / name[0]

    @contextlib.contextmanager
    def _one_line(self, temporary: Path) -> Iterator[None]:
        """A save that the disk refused is a UserError and leaves nothing; the checkpoints before it stay.

        Megatron and torch report such an error as one of their own, so the disk is asked once more.
        """
        try:
            yield
        except UserError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        except (Exception, CheckpointException) as error:  # torch derives it from BaseException
            problem = checkpoint_files.disk_problem(temporary, error)
            shutil.rmtree(temporary, ignore_errors=True)
            if problem is None:
                raise
            raise UserError(f"{problem}; the checkpoints before it are whole") from error

    def _publisher(self, temporary: Path, description: dict[str, Any]) -> Callable[[], None]:
        """What makes a written folder a checkpoint; Megatron calls it on all ranks after an async write."""

        def publish() -> None:
            if self.topology.rank == 0:
                checkpoint_files.seal(temporary, description)
                final = self.folder / iteration_name(description["iteration"])
                # A torn one that was skipped, or one of a run that was rolled back.
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
                fsync_path(self.folder)
                self._point_to(description["iteration"])
                log_line(f"saved {final}")
                self._delete_old(description["iteration"])
            dist.barrier()

        return publish

    def _delete_old(self, current: int) -> None:
        """Keep the last `keep_last` up to `current` and those that `keep_every` divides. Rank 0 only."""
        every = self.settings.keep_every
        # Later ones are of a run that was rolled back; they are replaced when this one gets there.
        past = [iteration for iteration in list_iterations(self.folder) if iteration <= current]
        for iteration in past[: -self.settings.keep_last]:
            if not (every and iteration % every == 0):
                # Renamed first: a kill in the middle of the deletion must not leave a torn checkpoint.
                doomed = self.folder / f".{iteration_name(iteration)}.old"
                (self.folder / iteration_name(iteration)).rename(doomed)
                shutil.rmtree(doomed)

    def load_latest(self, trainer: Trainer) -> bool:
        """Continue from the newest whole checkpoint of the run, if there is one.

        Every byte is compared with its hash, each rank reading its part of the files.
        """
        if self.topology.rank == 0:
            remove_leftovers(self.folder)
        skip: list[int] = []
        while description := self._newest(skip):
            path = self.folder / iteration_name(description["iteration"])
            problem = self._damage(path, description)
            if not problem:
                break
            skip.append(description["iteration"])
            if self.topology.rank == 0:
                checkpoint_files.warn_torn(path, problem)
        if description is None:
            return False
        if self.topology.rank == 0:
            if not checkpoint_files.has_hashes(description):
                log_line(f"{path} was written without hashes: its bytes cannot be checked")
            if checkpoint_files.read_pointer(self.folder) not in (None, description["iteration"]):
                self._point_to(description["iteration"])  # the torn one is replaced when the run gets there
        self.load(trainer, path, description)
        return True

    def _newest(self, skip: list[int]) -> dict[str, Any] | None:
        """`checkpoint_files.newest`, which rank 0 looks up for all; its UserError is raised on all."""
        found: list[dict[str, Any] | UserError | None] = [None]
        if self.topology.rank == 0:
            try:
                found[0] = checkpoint_files.newest(self.folder, skip=skip)
            except UserError as error:
                found[0] = error
        dist.broadcast_object_list(found, src=0)
        if isinstance(found[0], UserError):
            raise found[0]
        return found[0]

    def _damage(self, path: Path, description: dict[str, Any]) -> str:
        """The first problem that any rank finds in its part of the files, or ""."""
        files = description["files"]
        by_size = sorted(files, key=lambda name: (-checkpoint_files.size_and_hash(files[name])[0], name))
        mine = by_size[self.topology.rank :: self.topology.world_size]
        problems = [""] * self.topology.world_size
        dist.all_gather_object(problems, checkpoint_files.damage(path, description, mine))
        return next(filter(None, problems), "")

    def _point_to(self, iteration: int) -> None:
        with atomic_path(self.folder / LATEST) as latest:
            latest.write_text(f"{iteration}\n")

    def load(self, trainer: Trainer, folder: Path, description: dict[str, Any]) -> None:
        """Fill `trainer` from one checkpoint; refused when its inputs or its optimizer do not fit."""
        for what in ("model", "dataset"):
            refuse_other_input(folder, what, description.get(what), self.inputs.get(what))
        checkpoint_state.read(trainer, folder, description)
        if self.topology.rank == 0:
            log_line(f"resumed from {folder} at iteration {trainer.iteration}")


def refuse_other_input(
    folder: Path, what: str, stored: Fingerprint | None, current: Fingerprint | None
) -> None:
    """A UserError when a checkpoint was made from another model or dataset; None: not known, or not used."""
    if stored and current and stored["fingerprint"] != current["fingerprint"]:
        raise UserError(
            f"{folder} was trained with another {what}: {stored['origin']} ({stored['fingerprint'][:16]}), "
            f"this run has {current['origin']} ({current['fingerprint'][:16]}); choose another run_dir, or "
            f"give the {what} of the checkpoint"
        )


def remove_leftovers(folder: Path) -> None:
    """Delete what killed writers left behind."""
    for pointer in folder.glob(f".{LATEST}.*.tmp"):
        pointer.unlink()
    for path in [*folder.glob(".iter_*.tmp"), *folder.glob(".iter_*.old")]:
        log_line(f"warning: removing {path}, left by a save that was killed")
        shutil.rmtree(path, ignore_errors=True)  # its orphaned writer may still add files
