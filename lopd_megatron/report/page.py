"""Run folder → one self-contained HTML page: no network, no scripts, light and dark."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lopd_megatron.config import RunConfig
from lopd_megatron.report.cost import PAPER_8B, STAGES, paper_shares, shares, stage_costs
from lopd_megatron.report.curves import (
    held_out_figures,
    position_figures,
    staleness_figures,
    training_figures,
)
from lopd_megatron.report.gaps import GapSample, open_tokenizer, read_gaps
from lopd_megatron.report.headline import headlines
from lopd_megatron.report.lineage_diagram import lineage_picture, rules
from lopd_megatron.report.run_folder import RunFolder, fresh_scores, read_evaluations
from lopd_megatron.report.svg import error_bars, histogram, number, stacked_bars
from lopd_megatron.report.warnings import findings

GAP_EDGES = np.linspace(-4.0, 2.0, 49)


def render(run: RunFolder, *, documents: int = 4) -> str:
    """The page as text; `documents` rollouts are shown before and after training."""
    environment = Environment(
        loader=PackageLoader("lopd_megatron.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    costs = stage_costs(run)
    own = shares(costs)
    bars = ([("this run", own)] if own else []) + [("paper, 8B", paper_shares())]
    return environment.get_template("page.html").render(
        run=run,
        facts=_facts(run),
        headlines=headlines(run),
        held_out=held_out_figures(run.validations),
        findings=findings(run),
        picture=lineage_picture(run),
        rules=rules(run),
        lineage=run.data_lineage,
        lengths=[(_length_chart(manifest), manifest) for manifest in run.datasets],
        training=training_figures(run.metrics),
        positions=[] if run.is_sft else position_figures(run.metrics),
        staleness=[] if run.is_sft else staleness_figures(run.metrics, run.config),
        samples=_samples(run, documents),
        evaluations=_evaluations(run),
        costs=costs,
        cost_chart=stacked_bars(bars, STAGES),
        paper_hours=PAPER_8B,
        settings=_settings(run.config),
    )


def _facts(run: RunFolder) -> list[tuple[str, str]]:
    """The few numbers above everything else."""
    facts: list[tuple[str, str]] = []
    if run.config:
        facts.append(("objective", run.config.loss.objective))
    if run.datasets:
        facts.append(("trained tokens", f"{sum(m.trained_tokens for m in run.datasets):,}"))
    if run.metrics:
        facts.append(("iterations", f"{run.metrics[-1]['iteration']:,}"))
        first, last = run.metrics[0], run.metrics[-1]
        name = next(name for name in ("reverse_kl", "k2", "loss") if name in last)
        facts.append((f"{name}, trained on", f"{number(first[name])} → {number(last[name])}"))
    for summary in run.evaluations[:1]:
        value, error = 100 * summary["accuracy"], 100 * summary["standard_error"]
        facts.append(("accuracy", f"{value:.1f} ± {error:.1f} %"))
    return facts


def _length_chart(manifest: Any) -> Markup:
    """The manifest's histogram of document lengths, its empty ends cut off up to a margin."""
    counts, edges = manifest.lengths["counts"], manifest.lengths["edges"]
    filled = np.flatnonzero(counts)
    first, last = max(int(filled[0]) - 3, 0), min(int(filled[-1]) + 3, len(counts) - 1)
    return histogram(edges[first : last + 2], counts[first : last + 1], "tokens per document")


def _samples(run: RunFolder, documents: int) -> list[dict[str, Any]]:
    """Scored rollouts before training, and after it where the trained student wrote new ones."""
    found = []
    before = (run.folder, run.scored) if run.scored else None
    for label, source in (("before", before), ("after", fresh_scores(run))):
        if source is None:
            continue
        folder, scores = source
        origin = scores.lineage.tokenizer
        sample: GapSample = read_gaps(
            scores, open_tokenizer([origin["origin"] if origin else "", str(run.folder / "hf")]), documents
        )
        chart = histogram(GAP_EDGES.tolist(), sample.histogram(GAP_EDGES), "gap, nats")
        found.append({"label": label, "folder": folder, "sample": sample, "chart": chart})
    return found


def _evaluations(run: RunFolder) -> dict[str, Any]:
    """This run's models, and the student and teacher it came from where they answered the same problems."""
    own = run.evaluations
    if not own:
        return {"rows": [], "chart": None, "gain": None}
    start = _of_model(run.config.model.student if run.config else "", own[0])
    teacher = _of_model(run.config.model.teacher if run.config else "", own[0])
    rows = [("teacher", row) for row in teacher] + [("start", row) for row in start]
    rows += [("this run", row) for row in own]
    percent = [(row["name"], 100 * row["accuracy"], 100 * row["standard_error"]) for _, row in rows]
    gain = None
    if start:
        difference = own[0]["accuracy"] - start[0]["accuracy"]
        error = math.hypot(own[0]["standard_error"], start[0]["standard_error"])
        gain = {"points": 100 * difference, "error": 100 * error}
    return {"rows": rows, "chart": error_bars(percent, " %"), "gain": gain}


def _of_model(model: str, own: dict[str, Any]) -> list[dict[str, Any]]:
    """Evaluations in the run that exported `model`, on the same problems with the same sampling."""
    folder = Path(model).parent / "evaluation"
    if not model or not folder.is_dir():
        return []
    return [
        summary
        for summary in read_evaluations(folder)
        if all(summary["lineage"][key] == own["lineage"][key] for key in ("prompts", "sampling"))
    ]


def _settings(config: RunConfig | None) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """(section, [(field, value, differs from the default)])."""
    if config is None:
        return []
    default = RunConfig().leaves()
    sections: dict[str, list[tuple[str, str, bool]]] = {}
    for key, value in config.leaves().items():
        section, _, field = key.partition(".")
        name = (section, field) if field else ("run", section)
        if hasattr(value, "model_dump"):
            value = value.model_dump(mode="json")
        text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value or "—"
        sections.setdefault(name[0], []).append((name[1], text, value != default[key]))
    return list(sections.items())
