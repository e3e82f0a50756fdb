"""A resumed run is the run that was never stopped, bit for bit; under another layout up to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lopd_megatron.model.checkpoint_files import newest
from tests.distributed.tiny_run import advance, layout, state_hash, tiny_config, tiny_trainer, write_inputs
from tests.distributed.world import run_world

pytestmark = pytest.mark.dist

OVERLAP = {"optimizer__overlap_grad_reduce": True, "optimizer__overlap_param_gather": True}
ASYNC = {"checkpoint__async_save": True}
BF16 = {"train__precision": "bf16"}


def both(name: str, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A case in float32, whose weights the optimizer updates in place, and in bfloat16 with main weights."""
    return {name: settings, f"{name} bf16": settings | BF16}


SAME_LAYOUT = {
    2: both("DP2", layout())
    | both("TP2", layout(tp=2))
    | {
        "DP2 overlapped": layout(**OVERLAP, **BF16),
        "DP2 no distributed optimizer": layout(optimizer__use_distributed_optimizer=False, **BF16),
        "DP2 asynchronous": layout(**ASYNC),
        "DP2 precision-aware": layout(optimizer__use_precision_aware_optimizer=True, **BF16),
    },
    3: both("DP3", layout()) | {"DP3 asynchronous overlapped": layout(**ASYNC, **OVERLAP, **BF16)},
    4: both("TP2 PP2", layout(tp=2, pp=2)) | both("PP2 VP2", layout(pp=2, vpp=2)),
}


def same_layout(inputs: str, folder: str, cases: dict[str, dict[str, Any]]) -> None:
    """Six steps with a save after the third, against three steps of a new trainer from that checkpoint."""
    batch = {"train__global_batch_size": 2 * dist.get_world_size()}
    for name, settings in cases.items():
        config = tiny_config(Path(inputs), Path(folder) / name, **batch, **settings)
        straight = tiny_trainer(config)
        advance(straight, 3)
        straight.checkpoints.save(straight)
        expected = advance(straight, 3)  # with async_save the checkpoint is written meanwhile
        straight.checkpoints.finish()
        resumed = tiny_trainer(config)
        assert resumed.checkpoints.load_latest(resumed)
        assert resumed.iteration == 3
        assert advance(resumed, 3) == expected, name
        assert state_hash(resumed) == state_hash(straight), name


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("moe"), "qwen3_moe")


@pytest.mark.parametrize("world_size", SAME_LAYOUT)
def test_three_and_three_are_six_steps(world_size: int, dense: Path, tmp_path: Path) -> None:
    run_world(same_layout, world_size, str(dense), str(tmp_path), SAME_LAYOUT[world_size])


def test_mixture_three_and_three_are_six_steps(moe: Path, tmp_path: Path) -> None:
    run_world(same_layout, 2, str(moe), str(tmp_path), both("EP2", layout(ep=2)))


