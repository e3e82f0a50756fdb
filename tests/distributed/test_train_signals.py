"""The training program and its launchers: Ctrl-C, SIGTERM, a killed launcher, two writers, a full disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lopd_megatron.errors import EXIT_INTERRUPTED, EXIT_REQUEUE, EXIT_USER_ERROR
from lopd_megatron.model.checkpoint_files import newest_undamaged
from tests.distributed.test_train_cli import RECIPE
from tests.distributed.tiny_run import write_inputs
from tests.distributed.world import ROOT

pytestmark = pytest.mark.dist

OURS = "lopd_megatron.launch.torchrun"
PLAIN = "torch.distributed.run"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    (folder / "recipe.py").write_text(RECIPE.format(inputs=str(folder)))
    return folder


class Job:
    """A training job in a process group of its own, as a terminal makes it; its output in a file."""

    def __init__(
        self, inputs: Path, run_dir: Path, *overrides: str, launcher: str = OURS, prefix: str = ""
    ) -> None:
        self.run_dir = run_dir
        self.log = run_dir.with_suffix(f".{time.monotonic_ns()}.log")
        command = [
            sys.executable,
            "-m",
            launcher,
            "--standalone",
            "--nproc-per-node=2",
            "-m",
            "lopd_megatron.train",
        ]
        command += ["--recipe", f"{inputs}/recipe.py:opd", f"run_dir={run_dir}", "train.train_iters=100000"]
        command += ["checkpoint.save_interval=100000", *overrides]
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(inputs),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        if prefix:
            command = ["/bin/sh", "-c", f'{prefix}; exec "$@"', "sh", *command]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait_for(self, text: str, seconds: float = 120) -> Job:
        deadline = time.monotonic() + seconds
        while text not in self.log.read_text():
            assert time.monotonic() < deadline, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        return self

    def ranks(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "lopd_megatron.train" in child.cmdline()]

    def end(self, seconds: float = 120) -> tuple[int, str]:
        return self.process.wait(timeout=seconds), self.log.read_text()


def test_ctrl_c_saves_once_and_ends_at_once_the_second_time(inputs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = Job(inputs, run_dir).wait_for("iteration 2/")
    code, text = Job(inputs, run_dir).end()  # while the first one trains
    assert code == EXIT_USER_ERROR, text
    errors = [line for line in text.splitlines() if line.startswith("error")]
    assert len(errors) == 1, text
    assert f"{run_dir} is in use by training on {os.uname().nodename}, process " in errors[0]
    os.killpg(job.process.pid, signal.SIGINT)
    code, text = job.end()
    assert code == EXIT_REQUEUE, text
    assert "Traceback" not in text
    saved = newest_undamaged(run_dir / "checkpoints")
    assert not (run_dir / ".train.lock").exists()

    job = Job(inputs, run_dir).wait_for("resumed from").wait_for("iteration ")
    os.kill(job.ranks()[1].pid, signal.SIGSTOP)  # it will not save
    os.killpg(job.process.pid, signal.SIGINT)
    time.sleep(1)
    os.killpg(job.process.pid, signal.SIGINT)
    code, text = job.end(seconds=10)
    assert code == EXIT_INTERRUPTED, text
    assert newest_undamaged(run_dir / "checkpoints") == saved


def test_ranks_die_with_their_launcher_and_sigterm_under_plain_torchrun_saves(
    inputs: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    for launcher in (OURS, PLAIN):
        job = Job(inputs, run_dir, launcher=launcher).wait_for(" ms ")
        ranks = job.ranks()
        assert len(ranks) == 2
        job.process.kill()
        _, alive = psutil.wait_procs(ranks, timeout=25)  # they save
        assert alive == [], launcher
        assert "saved " in job.log.read_text()
    for number in (signal.SIGTERM, signal.SIGINT):
        job = Job(inputs, run_dir, launcher=PLAIN).wait_for(" ms ")
        ranks = job.ranks()
        job.process.send_signal(number)
        _, text = job.end()
        assert "saved " in text, text
        assert "python -m lopd_megatron.launch.torchrun" in text
        assert psutil.wait_procs(ranks, timeout=10)[1] == []
        newest_undamaged(run_dir / "checkpoints")


def test_a_stopped_rank_ends_a_real_job(inputs: Path, tmp_path: Path) -> None:
    job = Job(inputs, tmp_path / "run", "train.hang_timeout_s=10").wait_for("iteration 2/")
    stopped = job.ranks()[0]
    start = time.monotonic()
    stopped.suspend()
    code, text = job.end()
    assert time.monotonic() - start < 20, text
    assert code not in (0, EXIT_REQUEUE)
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: rank 0 on {os.uname().nodename} is stopped (kill -CONT {stopped.pid} ")
    assert "rank 1: stacks of all threads" in text


@pytest.mark.parametrize("settings", ["checkpoint.async_save=false", "checkpoint.async_save=true"])
def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(
    settings: str, inputs: Path, tmp_path: Path
) -> None:
    """The limit on file sizes stands for the disk: the files of a second, larger layout do not fit."""
    run_dir = tmp_path / "run"
    job = Job(inputs, run_dir, "train.train_iters=2")
    assert job.end()[0] == 0
    saved = newest_undamaged(run_dir / "checkpoints")
    limit = "ulimit -f 200; trap '' XFSZ"
    job = Job(inputs, run_dir, "train.train_iters=4", settings, prefix=limit)
    code, text = job.end()
    assert code == EXIT_USER_ERROR, text
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, text
    assert "File too large; raise the limit on file sizes" in errors[0]
    assert newest_undamaged(run_dir / "checkpoints") == saved
    assert [path.name for path in (run_dir / "checkpoints").glob(".*")] == []
