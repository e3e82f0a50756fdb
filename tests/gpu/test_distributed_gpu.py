"""The functions of tests/distributed on CUDA and NCCL, with as many ranks as there are GPUs: 1, 2 or 4.

NCCL gives each rank a GPU of its own, so one GPU has worlds of one rank: every path but the transport.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import test_head, test_resume, test_step_parity
from tests.distributed.step_reference import random_documents, reference_trajectory, write_dataset
from tests.distributed.test_step_parity import OBJECTIVES, OVERLAP, STEPS, parity_config
from tests.distributed.tiny_hf import save_model
from tests.distributed.tiny_run import layout, write_inputs
from tests.distributed.world import run_world

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

PRECISION_AWARE = {"optimizer__use_precision_aware_optimizer": True}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "one rank": layout(),
        "overlapped": layout(**OVERLAP),
        "plain head": layout(loss__head="plain"),
        "full recompute": layout(train__recompute_granularity="full"),
    },
    2: {
        "DP2": layout(),
        "TP2 SP": layout(tp=2),
        "PP2": layout(pp=2),
        "CP2": layout(parallel__context_parallel_size=2),
    },
    4: {
        "DP4": layout(),
        "TP2 PP2": layout(tp=2, pp=2),
        "PP4": layout(pp=4),
        "PP2 VP2": layout(pp=2, vpp=2),
        "TP2 CP2": layout(tp=2, parallel__context_parallel_size=2),
    },
}
RESUMED = {
    1: {
        "one rank": layout(),
        "asynchronous": layout(checkpoint__async_save=True),
        "aware": layout(**PRECISION_AWARE),
    },
    2: {"DP2": layout(), "TP2": layout(tp=2), "DP2 aware": layout(**PRECISION_AWARE)},
    4: {"TP2 PP2": layout(tp=2, pp=2)},
}
WORLDS = [
    pytest.param(n, marks=pytest.mark.skipif(torch.cuda.device_count() < n, reason=f"needs CUDA: {n} GPUs"))
    for n in (1, 2, 4)
]
EXPONENTIAL_SLACK = 5.0
"""The compiled exponential of a GPU is good to 2 units in the last place, the CPU's to half of one."""


@pytest.mark.parametrize("world_size", WORLDS)
def test_head_gradients_equal_the_dense_reference(world_size: int) -> None:
    cases = test_head.the_cases()
    results = run_world(test_head.all_errors, world_size, cases, device="cuda")
    print(f"largest error of a gradient: {test_head.check_errors(cases, results, EXPONENTIAL_SLACK):.1e}")


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(
    ("family", "objective"), [("qwen3", "lightning"), ("qwen3_tied", "lightning"), ("qwen3", "topk")]
)
def test_steps_equal_those_of_transformers(
    world_size: int, family: str, objective: str, tmp_path: Path
) -> None:
    from lopd_megatron.recipes import tiny_task

    save_model(family, tmp_path / "student")
    tiny_task.save_tokenizer(tmp_path / "student")
    write_dataset(tmp_path / "train", random_documents())
    config = parity_config(tmp_path, tmp_path / "run", **OBJECTIVES[objective])
    expected = reference_trajectory(config, random_documents(), STEPS)
    layouts = {name: settings | OBJECTIVES[objective] for name, settings in LAYOUTS[world_size].items()}
    results = run_world(
        test_step_parity.trained_in_layouts,
        world_size,
        str(tmp_path),
        str(tmp_path / "run"),
        list(layouts.values()),
        device="cuda",
    )
    test_step_parity.check_layouts(f"{family} {objective}", list(layouts), results, expected)


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_resumed_run_is_the_run_that_was_never_stopped(world_size: int, tmp_path: Path) -> None:
    """Bit for bit, in deterministic mode: atomic additions on a GPU come in any order."""
    inputs = write_inputs(tmp_path / "inputs")
    cases = {name: case | {"train__deterministic_mode": True} for name, case in RESUMED[world_size].items()}
    run_world(test_resume.same_layout, world_size, str(inputs), str(tmp_path), cases, device="cuda")
