"""GPU-hours of the paper's runs from FLOPs, bytes and assumed utilisation: arithmetic, nothing is measured.

    training  3 · forward FLOPs / (peak · MFU); prompts do not pass the head
    scoring   forward FLOPs / (peak · MFU), every rollout once
    rollouts  generated tokens · bytes of a decoding step / sequences of it / (bandwidth · share)
    top-k     bytes of its columns; no FLOPs: the teacher's logits are read once more, training has its three
              products of the head

A decoding step reads all weights once (of a mixture every expert: batches are large) and the KV cache of as
many half-finished sequences as the memory holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lopd_megatron.config import RunConfig
from lopd_megatron.recipes.models import QWEN3_4B, QWEN3_8B, QWEN3_30B_A3B, QWEN3_32B
from lopd_megatron.records import COLUMNS

PEAK_FLOPS, BANDWIDTH, MEMORY = 989e12, 3.35e12, 80e9
"""An H100 SXM: dense bfloat16, bytes a second, bytes."""
TRAINING_MFU = {"dense": 0.50, "mixture": 0.28}
"""Published for 8B: 53-57 %; for 30B-A3B on eight GPUs 28 %, with routing forced to balance."""
SCORING_MFU = {"dense": 0.55, "mixture": 0.30}
DECODING_BANDWIDTH, CACHE_MEMORY = 0.60, 0.88
STEPS, BATCH, ROLLOUTS = 150, 256, 17_398
PROMPT, RESPONSE = 150, 4096
"""Tokens. Every response at the limit, so an upper bound; the prompt's length is assumed."""

QWEN3_235B_A22B = QWEN3_30B_A3B | {
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "moe_intermediate_size": 1536,
}


@dataclass(frozen=True)
class Pair:
    student: dict[str, Any]
    teacher: dict[str, Any]
    engine_gpus: int
    """Of one engine that generates rollouts."""
    paper: tuple[int, int, int] | None
    """GPU-hours of rollouts, scoring and training (arXiv 2604.13010, cost figure)."""


PAIRS = {
    "4B ← 8B": Pair(QWEN3_4B, QWEN3_8B, 1, (10, 2, 8)),
    "8B ← 32B": Pair(QWEN3_8B, QWEN3_32B, 1, (10, 4, 16)),
    "30B-A3B ← 30B-A3B": Pair(QWEN3_30B_A3B, QWEN3_30B_A3B, 2, None),
    "32B ← 235B-A22B": Pair(QWEN3_32B, QWEN3_235B_A22B, 2, None),
}


def stage_hours(pair: Pair) -> tuple[float, float, float]:
    """GPU-hours of rollouts, scoring and training."""
    rollouts = ROLLOUTS * RESPONSE / decoding_rate(pair.student, pair.engine_gpus) / 3600
    scoring = ROLLOUTS * forward(pair.teacher) / (PEAK_FLOPS * SCORING_MFU[kind(pair.teacher)]) / 3600
    return rollouts, scoring, training_hours(pair, TRAINING_MFU[kind(pair.student)])


def training_hours(pair: Pair, mfu: float) -> float:
    return STEPS * BATCH * 3 * forward(pair.student) / (PEAK_FLOPS * mfu) / 3600


def kind(hf: dict[str, Any]) -> str:
    return "mixture" if "num_experts" in hf else "dense"


def forward(hf: dict[str, Any]) -> float:
    """FLOPs of one forward pass over one rollout, whose response rows alone pass the head."""
    from lopd_megatron.model.flops import forward_flops

    return forward_flops(_spec(hf), [PROMPT + RESPONSE], head_tokens=RESPONSE)


def decoding_rate(hf: dict[str, Any], gpus: int) -> float:
    """Generated tokens a second and GPU."""
    from lopd_megatron.model.memory_estimate import rank_parameters

    weights = 2 * rank_parameters(_spec(hf), 0).total
    cache_per_token = 2 * 2 * hf["num_hidden_layers"] * hf["num_key_value_heads"] * hf["head_dim"]
    context = PROMPT + RESPONSE / 2
    sequences = (CACHE_MEMORY * MEMORY * gpus - weights) / (context * cache_per_token)
    step_bytes = weights + sequences * context * cache_per_token
    return sequences / (step_bytes / (gpus * BANDWIDTH * DECODING_BANDWIDTH)) / gpus


def bytes_per_token(k: int) -> int:
    """Of a dataset with k cached teacher tokens."""
    return sum(np.dtype(c.dtype).itemsize * (k if c.per_topk else 1) for c in COLUMNS.values())


def selection_hours(pair: Pair) -> float:
    """GPU-hours of finding the k largest of the teacher's float32 logits: one read of them."""
    return ROLLOUTS * RESPONSE * 4 * pair.teacher["vocab_size"] / BANDWIDTH / 3600


def _spec(hf: dict[str, Any]) -> Any:
    from lopd_megatron.model.student_spec import student_spec

    return student_spec(hf, RunConfig(), attention="varlen")


def table() -> list[str]:
    """Markdown."""
    lines = [
        "| student ← teacher | rollouts | scoring | training | sum | training at 40 % MFU | paper |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, pair in PAIRS.items():
        hours = stage_hours(pair)
        cells = [*hours, sum(hours), training_hours(pair, 0.40)]
        shown = [f"{value:.1f}" for value in cells]
        if kind(pair.student) == "mixture":
            shown[-1] = "–"
        paper = "not published"
        if pair.paper:
            paper = f"{' + '.join(map(str, pair.paper))} = {sum(pair.paper)}"
        lines.append(f"| {' | '.join([name, *shown, paper])} |")
    return lines


def topk_table() -> list[str]:
    """Markdown: what k cached teacher tokens cost beside the sampled one, for the 8B student."""
    pair = PAIRS["8B ← 32B"]
    hours, paper = sum(stage_hours(pair)), sum(pair.paper or ())
    lines = [
        "| cached teacher tokens | bytes a token | 17,398 rollouts, GB | GPU-hours, 8B ← 32B | paper |",
        "|---|---:|---:|---:|---:|",
    ]
    for k in (0, 1, 2, 4, 8, 16, 32):
        size = ROLLOUTS * (PROMPT + RESPONSE) * bytes_per_token(k) / 1e9
        spent = hours + (selection_hours(pair) if k else 0.0)
        name = f"{k}: `lightning_opd_topk`" if k == 16 else ("0: `lightning_opd`" if k == 0 else str(k))
        lines.append(f"| {name} | {bytes_per_token(k)} | {size:.1f} | {spent:.2f} | {'' if k else paper} |")
    return lines
