"""The study: every system of the papers on the tiny task, several seeds, every cell cached.

    python tools/study.py [--seeds 5] [--groups core topk …] [--quick] [--report-only]

Trains the teachers and the base student where they are missing, then one process per seed works through
the cells of recipes/tiny_study.py; a cell whose result.json exists is not run again, so a killed study goes
on. Ends by writing docs/study.md, its plots and docs/study/results.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from lopd_megatron.errors import UserError, run_program
from lopd_megatron.files import write_json
from lopd_megatron.launch.study import Cell
from lopd_megatron.progress import say
from recipes.tiny_study import STUDY, Study, pretraining

GROUPS = ("core", "topk", "effopd", "mismatch", "rounds", "rollouts", "clip", "online")
QUICK_CELLS = (
    "sft",
    "more_sft",
    "sft_fresh",
    "lightning",
    "lightning_topk_1",
    "standard",
    "lightning_effopd_topk_kl",
)


def main() -> int:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--seeds", type=int, default=5, help="seeds 0 … N − 1")
    arguments.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    arguments.add_argument("--quick", action="store_true", help="one seed of seven cells: at most 15 minutes")
    arguments.add_argument("--report-only", action="store_true", help="only write docs/study.md")
    arguments.add_argument("--worker", type=int, metavar="SEED", help="one seed, in this process")
    arguments.add_argument("--prepare", nargs="+", metavar="MODEL", help="train these, in this process")
    arguments.add_argument("--dry-run", action="store_true", help="print what would be run")
    args = arguments.parse_args()
    seeds = range(1 if args.quick else args.seeds)
    if args.prepare:
        return prepare(args.prepare)
    if args.worker is not None:
        return work(Study(args.worker), wanted(Study(args.worker), args))
    todo = {
        seed: [cell for cell in wanted(Study(seed), args) if not cell.result_path.exists()] for seed in seeds
    }
    if args.dry_run:
        for seed, cells in todo.items():
            print(f"seed {seed}: {len(cells)} cells to run: {' '.join(cell.name for cell in cells)}")
        print("would write: docs/study.md, docs/study/")
        return 0
    if not args.report_only:
        run(sys.executable, "tools/make_tiny_task.py", "--output", f"{STUDY}/models/task", "--all-teachers")
        teachers = {name for cells in todo.values() for cell in cells for name in cell.teachers}
        run(sys.executable, __file__, "--prepare", "base", *sorted(teachers))
        for seed, cells in todo.items():
            if cells:
                run(sys.executable, __file__, "--worker", str(seed), *sys.argv[1:])
    run(sys.executable, str(Path(__file__).with_name("study_report.py")))
    return 0


def wanted(study: Study, args: argparse.Namespace) -> list[Cell]:
    """The cells that were asked for and those they start from."""
    cells = {cell.name: cell for cell in study.cells()}
    chosen = {
        c.name for c in cells.values() if (c.name in QUICK_CELLS if args.quick else c.group in args.groups)
    }
    chosen |= {need for name in chosen for need in cells[name].needs}
    return [cell for name, cell in cells.items() if name in chosen]


def prepare(names: list[str]) -> int:
    """Train the teachers and the base student that are missing, in this process."""
    from lopd_megatron.launch.workbench import train

    for name in names:
        config = pretraining(name)
        if not (config.paths.hf / "config.json").exists():
            say(f"study: training {name}")
            start = time.monotonic()
            train(config)
            write_json(config.paths.run_dir / "seconds.json", time.monotonic() - start)
    return 0


def run(*command: str) -> None:
    code = subprocess.call(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if code:
        raise UserError(f"{' '.join(command)} ended with exit code {code}; `make study` goes on from here")


def work(study: Study, cells: list[Cell]) -> int:
    """All missing cells of one seed in this process."""
    from lopd_megatron.launch.study import StudyRunner

    problems = f"{study.models}/task/problems"
    runner = StudyRunner(
        Path(study.root), study.seed, study.held_out, f"{problems}/valid.jsonl", f"{problems}/test.jsonl"
    )
    for number, cell in enumerate(cells, start=1):
        if cell.result_path.exists():
            continue
        start = time.monotonic()
        result = runner.run(cell)
        write_json(cell.result_path, result)
        accuracy = result["test"]["greedy"]["value"]
        say(
            f"seed {study.seed} [{number}/{len(cells)}] {cell.name}: greedy {accuracy:.3f}, "
            f"{time.monotonic() - start:.0f} s"
        )
    return 0


if __name__ == "__main__":
    run_program(main)
