"""Runs the stages of recipes: here, as Slurm jobs, or through NeMo-Run.

    lopd run recipes/tiny.py:lightning_opd [--stages train,export] [section.key=value ...]
    lopd run recipes/qwen3_8b.py:sft recipes/qwen3_8b.py:lightning_opd --on slurm [--dry-run]

Several recipes make one chain: a stage waits for the stages that write what it reads. Exit code 0 only when
every stage succeeded (with --on slurm: when every job was accepted).
"""

from __future__ import annotations

import argparse

from lopd_megatron import cli
from lopd_megatron.errors import UserError
from lopd_megatron.launch.stages import chain


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", action="append", default=[], metavar="FILE.py:FUNCTION")
    parser.add_argument(
        "--on",
        choices=("shell", "slurm", "nemo", "nemo-local"),
        default="shell",
        help="shell: here, in order; slurm: jobs from slurm/*.sbatch; nemo, nemo-local: NeMo-Run's executors",
    )
    parser.add_argument("--stages", default="", metavar="A,B", help="only these stages")
    parser.add_argument(
        "--dry-run", "--dryrun", action="store_true", help="print the commands or scripts; touch nothing"
    )
    known, rest = parser.parse_known_args()
    recipes = [*known.recipe, *(word for word in rest if cli.is_recipe(word))]
    if not recipes:
        raise UserError("name a recipe, as in lopd run recipes/tiny.py:sft; `lopd recipes` lists them")
    overrides = [word for word in rest if not cli.is_recipe(word)]
    stages = chain(recipes, overrides, [name for name in known.stages.split(",") if name])
    if known.on == "shell":
        from lopd_megatron.launch import shell

        if known.dry_run:
            print("\n".join(shell.lines(stages)))
            return 0
        return shell.run(stages)
    if known.on == "slurm":
        from lopd_megatron.launch import sbatch

        if known.dry_run:
            print(sbatch.render(stages), end="")
            return 0
        return sbatch.run(stages)
    from lopd_megatron.launch import nemo_run

    return nemo_run.run(stages, "slurm" if known.on == "nemo" else "local", dry_run=known.dry_run)
