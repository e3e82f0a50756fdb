"""Faults of the pinned Megatron-Core: each is shown without its correction, so a cure upstream shows too."""

from __future__ import annotations

import functools
import inspect
import multiprocessing
import os
import queue
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lopd_megatron.errors import UserError
from lopd_megatron.train.state import Trainer
from tests.distributed.tiny_run import advance, tiny_config, tiny_trainer, write_inputs
from tests.distributed.world import run_world

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@contextmanager
def stock(owner: Any, name: str) -> Iterator[None]:
    """Megatron-Core's own method instead of the corrected one."""
    corrected = getattr(owner, name)
    setattr(owner, name, inspect.getclosurevars(corrected).nonlocals["stock"])
    try:
        yield
    finally:
        setattr(owner, name, corrected)


def adam_steps(trainer: Trainer) -> set[float]:
    return {
        float(state["step"]) for state in trainer.optimizer.chained_optimizers[0].optimizer.state.values()
    }


def optimizer_faults(inputs: str, folder: str) -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for precision in ("fp32", "bf16"):
        run_dir = Path(folder) / f"{precision} {dist.get_world_size()}"
        config = tiny_config(Path(inputs), run_dir, train__precision=precision)
        trainer = tiny_trainer(config)
        advance(trainer, 3)
        trainer.checkpoints.save(trainer)
        expected = advance(trainer, 2)[1]
        assert adam_steps(trainer) == {5.0}

        # One `step` tensor for all parameters: every update counts it up once per parameter, silently.
        with stock(DistributedOptimizer, "load_state_dict"):
            trainer = tiny_trainer(config)
            trainer.checkpoints.load_latest(trainer)
        assert advance(trainer, 2)[1] != expected
        assert min(adam_steps(trainer)) > 10

        # A load into torch's Adam, which has no state before its first step, and keeps `step` per parameter.
        for name, error in (
            ("sharded_state_dict", AssertionError),
            ("_set_main_param_and_optimizer_states", KeyError),
        ):
            with stock(DistributedOptimizer, name):
                trainer = tiny_trainer(config)
                with pytest.raises(error):
                    trainer.checkpoints.load_latest(trainer)


def padded_buckets(inputs: str, folder: str) -> None:
    from megatron.core import distributed
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from lopd_megatron.train import setup

    stock_config = distributed.DistributedDataParallelConfig
    for precision in ("fp32", "bf16"):
        run_dir = Path(folder) / f"{precision} {dist.get_world_size()}"
        config = tiny_config(
            Path(inputs), run_dir, train__precision=precision, optimizer__overlap_grad_reduce=True
        )
        # At real sizes several buckets come by themselves; here 20,000 numbers make one.
        distributed.DistributedDataParallelConfig = functools.partial(stock_config, bucket_size=20_000)
        with pytest.raises(UserError, match="overlap_grad_reduce=false"):
            tiny_trainer(config)
        refuse, setup.refuse_padded_buckets = setup.refuse_padded_buckets, lambda model: None
        with stock(DistributedOptimizer, "sharded_state_dict"):
            trainer = tiny_trainer(config)
            advance(trainer, 3)
            trainer.checkpoints.save(trainer)
            expected = advance(trainer, 2)
        distributed.DistributedDataParallelConfig = stock_config
        setup.refuse_padded_buckets = refuse
        trainer = tiny_trainer(tiny_config(Path(inputs), run_dir, train__precision=precision))
        trainer.checkpoints.load_latest(trainer)
        loss, resumed = expected[-1][0], advance(trainer, 2)[-1][0]
        assert abs(resumed - loss) > 1e-3 * loss  # rounding would be 1e-6 of it


