"""A rank that hangs or is stopped ends the job in time, by name; one that is slow for a reason does not."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from lopd_megatron.data.loader import StepBatch
from lopd_megatron.train import watchdog
from lopd_megatron.train.state import BatchSource, Hook, StepResult, Trainer
from lopd_megatron.train.watchdog import Silence
from tests.distributed.tiny_run import layout, tiny_config, write_inputs
from tests.distributed.world import RankError, run_world

pytestmark = pytest.mark.dist

TIMEOUT_S = 6.0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


class AtIteration(Hook):
    """Something that one rank does after iteration 3."""

    def __init__(self, rank: int, what: str) -> None:
        self.rank, self.what = rank, what
        self.may_take_long = what == "search"

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if trainer.iteration != 3 or trainer.topology.rank != self.rank:
            return
        if self.what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            time.sleep(1000 if self.what == "hang" else 2 * TIMEOUT_S)


def train(inputs: str, folder: str, what: str) -> int:
    from lopd_megatron.train.loop import run

    log = os.open(f"{folder}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    config = tiny_config(Path(inputs), Path(folder) / "run", **layout(pp=2))
    config.train.hang_timeout_s = TIMEOUT_S
    hooks = [] if what == "batch" else [AtIteration(1, what)]
    return run(config, hooks=hooks, batches=SlowReader(config) if what == "batch" else None)


class SlowReader:
    """Rank 0 never gets its fourth batch, as from a file system that does not answer."""

    def __init__(self, config: object) -> None:
        self.config = config
        self.source: BatchSource | None = None

    def step(self, consumed: int) -> StepBatch:
        from lopd_megatron.model.student_spec import student_spec
        from lopd_megatron.parallel import topology as grid
        from lopd_megatron.train.setup import build_loader

        if self.source is None:
            topology = grid._read(self.config.parallel, grid._device())
            self.source = build_loader(
                self.config, student_spec(self.config.model.student, self.config), topology
            )
        if consumed == 36 and int(os.environ["LOCAL_RANK"]) == 0:
            time.sleep(1000)
        return self.source.step(consumed)


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("hang", "rank 1 on {host} has been in AtIteration for "),
        ("stop", "rank 1 on {host} is stopped (kill -CONT"),
        ("kill", "rank 1 on {host} is gone for "),
        ("batch", "rank 0 on {host} has been reading the batch for "),
    ],
)
def test_a_rank_that_does_not_go_on_ends_the_job(what: str, line: str, inputs: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="died without a result"):
        run_world(train, 2, str(inputs), str(tmp_path), what)
    # kill: pytest's world notices the death itself and ends the others; the alarm is that of a real job.
    seconds = time.monotonic() - start
    text = (tmp_path / "log").read_text()
    if what != "kill":
        errors = [one for one in text.splitlines() if one.startswith("error: ")]
        assert len(errors) == 1, text
        assert line.format(host=os.uname().nodename) in errors[0]
        assert "iteration 3" in errors[0] or "iteration 4" in errors[0]
        assert "train.hang_timeout_s=6" in errors[0]
        assert " is in " in errors[0]  # what the other one waits in
        stacks = 1 if what == "stop" else 2
        assert text.count("stacks of all threads") == stacks
        assert text.count("Current thread") >= stacks
    assert seconds < 3 * TIMEOUT_S  # the start of the world and three iterations are part of it


def test_slow_work_that_announces_itself_is_no_hang(inputs: Path, tmp_path: Path) -> None:
    assert run_world(train, 2, str(inputs), str(tmp_path), "search") == [0, 0]
    assert "stacks" not in (tmp_path / "log").read_text()
    assert not (tmp_path / "run" / "logs").exists() or os.listdir(tmp_path / "run" / "logs") == []


def test_silence_counts_only_while_this_process_looks(tmp_path: Path) -> None:
    silence = Silence()
    assert silence.grows("a", 5) == 0
    assert silence.grows("a", 5) == 5
    assert not silence.was_seen  # one value: it may be a file that a killed run has left
    assert silence.grows("b", 5) == 0
    assert silence.was_seen
    assert silence.grows("b", 2) == 2
    assert silence.grows(None, 5) == 0  # the file is gone: that rank has ended


def record(rank: int, sequence: int, *, limited: bool = True, in_collective: bool = False) -> dict:
    return {"rank": rank, "sequence": sequence, "limited": limited, "in_collective": in_collective}


@pytest.mark.parametrize(
    ("records", "hung"),
    [
        ([record(0, 8), record(1, 7), record(2, 8)], [1]),
        ([record(0, 7), record(1, 7, in_collective=True), record(2, 7, in_collective=True)], [0]),
        ([record(0, 7, in_collective=True), record(1, 7, in_collective=True)], [0, 1]),
        ([record(0, 8), record(1, 7, limited=False)], []),  # it asks a server, and the others wait for it
        ([record(0, 8, limited=False), record(1, 7)], [1]),  # it saves, or waits to
    ],
)
def test_who_hangs_is_who_is_behind(records: list[dict], hung: list[int], tmp_path: Path) -> None:
    for one in records:
        (tmp_path / f"{one['rank']:05d}.json").write_text(json.dumps(one))
    dog = watchdog.Watchdog.__new__(watchdog.Watchdog)
    dog.folder, dog.world_size = tmp_path, len(records)
    assert dog._least_advanced() == hung
