"""The scripts for Slurm: every recipe and cluster size parses, and one is compared with its golden text.

`LOPD_UPDATE_GOLDEN=1 pytest tests/unit/launch` writes the golden files again.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lopd_megatron import cli
from lopd_megatron.errors import UserError
from lopd_megatron.launch import sbatch, shell
from lopd_megatron.launch.stages import chain

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).parent
CLUSTER = f"{HERE.relative_to(ROOT)}/cluster.py:opd_64gpu"
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def recipes() -> list[str]:
    files = sorted((ROOT / "recipes").glob("*.py"))
    return [
        f"recipes/{file.name}:{name}" for file in files for name in cli.recipe_names(cli.recipe_module(file))
    ]


def golden(name: str, text: str) -> None:
    file = HERE / "golden" / name
    if os.environ.get("LOPD_UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_shellcheck_finds_nothing_in_slurm() -> None:
    assert SHELLCHECK is not None
    files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "slurm").iterdir())]
    assert len(files) == 10
    result = subprocess.run([SHELLCHECK, "-x", *files], capture_output=True, text=True)
    assert result.stdout == ""


def test_every_stage_has_its_sbatch_file() -> None:
    for stage in chain([CLUSTER]):
        text = (ROOT / f"slurm/{stage.name}.sbatch").read_text()
        assert f"#SBATCH --job-name={stage.name}\n" in text
        assert f"logs=$(log_folder {stage.name})\n" in text
        for option in ("--requeue", "--open-mode=append", "--kill-on-invalid-dep=yes", "--ntasks-per-node=1"):
            assert f"#SBATCH {option}\n" in text


def test_every_recipe_and_cluster_size_parses(tmp_path: Path) -> None:
    scripts = []
    for index, recipe in enumerate(recipes()):
        for nodes in (1, 2, 4, 8, 16, 64):
            size = [f"launch.stages.train.nodes={nodes}", "launch.stages.train.gpus_per_node=8"]
            try:
                text = sbatch.render(chain([recipe], size))
            except UserError as error:
                # One node may be too small, and standard OPD has its servers on the node it trains on.
                if "is not a multiple of TP·PP·CP" not in str(error) and "on one node" not in str(error):
                    raise
                continue
            scripts.append(tmp_path / f"{index}-{nodes}.sh")
            scripts[-1].write_text(text)
    assert len(scripts) >= 3 * len(recipes())
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
    assert SHELLCHECK is not None
    result = subprocess.run([SHELLCHECK, *map(str, scripts)], capture_output=True, text=True)
    assert result.stdout == ""


def test_golden_sbatch_64_gpus() -> None:
    golden("sbatch_64gpu.sh", sbatch.render(chain([CLUSTER], ["train.train_iters=300"])))


NEMO: tuple[str, ...] = (
    "run_dir=runs/nemo",
    "launch.stages.score.array=1",
    "launch.ssh_host=me@login.invalid",
)
NEMO += ("launch.ssh_checkout=/remote/lopd",)


def test_golden_nemo_run_64_gpus() -> None:
    """Submitted through SSH, since the lab runs the other way; a dry run does not connect.

    A process of its own: nemo_run reads NEMORUN_HOME at import, and takes seconds to import.
    """
    command = [sys.executable, "-m", "lopd_megatron.launch", "--recipe", CLUSTER, "--executor", "slurm"]
    result = subprocess.run(
        [*command, "--dryrun", "--stages=score,train", *NEMO], capture_output=True, text=True, check=True
    )
    assert not (ROOT / "runs/nemo").exists()
    text = re.sub(r"opd_\d{10,}", "opd_ID", result.stdout)
    text = re.sub(r"#!\S*/bash", "#!/bin/bash", text)
    golden("nemo_run_64gpu.sh", text[text.index("# opd-score") :])


def test_shell_sbatch_and_nemo_run_show_the_same_commands() -> None:
    """One source: the 64-GPU golden texts hold the commands that a shell would run."""
    stages = chain([CLUSTER], ["train.train_iters=300"])
    script = (HERE / "golden/sbatch_64gpu.sh").read_text()
    for stage in stages:
        assert f"slurm/{stage.name}.sbatch \\\n  {shlex.join(stage.command)})\n" in script
    assert shlex.join(stages[4].command) in shell.lines(stages)
    nemo = (HERE / "golden/nemo_run_64gpu.sh").read_text()
    for index in (2, 4):
        assert f"cd /remote/lopd\nexec {shlex.join(chain([CLUSTER], NEMO)[index].command)}\n" in nemo


FAKE_SCONTROL = """#!/bin/bash
[ "$2" = hostnames ] && printf 'n1\\nn2\\n' || echo "NodeName=$3 NodeAddr=127.0.0.1 Port=1"
"""


def test_rendezvous_is_the_first_node_and_a_free_port(tmp_path: Path) -> None:
    """job.sh, with a FakeScontrol. Another job, or attempt, starts its search elsewhere."""
    fake = tmp_path / "scontrol"
    fake.write_text(FAKE_SCONTROL)
    fake.chmod(0o755)
    text = 'set -euo pipefail; source slurm/job.sh; rendezvous; echo "$PET_MASTER_ADDR $PET_MASTER_PORT"'

    def port(job: int, attempt: int) -> int:
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[1-2]"}
        environment |= {"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(attempt)}
        address, found = subprocess.check_output(["bash", "-c", text], env=environment, text=True).split()
        assert address == "127.0.0.1"
        return int(found)

    first = port(11, 0)
    assert len({first, port(11, 1), port(12, 0)}) == 3
    with socket.create_server(("127.0.0.1", first)):
        assert port(11, 0) == first + 1


FAKE_SRUN = "#!/bin/bash\nprintf '%s\\n' \"$@\"\n"


def test_with_and_without_a_container(tmp_path: Path) -> None:
    """job.sh's srun line, with a FakeSrun that prints its arguments."""
    fake = tmp_path / "srun"
    fake.write_text(FAKE_SRUN)
    fake.chmod(0o755)
    text = "set -euo pipefail; source slurm/env.sh; source slurm/job.sh; step --output=x python tools/x.py"

    def arguments(**more: str) -> list[str]:
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **more}
        environment["LOPD_VENV"] = "/nonexistent"
        result = subprocess.run(
            ["bash", "-c", text], env=environment, capture_output=True, text=True, check=True
        )
        return result.stdout.splitlines()

    plain = ["--kill-on-bad-exit=1", "--cpu-bind=none"]
    command = ["--output=x", "python", "tools/x.py"]
    assert arguments() == [*plain, *command]
    assert arguments(LOPD_CONTAINER_IMAGE="img.sqsh", LOPD_CONTAINER_MOUNTS="/data:/data,/x:/y") == [
        *plain,
        "--container-image=img.sqsh",
        f"--container-workdir={ROOT}",
        "--no-container-mount-home",
        f"--container-mounts={ROOT}:{ROOT},/data:/data,/x:/y",
        *command,
    ]
