"""Rank correlation of layouts: does the model order them as the published runs do?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lopd_megatron.performance.published import Row

ENOUGH = 4


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's correlation, ties with mean ranks; nan where one side does not vary."""
    x, y = _ranks(a), _ranks(b)
    if x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def layout_correlations(rows: Sequence[Row], predicted: Sequence[float]) -> dict[str, tuple[int, float]]:
    """(number, Spearman's correlation) for every model, system and kind of training with at least four runs.

    Rows of one layout, precision and software are one run: their means over releases are compared, because
    releases differ by what no layout says. Pretraining, SFT and LoRA are different work, not other layouts.
    """
    runs: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row, value in zip(rows, predicted, strict=True):
        software = row.step.software
        run = (
            f"{row.label.split(' ', 1)[1]} {software.graphs} {software.dispatcher} {software.overlap_experts}"
        )
        runs[f"{row.model} {row.system} {row.kind}"][run].append((row.tokens_per_second, value))
    found = {}
    for name, members in sorted(runs.items()):
        means = [np.mean(pairs, axis=0) for pairs in members.values()]
        if len(means) >= ENOUGH:
            found[name] = (
                len(means),
                spearman([m[0] for m in means], [m[1] for m in means]),
            )
    return found


def _ranks(values: Sequence[float]) -> NDArray[np.float64]:
    x = np.asarray(values)
    return np.array([((x < v).sum() + (x <= v).sum() - 1) / 2 for v in x], dtype=float)
