"""The study: every system of the papers on the tiny task, several seeds, every cell cached.

    lopd study [--seeds 5] [--groups core topk …] [--quick] [--report-only]

Trains the teachers and the base student where they are missing, then one process per seed works through
the cells of recipes/study/tiny.py, as many at a time as there are cores. A cell is not run again where its
result, made with the same settings, is below runs/study or in docs/study/results.json: a killed study goes
on, on another machine too. Ends by writing docs/study.md, its plots and docs/study/results.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lopd_megatron.errors import UserError
from lopd_megatron.files import write_json
from lopd_megatron.progress import log_line
from lopd_megatron.recipes.study.claims import CLAIMS
from lopd_megatron.recipes.study.tiny import STUDY, Study
from lopd_megatron.study.cells import Cell
from lopd_megatron.study.report import collect, read_kept, write_report
from lopd_megatron.study.statistics import Result

GROUPS = {
    "core": "Core: the systems of the papers",
    "clip": "Clip: of the advantage (the recipe's is 0.5)",
    "topk": "Top-k: cached teacher tokens",
    "effopd": "EffOPD: three scores on three systems",
    "mismatch": "Teachers: who wrote the SFT data, who distils",
    "soft": "Soft: a teacher with a bit more entropy in every step",
    "rounds": "Rounds: fresh rollouts now and then",
    "rollouts": "Rollouts: fewer prompts, several responses",
    "online": "Online: overlap",
}
REPORT = Path("docs/study.md")
RESULTS = Path("docs/study/results.json")
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
    arguments.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes of one thread each")
    arguments.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    arguments.add_argument("--quick", action="store_true", help="one seed of seven cells: at most 15 minutes")
    arguments.add_argument("--report-only", action="store_true", help="only write docs/study.md")
    arguments.add_argument("--worker", type=int, metavar="SEED", help="one seed, in this process")
    arguments.add_argument("--prepare", nargs="+", metavar="MODEL", help="train these, in this process")
    arguments.add_argument("--dry-run", action="store_true", help="print what would be run")
    args = arguments.parse_args()
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs} runs nothing; give 1 or more, at most the cores of the machine")
    if args.seeds < 1:
        raise UserError(
            f"--seeds {args.seeds} runs nothing; give 1 or more, 5 for intervals that mean something"
        )
    seeds = range(1 if args.quick else args.seeds)
    if args.prepare:
        return prepare(args.prepare)
    if args.worker is not None:
        return work(Study(args.worker), to_run(Study(args.worker), args))
    todo = {seed: to_run(Study(seed), args) for seed in seeds}
    if args.dry_run:
        for seed, cells in todo.items():
            print(f"seed {seed}: {len(cells)} cells to run: {' '.join(cell.name for cell in cells)}")
        print("would write: docs/study.md, docs/study/")
        return 0
    if not args.report_only:
        run("tiny-task", "--output", f"{STUDY}/models/task", "--all-teachers")
        models = models_behind(cell for cells in todo.values() for cell in cells)
        side_by_side(args.jobs, (("--prepare", name) for name in models))
        workers = (("--worker", str(seed), *sys.argv[1:]) for seed, cells in todo.items() if cells)
        side_by_side(args.jobs, workers)
    report()
    return 0


def models_behind(cells: Iterable[Cell]) -> list[str]:
    """The base student and the teachers that cells need; none without a cell."""
    return sorted({name for cell in cells for name in ("base", *cell.teachers)})


def to_run(study: Study, args: argparse.Namespace) -> list[Cell]:
    """The cells that were asked for and have no result, and those they start from that are not here.

    A quick study shows that the numbers can be had on this machine: results kept from others do not count.
    """
    cells = {cell.name: cell for cell in study.cells()}
    kept = [] if args.quick else read_kept(RESULTS)
    known = {r["cell"] for r in kept if r["seed"] == study.seed and is_current(r)}
    chosen = {
        cell.name
        for cell in cells.values()
        if (cell.name in QUICK_CELLS if args.quick else cell.group in args.groups)
        and cell.name not in known
        and not is_here(cell)
    }
    chosen |= {need for name in chosen for need in cells[name].needs if not is_here(cells[need])}
    return [cell for name, cell in cells.items() if name in chosen]


def is_here(cell: Cell) -> bool:
    """Whether the cell was run on this machine, so that its weights are there, with the settings of today."""
    return cell.result_path.exists() and is_current(json.loads(cell.result_path.read_text()))


def is_current(result: Result) -> bool:
    """Whether a result was made with the settings of today."""
    return result.get("recipe") == recipes(result["seed"]).get(result["cell"], "no such cell")


@functools.cache
def recipes(seed: int) -> dict[str, str]:
    return Study(seed).recipes()


def report() -> None:
    """Write docs/study.md from all results there are."""
    cells = Study(0).cells()
    groups = {
        heading: [cell.name for cell in cells if cell.group == group] for group, heading in GROUPS.items()
    }
    results = collect(Path(STUDY), RESULTS, is_current)
    write_report(REPORT, results, groups, CLAIMS, introduction(cells))
    log_line(f"written: {REPORT}")


def introduction(cells: list[Cell]) -> str:
    configs = {cell.name: cell.parts[-1].config for cell in cells}
    opd, sft = configs["lightning"], configs["sft"]
    return f"""# Study: the papers' claims on the tiny task

