"""kill −9 in the middle of saves: the checkpoint before it is never lost, and the run comes out the same."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from lopd_megatron.model.checkpoint_files import newest
from lopd_megatron.parallel import topology as grid
from tests.distributed.tiny_run import state_hash, tiny_config, tiny_trainer, write_inputs
from tests.distributed.world import RankError, run_world

pytestmark = pytest.mark.dist

KILLS = 22
FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree")
EVENTS_OF_A_SAVE = 24


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def train_until_killed(inputs: str, run_dir: str, kill_at: int, async_save: bool) -> None:
    """Save after every step; kill −9 this process at file event `kill_at` below the checkpoint folder.

    The writers that a save forks count on from there, and kill the trainer too.
    """
    from lopd_megatron.train.loop import run

    trainer_pid, seen = os.getpid(), 0

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in FILE_EVENTS and f"{run_dir}/checkpoints" in str(arguments):
            seen += event != "open" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
            if seen == kill_at:
                os.kill(trainer_pid, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    run(tiny_config(Path(inputs), Path(run_dir), **settings(500), checkpoint__async_save=async_save))


def settings(train_iters: int) -> dict[str, Any]:
    return {
        "checkpoint__save_interval": 1,
        "train__train_iters": train_iters,
        "train__global_batch_size": 2,
        "optimizer__lr_decay_style": "constant",
    }


def finish(inputs: str, run_dir: str, train_iters: int) -> str:
    from lopd_megatron.train.loop import run

    grid.destroy()
    config = tiny_config(Path(inputs), Path(run_dir), **settings(train_iters))
    config.checkpoint.save_interval = 1000
    assert run(config) == 0
    trainer = tiny_trainer(config)
    trainer.checkpoints.load_latest(trainer)
    return state_hash(trainer)


def test_kills_during_saves_lose_nothing(inputs: Path, tmp_path: Path) -> None:
    rng = random.Random(5)
    run_dir = tmp_path / "killed"
    reached = 0
    for attempt in range(KILLS):
        kill_at = rng.randint(1, EVENTS_OF_A_SAVE) + (EVENTS_OF_A_SAVE if attempt == 0 else 0)
        with pytest.raises(RankError, match="died without a result"):
            run_world(train_until_killed, 1, str(inputs), str(run_dir), kill_at, bool(attempt % 2))
        found = newest(run_dir / "checkpoints")
        assert found is not None
        assert found["iteration"] >= reached, attempt
        reached = found["iteration"]
    total = reached + 1
    (killed,) = run_world(finish, 1, str(inputs), str(run_dir), total)
    (straight,) = run_world(finish, 1, str(inputs), str(tmp_path / "straight"), total)
    assert killed == straight
    leftovers = [path.name for path in (run_dir / "checkpoints").glob(".*")]
    assert leftovers == []


def writer_killed(inputs: str, run_dir: str, async_save: bool) -> None:
    """The kernel kills a writer of the second save, not the trainer."""
    from lopd_megatron.model.checkpoint_files import HashingFile
    from lopd_megatron.train.loop import run

    stock = HashingFile.write

    def write(self: HashingFile, data: Any) -> int:
        if "iter_0000002" in self._path:
            os.kill(os.getpid(), signal.SIGKILL)
        return stock(self, data)

    HashingFile.write = write
    os.dup2(os.open(f"{run_dir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    run(tiny_config(Path(inputs), Path(run_dir), **settings(4), checkpoint__async_save=async_save))


@pytest.mark.parametrize("async_save", [False, True])
def test_a_killed_writer_ends_the_run_instead_of_hanging_it(
    async_save: bool, inputs: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(RankError):
        run_world(writer_killed, 1, str(inputs), str(run_dir), async_save, timeout_s=60)
    assert "a process that writes the checkpoint was killed by signal 9" in Path(f"{run_dir}.log").read_text()
    found = newest(run_dir / "checkpoints")
    assert found is not None
    assert found["iteration"] == 1
