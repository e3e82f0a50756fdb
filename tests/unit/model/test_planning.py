"""Layouts for a cluster."""

from __future__ import annotations

from lopd_megatron.config import RunConfig
from lopd_megatron.model.memory_estimate import OVERHEAD_BYTES
from lopd_megatron.model.planning import feasible_layouts
from lopd_megatron.recipes.models import QWEN3_8B, QWEN3_30B_A3B, QWEN3_32B

GIB = 1024**3


def test_everything_that_is_offered_fits_and_the_fastest_comes_first() -> None:
    layouts, tried = feasible_layouts(QWEN3_8B, RunConfig(), gpus=8, gpu_bytes=80 * GIB, mean_tokens=4246)
    assert 0 < len(layouts) < tried
    assert all(layout.memory.total + OVERHEAD_BYTES <= 80 * GIB for layout in layouts)
    times = [layout.relative_time for layout in layouts]
    assert times == sorted(times)


def test_too_small_a_cluster_has_no_layout() -> None:
    layouts, tried = feasible_layouts(QWEN3_32B, RunConfig(), gpus=2, gpu_bytes=80 * GIB, mean_tokens=4246)
    assert (layouts, tried > 0) == ([], True)


def test_experts_are_spread_only_as_megatron_reduces_them() -> None:
    layouts, _ = feasible_layouts(QWEN3_30B_A3B, RunConfig(), gpus=16, gpu_bytes=80 * GIB, mean_tokens=4246)
    assert layouts
    for layout in layouts:
        parallel = layout.config.parallel
        if parallel.expert_model_parallel_size == 1:
            assert parallel.expert_tensor_parallel_size == parallel.tensor_model_parallel_size
