"""The student under context parallelism and recomputation: same hidden states, same gradients.

Tolerance: float32 sums in another order, relative to the largest entry; a wrong mask shows as more than 1e-1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lopd_megatron.config import RunConfig
from lopd_megatron.model.student_spec import student_spec
from lopd_megatron.parallel import topology as grid
from lopd_megatron.parallel.context import zigzag_indices
from lopd_megatron.records import MicroBatch
from tests.distributed.world import run_world
from tests.unit.model.tiny import LLAMA31, MOE, QWEN3

TOLERANCE = 1e-5
LENGTHS = (16, 8, 40, 24)  # multiples of 2·CP


def build(hf: dict[str, Any], config: RunConfig) -> tuple[Any, grid.Topology]:
    """One model chunk with weights that depend on the name of the parameter alone."""
    from lopd_megatron.model.names import shard, weight_table
    from lopd_megatron.model.student import build_student
    from lopd_megatron.model.weights import named_parameters

    topology = grid.initialize(config.parallel, seed=1)
    spec = student_spec(hf, config)
    chunks = build_student(spec, topology)
    table = weight_table(spec)
    for index, (name, parameter) in enumerate(named_parameters(chunks, spec, topology)):
        weight = table[name]
        shape = list(parameter.shape)
        if weight.layout != "whole" and not weight.expert:
            shape[1 if weight.layout == "columns" else 0] *= topology.tp_size
        generator = torch.Generator().manual_seed(index)
        whole = 0.1 * torch.randn(shape, generator=generator) + (len(shape) == 1)
        if not weight.expert:
            whole = shard(weight, whole, topology.tp_rank, topology.tp_size)
        parameter.data.copy_(whole)
    return chunks[0], topology


def packed(topology: grid.Topology) -> tuple[MicroBatch, torch.Tensor]:
    """A packed row, of which context-parallel ranks hold their part, and the positions of that part."""
    from lopd_megatron.model.verify import pack_documents

    generator = torch.Generator().manual_seed(7)
    texts = [torch.randint(0, 211, (length,), generator=generator) for length in LENGTHS]
    whole = pack_documents(texts, replace(topology, cp_size=1))
    starts = whole.cu_seqlens.tolist()
    if topology.cp_size == 1:
        return whole, torch.arange(starts[-1])
    mine = torch.from_numpy(zigzag_indices(np.array(LENGTHS), topology.cp_rank, topology.cp_size))
    assert whole.tokens is not None
    return replace(whole, tokens=whole.tokens[:, mine]), mine


def hidden_and_gradients(
    hf: dict[str, Any], changes: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(positions, hidden states there, gradients summed over context-parallel ranks)."""
    config = RunConfig()
    config.train.precision = "fp32"
    for key, value in changes.items():
        section, _, field = key.partition(".")
        setattr(getattr(config, section), field, value)
    model, topology = build(hf, config)
    batch, positions = packed(topology)
    hidden = model(batch)
    if config.parallel.sequence_parallel:
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    hidden = hidden.squeeze(1)
    weights = torch.sin(positions[:, None] + torch.arange(hidden.size(1)))
    (hidden * weights).sum().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue  # the output layer: its product belongs to the loss
        dist.all_reduce(parameter.grad, group=topology.cp_group)
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(parameter.grad, group=topology.tp_group)
        gradients[name] = parameter.grad
    grid.destroy()
    return positions, hidden.detach(), gradients


def compare(hf: dict[str, Any], one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest relative difference of hidden states and gradients between two ways to run a model."""
    _, expected, expected_gradients = hidden_and_gradients(hf, one)
    positions, hidden, gradients = hidden_and_gradients(hf, other)
    worst = (hidden - expected[positions]).abs().max() / expected.abs().max()
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        scale = expected_gradients[name].abs().max()
        worst = max(worst, (gradient - expected_gradients[name]).abs().max() / scale)
    return worst.item()


def compare_all(cases: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]) -> list[float]:
    return [compare(*case) for case in cases]


def selective(*modules: str) -> dict[str, Any]:
    return {"train.recompute_granularity": "selective", "train.recompute_modules": list(modules)}


TP2_SP = {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True}
CP2 = {"parallel.context_parallel_size": 2}


@pytest.mark.dist
def test_context_parallel_attention() -> None:
    cases = [(QWEN3, {}, CP2), (LLAMA31, {}, CP2)]
    for worst in run_world(compare_all, 2, cases):
        assert max(worst) < TOLERANCE, worst
    for worst in run_world(compare_all, 4, [(QWEN3, TP2_SP, TP2_SP | CP2)]):
        assert max(worst) < TOLERANCE, worst


@pytest.mark.dist
def test_recomputation_changes_nothing() -> None:
    full = {"train.recompute_granularity": "full"}
    cases = [
        (QWEN3, {}, full),
        (QWEN3, {}, full | {"train.recompute_num_layers": 2}),
        (QWEN3, {}, selective("core_attn", "mlp", "layernorm")),
        (MOE, {}, full),
        (MOE, {}, selective("moe")),
    ]
    (differences,) = run_world(compare_all, 1, cases)
    assert max(differences) < TOLERANCE, differences
