"""The chain as a shell script of sbatch calls. It is what slurm/pipeline.sh runs."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Sequence

from lopd_megatron.launch.shell import environment
from lopd_megatron.launch.stages import Stage

HEADER = """\
#!/bin/bash
# The chain as Slurm jobs: run it in the checkout on a login node. Prints the id of every job.
set -euo pipefail
"""
LINE = " \\\n  "


def render(stages: Sequence[Stage]) -> str:
    """The script: each stage is one job, or one array, that waits for the jobs named in `Stage.after`."""
    here = {stage.job for stage in stages}
    text = [HEADER]
    run = None
    for stage in stages:
        if stage.run != run:
            run = stage.run
            text.append(
                "\n".join(f"export {name}={value}" for name, value in variables(stage).items()) + "\n"
            )
        folder = shlex.quote(str(stage.config.paths.logs / stage.name))
        after = "".join(f':"${_variable(job)}"' for job in stage.after if job in here)
        words = ["sbatch --parsable", *(shlex.quote(option) for option in options(stage))]
        if after:
            words.append("--dependency=afterok" + after)
        words += [f"slurm/{stage.name}.sbatch", shlex.join(stage.command)]
        text.append(
            f"mkdir -p {folder}\n"
            f"{_variable(stage.job)}=$({LINE.join(words)})\n"
            f'echo "{stage.job} ${_variable(stage.job)}"\n'
        )
    return "\n".join(text)


def options(stage: Stage) -> list[str]:
    """The options of sbatch that a stage's resources ask for. A requeued job appends to its `--output`."""
    resources, launch = stage.resources, stage.config.launch
    name = "%j" if resources.array == 1 else "%A_%a"
    found = [
        f"--job-name={stage.job}",
        f"--output={stage.config.paths.logs / stage.name}/{name}.batch.log",
        f"--time={resources.time}",
        f"--nodes={resources.nodes}",
    ]
    if resources.gpus_per_node:
        found.append(f"--gpus-per-node={resources.gpus_per_node}")
    if resources.array > 1:
        found.append(f"--array=0-{resources.array - 1}")
    if launch.account:
        found.append(f"--account={launch.account}")
    if launch.partition:
        found.append(f"--partition={launch.partition}")
    return [*found, *launch.sbatch_options]


def variables(stage: Stage) -> dict[str, str]:
    """What slurm/job.sh reads, quoted for a shell."""
    launch = stage.config.launch
    values = {
        "LOPD_LOGS": str(stage.config.paths.logs),
        "LOPD_MAX_RESTARTS": str(launch.max_restarts),
        "LOPD_MAX_RETRIES": str(launch.max_retries),
        "LOPD_CONTAINER_IMAGE": launch.container_image,
        "LOPD_CONTAINER_MOUNTS": ",".join(launch.container_mounts),
    }
    return {name: shlex.quote(value) for name, value in values.items()}


def run(stages: Sequence[Stage]) -> int:
    """Submit the chain. Returns sbatch's exit code when a submission is refused; later ones are not tried."""
    return subprocess.run(["bash", "-c", render(stages)], env=environment()).returncode


def _variable(job: str) -> str:
    return re.sub(r"\W", "_", job)
