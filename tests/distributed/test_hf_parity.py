"""The student computes what transformers computes, in every family and layout.

Tolerance: both sides are float32 over four layers, logits are of order 10 and sums are taken in another
order; observed differences are below 2e-5. A wrong permutation, norm or frequency shows as > 1e-1.
"""

from pathlib import Path

import pytest
import torch

from lopd_megatron.config import RunConfig
from lopd_megatron.model.config import student_spec
from lopd_megatron.parallel import topology as grid
from tests.distributed.tiny_hf import documents, reference_logits, save_model
from tests.distributed.world import run_world

TOLERANCE = 1e-4


def run_config(**parallel: object) -> RunConfig:
    config = RunConfig()
    config.train.precision = "fp32"
    for name, value in parallel.items():
        setattr(config.parallel, name, value)
    return config


LAYOUTS = {
    "tp2_pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "tp2_pp2_sp": {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
    },
}


def logits_in_layout(folder: str, parallel: dict) -> list[torch.Tensor] | None:
    from lopd_megatron.model.student import build_student
    from lopd_megatron.model.verify import student_logits
    from lopd_megatron.model.weights import load_hf

    config = run_config(**parallel)
    topology = grid.initialize(config.parallel, seed=1)
    spec = student_spec(folder, config)
    chunks = build_student(spec, topology)
    load_hf(chunks, folder, spec, topology)
    logits = student_logits(chunks, documents(), topology)
    grid.destroy()
    return logits


def logits_in_layouts(cases: list[tuple[str, dict]]) -> list[list[torch.Tensor] | None]:
    return [logits_in_layout(folder, parallel) for folder, parallel in cases]


@pytest.mark.dist
def test_logits_equal_transformers(tmp_path: Path) -> None:
    cases, references = [], []
    for family, layout in [
        ("qwen3", "tp2_pp2"),
        ("qwen3", "tp2_pp2_sp"),
        ("qwen3_tied", "tp2_pp2"),
        ("qwen2", "tp2_pp2"),
        ("llama", "tp2_pp2"),
        ("llama31", "tp2_pp2"),
        ("qwen3_moe", "tp2_pp2_sp"),
        ("qwen3_moe_mixed", "tp2_pp2_sp"),
    ]:
        folder = tmp_path / family
        model = save_model(family, folder)
        cases.append((str(folder), LAYOUTS[layout]))
        references.append(reference_logits(model, documents()))
    results = run_world(logits_in_layouts, 4, cases)
    for case, (name, reference) in enumerate(zip(cases, references, strict=True)):
        logits = results[-1][case]
        assert logits is not None
        difference = max((a - b).abs().max().item() for a, b in zip(logits, reference, strict=True))
        print(name, difference)
        assert difference < TOLERANCE, name
