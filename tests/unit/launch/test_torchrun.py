"""The launcher tells the truth about its workers. Real torchrun, small workers that do not import torch."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

LAUNCH = [sys.executable, "-m", "lopd_megatron.launch.torchrun", "--standalone", "--nproc-per-node", "2"]

WORKER = """
import os, pathlib, signal, sys, time
mode, folder = sys.argv[1], pathlib.Path(sys.argv[2])
got = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: got.append(number))
if mode == "kill" and os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if mode.isdigit():
    sys.exit(int(mode) if os.environ["RANK"] == "1" else 0)
(folder / ("up" + os.environ["RANK"])).touch()
while not got:
    time.sleep(0.05)
time.sleep(1)
(folder / ("saved" + os.environ["RANK"])).touch()
sys.exit(85)
"""


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return path


@pytest.mark.parametrize(("mode", "code"), [("2", 2), ("kill", 137)])
def test_exit_code_is_that_of_the_worker(worker: Path, mode: str, code: int) -> None:
    result = subprocess.run(
        [*LAUNCH, str(worker), mode, str(worker.parent)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == code, result.stderr
    assert "rank 1 on" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_workers_get_the_signal_and_the_time_to_save(
    worker: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = subprocess.Popen([*LAUNCH, str(worker), "wait", str(tmp_path)])
    end = time.monotonic() + 120
    while len(list(tmp_path.glob("up*"))) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == 85
    assert len(list(tmp_path.glob("saved*"))) == 2
