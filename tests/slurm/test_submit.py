"""Real sbatch reads every file and every option, for jobs as large as 64 nodes of 8 GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from lopd_megatron.launch import sbatch
from lopd_megatron.launch.stages import chain
from tests.slurm.conftest import ROOT
from tests.slurm.lab import SlurmLab

# sbatch that only asks; the jobs a job would wait for do not exist.
TEST_ONLY = r"""#!/bin/bash
for word; do
  case $word in --dependency=* | --parsable) ;; *) set -- "$@" "$word" ;; esac
  shift
done
exec REAL --test-only --partition=big "$@"
"""


@pytest.mark.parametrize("nodes", [1, 8, 64])
@pytest.mark.parametrize("recipe", ["sft", "lightning_opd"])
def test_sbatch_accepts_the_chain(lab: SlurmLab, tmp_path: Path, recipe: str, nodes: int) -> None:
    fake = tmp_path / "sbatch"
    real = lab.run(["which", "sbatch"]).stdout.strip()
    fake.write_text(TEST_ONLY.replace("REAL", real))
    fake.chmod(0o755)
    size = [
        f"launch.stages.train.nodes={nodes}",
        "launch.stages.rollouts.array=16",
        f"run_dir={tmp_path}/run",
    ]
    site = ["launch.account=llm", "launch.sbatch_options=[--exclusive,--mem=0]"]
    found = chain([f"recipes/qwen3_8b.py:{recipe}"], [*size, *site])
    result = lab.run(
        ["bash", "-c", sbatch.render(found)], cwd=ROOT, env={"PATH": f"{tmp_path}:{lab.env['PATH']}"}
    )
    assert result.stdout.count("to start at") == len(found)


def test_sbatch_refuses_what_no_cluster_has(lab: SlurmLab) -> None:
    """The partition is not one that says yes to everything."""
    command = ["sbatch", "--test-only", "--partition=big", "--nodes=65", "slurm/train.sbatch", "true"]
    assert lab.run(command, cwd=ROOT, check=False).returncode != 0
