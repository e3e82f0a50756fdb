"""One writer of a run_dir: who holds it is named, and the dead do not hold it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lopd_megatron import run_lock as locks
from lopd_megatron.errors import UserError
from lopd_megatron.run_lock import read_holder, run_lock, this_process

HOLD = """
import sys, time
from pathlib import Path
from lopd_megatron.run_lock import run_lock
with run_lock(Path(sys.argv[1]), "training"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / ".train.lock"


@pytest.mark.processes
def test_a_second_writer_is_refused_by_name_and_a_killed_one_is_not_waited_for(path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    start = time.monotonic()
    named = rf"in use by training on \S+, process {holder.pid}, started 20"
    with pytest.raises(UserError, match=named), run_lock(path, "training"):
        pass
    holder.kill()
    holder.wait()
    with run_lock(path, "training"):
        assert (read_holder(path) or {})["pid"] == os.getpid()
    assert time.monotonic() - start < 10
    assert os.listdir(path.parent) == []


def test_a_number_that_another_process_has_by_now_is_no_holder(path: Path) -> None:
    path.parent.mkdir()
    path.write_text(json.dumps({**this_process(), "pid": 1, "id": "old"}))  # with our start time
    with run_lock(path, "training"):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "elsewhere", "pid": 1}'])
@pytest.mark.parametrize("beats", [True, False])
def test_other_hosts_are_judged_by_their_heartbeat(
    path: Path, content: str, beats: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "WATCH_S", 1.0)
    path.parent.mkdir()
    path.write_text(content)
    os.utime(path, (1e9, 1e9))
    timer = threading.Timer(0.3, os.utime, (path,))
    if beats:
        timer.start()
        with pytest.raises(UserError, match="in use by"), run_lock(path, "training"):
            pass
        assert path.read_text() == content
    else:
        with run_lock(path, "training"):
            pass
        assert not path.exists()


def test_what_another_program_took_meanwhile_is_put_back(path: Path) -> None:
    path.parent.mkdir()
    path.write_text(json.dumps({**this_process(), "id": "new"}))
    locks._Lock(path, "training")._remove({"id": "dead"})
    assert (read_holder(path) or {})["id"] == "new"


@pytest.mark.processes
def test_a_holder_that_lost_its_lock_ends(path: Path) -> None:
    """As after an hour without network: another host has taken over."""
    code = f"import lopd_megatron.run_lock as l; l.BEAT_S = 0.1\n{HOLD}"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "program": "training", "id": "new"}))
    _, errors = holder.communicate(timeout=30)
    assert holder.returncode == 2
    assert "training on elsewhere, process 7" in errors
    assert (read_holder(path) or {})["id"] == "new"
