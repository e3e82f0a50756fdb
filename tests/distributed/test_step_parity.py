"""Whole training steps: every layout against transformers in float64, one document at a time.

Loss, gradient norm and the update of every weight over two steps. Adam divides by the root of the second
moment, which turns rounding noise in a vanishing gradient into a full step, so these runs use adam_eps 1e-3:
then the update is a smooth function of the gradient and can be compared like one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.records import LossOutput
from lopd_megatron.train.step import train_step
from tests.distributed import tiny_hf
from tests.distributed.step_reference import (
    TOPK,
    Trajectory,
    random_documents,
    reference_trajectory,
    write_dataset,
)
from tests.distributed.tiny_run import advance, layout, tiny_config, tiny_trainer
from tests.distributed.world import run_world

pytestmark = pytest.mark.dist

STEPS = 2  # the second has moments and moved weights
STEP_TOLERANCE = 2e-5  # loss and gradient norm against float64
LAYOUT_TOLERANCE = 5e-6  # and between layouts, which differ in the order of sums alone
UPDATE_TOLERANCE = 1e-4  # the rounding of float32 weights to which an update is added: observed 3e-5
LAYOUT_UPDATE_TOLERANCE = 2e-5  # observed 4e-6

LIGHTNING: dict[str, Any] = {"loss__advantage_clip": 2.0}
TOPK_PER_SEQUENCE: dict[str, Any] = {
    "loss__objective": "topk_reverse_kl",
    "loss__topk": TOPK,
    "loss__normalization": "per_sequence",
    "loss__head_chunk_tokens": 17,
}
CP2 = {"parallel__context_parallel_size": 2}
NO_SP = {"parallel__sequence_parallel": False}
OVERLAP = {"optimizer__overlap_grad_reduce": True}
ONE_DOCUMENT_A_ROW = {"data__seq_length": 40, "train__micro_batch_size": 1}

# family, objective → layouts of a world of four
CASES: dict[tuple[str, str], dict[str, dict[str, Any]]] = {
    ("qwen3", "lightning"): {
        "DP4": layout(),
        "TP2": layout(tp=2) | NO_SP,
        "TP2 SP": layout(tp=2),
        "PP2": layout(pp=2),
        "TP2 PP2": layout(tp=2, pp=2),
        "PP4": layout(pp=4),
        "PP2 VP2": layout(pp=2, vpp=2),
        "CP2": layout() | CP2,
        "one document a row": layout() | ONE_DOCUMENT_A_ROW,
        "three rows a micro-batch": layout(pp=2) | {"train__micro_batch_size": 3},
    },
    ("qwen3", "topk"): {
        "DP4": layout(),
        "TP2 PP2": layout(tp=2, pp=2),
        "TP2 CP2": layout(tp=2) | CP2,
        "plain head": layout(tp=2) | {"loss__head": "plain"},
    },
    ("qwen3_tied", "lightning"): {
        "DP4": layout(),
        "DP4 overlapped": layout() | OVERLAP,
        "TP2": layout(tp=2),
        "TP2 PP2": layout(tp=2, pp=2),
        "PP2 overlapped": layout(pp=2) | OVERLAP,
    },
    ("qwen3_moe", "lightning"): {"EP2": layout(ep=2), "TP2 EP2": layout(tp=2, ep=2)},
}
OBJECTIVES = {"lightning": LIGHTNING, "topk": TOPK_PER_SEQUENCE}


def parity_config(inputs: Path, run_dir: Path, **settings: Any) -> RunConfig:
    config = tiny_config(inputs, run_dir, optimizer__adam_eps=1e-3, **settings)
    config.optimizer.lr_decay_style = "constant"
    return config


def trained(config: RunConfig) -> Trajectory:
    """Some steps of the package; the update, by Hugging Face names, on rank 0."""
    from lopd_megatron.model.names import split, weight_table
    from lopd_megatron.model.weights import LiveTensors

    trainer = tiny_trainer(config)
    chunks = [chunk.module for chunk in trainer.model]

    def weights() -> dict[str, torch.Tensor]:
        live = LiveTensors(chunks, trainer.spec, trainer.topology)
        tensors: dict[str, torch.Tensor] = {}
        for weight in weight_table(trainer.spec).values():
            whole = live.read(weight).cpu().clone()
            if trainer.topology.rank == 0:
                tensors |= zip(weight.hf_names, split(weight, whole, trainer.spec), strict=True)
        return tensors

    before = weights()
    steps = advance(trainer, STEPS)
    return Trajectory(steps, {name: value - before[name] for name, value in weights().items()})


def trained_in_layouts(inputs: str, run_dir: str, layouts: list[dict[str, Any]]) -> list[Trajectory]:
    return [trained(parity_config(Path(inputs), Path(run_dir), **settings)) for settings in layouts]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per family, with the same dataset beside each student."""
    from lopd_megatron.recipes import tiny_task

    folder = tmp_path_factory.mktemp("parity")
    for family in {family for family, _ in CASES}:
        tiny_hf.save_model(family, folder / family / "student")
        tiny_task.save_tokenizer(folder / family / "student")
        write_dataset(folder / family / "train", random_documents())
    return folder


def update_error(seen: Trajectory, expected: Trajectory) -> float:
    """‖difference‖ / ‖update‖ over all weights."""
    assert seen.update.keys() == expected.update.keys()
    difference = sum(
        float((seen.update[name].double() - value.double()).square().sum())
        for name, value in expected.update.items()
    )
    return (
        difference / sum(float(value.double().square().sum()) for value in expected.update.values())
    ) ** 0.5


