"""docs/study.md from results: tables, plots, verdicts. No number in it is written by hand."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from lopd_megatron.files import atomic_path, write_json
from lopd_megatron.study.plots import plots, summary_plot
from lopd_megatron.study.statistics import (
    Claim,
    Interval,
    Metric,
    Result,
    Results,
    at_end,
    over_seeds,
    quality,
    total_seconds,
    until,
)

STAGES = ("rollouts", "generate", "scores", "dataset", "sync", "train")
LEVELS = (0.8, 0.9, 0.97)


def collect(runs: Path, kept: Path, is_current: Callable[[Result], bool]) -> Results:
    """The results below `runs` over those kept earlier in `kept`, which is brought up to date.

    A result of other settings than today's is left out, so that no mean is over two recipes.
    """
    results: Results = {}
    for result in (*read_kept(kept), *_read_runs(runs)):
        if is_current(result):
            results.setdefault(result["cell"], {})[result["seed"]] = result
    write_json(kept, {"machine": f"{platform.system()} {platform.machine()}, CPU", "cells": results})
    return results


def read_kept(kept: Path) -> list[Result]:
    """Results of earlier runs, on this machine or on others."""
    if not kept.exists():
        return []
    cells = json.loads(kept.read_text())["cells"]
    return [result for by_seed in cells.values() for result in by_seed.values()]


def _read_runs(runs: Path) -> Iterator[Result]:
    for path in sorted(runs.glob("seed_*/*/result.json")):
        result = json.loads(path.read_text())
        for bulky in ("config", "metrics"):
            result.pop(bulky, None)
        yield result


def write_report(
    path: Path,
    results: Results,
    groups: Mapping[str, Sequence[str]],
    claims: Sequence[Claim],
    introduction: str,
) -> None:
    """`groups`: heading → cells, all that were planned; those without a result are named at the end."""
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    parts = [introduction.strip(), *verdicts(results, claims)]
    for heading, cells in groups.items():
        known = [cell for cell in cells if cell in results]
        if known:
            parts += [f"## {heading}", quality_table(results, known), cost_table(results, known)]
    parts += plots(folder, results, groups)
    summary_plot(folder / "summary.png", results)
    parts += ["## EffOPD: what was accepted", effopd_table(results), *not_run(results, groups)]
    with atomic_path(path) as temporary:
        temporary.write_text("\n\n".join(part for part in parts if part) + "\n")


def verdicts(results: Results, claims: Sequence[Claim]) -> list[str]:
    rows = []
    for claim in claims:
        found = claim.difference(results)
        shown = f"{found.text(claim.scale, 2)} {claim.unit}, n = {found.count}" if found else "–"
        rows.append((claim.source, claim.text, shown, claim.verdict(results)))
    note = (
        "The difference is taken seed by seed (a positive one is in favour of the claim) and shown with its "
        "95 % interval. A claim holds when the whole interval is on its side."
    )
    return ["## Verdicts", note, table(("source", "claim", "difference", "verdict"), rows)]


def quality_table(results: Results, cells: Sequence[str]) -> str:
    columns: list[tuple[str, Metric, float, int]] = [
        ("greedy %", quality("greedy"), 100, 1),
        ("T = 1 %", quality("sampled"), 100, 1),
        ("reverse KL, nats/token", quality("reverse_kl"), 1, 4),
        ("validation greedy %", at_end, 100, 1),
    ]
    rows = []
    for cell in cells:
        numbers = [
            _text(over_seeds(results, cell, metric), scale, digits) for _, metric, scale, digits in columns
        ]
        rows.append((f"`{cell}`", str(len(results[cell])), *numbers))
    return table(("cell", "seeds", *(name for name, *_ in columns)), rows)


def cost_table(results: Results, cells: Sequence[str]) -> str:
    """Mean seconds by stage after the SFT student, and iterations and seconds to an accuracy."""
    stages = [s for s in STAGES if any(s in r["seconds"] for c in cells for r in results[c].values())]
    header = (
        "cell",
        *(f"{stage} s" for stage in stages),
        "total s",
        *(f"to {level:.0%}" for level in LEVELS),
    )
    rows = []
    for cell in cells:
        by_stage = [
            _mean(over_seeds(results, cell, lambda r, s=stage: r["seconds"].get(s)))  # type: ignore[misc]
            for stage in stages
        ]
        reached = [_reached(results, cell, level) for level in LEVELS]
        rows.append((f"`{cell}`", *by_stage, _mean(over_seeds(results, cell, total_seconds)), *reached))
    return table(header, rows)


def _reached(results: Results, cell: str, level: float) -> str:
    iterations = over_seeds(results, cell, until(level, "iteration"))
    seconds = over_seeds(results, cell, until(level, "seconds"))
    if iterations is None or seconds is None:
        return "–"
    share = f" ({iterations.count}/{len(results[cell])})" if iterations.count < len(results[cell]) else ""
    return f"{iterations.mean:.0f} it., {seconds.mean:.0f} s{share}"


def effopd_table(results: Results) -> str:
    rows = []
    for cell, by_seed in results.items():
        for seed, result in sorted(by_seed.items()):
            if result["effopd"]:
                taken = ", ".join(f"{h['iteration']}: {h['multiplier']}" for h in result["effopd"])
                seconds = sum(h["seconds"] for h in result["effopd"])
                rows.append((f"`{cell}`", str(seed), taken, f"{seconds:.1f}"))
    return table(("cell", "seed", "after iteration: multiplier", "seconds of search"), rows)


def not_run(results: Results, groups: Mapping[str, Sequence[str]]) -> list[str]:
    missing = [cell for cells in groups.values() for cell in cells if cell not in results]
    seeds = {cell: len(by_seed) for cell, by_seed in results.items()}
    most = max(seeds.values(), default=0)
    fewer = [f"`{cell}` ({count})" for cell, count in seeds.items() if count < most]
    text = []
    if missing:
        text.append("Planned and not run yet: " + ", ".join(f"`{cell}`" for cell in missing) + ".")
    if fewer:
        text.append(f"With fewer than {most} seeds: " + ", ".join(fewer) + ".")
    return ["## What was not run", *(text or ["Everything planned was run."])]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; "" without rows."""
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mean(value: Interval | None) -> str:
    return "–" if value is None else f"{value.mean:.0f}"


def _text(value: Interval | None, scale: float, digits: int) -> str:
    return "–" if value is None else value.text(scale, digits)