def write_checkpoints(inputs: str, folder: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Two steps and a save under each layout; returns the step that follows."""
    following = {}
    for name, settings in cases.items():
        trainer = tiny_trainer(tiny_config(Path(inputs), Path(folder) / name, **settings))
        advance(trainer, 2)
        trainer.checkpoints.save(trainer)
        following[name] = advance(trainer, 1)[0]
    return following


def load_checkpoints(
    inputs: str, folder: str, following: dict[str, Any], cases: dict[str, tuple[str, dict[str, Any]]]
) -> None:
    """Load each, write it again from the new layout, and take a step."""
    for name, (source, settings) in cases.items():
        trainer = tiny_trainer(tiny_config(Path(inputs), Path(folder) / name, **settings))
        description = newest(Path(folder) / source / "checkpoints")
        assert description is not None
        trainer.checkpoints.load(trainer, saved(folder, source), description)
        trainer.checkpoints.save(trainer)
        step = advance(trainer, 1)[0]
        # Rounding of sums in another order; 6e-7 was the largest.
        torch.testing.assert_close(
            torch.tensor(step), torch.tensor(following[source]), rtol=3e-6, atol=0, msg=name
        )


def saved(folder: str, name: str) -> Path:
    return Path(folder) / name / "checkpoints" / "iter_0000002"


def compare_checkpoints(folder: str, copies: dict[str, str]) -> None:
    """On one rank, which reads them all whole: every tensor of a copy is that of its source, bit for bit.

    Weights, main parameters and moments; the random state belongs to a layout.
    """
    from megatron.core import dist_checkpointing

    def tensors(name: str) -> dict[str, torch.Tensor]:
        loaded = dist_checkpointing.load_plain_tensors(str(saved(folder, name)))
        return {k: v for k, v in loaded.items() if isinstance(v, torch.Tensor) and not k.startswith("rng")}

    sources = {name: tensors(name) for name in set(copies.values())}
    for name, source in copies.items():
        before, after = sources[source], tensors(name)
        assert before.keys() == after.keys(), name
        assert len(before) > 30
        for key, tensor in before.items():
            assert torch.equal(tensor, after[key]), (name, key)


RESHARD = {
    4: {
        "TP2 PP2 to PP4": ("TP2 PP2", layout(pp=4)),
        "TP2 PP2 to DP4": ("TP2 PP2", layout()),
        "TP2 PP2 to TP4": ("TP2 PP2", layout(tp=4)),
        "TP2 PP2 to PP2 VP2": ("TP2 PP2", layout(pp=2, vpp=2)),
        "DP4 to TP2 PP2": ("DP4", layout(tp=2, pp=2)),
        "PP4 to TP2": ("PP4", layout(tp=2)),
        "PP2 VP2 to TP4": ("PP2 VP2", layout(tp=4)),
        "TP4 to PP2 VP2": ("TP4", layout(pp=2, vpp=2)),
    },
    3: {"TP2 PP2 to DP3": ("TP2 PP2", layout()), "PP2 VP2 to DP3": ("PP2 VP2", layout())},
    2: {"DP4 to PP2": ("DP4", layout(pp=2)), "PP4 to TP2 on two": ("PP4", layout(tp=2))},
    1: {"TP2 PP2 to one": ("TP2 PP2", layout()), "DP4 to one": ("DP4", layout())},
}
SOURCES = {
    "TP2 PP2": layout(tp=2, pp=2),
    "DP4": layout(),
    "PP4": layout(pp=4),
    "TP4": layout(tp=4),
    "PP2 VP2": layout(pp=2, vpp=2),
}


def test_a_checkpoint_loads_under_every_layout(dense: Path, tmp_path: Path) -> None:
    following = run_world(write_checkpoints, 4, str(dense), str(tmp_path), SOURCES)[0]
    for world_size, cases in RESHARD.items():
        run_world(load_checkpoints, world_size, str(dense), str(tmp_path), following, cases)
    copies = {name: source for cases in RESHARD.values() for name, (source, _) in cases.items()}
    run_world(compare_checkpoints, 1, str(tmp_path), copies)


def test_a_mixture_checkpoint_loads_under_other_layouts(moe: Path, tmp_path: Path) -> None:
    sources = {"EP2": layout(ep=2), "EP2 PP2": layout(ep=2, pp=2)}
    following = run_world(write_checkpoints, 4, str(moe), str(tmp_path), sources)[0]
    cases = {
        "EP2 to EP4": ("EP2", layout(ep=4)),
        "EP2 to TP2 EP2": ("EP2", layout(tp=2, ep=2)),
        "EP2 PP2 to EP2": ("EP2 PP2", layout(ep=2)),
    }
    run_world(load_checkpoints, 4, str(moe), str(tmp_path), following, cases)
    run_world(compare_checkpoints, 1, str(tmp_path), {name: source for name, (source, _) in cases.items()})
