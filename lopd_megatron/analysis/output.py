"""The result of an analysis as files: CSV of all rows, JSON of the means, and plots."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lopd_megatron.analysis.updates import Row
from lopd_megatron.files import atomic_path, write_json

PANELS = {
    "spectral_norm": "spectral norm",
    "spectral_to_frobenius": "spectral / Frobenius norm",
    "effective_rank": "effective rank",
    "top1_percent_norm_ratio": "top-1 % norm ratio",
}


def write_report(output: Path, rows: Sequence[Row], summary: dict[str, Any]) -> list[Path]:
    """`tensors.csv`, `summary.json` and the plots; returns what was written."""
    written = [
        output / "tensors.csv",
        output / "summary.json",
        output / "by_layer.png",
        output / "shares.png",
    ]
    _write_csv(written[0], rows)
    write_json(written[1], summary)
    labels = list(summary)
    _plot_by_layer(written[2], [row for row in rows if row["checkpoint"] == labels[-1]], labels[-1])
    _plot_shares(written[3], summary)
    if len(labels) > 1:
        written.append(output / "alignment.png")
        _plot_alignment(written[-1], rows, labels)
    return written


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_path(path) as temporary, temporary.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, columns, restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow(row | {"shape": "x".join(map(str, row["shape"]))})


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        rows, columns, figsize=(width, height), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    pyplot.close(figure)


def _plot_by_layer(path: Path, rows: Sequence[Row], label: str) -> None:
    figure, axes = _figure(11, 7, 2, 2)
    modules = list(dict.fromkeys(row["module"] for row in rows if "spectral_norm" in row))
    for axis, (metric, title) in zip(axes.flat, PANELS.items(), strict=True):
        for module in modules:
            points = _mean_by([row for row in rows if row["module"] == module], "layer", metric)
            axis.plot(list(points), list(points.values()), marker="o", markersize=3, label=module)
        axis.set(title=title, xlabel="layer")
    if modules:
        axes[0][0].legend(fontsize=8, ncols=2)
    figure.suptitle(f"Weight update at {label}")
    _save(figure, path)


def _plot_shares(path: Path, summary: dict[str, Any]) -> None:
    figure, axes = _figure(1.2 * len(summary) + 4, 4)
    labels = list(summary)
    modules = sorted({name for entry in summary.values() for name in entry["module_share"]})
    bottom = [0.0] * len(labels)
    for module in modules:
        heights = [summary[label]["module_share"].get(module, 0.0) for label in labels]
        axes[0][0].bar(labels, heights, bottom=bottom, label=module)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes[0][0].set(title="Share of the squared update norm", ylim=(0, 1))
    axes[0][0].tick_params(axis="x", rotation=30)
    figure.legend(loc="outside right upper", fontsize=8)
    _save(figure, path)


def _plot_alignment(path: Path, rows: Sequence[Row], labels: Sequence[str]) -> None:
    figure, axes = _figure(1.2 * len(labels) + 4, 4)
    for module in dict.fromkeys(row["module"] for row in rows if "subspace_alignment" in row):
        chosen = [row for row in rows if row["module"] == module]
        points = _mean_by(chosen, "checkpoint", "subspace_alignment")
        axes[0][0].plot(list(points), list(points.values()), marker="o", label=module)
    axes[0][0].set(title="Alignment of the leading right subspace with the last checkpoint", ylim=(0, 1.05))
    axes[0][0].tick_params(axis="x", rotation=30)
    figure.legend(loc="outside right upper", fontsize=8)
    _save(figure, path)


def _mean_by(rows: Sequence[Row], key: str, metric: str) -> dict[Any, float]:
    """Mean of a metric for each value of a column, in the order of the rows."""
    values: dict[Any, list[float]] = {}
    for row in rows:
        if metric in row:
            values.setdefault(row[key], []).append(row[metric])
    return {name: sum(found) / len(found) for name, found in values.items()}