def hub_names(update: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers keeps the experts of a layer in one tensor; its files have one per expert."""
    named: dict[str, torch.Tensor] = {}
    for name, value in update.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(value):
                gate, up = both.chunk(2)
                prefix = f"{name.removesuffix('gate_up_proj')}{expert}."
                named |= {f"{prefix}gate_proj.weight": gate, f"{prefix}up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            named |= {f"{prefix}{expert}.down_proj.weight": down for expert, down in enumerate(value)}
        else:
            named[name] = value
    return named


@pytest.mark.parametrize(("family", "objective"), CASES, ids=["-".join(case) for case in CASES])
def test_layouts_take_the_steps_of_transformers(
    family: str, objective: str, inputs: Path, tmp_path: Path
) -> None:
    config = parity_config(inputs / family, tmp_path, **OBJECTIVES[objective])
    expected = reference_trajectory(config, random_documents(), STEPS)
    expected.update = hub_names(expected.update)
    layouts = CASES[family, objective]
    settings = [layout | OBJECTIVES[objective] for layout in layouts.values()]
    results = run_world(trained_in_layouts, 4, str(inputs / family), str(tmp_path), settings)
    check_layouts(f"{family} {objective}", list(layouts), results, expected)


def check_layouts(
    case: str, layouts: list[str], results: list[list[Trajectory]], expected: Trajectory
) -> None:
    """Every rank's steps under every layout against float64, and against those under the first layout."""
    first = results[0][0]
    for number, name in enumerate(layouts):
        for rank, trajectories in enumerate(results):
            seen = trajectories[number].steps
            where = f"{name}, rank {rank}: {seen}"
            assert largest_difference(seen, expected.steps) < STEP_TOLERANCE, where
            assert largest_difference(seen, first.steps) < LAYOUT_TOLERANCE, where
        against_float64 = update_error(results[0][number], expected)
        between_layouts = update_error(results[0][number], first)
        print(f"{case} {name}: {against_float64:.1e}, to the first layout {between_layouts:.1e}")
        assert against_float64 < UPDATE_TOLERANCE, name
        assert between_layouts < LAYOUT_UPDATE_TOLERANCE, name


def largest_difference(seen: list[tuple[float, float]], expected: list[tuple[float, float]]) -> float:
    """Relative, over the losses and gradient norms of all steps."""
    return max(
        abs(a / b - 1)
        for step, other in zip(seen, expected, strict=True)
        for a, b in zip(step, other, strict=True)
    )


def mean_of_means(trainer: Any) -> None:
    """Every micro-batch divided by its own tokens: a short one weighs like a long one."""
    stock = trainer.loss

    def loss(*args: Any) -> LossOutput:
        output = stock(*args)
        count = output.denominator.clamp(min=1)
        return LossOutput(output.numerator / count, torch.ones_like(count), output.metric_sums)

    loss.finite = stock.finite  # type: ignore[attr-defined]
    trainer.loss = loss


def placeholder_beside_the_lookup(trainer: Any) -> None:
    """A tied weight without `zero_out_wgrad`: the hook leaves out .grad and the lookup's gradient in it."""
    trainer.model[0].module.head_weight.zero_out_wgrad = False


FAULTS = {"mean_of_means": mean_of_means, "placeholder_beside_the_lookup": placeholder_beside_the_lookup}


def steps_with_a_fault(inputs: str, run_dir: str, fault: str) -> list[tuple[float, float]]:
    trainer = tiny_trainer(parity_config(Path(inputs), Path(run_dir), **LIGHTNING))
    FAULTS[fault](trainer)
    return advance(trainer, 1)


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_planted_fault_is_caught(fault: str, inputs: Path, tmp_path: Path) -> None:
    """The first loss stays right in both; the gradient norm is off by fifty times the tolerance."""
    folder = inputs / "qwen3_tied"
    expected = reference_trajectory(parity_config(folder, tmp_path, **LIGHTNING), random_documents(), 1)
    steps = run_world(steps_with_a_fault, 2, str(folder), str(tmp_path), fault)[0]
    assert steps[0][0] == pytest.approx(expected.steps[0][0], rel=2e-5)
    assert abs(steps[0][1] / expected.steps[0][1] - 1) > 1e-3


def poisoned_step(inputs: str, run_dir: str) -> tuple[str, str, bool]:
    """One rank reads a NaN from the teacher: the expected place, what this rank raised, weights untouched."""
    settings = layout(pp=2)
    trainer = tiny_trainer(parity_config(Path(inputs), Path(run_dir), **settings))
    batch = trainer.batches.step(0)
    place = ""
    if trainer.topology.dp_rank == 1 and trainer.topology.is_last_stage:
        poisoned = batch.microbatches[-1]
        assert poisoned.loss_mask is not None
        assert poisoned.teacher_logprobs is not None
        assert poisoned.sequence_index is not None
        assert poisoned.position_ids is not None
        row = int(poisoned.loss_mask[0].nonzero()[3])
        poisoned.teacher_logprobs[0, row] = torch.nan
        document = poisoned.document_indices[int(poisoned.sequence_index[0, row])]
        place = f"document {document}, token {int(poisoned.position_ids[0, row]) + 1} "
    before = [parameter.clone() for chunk in trainer.model for parameter in chunk.parameters()]
    try:
        train_step(trainer, batch)
    except UserError as error:
        after = [parameter for chunk in trainer.model for parameter in chunk.parameters()]
        return place, str(error), all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return place, "", False


def test_a_non_finite_token_stops_every_rank_before_the_update(inputs: Path, tmp_path: Path) -> None:
    results = run_world(poisoned_step, 4, str(inputs / "qwen3"), str(tmp_path))
    (place,) = {place for place, _, _ in results if place}
    for _, message, untouched in results:
        assert place in message
        assert untouched