def stale_parameters(inputs: str, folder: str) -> None:
    from lopd_megatron.train import checkpoint_state

    for precision in ("fp32", "bf16"):
        run_dir = Path(folder) / f"{precision} {dist.get_world_size()}"
        config = tiny_config(
            Path(inputs),
            run_dir,
            train__precision=precision,
            optimizer__overlap_grad_reduce=True,
            optimizer__overlap_param_gather=True,
        )
        trainer = tiny_trainer(config)
        advance(trainer, 3)
        corrected, checkpoint_state.parameters_are_current = (
            checkpoint_state.parameters_are_current,
            lambda trainer: None,
        )
        stale = saved_weights(trainer, run_dir / "stale")
        checkpoint_state.parameters_are_current = corrected
        current = saved_weights(trainer, run_dir / "current")
        # A resume would gather them anew from the optimizer's part; an export takes them as they are.
        assert any(not torch.equal(stale[name], current[name]) for name in current)
        expected = dict(trainer.model[0].module.named_parameters())
        name = "embedding.word_embeddings.weight"
        rows = current[name].size(0)
        assert torch.equal(current[name], expected[name][:rows])


def saved_weights(trainer: Trainer, folder: Path) -> dict[str, torch.Tensor]:
    from megatron.core import dist_checkpointing

    trainer.checkpoints.folder = folder
    trainer.checkpoints.save(trainer)
    loaded = dist_checkpointing.load_plain_tensors(str(folder / "iter_0000003"))
    return {
        name: value
        for name, value in loaded.items()
        if isinstance(value, torch.Tensor) and not name.startswith(("optimizer", "rng"))
    }


@pytest.mark.parametrize("world_size", [2, 3])
def test_silent_faults_of_the_optimizer_state(world_size: int, inputs: Path, tmp_path: Path) -> None:
    run_world(optimizer_faults, world_size, str(inputs), str(tmp_path))


def test_silent_fault_of_padded_buckets(inputs: Path, tmp_path: Path) -> None:
    run_world(padded_buckets, 3, str(inputs), str(tmp_path))


@pytest.mark.parametrize("world_size", [2, 3])
def test_silent_fault_of_overlapped_gathers(world_size: int, inputs: Path, tmp_path: Path) -> None:
    run_world(stale_parameters, world_size, str(inputs), str(tmp_path))


def writer_without_psutil() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from lopd_megatron.train import checkpoint_state

    filesystem_async.HAVE_PSUTIL = False
    with pytest.raises(UserError, match="psutil"):
        checkpoint_state._prepare_results_queue()
    # Raised in the writer's process before it reports anything, and its parent waits for a report.
    with pytest.raises(RuntimeError, match="psutil"):
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            [], 0, (os.devnull, "", ([], [])), queue.Queue(), multiprocessing.JoinableQueue(), False
        )


def test_a_save_without_psutil_would_hang_and_is_refused() -> None:
    run_world(writer_without_psutil, 1)


def persistent_writer() -> None:
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    with pytest.raises(ZeroDivisionError):
        PersistentAsyncCaller.async_loop(0, None, None, None)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the fault of the persistent writer needs a host without CUDA"
)
def test_the_persistent_writer_dies_without_cuda() -> None:
    """Its parent waits for ever; so asynchronous saves fork a writer each (test_resume has one)."""
    run_world(persistent_writer, 1)


UNGUARDED = """
from lopd_megatron.parallel import prepare_megatron
prepare_megatron()
from lopd_megatron.train import checkpoint_state
from lopd_megatron.parallel import versions
if {corrected}:
    checkpoint_state._prepare_results_queue()
versions.write_results_queue().put("written")
assert versions.write_results_queue().get() == "written"
print("main ran")
"""


@pytest.mark.parametrize("corrected", [True, False])
def test_a_save_does_not_import_the_main_program_again(corrected: bool, tmp_path: Path) -> None:
    script = tmp_path / "train_without_guard.py"
    script.write_text(UNGUARDED.format(corrected=corrected))
    try:
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        assert not corrected
    else:
        assert (done.returncode == 0 and done.stdout.count("main ran") == 1) == corrected, done.stderr
