"""The student computes what transformers computes, forward and backward, in every family and layout.

Tolerances: both sides are float32 over four layers and sum in another order. Logits are of order 1, observed
differences below 3e-6; gradients, relative to the largest of their tensor, below 1e-5. A wrong permutation,
norm, frequency or a missing reduction shows as more than 1e-1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lopd_megatron.config import RunConfig
from lopd_megatron.model.student_spec import student_spec
from lopd_megatron.parallel import topology as grid
from tests.distributed.tiny_hf import documents, reference_logits, save_model
from tests.distributed.world import run_world

LOGIT_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-4

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "tp2_pp2_sp": {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
    },
    "tp2_pp2_vp2": {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
    },
    "tp2_etp2_pp2": {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "expert_tensor_parallel_size": 2,
        "sequence_parallel": True,
    },
    "tp2_ep2_pp2": {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "sequence_parallel": True,
    },
}
CASES = [
    ("qwen3", "tp2_pp2_vp2"),
    ("qwen3_tied", "tp2_pp2_sp"),
    ("qwen2", "tp2_pp2"),
    ("llama31", "tp2_pp2"),
    ("qwen3_moe", "tp2_etp2_pp2"),
    ("qwen3_moe_mixed", "tp2_ep2_pp2"),
]


def run_config(layout: str) -> RunConfig:
    config = RunConfig()
    config.train.precision = "fp32"
    for name, value in LAYOUTS[layout].items():
        setattr(config.parallel, name, value)
    return config


def token_weights(labels: torch.Tensor) -> torch.Tensor:
    """A weight per token that no permutation of tokens preserves."""
    return torch.cos(labels.float() + 0.1 * torch.arange(len(labels)))


def reference(model: torch.nn.Module) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """transformers: logits of each document, and gradients of Σ weight · log-prob over all of them."""
    texts = documents()
    total = torch.zeros(())
    for text in texts:
        logprobs = model(text[None]).logits[0].log_softmax(-1)
        labels = text.roll(-1)
        total = total + (token_weights(labels) * logprobs.gather(1, labels[:, None])[:, 0]).sum()
    total.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return reference_logits(model, texts), gradients


def gradients_in_layout(chunks: list, spec: Any, topology: grid.Topology) -> None:
    """The same gradients through the real schedule, in place of the parameters."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from lopd_megatron.model.verify import pack_documents

    config = spec.transformer_config
    config.finalize_model_grads_func = finalize_model_grads
    model = [DistributedDataParallel(config, DistributedDataParallelConfig(), chunk) for chunk in chunks]
    texts = documents()
    batch = pack_documents(texts, topology)
    labels = torch.cat([text.roll(-1) for text in texts])
    weights = torch.cat([token_weights(text.roll(-1)) for text in texts])
    padding = batch.tokens.shape[1] - len(labels)
    labels, weights = F.pad(labels, (0, padding)), F.pad(weights, (0, padding))

    def forward_step(iterator: Any, chunk: Any) -> Any:
        def loss(hidden: torch.Tensor) -> Any:
            student = chunk.module
            logits, _ = student.output_layer(hidden, weight=student.head_weight)
            first = topology.tp_rank * logits.size(-1)
            ids = torch.arange(first, first + logits.size(-1))
            logits = logits.masked_fill(ids >= spec.vocab_size, -torch.inf)
            nll = vocab_parallel_cross_entropy(logits, labels[:, None]).squeeze(1)
            # Megatron averages over micro-batches that differ; these are the same one repeated.
            return -(nll * weights).sum(), torch.tensor(1, dtype=torch.int), {}

        return chunk(next(iterator)), loss

    count = topology.pp_size if topology.virtual_size > 1 else 1
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter([batch] * count) for _ in model] if len(model) > 1 else iter([batch]),
        model=model if len(model) > 1 else model[0],
        num_microbatches=count,
        seq_length=batch.tokens.shape[1],
        micro_batch_size=1,
        forward_only=False,
    )
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data = parameter.main_grad


def one_case(folder: str, layout: str, out: str) -> list[torch.Tensor] | None:
    from lopd_megatron.model.student import build_student
    from lopd_megatron.model.verify import student_logits
    from lopd_megatron.model.weights import export_hf, load_hf

    config = run_config(layout)
    topology = grid.initialize(config.parallel, seed=1)
    spec = student_spec(folder, config)
    chunks = build_student(spec, topology)
    load_hf(chunks, folder, spec, topology)
    logits = student_logits(chunks, documents(), topology)
    gradients_in_layout(chunks, spec, topology)
    export_hf(chunks, spec, topology, out, folder)  # gradients have the shapes and names of weights
    grid.destroy()
    return logits


def all_cases(cases: list[tuple[str, str, str]]) -> list[list[torch.Tensor] | None]:
    return [one_case(*case) for case in cases]


@pytest.mark.dist
def test_logits_and_gradients_equal_transformers(tmp_path: Path) -> None:
    from lopd_megatron.hf_folder import HfFolder

    references = {}
    for family in dict.fromkeys(family for family, _ in CASES):
        references[family] = reference(save_model(family, tmp_path / family))
    cases = [
        (str(tmp_path / family), layout, str(tmp_path / f"{family}-{layout}")) for family, layout in CASES
    ]
    results = run_world(all_cases, 4, cases)[-1]
    for (family, layout), (_, _, out), logits in zip(CASES, cases, results, strict=True):
        expected_logits, expected_gradients = references[family]
        assert logits is not None
        difference = max((a - b).abs().max().item() for a, b in zip(logits, expected_logits, strict=True))
        assert difference < LOGIT_TOLERANCE, (family, layout)
        found = HfFolder(out)
        expected = split_experts(expected_gradients)
        worst = max(
            ((found.read(name) - expected[name]).abs().max() / expected[name].abs().max()).item()
            for name in found.names()
        )
        print(f"{family:16s} {layout:14s} logits {difference:.1e} gradients {worst:.1e}")
        assert worst < GRADIENT_TOLERANCE, (family, layout)


def split_experts(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers 5 fuses the experts in memory and not on disk."""
    found = {}
    for name, gradient in gradients.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(gradient):
                gate, up = both.chunk(2)
                prefix = name.removesuffix("gate_up_proj")
                found[f"{prefix}{expert}.gate_proj.weight"] = gate
                found[f"{prefix}{expert}.up_proj.weight"] = up
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(gradient):
                found[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = down
        else:
            found[name] = gradient
    return found
