"""Fit the step-time model to the published runs and cross-validate it.

    python tools/bench/fit_step_time.py [--csv TABLE.csv] [--dry-run]

Reads docs/benchmarks/published_throughput.csv and published_settings.csv, writes
lopd_megatron/performance/fit.json: constants, error of the fit, error of leaving one model out and of leaving
one family out. Takes about two minutes on one core. `--dry-run` prints and writes nothing.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lopd_megatron.errors import run_program
from lopd_megatron.files import write_json
from lopd_megatron.performance.constants import FIT, Constants
from lopd_megatron.performance.fit import fit, leave_one_out, log_ratios, summary
from lopd_megatron.performance.published import THROUGHPUT, read_rows
from lopd_megatron.progress import log_line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", type=Path, default=THROUGHPUT)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    rows, unknown = read_rows(options.csv)
    for line in unknown:
        log_line(line)
    constants = Constants(**{name: float(f"{value:.4g}") for name, value in asdict(fit(rows)).items()})
    result: dict[str, Any] = {
        "constants": asdict(constants),
        "rows": len(rows),
        "table": options.csv.name,
        "fitted": summary(log_ratios(rows, constants)),
    }
    log_line(f"fitted {len(rows)} rows: {result['fitted']}")
    for name, group in (
        ("leave_one_model_out", [row.model for row in rows]),
        ("leave_one_family_out", [family(row.model) for row in rows]),
    ):
        result[name] = summary(leave_one_out(rows, group, constants))
        log_line(f"{name.replace('_', ' ')} ({len(set(group))} groups): {result[name]}")
    if not options.dry_run:
        write_json(FIT, result)
        log_line(f"wrote {FIT}")


def family(model: str) -> str:
    """Models of one maker's line: llama3.1 is llama."""
    return model.split("-")[0].rstrip("0123456789.")


if __name__ == "__main__":
    run_program(main)
