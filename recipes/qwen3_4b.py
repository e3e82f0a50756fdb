"""Qwen3-4B ← Qwen3-8B, the smaller pair of the paper.

    python -m lopd_megatron.launch --executor sbatch --recipe recipes/qwen3_4b.py:sft \\
        --recipe recipes/qwen3_4b.py:lightning_opd --dry-run

Layouts are for GPUs of 80 GB and packed rows of 16,384 tokens; `lopd plan` finds others.
"""

from __future__ import annotations

from lopd_megatron.config import RunConfig

from . import paper
from .paper import Layout

PAIR = paper.Pair(name="qwen3_4b", base="models/Qwen3-4B-Base", teacher="models/Qwen3-8B", sft_rows=256)
LAYOUTS = {
    8: Layout(tp=1, recompute="selective"),
    32: Layout(tp=1, recompute="selective"),
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
