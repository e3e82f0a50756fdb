"""Real sbatch reads every file and every option, for jobs as large as 64 nodes of 8 GPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lopd_megatron.cli import recipe_module
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


SITE = ["launch.account=llm", "launch.sbatch_options=[--exclusive,--mem=0]"]


def test_sbatch_accepts_every_model_at_its_largest_size(lab: SlurmLab, tmp_path: Path) -> None:
    fake = tmp_path / "sbatch"
    real = lab.run(["which", "sbatch"]).stdout.strip()
    fake.write_text(TEST_ONLY.replace("REAL", real))
    fake.chmod(0o755)
    path = {"PATH": f"{tmp_path}:{lab.env['PATH']}"}
    for file in sorted((ROOT / "recipes").glob("qwen3_*.py")):
        largest = max(recipe_module(file).LAYOUTS) // 8
        for recipe, nodes in (("sft", 64), ("lightning_opd", largest)):
            size = [f"launch.stages.train.nodes={nodes}", "launch.stages.rollouts.array=16"]
            found = chain([f"{file}:{recipe}"], [*size, f"run_dir={tmp_path}/run", *SITE])
            result = lab.run(["bash", "-c", sbatch.render(found)], cwd=ROOT, env=path)
            assert result.stdout.count("to start at") == len(found)


def test_a_refused_job_takes_those_before_it_with_it(lab: SlurmLab, tmp_path: Path) -> None:
    """The last one's file does not exist. A name may hold a blank and begin with a digit."""
    overrides = [f"run_dir={tmp_path}/a run", "name=8b run", "launch.sbatch_options=[--hold]"]
    found = chain(["recipes/tiny.py:lightning_opd"], overrides)
    script = sbatch.render([*found[:-1], replace(found[-1], name="nothing")])
    result = lab.run(["bash", "-c", script], cwd=ROOT, check=False)
    assert result.returncode == 1
    assert "not submitted; cancelling" in result.stdout
    jobs = [line.rpartition(" ")[2] for line in result.stdout.splitlines() if line.startswith("8b run-")]
    assert len(jobs) == len(found) - 1
    assert {lab.job(job)["JobState"] for job in jobs} == {"CANCELLED"}


def test_sbatch_refuses_what_no_cluster_has(lab: SlurmLab) -> None:
    """The partition is not one that says yes to everything."""
    command = ["sbatch", "--test-only", "--partition=big", "--nodes=65", "slurm/train.sbatch", "true"]
    assert lab.run(command, cwd=ROOT, check=False).returncode != 0
