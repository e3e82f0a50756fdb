"""GPU-hours of the paper's runs from the model of time: predicted, not measured.

rollouts  decoding on every GPU, vLLM's memory for the cache (performance/stages.py)
scoring   one forward pass, response rows alone through the head
training  the fastest layout that fits, with this trainer's software and with that of published runs
top-k     bytes of its columns; no products: the teacher's logits are read once more
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from lopd_megatron.config import RunConfig
from lopd_megatron.performance.hardware import GPUS
from lopd_megatron.performance.known_models import known_config
from lopd_megatron.performance.ours import DIFFERENCES, price_list
from lopd_megatron.performance.prediction import Batch, fitted_model, training_step
from lopd_megatron.performance.search import Plan, search_layouts
from lopd_megatron.performance.shapes import shape_from_hf
from lopd_megatron.performance.software import Software
from lopd_megatron.performance.stages import decode, response_lengths, score_seconds
from lopd_megatron.performance.step_time import Step
from lopd_megatron.records import COLUMNS

GPU = GPUS["H100"]
STEPS, BATCH, ROLLOUTS = 150, 256, 17_398
PROMPT, RESPONSE = 150, 4096
"""Tokens. Every response at the limit, so an upper bound; the prompt's length is assumed."""
STEP = Batch(BATCH * (PROMPT + RESPONSE), PROMPT + RESPONSE, RESPONSE / (PROMPT + RESPONSE))


@dataclass(frozen=True)
class Pair:
    student: str
    teacher: str
    gpus: int
    """Of the training."""
    engine_gpus: int
    """Of one engine that generates rollouts."""
    teacher_gpus: int
    """Of one engine that scores."""
    paper: tuple[int, int, int] | None
    """GPU-hours of rollouts, scoring and training (arXiv 2604.13010, cost figure)."""


PAIRS = {
    "4B ← 8B": Pair("Qwen3-4B", "Qwen3-8B", 8, 1, 1, (10, 2, 8)),
    "8B ← 32B": Pair("Qwen3-8B", "Qwen3-32B", 8, 1, 2, (10, 4, 16)),
    "30B-A3B ← 30B-A3B": Pair("Qwen3-30B-A3B", "Qwen3-30B-A3B", 16, 2, 2, None),
    "32B ← 235B-A22B": Pair("Qwen3-32B", "Qwen3-235B-A22B", 32, 2, 8, None),
}


@dataclass(frozen=True)
class Hours:
    """GPU-hours of the stages of a pair."""

    rollouts: float
    scoring: float
    training: float
    tuned: float
    """Training with the software of the published runs."""
    layout: str


@lru_cache
def stage_hours(name: str) -> Hours:
    """Predicted GPU-hours on H100s; the pair's name is a key of PAIRS."""
    pair = PAIRS[name]
    plan = best_plan(pair)
    tuned = replace(training(pair, plan), software=published(plan))
    return Hours(
        rollouts=rollout_hours(pair),
        scoring=score_hours(pair),
        training=STEPS * plan.seconds * pair.gpus / 3600,
        tuned=STEPS * fitted_model().predict(tuned).seconds * pair.gpus / 3600,
        layout=f"{pair.gpus} GPUs, {plan.label}",
    )


def rollout_hours(pair: Pair, value_bytes: float = 2.0) -> float:
    """GPU-hours of decoding on eight GPUs; one byte a value: FP8 weights and cache."""
    made = decode(
        shape_from_hf(_hf(pair.student)),
        GPU,
        lengths=response_lengths(ROLLOUTS, RESPONSE, None),
        prompt=PROMPT,
        engines=8 // pair.engine_gpus,
        gpus_per_engine=pair.engine_gpus,
        max_sequences=256,
        value_bytes=value_bytes,
    )
    return made.seconds * 8 / 3600


def score_hours(pair: Pair, precision: str = "bf16") -> float:
    """GPU-hours of one forward pass of the teacher over all rollouts."""
    seconds = score_seconds(
        fitted_model(),
        shape_from_hf(_hf(pair.teacher)),
        GPU,
        tokens=ROLLOUTS * (PROMPT + RESPONSE),
        length=PROMPT + RESPONSE,
        response=RESPONSE,
        tp=pair.teacher_gpus,
        precision=precision,
    )
    return seconds / 3600


def road_table() -> list[str]:
    """Markdown: what would bring the 8B pipeline below eight H100-hours, one after the other."""
    pair, today = PAIRS["8B ← 32B"], stage_hours("8B ← 32B")
    rollouts, scoring, train = today.rollouts, today.scoring, today.training
    lines = ["| 8B ← 32B, H100-hours | rollouts | scoring | training | sum |", "|---|---:|---:|---:|---:|"]
    for name, change in (
        ("this project", {}),
        ("training with the software of the published runs", {"train": today.tuned}),
        ("rollouts with FP8 weights and cache", {"rollouts": rollout_hours(pair, 1.0)}),
        ("teacher in FP8", {"scoring": score_hours(pair, "fp8_cs")}),
        ("training products in FP8", {"train": fp8_hours(pair)}),
    ):
        rollouts = change.get("rollouts", rollouts)
        scoring = change.get("scoring", scoring)
        train = change.get("train", train)
        total = rollouts + scoring + train
        lines.append(f"| {name} | {rollouts:.1f} | {scoring:.1f} | {train:.1f} | {total:.1f} |")
    return lines


