"""Training is the same function of weights and data under every layout and memory setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.tiny_run import advance, layout, tiny_config, tiny_trainer, write_inputs
from tests.distributed.world import run_world

pytestmark = pytest.mark.dist

OVERLAPPED = {"optimizer__overlap_grad_reduce": True, "optimizer__overlap_param_gather": True}
# What test_step_parity holds against transformers is not repeated here.
DENSE = {
    "TP4": layout(tp=4),
    "no distributed optimizer": layout(tp=2, optimizer__use_distributed_optimizer=False),
    "overlapped": layout(**OVERLAPPED),
    "overlapped PP2 VP2": layout(pp=2, vpp=2, **OVERLAPPED),
    "selective recompute": layout(tp=2, pp=2, train__recompute_granularity="selective"),
    "full recompute": layout(tp=2, pp=2, train__recompute_granularity="full"),
    "deterministic": layout(train__deterministic_mode=True),
    "two rows a micro-batch": layout(train__micro_batch_size=2),
}
MOE = {"DP4": layout(), "EP2 PP2": layout(ep=2, pp=2)}


def trajectories(inputs: str, run_dir: str, layouts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        name: advance(tiny_trainer(tiny_config(Path(inputs), Path(run_dir), **settings)), 2)
        for name, settings in layouts.items()
    }


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("moe"), "qwen3_moe")


def close(seen: dict[str, Any], expected: Any) -> None:
    """fp32 rounding: sums in another order differ by some 1e-7, and two steps of Adam at 1e-3 keep that
    below 1e-5 in the loss; a lost or doubled gradient moves the norm by percents."""
    for name, steps in seen.items():
        torch.testing.assert_close(
            torch.tensor(steps), torch.tensor(expected), rtol=2e-5, atol=1e-6, msg=name
        )


def test_every_layout_trains_alike(dense: Path, tmp_path: Path) -> None:
    (reference,) = run_world(trajectories, 1, str(dense), str(tmp_path), {"one rank": layout()})
    results = run_world(trajectories, 4, str(dense), str(tmp_path), DENSE)
    for result in results:
        close(result, reference["one rank"])


def test_every_mixture_layout_trains_alike(moe: Path, tmp_path: Path) -> None:
    (reference,) = run_world(trajectories, 1, str(moe), str(tmp_path), {"one rank": layout()})
    for result in run_world(trajectories, 4, str(moe), str(tmp_path), MOE):
        close(result, reference["one rank"])