Generated by `make study` from `docs/study/results.json`; no number here is typed. Cells are defined in
`recipes/study/tiny.py`, claims in `recipes/study/claims.py`, the task in `recipes/tiny_task.py`.

All cells run the same Megatron-Core trainer, loss and packing, and the same vLLM, in float32 on a CPU, at
world size 1. Teachers, base student and problems are fixed; SFT and everything after it depend on the seed.
SFT takes {sft.train.train_iters} iterations, distillation {opd.train.train_iters}, with
{opd.train.global_batch_size} sequences each, learning rate {opd.optimizer.lr:g}
({opd.optimizer.lr_decay_style}), advantage clip {opd.loss.advantage_clip}. `standard` samples and scores anew
at every iteration, `lightning` once. Accuracy is that on held-out test problems; curves and choices use
validation problems. Values are means over seeds ± the half width of the 95 % interval (Student's t).
Seconds are CPU seconds of a process with one thread; those of `core`, the first group, are wall time."""


def prepare(names: list[str]) -> int:
    """Train the teachers and the base student that are missing, in this process."""
    known = models_behind(Study(0).cells())
    if unknown := sorted(set(names) - set(known)):
        raise UserError(f"--prepare {unknown[0]}: no such model; there are {', '.join(known)}")
    from lopd_megatron.study.workbench import train

    for name in names:
        config, recipe = Study(0).pretraining(name), Study(0).model_recipe(name)
        done = config.paths.run_dir / "recipe.json"
        if not done.exists() or json.loads(done.read_text()) != recipe:
            log_line(f"study: training {name}")
            train(config)
            write_json(done, recipe)
    return 0


def side_by_side(jobs: int, calls: Iterable[tuple[str, ...]]) -> None:
    """Run this program with each of these arguments, `jobs` at a time; a failure is raised at the end."""
    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(run, "study", *call) for call in calls]:
            done.result()


def run(*arguments: str) -> None:
    command = (sys.executable, "-m", "lopd_megatron", *arguments)
    code = subprocess.call(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if code:
        raise UserError(f"{' '.join(command)} ended with exit code {code}; `make study` goes on from here")


def work(study: Study, cells: list[Cell]) -> int:
    """All missing cells of one seed in this process."""
    from lopd_megatron.study.runner import StudyRunner

    problems = f"{study.models}/task/problems"
    runner = StudyRunner(
        Path(study.root),
        study.seed,
        study.pretraining("base"),
        study.held_out,
        valid=f"{problems}/valid.jsonl",
        test=f"{problems}/test.jsonl",
    )
    for number, cell in enumerate(cells, start=1):
        start = time.monotonic()
        result = runner.run(cell) | {"recipe": recipes(study.seed)[cell.name]}
        write_json(cell.result_path, result)
        accuracy = result["test"]["greedy"]["value"]
        log_line(
            f"seed {study.seed} [{number}/{len(cells)}] {cell.name}: greedy {accuracy:.3f}, "
            f"{time.monotonic() - start:.0f} s"
        )
    return 0
