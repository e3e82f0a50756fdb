"""The chain as a shell script of sbatch calls. It is what slurm/pipeline.sh runs."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lopd_megatron.errors import UserError
from lopd_megatron.launch.shell import environment
from lopd_megatron.launch.stages import Stage, refuse_short_time

HEADER = """\
#!/bin/bash
# The chain as Slurm jobs: run it in the checkout on a login node. Prints the id of every job.
# When a job is refused, those before it are cancelled: what they make would be waited for by nobody.
set -euo pipefail
if [ -n "${SLURM_JOB_ID:-}" ]; then # inside a job, whose GPUs and array these jobs would take for their own
  for name in "${!SLURM_@}"; do [ "$name" = SLURM_CONF ] || unset "$name"; done
fi
job=()
trap '[ $? = 0 ] || { echo "not submitted; cancelling ${job[*]}" >&2
  printf "%s\\n" "${job[@]}" | xargs -r scancel; }' EXIT
"""
LINE = " \\\n  "


def render(stages: Sequence[Stage]) -> str:
    """The script: each stage is one job, or one array, that waits for the jobs named in `Stage.after`."""
    number = {stage.job: index for index, stage in enumerate(stages)}
    text = [HEADER]
    run = None
    for index, stage in enumerate(stages):
        if stage.run != run:
            run = stage.run
            text.append(
                "\n".join(f"export {name}={value}" for name, value in variables(stage).items()) + "\n"
            )
        folder = shlex.quote(str(stage.config.paths.logs / stage.name))
        after = "".join(f':"${{job[{number[name]}]}}"' for name in stage.after if name in number)
        words = ["sbatch --parsable", *(shlex.quote(option) for option in options(stage))]
        if after:
            words.append("--dependency=afterok" + after)
        words += [f"slurm/{stage.name}.sbatch", shlex.join(stage.command)]
        text.append(
            f"mkdir -p {folder}\n"
            f"job[{index}]=$({LINE.join(words)})\n"
            f'echo {shlex.quote(stage.job)} "${{job[{index}]}}"\n'
        )
    return "\n".join(text)


def options(stage: Stage) -> list[str]:
    """The options of sbatch that a stage's resources ask for. A requeued job appends to its `--output`."""
    refuse_short_time(stage)
    resources, launch = stage.resources, stage.config.launch
    name = "%j" if resources.array == 1 else "%A_%a"
    found = [
        "--export=ALL",  # some sites export nothing; a job must see LOPD_* and the secrets
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
    if not Path("slurm/job.sh").is_file():
        raise UserError("slurm/job.sh is not below this folder; submit from a checkout of lopd_megatron")
    return subprocess.run(["bash", "-c", render(stages)], env=environment()).returncode
