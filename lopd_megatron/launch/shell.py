"""The chain on this machine: one stage after the other, stopping at the first that fails."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lopd_megatron.errors import EXIT_REQUEUE, UserError
from lopd_megatron.launch.stages import Stage
from lopd_megatron.progress import log_line


def lines(stages: Sequence[Stage]) -> list[str]:
    """Every command as one line of shell, in order."""
    return [shlex.join(command) for stage in stages for command in stage.worker_commands()]


def environment() -> dict[str, str]:
    """This process's environment with its own Python first: `python` in a command is the same one."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    return os.environ | {"PATH": path}


def run(stages: Sequence[Stage]) -> int:
    """Run all commands, the workers of an array in turn. Returns 0 or the exit code of the first failure."""
    for stage in stages:
        if stage.resources.nodes > 1:
            raise UserError(
                f"{stage.job} asks for {stage.resources.nodes} nodes; a shell has one: "
                f"set launch.stages.{stage.name}.nodes=1 or use --on slurm"
            )
    for stage in stages:
        for command in stage.worker_commands():
            log_line(f"{stage.job}: {shlex.join(command)}")
            start = time.monotonic()
            code = _until_done(command, stage.config.launch.max_restarts)
            log_line(f"{stage.job}: exit code {code} after {time.monotonic() - start:.0f} s")
            if code:
                return code
    return 0


def _until_done(command: Sequence[str], max_restarts: int) -> int:
    """Start a command again as long as it says that it saved and stopped before its end."""
    for _ in range(max_restarts + 1):
        code = subprocess.run(command, env=environment()).returncode
        if code != EXIT_REQUEUE:
            break
    return code
