"""The scripts for Slurm: every recipe and cluster size parses, and one is compared with its golden text.

`LOPD_UPDATE_GOLDEN=1 pytest tests/unit/launch` writes the golden files again.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lopd_megatron import cli
from lopd_megatron.errors import UserError
from lopd_megatron.launch import sbatch, shell
from lopd_megatron.launch.stages import chain, stages
from lopd_megatron.recipes import qwen3_32b

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).parent
RUNS = ["recipes/qwen3_32b.py:sft", "recipes/qwen3_32b.py:lightning_opd"]
LAYOUT_64 = [f"parallel.{kind}_model_parallel_size=4" for kind in ("tensor", "pipeline")]
LAYOUT_64 += ["launch.stages.train.nodes=8"]
SITE = [
    "launch.account=llm",
    "launch.partition=batch",
    "launch.sbatch_options=[--exclusive,--mem=0]",
    "launch.container_image=nvcr.io/nvidia/nemo:25.09",
    "launch.container_mounts=[/lustre/models:/lustre/models:ro]",
]
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def recipes() -> list[str]:
    files = sorted((ROOT / "recipes").glob("*.py"))
    return [
        f"recipes/{file.name}:{name}" for file in files for name in cli.recipe_names(cli.recipe_module(file))
    ]


def placed() -> list[tuple[str, str, int]]:
    """(file, function, GPUs) for every size that a recipe file has a layout for."""
    modules = {path: cli.recipe_module(ROOT / path) for path in {name.split(":")[0] for name in recipes()}}
    return [
        (path, name, gpus)
        for path, module in sorted(modules.items())
        for name in cli.recipe_names(module)
        for gpus in getattr(module, "LAYOUTS", {})
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
    for stage in chain(RUNS):
        text = (ROOT / f"slurm/{stage.name}.sbatch").read_text()
        assert f"#SBATCH --job-name={stage.name}\n" in text
        assert f"logs=$(log_folder {stage.name})\n" in text
        for option in ("--requeue", "--open-mode=append", "--kill-on-invalid-dep=yes", "--ntasks-per-node=1"):
            assert f"#SBATCH {option}\n" in text


def test_every_recipe_and_cluster_size_parses(tmp_path: Path) -> None:
    """With any number of nodes, and with every layout that its file has."""
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
    for file, function, gpus in placed():
        config = getattr(cli.recipe_module(ROOT / file), function)(gpus)
        if config.online.enabled:
            config.launch.stages.train.nodes = 1
        scripts.append(tmp_path / f"{Path(file).stem}-{function}-{gpus}.sh")
        scripts[-1].write_text(sbatch.render(stages(config, f"{file}:{function}")))
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
    assert SHELLCHECK is not None
    different = list({path.stem.rpartition("-")[0]: path for path in scripts}.values())  # but for numbers
    result = subprocess.run([SHELLCHECK, *map(str, different)], capture_output=True, text=True)
    assert result.stdout == ""


def test_golden_sbatch_64_gpus() -> None:
    """Qwen3-32B with its layout for 64 GPUs, SFT and OPD as one chain."""
    golden("sbatch_64gpu.sh", sbatch.render(chain(RUNS, [*LAYOUT_64, *SITE])))
    found = {stage.job: stage.config for stage in chain(RUNS, LAYOUT_64)}["qwen3_32b-lightning_opd-train"]
    placed_64 = qwen3_32b.lightning_opd(64)
    assert (found.parallel, found.launch) == (placed_64.parallel, placed_64.launch)


SSH = ["launch.ssh_host=me@login.invalid", "launch.ssh_checkout=/remote/lopd"]


def test_golden_nemo_run_64_gpus() -> None:
    """Submitted through SSH, since the lab runs the other way; a dry run does not connect.

    A process of its own: nemo_run reads NEMORUN_HOME at import, and takes seconds to import.
    """
    command = [sys.executable, "-m", "lopd_megatron", "run", "--on", "nemo", RUNS[1]]
    arguments = ["--dryrun", "--stages=scores,train", *LAYOUT_64, *SITE, *SSH]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    assert not (ROOT / "runs/qwen3_32b").exists()
    text = re.sub(r"(lightning_opd)_\d{10,}", r"\1_ID", result.stdout)
    text = re.sub(r"#!\S*/bash", "#!/bin/bash", text)
    golden("nemo_run_64gpu.sh", text[text.index("# qwen3_32b-") :])


def test_shell_sbatch_and_nemo_run_show_the_same_commands() -> None:
    """One source: the 64-GPU golden texts hold the commands that a shell would run."""
    found = chain(RUNS, [*LAYOUT_64, *SITE])
    script = (HERE / "golden/sbatch_64gpu.sh").read_text()
    for stage in found:
        assert f"slurm/{stage.name}.sbatch \\\n  {shlex.join(stage.command)})\n" in script
        assert shlex.join(stage.worker_commands()[0]) in shell.lines(found)
    nemo = (HERE / "golden/nemo_run_64gpu.sh").read_text()
    for stage in chain(RUNS[1:], [*LAYOUT_64, *SITE, *SSH], ["scores", "train"]):
        assert f"cd /remote/lopd\nexec {shlex.join(stage.command)}\n" in nemo
