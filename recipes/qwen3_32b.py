"""A 32B student, four times the largest dense one of the paper: Qwen3-32B ← Qwen3-235B-A22B-Thinking-2507.

    python -m lopd_megatron.launch --executor sbatch --recipe recipes/qwen3_32b.py:sft \\
        --recipe recipes/qwen3_32b.py:lightning_opd --dry-run

Layouts are for GPUs of 80 GB and packed rows of 16,384 tokens; `lopd plan` finds others.
"""

from __future__ import annotations

from lopd_megatron.config import RunConfig

from . import paper
from .paper import Layout

PAIR = paper.Pair(
    name="qwen3_32b",
    base="models/Qwen3-32B",
    teacher="models/Qwen3-235B-A22B-Thinking-2507",
    sft_rows=128,
    teacher_gpus=8,
    student_gpus=2,
)
LAYOUTS = {
    8: Layout(tp=8, recompute="full"),
    16: Layout(tp=8, recompute="selective"),
    32: Layout(tp=8, recompute="selective"),
    64: Layout(tp=4, pp=4, recompute="selective"),
}
"""By number of GPUs: what the memory model says fits, with the least recomputation and communication."""


def sft(gpus: int = 32) -> RunConfig:
    return paper.place(paper.sft(PAIR), LAYOUTS, gpus)


def lightning_opd(gpus: int = 16) -> RunConfig:
    return paper.place(paper.lightning_opd(PAIR), LAYOUTS, gpus)


def lightning_opd_topk(gpus: int = 16) -> RunConfig:
    return paper.place(paper.lightning_opd_topk(PAIR), LAYOUTS, gpus)


def standard_opd(gpus: int = 16) -> RunConfig:
    return paper.place(paper.standard_opd(PAIR), LAYOUTS, gpus)
