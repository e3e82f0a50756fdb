"""The trainer as a program: dry run, wrong settings, exit codes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.train.profile import ProfileHook
from lopd_megatron.train.run_rank import out_of_memory_message
from lopd_megatron.train.standard_hooks import standard_hooks
from lopd_megatron.train.validate import ValidateHook

ROOT = Path(__file__).resolve().parents[3]

RANKS = """
import os
import sys
from lopd_megatron.errors import UserError
from lopd_megatron.train.run_rank import run_rank

class OutOfMemoryError(RuntimeError):
    pass

def fail(error):
    raise error

MAINS = [
    lambda: fail(UserError("seq_length 7 is odd; use 8")),
    lambda: 85,
    lambda: 1 / 0,
    lambda: fail(OutOfMemoryError("Tried to allocate 2 GiB.")),
]
for rank, main in enumerate(MAINS):
    if os.fork() == 0:
        os.environ["RANK"] = str(rank)
        run_rank(main)
    code = os.waitstatus_to_exitcode(os.wait()[1])
    print(f"<exit code {code}>", file=sys.stderr, flush=True)
"""


@pytest.mark.processes
def test_exit_codes_and_messages_of_a_rank() -> None:
    """Each rank a fork of a process that has imported torch."""
    done = subprocess.run([sys.executable, "-c", RANKS], capture_output=True, text=True)
    texts, codes = (re.split(r"<exit code (\d+)>\n", done.stderr)[start::2] for start in (0, 1))
    assert codes == ["2", "85", "1", "1"]
    wrong_input, finished, crashed, out_of_memory, _ = texts
    assert wrong_input == "error: seq_length 7 is odd; use 8\n"
    assert finished == ""
    assert "rank 2 failed" in crashed
    assert "ZeroDivisionError" in crashed
    assert out_of_memory.startswith(
        "error on rank 3: out of memory: Tried to allocate 2 GiB. Lower data.seq_length"
    )
    assert "Traceback" not in out_of_memory


def test_out_of_memory_says_what_to_change() -> None:
    text = out_of_memory_message(0, RuntimeError("Tried 1 GiB.\nmore"))
    assert "train.recompute_granularity=full" in text
    assert "\n" not in text


@pytest.mark.processes
def test_dry_run_touches_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lopd_megatron.train", "--recipe", "recipes/tiny.py:lightning_opd"]
    done = subprocess.run(
        [*command, "--train-iters", "3", f"run_dir={tmp_path}/run", "--dry-run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert '"train_iters": 3' in done.stdout
    assert f"would write: {tmp_path}/run/checkpoints" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("window", [[3], [3, 3], [0, 2]])
def test_a_profile_window_is_first_and_last(window: list[int]) -> None:
    config = RunConfig()
    config.train.profile_iters = window
    with pytest.raises(UserError, match="profile_iters"):
        ProfileHook(config)


def test_a_run_without_held_out_data_does_not_validate(tmp_path: Path) -> None:
    config = RunConfig(run_dir=str(tmp_path))
    assert config.train.eval_interval
    assert not [hook for hook in standard_hooks(config) if isinstance(hook, ValidateHook)]
