"""The tables of docs/performance.md, from docs/benchmarks/*.json and from arithmetic.

    python tools/bench/bench_page.py [--dry-run]

Writes what stands between the markers of the page. tests/unit/test_performance_doc.py compares.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from pathlib import Path
from typing import Any

import bench_projection
import step_time_page

from lopd_megatron.errors import UserError, run_program
from lopd_megatron.files import atomic_path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "performance.md"
BENCHMARKS = ROOT / "docs" / "benchmarks"

# (what, file, key, format, goal); a goal is what the project set itself before it measured.
MEASURED = [
    ("speed against the Hugging Face loop", "peers", "hf_loop.speed", "{:.2f}×", "≥ 1.7×"),
    ("memory against the Hugging Face loop", "peers", "hf_loop.memory", "{:.2f}×", "≤ 0.40×"),
    ("the same speed, nothing to pad", "peers", "equal_lengths.hf_loop.speed", "{:.2f}×", ""),
    ("the same memory, nothing to pad", "peers", "equal_lengths.hf_loop.memory", "{:.2f}×", ""),
    ("speed against TRL GKDTrainer (other objective)", "peers", "trl_gkd.speed", "{:.2f}×", "≥ 2.8×"),
    ("memory against TRL GKDTrainer (other objective)", "peers", "trl_gkd.memory", "{:.2f}×", "≤ 0.20×"),
    ("speed against Megatron's cross-entropy, whole step", "peers", "plain_head.speed", "{:.2f}×", ""),
    ("memory against Megatron's cross-entropy, whole step", "peers", "plain_head.memory", "{:.2f}×", ""),
    ("head memory against Megatron's cross-entropy", "loss", "result.memory_ratio", "{:.3f}×", "≤ 0.033×"),
    ("head time, 15 % masked rows", "loss", "result.time_ratio_masked", "{:.2f}×", "≤ 0.95×"),
    ("head time, no masked rows", "loss", "result.time_ratio_full", "{:.2f}×", "≤ 1.05×"),
    ("FLOPs of a step over three forwards", "loss", "result.step_flops_ratio", "{:.3f}", "≤ 1.02"),
    ("time against a step shaped like the release", "loss", "result.step_time_ratio", "{:.2f}×", "≤ 0.45×"),
    ("memory against that step", "loss", "result.step_memory_ratio", "{:.2f}×", "≤ 0.30×"),
    ("scoring against prefill alone, tokens a second", "scoring", "score_vs_prefill", "{:.2f}×", ""),
    ("opening 50,000 documents", "data", "open_ms", "{:.1f} ms", "≤ 10 ms"),
    ("private memory of a reader", "data", "private_mb", "{:.1f} MB", "≤ 5 MB"),
    ("packed reading, tokens a CPU second", "data", "read_mtok_per_cpu_s", "{:.0f} M", "≥ 100 M"),
    ("reading against the release's loader", "data", "speedup_vs_parquet_lists", "{:.0f}×", "≥ 300×"),
    ("data-parallel balance, mean", "data", "balance_mean", "{:.4f}", "≥ 0.999"),
    ("data-parallel balance, worst step", "data", "balance_worst", "{:.4f}", "≥ 0.995"),
    ("micro-batches above the least number", "data", "extra_microbatches", "{}", "≤ 1"),
    ("packing 50,000 documents, CPU seconds", "data", "pack_cpu_s", "{:.2f}", "≤ 0.5"),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="print the tables and write nothing")
    options = parser.parse_args()
    if options.dry_run:
        print("\n".join(["\n".join(lines()) + "\n" for lines in TABLES.values()]))
        return
    text = with_tables(PAGE.read_text())
    with atomic_path(PAGE) as path:
        path.write_text(text)
    step_time_page.draw()
    print(PAGE.relative_to(ROOT), step_time_page.PLOT.relative_to(ROOT))


def measured_table() -> list[str]:
    """Markdown: a row for every figure, its goal and whether it is met."""
    lines = ["| ours ÷ theirs, or ours | measured | goal | | file |", "|---|---:|---:|---|---|"]
    for what, file, key, form, goal in MEASURED:
        value: Any = functools.reduce(lambda found, name: found[name], key.split("."), _read(file))
        verdict = ("met" if is_met(value, goal) else "**missed**") if goal else ""
        lines.append(f"| {what} | {form.format(value)} | {goal} | {verdict} | {file}.json |")
    return lines


def is_met(value: float, goal: str) -> bool:
    """`goal` as the table shows it: ≥ or ≤, a number, a unit. The value is in the same unit."""
    match = re.fullmatch(r"([≥≤]) ([\d.]+)\D*", goal)
    if match is None:
        raise ValueError(f"{goal!r} is not a goal")
    limit = float(match[2])
    return value >= limit if match[1] == "≥" else value <= limit


def with_tables(text: str) -> str:
    """The page with its tables made anew; all else stays."""
    for name, lines in TABLES.items():
        opening, closing = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        if text.count(opening) != 1 or text.count(closing) != 1:
            raise UserError(
                f"{PAGE.name} needs one {opening.strip()} and one {closing}; put them around a table"
            )
        before, rest = text.split(opening)
        table = "\n".join(lines())
        text = f"{before}{opening}\n{table}\n\n{closing}{rest.split(closing)[1]}"
    return text


def _read(file: str) -> dict[str, Any]:
    return json.loads((BENCHMARKS / f"{file}.json").read_text())


TABLES = {
    "measured": measured_table,
    "projection": bench_projection.table,
    "topk": bench_projection.topk_table,
    "step time": step_time_page.error_table,
    "anchors": step_time_page.anchor_table,
    "road": bench_projection.road_table,
    "ours": bench_projection.ours_table,
    "constants": step_time_page.constant_table,
    "hardware": step_time_page.hardware_table,
}
"""Marker on the page → what stands there."""


if __name__ == "__main__":
    run_program(main)
