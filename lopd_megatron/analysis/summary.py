"""Means over matrices and shares of the update norm, for each checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lopd_megatron.analysis.updates import Row

AVERAGED = (
    "spectral_norm",
    "spectral_to_frobenius",
    "stable_rank",
    "effective_rank",
    "top1_percent_norm_ratio",
    "subspace_alignment",
    "rank1_cosine",
    "trajectory_concentration",
)


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Per checkpoint: means of the spectral metrics over matrices, and shares of the squared update norm."""
    labels = list(dict.fromkeys(row["checkpoint"] for row in rows))
    return {label: _summary([row for row in rows if row["checkpoint"] == label]) for label in labels}


def _summary(rows: Sequence[Row]) -> dict[str, Any]:
    total = sum(row["frobenius"] ** 2 for row in rows)
    result: dict[str, Any] = {"update_norm": total**0.5}
    for key in ("group", "module"):
        names = sorted({row[key] for row in rows})
        result[f"{key}_share"] = {
            name: sum(row["frobenius"] ** 2 for row in rows if row[key] == name) / total if total else 0.0
            for name in names
        }
    result["matrices"] = sum("spectral_norm" in row for row in rows)
    result["randomized_matrices"] = sum(row.get("exact") is False for row in rows)
    rounding = sum((row["rounding_share"] * row["frobenius"]) ** 2 for row in rows) ** 0.5
    result["rounding_share"] = rounding / total**0.5 if total else 0.0
    for group in (None, "attention", "mlp"):
        chosen = [row for row in rows if group in (None, row["group"])]
        result[f"mean_{group or 'all'}"] = dict(_means(chosen))
    return result


def _means(rows: Sequence[Row]) -> Iterator[tuple[str, float]]:
    for name in AVERAGED:
        values = [row[name] for row in rows if name in row]
        if values:
            yield name, sum(values) / len(values)
