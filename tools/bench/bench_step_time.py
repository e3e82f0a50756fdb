"""Predicted against published throughput.

    python tools/bench/bench_step_time.py [TABLE.csv] [--rows]

Any table with the columns of docs/benchmarks/published_throughput.csv. A row of an unknown model, system or
precision is named and skipped. The last line is one JSON object: rows, median_abs_rel_error,
p90_abs_rel_error, by_system, by_model, skipped, rank_correlation.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lopd_megatron.errors import run_program
from lopd_megatron.performance.fit import summary
from lopd_megatron.performance.published import THROUGHPUT, Row, read_rows
from lopd_megatron.performance.rank import layout_correlations
from lopd_megatron.performance.step_time import StepModel


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", nargs="?", type=Path, default=THROUGHPUT)
    parser.add_argument("--rows", action="store_true", help="print every row")
    options = parser.parse_args()
    rows, unknown = read_rows(options.csv)
    for line in unknown:
        print(line)
    model = StepModel()
    predicted = [row.predicted(model) for row in rows]
    if options.rows:
        print_rows(rows, predicted)
    print(json.dumps(result(rows, predicted) | {"skipped": len(unknown)}))


def print_rows(rows: Sequence[Row], predicted: Sequence[float]) -> None:
    for row, value in zip(rows, predicted, strict=True):
        error = value / row.tokens_per_second - 1
        print(f"{row.label:84s} published {row.tokens_per_second:7.0f} predicted {value:7.0f} {error:+.1%}")


def result(rows: Sequence[Row], predicted: Sequence[float]) -> dict[str, object]:
    """The errors as one object; None where there is no row."""
    if not rows:
        nothing = {"median_abs_rel_error": None, "p90_abs_rel_error": None}
        return {"rows": 0, **nothing, "by_system": {}, "by_model": {}, "rank_correlation": {}}
    ratios = np.log(np.array(predicted) / np.array([row.tokens_per_second for row in rows]))

    def by(key: Callable[[Row], str]) -> dict[str, dict[str, float]]:
        groups: dict[str, list[int]] = defaultdict(list)
        for number, row in enumerate(rows):
            groups[key(row)].append(number)
        return {
            name: {"rows": len(members), **summary(ratios[members])}
            for name, members in sorted(groups.items())
        }

    correlations = layout_correlations(rows, predicted)
    return {
        "rows": len(rows),
        **summary(ratios),
        "by_system": by(lambda row: row.system),
        "by_model": by(lambda row: row.model),
        "rank_correlation": {
            name: round(value, 3) for name, (_, value) in correlations.items() if not math.isnan(value)
        },
    }


if __name__ == "__main__":
    run_program(main)
