"""Run a recipe's stages here, as Slurm jobs, or through NeMo-Run.

    python -m lopd_megatron.launch --recipe FILE.py:FUNCTION [--recipe ...] [section.key=value ...]
        [--executor shell|sbatch|local|slurm] [--stages train,export] [--dry-run]

Several recipes make one chain: a stage waits for the stages that write what it reads. Exit code 0 only when
every stage succeeded (sbatch: when every job was accepted).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lopd_megatron.errors import run_program
from lopd_megatron.launch import nemo_run, sbatch, shell
from lopd_megatron.launch.stages import chain


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m lopd_megatron.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", action="append", required=True, metavar="FILE.py:FUNCTION")
    parser.add_argument(
        "--executor",
        choices=("shell", "sbatch", "local", "slurm"),
        default="shell",
        help="shell: here, in order; sbatch: Slurm jobs from slurm/*.sbatch; "
        "local, slurm: NeMo-Run's LocalExecutor and SlurmExecutor",
    )
    parser.add_argument("--stages", default="", metavar="A,B", help="only these stages")
    parser.add_argument(
        "--dry-run", "--dryrun", action="store_true", help="print the commands or scripts; touch nothing"
    )
    known, overrides = parser.parse_known_args(argv)
    stages = chain(known.recipe, overrides, [name for name in known.stages.split(",") if name])
    if known.executor == "shell":
        if known.dry_run:
            print("\n".join(shell.lines(stages)))
            return 0
        return shell.run(stages)
    if known.executor == "sbatch":
        if known.dry_run:
            print(sbatch.render(stages), end="")
            return 0
        return sbatch.run(stages)
    return nemo_run.run(stages, known.executor, dry_run=known.dry_run)


if __name__ == "__main__":
    run_program(main)
