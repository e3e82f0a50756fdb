"""slurm/env.sh and slurm/job.sh, with a FakeSrun and a FakeScontrol; tests/slurm has the real ones."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[3]
FAKE_SCONTROL = """
case "$2" in
  hostnames) printf 'n1\\nn2\\n' ;;
  node) echo "NodeName=$3 NodeAddr=127.0.0.1 Port=1" ;;
  *) kill -USR1 $PPID ;; # a requeue; the warning before the limit comes at the same moment
esac
"""
PRINT_ARGUMENTS = "printf '%s\\n' \"$@\"\n"


class Shell:
    """Runs bash in a copy of slurm/ below a folder whose name has a blank."""

    def __init__(self, folder: Path) -> None:
        self.checkout, self.bin = folder / "a checkout", folder / "bin"
        shutil.copytree(ROOT / "slurm", self.checkout / "slurm")
        self.bin.mkdir()
        for name, text in (("srun", PRINT_ARGUMENTS), ("scontrol", FAKE_SCONTROL), ("sleep", "")):
            self.program(name, text)

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text("#!/bin/bash\n" + text)
        (self.bin / name).chmod(0o755)

    def run(self, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{self.bin}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **more}
        return subprocess.run(
            ["bash", *command], cwd=self.checkout, env=environment, capture_output=True, text=True
        )

    def edit_env(self, line: str) -> None:
        with (self.checkout / "slurm/env.sh").open("a") as file:
            file.write(line + "\n")


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_rendezvous_is_the_first_node_and_a_free_port(shell: Shell) -> None:
    """Another job, or attempt, starts its search elsewhere."""
    text = 'set -euo pipefail; source slurm/job.sh; rendezvous; echo "$PET_MASTER_ADDR $PET_MASTER_PORT"'

    def port(job: int, attempt: int) -> int:
        numbers = {"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(attempt)}
        address, found = shell.run("-c", text, SLURM_JOB_NODELIST="n[1-2]", **numbers).stdout.split()
        assert address == "127.0.0.1"
        return int(found)

    first = port(11, 0)
    assert len({first, port(11, 1), port(12, 0)}) == 3
    with socket.create_server(("127.0.0.1", first)):
        assert port(11, 0) == first + 1


def test_with_and_without_a_container(shell: Shell) -> None:
    text = "set -euo pipefail; source slurm/env.sh; source slurm/job.sh; step --output=x python tools/x.py"
    plain = ["--kill-on-bad-exit=1", "--cpu-bind=none", "--export=ALL"]
    command = ["--output=x", "python", "tools/x.py"]
    assert shell.run("-c", text).stdout.splitlines() == [*plain, *command]
    image = {"LOPD_CONTAINER_IMAGE": "img.sqsh", "LOPD_CONTAINER_MOUNTS": "/data:/data,/x:/y"}
    assert shell.run("-c", text, **image).stdout.splitlines() == [
        *plain,
        "--container-image=img.sqsh",
        f"--container-workdir={shell.checkout}",
        "--no-container-mount-home",
        f"--container-mounts={shell.checkout}:{shell.checkout},/data:/data,/x:/y",
        *command,
    ]


def test_a_stage_in_folders_with_blanks(shell: Shell) -> None:
    result = shell.run("slurm/dataset.sbatch", "python", "a tool.py", LOPD_LOGS="some logs")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].endswith("job 7 attempt 0: done")
    assert "--output=some logs/dataset/7.0/node-%n.log\npython\na tool.py\n" in result.stdout
    assert (shell.checkout / "some logs/dataset/latest").readlink() == Path("7.0")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        pytest.param(': "$PS1_OF_CONDA"', 0, id="unset variable: conda and module use them"),
        pytest.param("module load nothing", 127, id="no such command"),
        pytest.param("if", 2, id="syntax error"),
    ],
)
def test_what_sites_write_into_env_sh(shell: Shell, line: str, code: int) -> None:
    """What works in a login shell works; what fails ends the job before anything has run."""
    shell.edit_env(line)
    for program in ("slurm/train.sbatch", "slurm/dataset.sbatch", "slurm/pipeline.sh"):
        shell.program("python", PRINT_ARGUMENTS)
        job = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "LOPD_HEALTH_CHECK": "0"}
        result = shell.run(program, "a command", **job)
        assert bool(result.returncode) == bool(code), result.stderr
        assert ("a command" in result.stdout) == (code == 0)


def test_logs_that_cannot_be_written_end_the_job(shell: Shell) -> None:
    result = shell.run("slurm/dataset.sbatch", "true", LOPD_LOGS="/dev/null")
    assert result.returncode == 1
    assert "done" not in result.stdout


def test_a_warning_that_comes_when_srun_has_just_ended(shell: Shell) -> None:
    """The job has succeeded all the same."""
    shell.program("srun", "kill -USR1 $PPID; /bin/sleep 0.3\n")
    gone = 'kill() { [ "$1" = -0 ] && builtin kill "$@"; }'
    result = shell.run("-c", f"set -euo pipefail; source slurm/job.sh; {gone}; run_stage logs true")
    assert "told to stop" in result.stdout
    assert result.returncode == 0, result.stderr


def test_a_warning_that_comes_before_srun_is_passed_on(shell: Shell) -> None:
    shell.program("srun", "trap 'exit 85' USR1; for _ in {1..100}; do /bin/sleep 0.1; done\n")
    shell.program("sleep", '[ "$1" = 120 ] || exec /bin/sleep "$@"\n')
    told = 'say() { [ "$*" != command ] || kill -USR1 $$; }'
    text = f"set -euo pipefail; source slurm/job.sh; {told}; run_stage logs command"
    assert shell.run("-c", text).returncode == 85


def test_a_controller_that_does_not_answer_at_once(shell: Shell) -> None:
    """The address of the first node is asked again after a requeue, and a requeue is asked for again."""
    shell.program("scontrol", 'echo "scontrol $1" >> asked; [ "$(grep -c requeue asked)" = 3 ]\n')
    result = shell.run("slurm/train.sbatch", "true", SLURM_JOB_NODELIST="n[1-2]")
    assert "Slurm does not tell the address" in result.stdout
    assert result.returncode == 1
    asked = (shell.checkout / "asked").read_text().splitlines()
    assert asked[-3:] == ["scontrol requeue"] * 3


def test_a_warning_during_the_requeue_changes_nothing(shell: Shell) -> None:
    shell.program("srun", "exit 85\n")
    assert shell.run("slurm/dataset.sbatch", "true").returncode == 85
