"""Curves of the study: accuracy over iterations and over seconds, mean over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lopd_megatron.study.statistics import Results, interval

SUMMARY = {
    "lightning_topk_1": "Lightning OPD, cached top-1 (ours)",
    "lightning": "Lightning OPD, sampled token (the paper)",
    "standard": "standard OPD, live teacher",
    "more_sft": "more SFT on the same data",
}
"""Cells of the picture on the front page, and what they are called there."""


def plots(folder: Path, results: Results, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Accuracy over iterations and over seconds, one pair of panels per group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = ["## Curves", "Greedy accuracy on validation problems, mean over seeds."]
    for heading, cells in groups.items():
        shown = [cell for cell in cells if any(r["curve"] for r in results.get(cell, {}).values())]
        if not shown:
            continue
        figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
        for cell in shown:
            for axis, what in zip(axes, ("iteration", "seconds"), strict=True):
                axis.plot(*_mean_curve(list(results[cell].values()), what), marker=".", label=cell)
        for axis, label in zip(axes, ("iterations", "seconds, rollouts and scores included"), strict=True):
            axis.set_xlabel(label)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("accuracy")
        axes[0].legend(fontsize=7)
        figure.tight_layout()
        name = f"{heading.split(':')[0].lower().replace(' ', '_')}.png"
        figure.savefig(folder / name, dpi=110, metadata={"Software": None})
        pyplot.close(figure)
        parts.append(f"![{heading}]({folder.name}/{name})")
    return parts


def _mean_curve(by_seed: list[dict[str, Any]], what: str) -> tuple[list[float], list[float]]:
    """Means at the iterations that all seeds have."""
    curves = [{p["iteration"]: p for p in result["curve"]} for result in by_seed if result["curve"]]
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    x = [sum(curve[i][what] for curve in curves) / len(curves) for i in common]
    return x, [sum(curve[i]["value"] for curve in curves) / len(curves) for i in common]


def summary_plot(path: Path, results: Results) -> None:
    """One picture for the front page: accuracy over seconds, with 95 % intervals over seeds as bands."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.2, 3.6))
    for cell, label in SUMMARY.items():
        if cell not in results:
            continue
        seconds, accuracy, half = _band([r for r in results[cell].values() if r["curve"]])
        axis.plot(seconds, accuracy, label=label)
        low = [100 * max(0.0, a / 100 - h) for a, h in zip(accuracy, half, strict=True)]
        high = [100 * min(1.0, a / 100 + h) for a, h in zip(accuracy, half, strict=True)]
        axis.fill_between(seconds, low, high, alpha=0.2)
    axis.set_xscale("log")
    axis.set_xlabel("seconds after SFT: rollouts, scores and training (one CPU core, log scale)")
    axis.set_ylabel("accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=140, metadata={"Software": None})
    pyplot.close(figure)


def _band(by_seed: Sequence[dict[str, Any]]) -> tuple[list[float], list[float], list[float]]:
    """Seconds, accuracy in percent and half the width of its interval at the iterations all seeds have."""
    curves = [{point["iteration"]: point for point in result["curve"]} for result in by_seed]
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    seconds = [sum(curve[i]["seconds"] for curve in curves) / len(curves) for i in common]
    values = [interval([curve[i]["value"] for curve in curves]) for i in common]
    means = [100 * value.mean for value in values if value]
    halves = [(value.half or 0.0) for value in values if value]
    return seconds, means, halves
