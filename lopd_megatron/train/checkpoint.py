"""Checkpoints in Megatron's `torch_dist` format: written whole or not at all, loaded under any layout.

    run_dir/checkpoints/
        iter_0000150/                       one checkpoint; the name appears when it is whole
            __0_0.distcp … .metadata common.pt metadata.json     Megatron's files
            checkpoint.json                 iteration, layout, inputs, and the size of every file
        latest_checkpointed_iteration.txt   written last
        .iter_0000200.*.tmp/                being written, or what a killed writer left; never read

Only load checkpoints that you wrote: Megatron reads parts of them with pickle.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.files import atomic_path, fsync_path, write_json
from lopd_megatron.fingerprints import Fingerprint
from lopd_megatron.parallel.topology import Topology
from lopd_megatron.progress import say
from lopd_megatron.train import checkpoint_state
from lopd_megatron.train.state import Trainer

DESCRIPTION = "checkpoint.json"
LATEST = "latest_checkpointed_iteration.txt"


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
        request = checkpoint_state.write(trainer, temporary, description, async_save=self.settings.async_save)
        publish = self._publisher(temporary, description)
        if request is None:
            publish()
        else:
            request.add_finalize_fn(publish)
            self._queue.schedule_async_request(request)

    def poll(self) -> None:
        """Publish an asynchronous save that every rank has written; one small all-reduce if one is open."""
        if self._queue.get_num_unfinalized_calls():
            self._queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Wait for an asynchronous save and publish it."""
        if self._queue.get_num_unfinalized_calls():
            self._queue.maybe_finalize_async_calls(blocking=True)

    def _temporary_folder(self, iteration: int) -> Path:
        """A new empty folder. Its name is never used again: the forked writer of a killed run may live on."""
        name = [f".{_name(iteration)}.{uuid.uuid4().hex[:8]}.tmp"]
        dist.broadcast_object_list(name, src=0)
        if self.topology.rank == 0:
            (self.folder / name[0]).mkdir(parents=True)
        dist.barrier()
        return self.folder / name[0]

    def _publisher(self, temporary: Path, description: dict[str, Any]) -> Callable[[], None]:
        """What makes a written folder a checkpoint; Megatron calls it on all ranks after an async write."""

        def publish() -> None:
            if self.topology.rank == 0:
                sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
                write_json(temporary / DESCRIPTION, description | {"files": sizes})
                final = self.folder / _name(description["iteration"])
                # A torn one that was skipped, or one of a run that was rolled back.
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
                fsync_path(self.folder)
                with atomic_path(self.folder / LATEST) as latest:
                    latest.write_text(f"{description['iteration']}\n")
                say(f"saved {final}")
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
                doomed = self.folder / f".{_name(iteration)}.old"
                (self.folder / _name(iteration)).rename(doomed)
                shutil.rmtree(doomed)

    def load_latest(self, trainer: Trainer) -> bool:
        """Continue from the newest whole checkpoint of the run, if there is one."""
        found: list[dict[str, Any] | None] = [None]
        if self.topology.rank == 0:
            remove_leftovers(self.folder)
            found[0] = newest(self.folder)
        dist.broadcast_object_list(found, src=0)
        if found[0] is None:
            return False
        self.load(trainer, self.folder / _name(found[0]["iteration"]), found[0])
        return True

    def load(self, trainer: Trainer, folder: Path, description: dict[str, Any]) -> None:
        """Fill `trainer` from one checkpoint; refused when its inputs or its optimizer do not fit."""
        for what in ("model", "dataset"):
            refuse_other_input(folder, what, description.get(what), self.inputs.get(what))
        checkpoint_state.read(trainer, folder, description)
        if self.topology.rank == 0:
            say(f"resumed from {folder} at iteration {trainer.iteration}")


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


def newest(folder: Path) -> dict[str, Any] | None:
    """`checkpoint.json` of the checkpoint that `latest_checkpointed_iteration.txt` names, or of the newest
    whole one before it; torn ones are skipped with a warning. Without that file, the newest whole one."""
    pointer = folder / LATEST
    try:
        limit = int(pointer.read_text()) if pointer.exists() else None
    except ValueError:
        say(f"warning: {pointer} is not a number; using the newest whole checkpoint")
        limit = None
    for iteration in reversed(list_iterations(folder)):
        if limit is not None and iteration > limit:
            continue
        path = folder / _name(iteration)
        description, problem = inspect(path)
        if not problem:
            return description
        say(f"warning: {path} is torn ({problem}); trying the one before it")
    return None


def inspect(path: Path) -> tuple[dict[str, Any], str]:
    """(description, what is wrong with the checkpoint or "")."""
    try:
        description = json.loads((path / DESCRIPTION).read_text())
    except (OSError, ValueError):
        return {}, f"no readable {DESCRIPTION}"
    for name, size in description["files"].items():
        file = path / name
        if not file.is_file():
            return description, f"{name} is missing"
        if file.stat().st_size != size:
            return description, f"{name} has {file.stat().st_size} bytes instead of {size}"
    return description, ""


def list_iterations(folder: Path) -> list[int]:
    """Iterations that have a checkpoint folder, ascending."""
    return sorted(int(p.name.removeprefix("iter_")) for p in folder.glob("iter_*") if p.is_dir())


def remove_leftovers(folder: Path) -> None:
    """Delete what killed writers left behind."""
    for pointer in folder.glob(f".{LATEST}.*.tmp"):
        pointer.unlink()
    for path in [*folder.glob(".iter_*.tmp"), *folder.glob(".iter_*.old")]:
        say(f"warning: removing {path}, left by a save that was killed")
        shutil.rmtree(path, ignore_errors=True)  # its orphaned writer may still add files


def _name(iteration: int) -> str:
    return f"iter_{iteration:07d}"
