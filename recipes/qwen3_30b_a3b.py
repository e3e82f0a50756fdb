"""Qwen3-30B-A3B ← Qwen3-30B-A3B-Thinking-2507, the mixture-of-experts pair of the paper.

    python -m lopd_megatron.launch --executor sbatch --recipe recipes/qwen3_30b_a3b.py:sft \\
        --recipe recipes/qwen3_30b_a3b.py:lightning_opd --dry-run

Layouts are for GPUs of 80 GB and packed rows of 16,384 tokens; `lopd plan` finds others.
"""

from __future__ import annotations

from lopd_megatron.config import RunConfig

from . import paper
from .paper import Layout

PAIR = paper.Pair(
    name="qwen3_30b_a3b",
    base="models/Qwen3-30B-A3B-Base",
    teacher="models/Qwen3-30B-A3B-Thinking-2507",
    sft_rows=128,
    teacher_gpus=2,
    student_gpus=2,
)
LAYOUTS = {
    8: Layout(tp=2, ep=8, recompute="full"),
    16: Layout(tp=2, ep=8, recompute="selective", modules=("moe",)),
    32: Layout(tp=2, ep=8, recompute="selective", modules=("moe",)),
}
"""By number of GPUs: what the memory model says fits, with the least recomputation and communication."""


def sft(gpus: int = 32) -> RunConfig:
    return paper.place(paper.sft(PAIR), LAYOUTS, gpus)


def lightning_opd(gpus: int = 8) -> RunConfig:
    return paper.place(paper.lightning_opd(PAIR), LAYOUTS, gpus)


def lightning_opd_topk(gpus: int = 8) -> RunConfig:
    return paper.place(paper.lightning_opd_topk(PAIR), LAYOUTS, gpus)


def standard_opd(gpus: int = 8) -> RunConfig:
    return paper.place(paper.standard_opd(PAIR), LAYOUTS, gpus)
