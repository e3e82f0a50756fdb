"""A whole run: signals, time limit, metrics of a resumed run, and the inputs that are refused."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lopd_megatron.data.loader import StepBatch
from lopd_megatron.errors import EXIT_REQUEUE, UserError
from lopd_megatron.parallel import topology as grid
from lopd_megatron.train.metrics import read_metrics
from lopd_megatron.train.state import BatchSource, Hook, StepResult, Trainer
from tests.distributed.tiny_run import advance, layout, tiny_config, tiny_trainer, write_dataset, write_inputs
from tests.distributed.world import run_world

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    write_dataset(folder / "other", seed=4)
    return folder


class Interrupt(Hook):
    """Sends one rank a signal during the step before `iteration` + 1; twice, as launchers do."""

    def __init__(self, number: int, iteration: int) -> None:
        self.number, self.iteration = number, iteration

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if trainer.iteration == self.iteration and trainer.topology.rank == trainer.topology.world_size - 1:
            os.kill(os.getpid(), self.number)
            os.kill(os.getpid(), self.number)


def start(inputs: str, run_dir: Path, *hooks: Hook, **settings: object) -> int:
    from lopd_megatron.train.loop import run

    grid.destroy()
    config = tiny_config(
        Path(inputs),
        run_dir,
        checkpoint__save_interval=100,
        train__eval_interval=4,
        train__eval_documents=10,
        data__valid_prefixes=[f"{inputs}/other"],
        **settings,
    )
    return run(config, hooks=hooks)


def stopped_runs(inputs: str, folder: str) -> None:
    settings = layout(pp=2)
    assert start(inputs, Path(folder) / "straight", **settings) == 0
    stopped = Path(folder) / "stopped"
    pointer = stopped / "checkpoints" / "latest_checkpointed_iteration.txt"
    for number, iteration in ((signal.SIGUSR1, 2), (signal.SIGTERM, 4)):
        assert start(inputs, stopped, Interrupt(number, iteration), **settings) == EXIT_REQUEUE
        assert pointer.read_text() == f"{iteration}\n"
    assert start(inputs, stopped, train__exit_duration_in_mins=1e-9, **settings) == EXIT_REQUEUE
    assert pointer.read_text() == "5\n"
    assert start(inputs, stopped, **settings) == 0
    assert start(inputs, stopped, **settings) == 0  # already done


def test_a_run_that_was_stopped_three_times_is_the_run_that_was_not(inputs: Path, tmp_path: Path) -> None:
    run_world(stopped_runs, 2, str(inputs), str(tmp_path))
    straight, stopped = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("straight", "stopped"))
    measured = {"iteration_time_ms", "tokens_per_second_per_gpu", "peak_memory_gib"}
    assert [line["iteration"] for line in stopped] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(straight, stopped, strict=True):
        assert measured < one.keys()
        same = set(one) - measured
        assert {name: one[name] for name in same} == {name: other[name] for name in same}
    assert "valid_loss" in straight[3]
    assert "valid_loss" not in straight[2]
    assert {"loss", "log_ratio_mean", "grad_norm", "lr", "consumed_train_samples"} <= straight[0].keys()


class Spoiled:
    """A batch source whose second step has a document with a NaN."""

    def __init__(self, source: BatchSource) -> None:
        self.source = source

    def step(self, consumed: int) -> StepBatch:
        batch = self.source.step(consumed)
        teacher = batch.microbatches[0].teacher_logprobs
        if consumed and teacher is not None and dist.get_rank() == dist.get_world_size() - 1:
            teacher[:] = float("nan")
        return dataclasses.replace(batch, document_label="{0} (prompt/{0})".format)


def refused(inputs: str, folder: str) -> list[str]:
    """The messages, the same on every rank, of what is refused."""
    from lopd_megatron.train.loop import run, train

    def message(error: pytest.ExceptionInfo) -> str:
        return str(error.value)

    found = []
    config = tiny_config(Path(inputs), Path(folder) / "nan", **layout(pp=2))
    trainer = tiny_trainer(config)
    trainer.batches = Spoiled(trainer.batches)
    before = [p.clone() for p in trainer.model[0].parameters()]
    with pytest.raises(UserError) as error:
        train(trainer)
    found.append(message(error))
    assert trainer.iteration == 1
    for chunk in trainer.model:
        assert all(bool(torch.isfinite(p).all()) for p in chunk.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model[0].parameters(), strict=True))

    grid.destroy()
    config = tiny_config(Path(inputs), Path(folder) / "run", train__train_iters=1)
    assert run(config) == 0
    for settings in (
        {"data__prefixes": [f"{inputs}/other"]},
        {"optimizer__use_distributed_optimizer": False},
    ):
        grid.destroy()
        with pytest.raises(UserError) as error:
            run(tiny_config(Path(inputs), Path(folder) / "run", train__train_iters=2, **settings))
        found.append(message(error))
    return found


def test_what_is_refused_says_why_on_every_rank(inputs: Path, tmp_path: Path) -> None:
    first, second = run_world(refused, 2, str(inputs), str(tmp_path))
    assert first == second
    nan, dataset, optimizer = first
    assert nan.startswith("iteration 2: ")
    assert re.search(r"document (\d+) \(prompt/\1\), token", nan)
    assert "another dataset" in dataset
    assert f"{inputs}/other" in dataset
    assert "use_distributed_optimizer" in optimizer


def torn_and_kept(inputs: str, folder: str) -> None:
    """keep_last, keep_every, and a checkpoint with a flipped bit; sizes are right."""
    from lopd_megatron.model.checkpoint_files import list_iterations, newest

    run_dir = Path(folder) / "torn"
    settings = {
        "checkpoint__save_interval": 1,
        "checkpoint__keep_last": 2,
        "checkpoint__keep_every": 2,
        "train__train_iters": 5,
    }
    from lopd_megatron.train.loop import run

    grid.destroy()
    assert run(tiny_config(Path(inputs), run_dir, **settings)) == 0
    checkpoints = run_dir / "checkpoints"
    assert list_iterations(checkpoints) == [2, 4, 5]
    dist.barrier()
    if dist.get_rank() == 0:
        file = max((checkpoints / "iter_0000005").glob("*.distcp"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    dist.barrier()
    trainer = tiny_trainer(tiny_config(Path(inputs), run_dir, **settings))
    assert trainer.checkpoints.load_latest(trainer)
    assert trainer.iteration == 4
    assert newest(checkpoints)["iteration"] == 4  # the pointer no longer names the torn one


def test_a_torn_checkpoint_is_skipped(inputs: Path, tmp_path: Path) -> None:
    run_world(torn_and_kept, 2, str(inputs), str(tmp_path))
    from megatron.core.dist_checkpointing import load_common_state_dict

    stored = load_common_state_dict(str(tmp_path / "torn" / "checkpoints" / "iter_0000004"))
    assert stored["config"] == json.loads((tmp_path / "torn" / "config.json").read_text())


def resumed_otherwise(inputs: str, folder: str) -> None:
    """Other settings are those of the configuration; without optimizer state Adam starts anew."""
    run_dir = Path(folder) / "settings"
    trainer = tiny_trainer(tiny_config(Path(inputs), run_dir))
    advance(trainer, 3)
    trainer.checkpoints.save(trainer)
    changed = {"optimizer__lr": 5e-4, "optimizer__lr_decay_style": "constant", "optimizer__adam_beta2": 0.5}
    trainer = tiny_trainer(tiny_config(Path(inputs), run_dir, **changed))
    trainer.checkpoints.load_latest(trainer)
    for group in trainer.optimizer.param_groups:
        assert (group["lr"], group["betas"]) == (5e-4, (0.9, 0.5))
    assert trainer.scheduler.num_steps == 36

    # Another batch size: iteration 4 has the learning rate that it would have had.
    config = tiny_config(Path(inputs), run_dir)
    trainer = tiny_trainer(config)
    trainer.checkpoints.load_latest(trainer)
    expected = trainer.optimizer.param_groups[0]["lr"]
    config.train.global_batch_size = 5
    trainer = tiny_trainer(config)
    trainer.checkpoints.load_latest(trainer)
    assert trainer.optimizer.param_groups[0]["lr"] == expected
    assert (trainer.iteration, trainer.consumed_train_samples) == (3, 36)
    advance(trainer, 3)
    assert trainer.optimizer.param_groups[0]["lr"] == config.optimizer.min_lr  # the decay ends
    trainer = tiny_trainer(tiny_config(Path(inputs), run_dir, train__seed=9))
    with pytest.raises(UserError, match=r"train.seed=9, .* trained with 1234"):
        trainer.checkpoints.load_latest(trainer)

    config = tiny_config(Path(inputs), Path(folder) / "weights", checkpoint__save_optimizer=False)
    trainer = tiny_trainer(config)
    advance(trainer, 3)
    trainer.checkpoints.save(trainer)
    loss = advance(trainer, 1)[0][0]
    trainer = tiny_trainer(config)
    trainer.checkpoints.load_latest(trainer)
    assert trainer.scheduler.num_steps == 36
    assert advance(trainer, 1)[0][0] == loss
    files = sum(path.stat().st_size for path in (Path(folder) / "weights/checkpoints/iter_0000003").iterdir())
    whole = sum(path.stat().st_size for path in (run_dir / "checkpoints/iter_0000003").iterdir())
    assert files < 0.4 * whole  # weights alone, not main parameters and two moments


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def crafted(inputs: str, folder: str) -> None:
    """A checkpoint whose random state is code, with the hashes that belong to it."""
    from lopd_megatron.train import checkpoint_state

    config = tiny_config(Path(inputs), Path(folder) / "crafted")
    # A random state for each rank: of two replicas, Megatron-Core 0.19 lets one read it, and the other waits.
    config.parallel.tensor_model_parallel_size = 2
    proof = Path(folder) / f"ran {dist.get_rank()}"
    trainer = tiny_trainer(config)
    advance(trainer, 1)
    stock = checkpoint_state._rng_state

    def with_payload(trainer: Trainer) -> Any:
        sharded = stock(trainer)
        sharded.data["random"] = Payload(proof)
        return sharded

    checkpoint_state._rng_state = with_payload
    trainer.checkpoints.save(trainer)
    checkpoint_state._rng_state = stock
    with pytest.raises(UserError, match=r"it names posix.mkdir, which no checkpoint needs; it was not run"):
        trainer.checkpoints.load_latest(trainer)
    assert not proof.exists()


def test_code_in_a_random_state_is_not_run(inputs: Path, tmp_path: Path) -> None:
    run_world(crafted, 2, str(inputs), str(tmp_path))


def test_a_resume_with_other_settings(inputs: Path, tmp_path: Path) -> None:
    run_world(resumed_otherwise, 1, str(inputs), str(tmp_path))