def fp8_hours(pair: Pair) -> float:
    """GPU-hours of training with the published software and FP8 products."""
    plan = best_plan(pair)
    step = replace(training(pair, plan), software=published(plan), precision="fp8_cs")
    return STEPS * fitted_model().predict(step).seconds * pair.gpus / 3600


@lru_cache
def best_plan(pair: Pair) -> Plan:
    """The fastest layout of the training that fits."""
    config = RunConfig()
    config.loss.head_chunk_tokens = 2048
    plans, _ = search_layouts(_hf(pair.student), config, GPU, pair.gpus, STEP)
    return plans[0]


def training(pair: Pair, plan: Plan) -> Step:
    return training_step(shape_from_hf(_hf(pair.student)), plan.config, GPU, pair.gpus, STEP)


def published(plan: Plan) -> Software:
    """The settings of the published runs in this layout."""
    software = training_step(shape_from_hf(_hf("Qwen3-8B")), RunConfig(), GPU, 8, STEP).software
    for _, settings in DIFFERENCES:
        if "fused_experts" not in settings:  # for FP8 only
            software = replace(software, **settings)
    selective = plan.config.train.recompute_granularity == "selective"
    return replace(
        software,
        recompute_layers=1_000_000 if plan.config.train.recompute_granularity == "full" else 0,
        recompute_modules=frozenset(plan.config.train.recompute_modules if selective else ()),
    )


def _hf(name: str) -> dict[str, Any]:
    found = known_config(name)
    assert found is not None, name
    return found


def bytes_per_token(k: int) -> int:
    """Of a dataset with k cached teacher tokens."""
    return sum(np.dtype(c.dtype).itemsize * (k if c.per_topk else 1) for c in COLUMNS.values())


def selection_hours(name: str) -> float:
    """GPU-hours of finding the k largest of the teacher's float32 logits: one read of them."""
    return ROLLOUTS * RESPONSE * 4 * _hf(PAIRS[name].teacher)["vocab_size"] / GPU.hbm / 3600


def table() -> list[str]:
    """Markdown."""
    lines = [
        "| student ← teacher | rollouts | scoring | training | sum | training, published software "
        "| layout | paper |",
        "|---|---:|---:|---:|---:|---:|---|---|",
    ]
    for name, pair in PAIRS.items():
        hours = stage_hours(name)
        cells = [hours.rollouts, hours.scoring, hours.training]
        shown = [f"{value:.1f}" for value in (*cells, sum(cells), hours.tuned)]
        paper = f"{' + '.join(map(str, pair.paper))} = {sum(pair.paper)}" if pair.paper else "not published"
        lines.append(f"| {' | '.join([name, *shown, hours.layout, paper])} |")
    return lines


def topk_table() -> list[str]:
    """Markdown: what k cached teacher tokens cost, for the 8B student."""
    name = "8B ← 32B"
    found = stage_hours(name)
    hours, paper = found.rollouts + found.scoring + found.training, sum(PAIRS[name].paper or ())
    lines = [
        "| cached teacher tokens | bytes a token | 17,398 rollouts, GB | GPU-hours, 8B ← 32B | paper |",
        "|---|---:|---:|---:|---:|",
    ]
    for k in (0, 1, 2, 4, 8, 16, 32):
        size = ROLLOUTS * (PROMPT + RESPONSE) * bytes_per_token(k) / 1e9
        spent = hours + (selection_hours(name) if k else 0.0)
        label = f"{k}: `lightning_opd_topk`" if k == 16 else ("0: `lightning_opd`" if k == 0 else str(k))
        lines.append(f"| {label} | {bytes_per_token(k)} | {size:.1f} | {spent:.2f} | {'' if k else paper} |")
    return lines


def ours_table() -> list[str]:
    """Markdown: what published software has and this trainer lacks, in milliseconds of a step."""
    columns = []
    for name in ("8B ← 32B", "30B-A3B ← 30B-A3B"):
        plan = best_plan(PAIRS[name])
        step = replace(training(PAIRS[name], plan))
        columns.append({item: (before, after) for item, before, after in price_list(step)})
    heads = "8B dense, 8 × H100 | 30B-A3B, 16 × H100"
    lines = [f"| with, one after the other | {heads} |", "|---|---:|---:|"]
    starts = [f"{next(iter(column.values()))[0]:.2f} s" for column in columns]
    lines.append(f"| this trainer, a step of 256 × 4,246 tokens | {' | '.join(starts)} |")
    for item, settings in DIFFERENCES:
        if "fused_experts" in settings:
            continue  # for FP8 only
        cells = []
        for column in columns:
            before, after = column.get(item, (0.0, 0.0))
            cells.append(f"{after:.2f} s (−{before - after:.2f})" if before - after >= 0.005 else "–")
        lines.append(f"| {item} | {' | '.join(cells)} |")
    return lines
