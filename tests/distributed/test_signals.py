"""Validation in a run: what it keeps, and a run that is planted to go wrong and says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lopd_megatron.data.build_dataset import build_dataset
from lopd_megatron.data.filters import Filters
from lopd_megatron.data.held_out import HeldOut
from lopd_megatron.errors import EXIT_REQUEUE
from lopd_megatron.parallel import topology as grid
from lopd_megatron.report.headline import headlines
from lopd_megatron.report.page import render
from lopd_megatron.report.run_folder import read_run
from lopd_megatron.report.warnings import findings
from lopd_megatron.train.held_out import change, read_validations
from lopd_megatron.train.metrics import read_metrics
from tests.distributed.test_run import Interrupt
from tests.distributed.tiny_run import layout, tiny_config, write_inputs
from tests.distributed.world import run_world
from tests.unit.data.samples import write_shards

pytestmark = pytest.mark.dist

TOPK = 8
PROMPTS = 160
RESPONSE = 12
ITERATIONS = 24
LR = 1e-3
OBJECTIVES = ("lightning_opd", "topk_reverse_kl")
LAYOUTS = {
    "one rank": (1, layout()),
    "TP2 PP2": (4, layout(tp=2, pp=2)),
    "CP2": (2, layout(parallel__context_parallel_size=2)),
    "DP2": (2, layout()),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random student, and a dataset of its own rollouts with the scores of a teacher near it."""
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    rows = rollouts(folder / "student")
    write_shards(folder / "scores", [rows[: PROMPTS // 2], rows[PROMPTS // 2 :]])
    prefix = folder / "scored" / "train"
    prefix.parent.mkdir()
    build_dataset(folder / "scores", prefix, filters=Filters(64), held_out=HeldOut(0.02))
    return folder


@torch.no_grad()
def rollouts(student_folder: Path) -> list[dict]:
    """One response to each prompt. The teacher is the student with noise of a third on every weight."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32).eval() for _ in range(2)
    )
    for weight in teacher.parameters():
        if weight.dim() > 1:
            weight += 0.3 * weight.std() * torch.randn_like(weight)
    prompts = torch.arange(PROMPTS)
    ids = torch.stack([3 + prompts, 3 + prompts // 2], dim=1)
    for _ in range(RESPONSE):
        ids = torch.cat([ids, torch.multinomial(student(ids).logits[:, -1].softmax(-1), 1)], dim=1)
    own, other = (model(ids).logits[:, 1:-1].log_softmax(-1) for model in (student, teacher))
    responses = ids[:, 2:, None]
    top = other.topk(TOPK)
    return [
        {
            "document_id": f"p{i}/0",
            "prompt_id": f"p{i}",
            "sample_index": 0,
            "prompt_tokens": ids[i, :2].tolist(),
            "response_tokens": ids[i, 2:].tolist(),
            "rollout_logprobs": own[i].gather(1, responses[i])[:, 0].tolist(),
            "teacher_logprobs": other[i].gather(1, responses[i])[:, 0].tolist(),
            "finish_reason": "length",
            "answer": None,
            "teacher_topk_ids": top.indices[i].flatten().tolist(),
            "teacher_topk_logprobs": top.values[i].flatten().tolist(),
        }
        for i in range(PROMPTS)
    ]


def train(inputs: str, run_dir: str, objective: str, lr: float, stop_at: int | None = None) -> int:
    from lopd_megatron.train.loop import run

    grid.destroy()
    config = tiny_config(
        Path(inputs),
        Path(run_dir),
        **layout(pp=2),
        data__prefixes=[f"{inputs}/scored/train"],
        loss__objective=objective,
        loss__topk=TOPK if objective.startswith("topk_") else 0,
        scores__topk=TOPK,
        optimizer__lr=lr,
        optimizer__lr_decay_style="constant",
        optimizer__weight_decay=0.0,
        train__train_iters=ITERATIONS,
        train__global_batch_size=16,
        train__eval_interval=6,
        checkpoint__save_interval=100,
    )
    import signal

    hooks = [Interrupt(signal.SIGUSR1, stop_at)] if stop_at else []
    return run(config, hooks=hooks)


@pytest.fixture(scope="module")
def runs(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good and a bad run of each objective: `objective-1` and `objective-30`."""
    folder = tmp_path_factory.mktemp("runs")
    for objective in OBJECTIVES:
        for factor in (1, 30):
            run_world(train, 2, str(inputs), f"{folder}/{objective}-{factor}", objective, factor * LR)
    return folder


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_good_run_is_better(runs: Path, objective: str) -> None:
    run = read_run(runs / f"{objective}-1")
    assert [line["iteration"] for line in run.metrics if "valid_reverse_kl" in line] == [6, 12, 18, 24]
    assert [v.iteration for v in run.validations] == [0, 6, 12, 18, 24]
    assert all(v.metric == "reverse_kl" and v.value > 0 for v in run.validations)
    for validation in run.validations[1:]:
        logged = run.metrics[validation.iteration - 1]["valid_reverse_kl"]
        assert validation.value == pytest.approx(logged, rel=1e-12)
    headline, _ = headlines(run)
    assert headline.verdict == "better"
    assert f">better</b>{headline.what}: " in render(run)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_bad_run_is_worse_and_warns_before_half_of_its_steps(runs: Path, objective: str) -> None:
    """Thirty times the learning rate."""
    run = read_run(runs / f"{objective}-30")
    headline, _ = headlines(run)
    assert headline.verdict == "worse"
    assert f">worse</b>{headline.what}: " in render(run)
    assert run.warnings
    assert run.warnings[0]["iteration"] <= ITERATIONS // 2
    told = [warning["text"] for warning in run.warnings]
    assert all(any(text in finding for finding in findings(run)) for text in told)


def validated(inputs: str, run_dir: str, objective: str, settings: dict) -> None:
    from lopd_megatron.train.loop import run

    grid.destroy()
    settings |= {"data__prefixes": [f"{inputs}/scored/train"], "loss__objective": objective}
    assert run(tiny_config(Path(inputs), Path(run_dir), train__train_iters=1, **settings)) == 0


@pytest.mark.parametrize("objective", ["lightning_opd", "sft"])
def test_the_sums_of_documents_do_not_depend_on_the_layout(
    inputs: Path, tmp_path: Path, objective: str
) -> None:
    found = {}
    for name, (ranks, settings) in LAYOUTS.items():
        run_world(validated, ranks, str(inputs), f"{tmp_path}/{name}", objective, settings)
        found[name] = read_validations(tmp_path / name / "validation.jsonl")
    for validations in found.values():
        for one, other in zip(found["one rank"], validations, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist() == [RESPONSE] * 32
            assert one.metric == other.metric == ("loss" if objective == "sft" else "reverse_kl")
            # float32 products in another order, before and after one update
            assert other.sums == pytest.approx(one.sums, rel=2e-4)
            assert (one.estimates is None) == (objective == "sft")
            if one.estimates is not None:
                assert other.estimates == pytest.approx(one.estimates, rel=2e-4, abs=1e-4)


def test_a_run_that_was_stopped_keeps_its_validations(inputs: Path, runs: Path, tmp_path: Path) -> None:
    """Also the one before the first step, which only the first process makes."""
    arguments = (str(inputs), f"{tmp_path}/stopped", "lightning_opd", LR)
    assert run_world(train, 2, *arguments, 7) == [EXIT_REQUEUE] * 2
    path = tmp_path / "stopped" / "validation.jsonl"
    lines = path.read_text()
    path.write_text(lines + json.dumps(json.loads(lines.splitlines()[-1]) | {"iteration": 12}) + "\n")
    assert run_world(train, 2, *arguments) == [0, 0]
    assert path.read_text() == (runs / "lightning_opd-1" / "validation.jsonl").read_text()


def test_the_student_at_the_start_is_validated_before_the_first_step(runs: Path) -> None:
    """The values before training do not depend on the learning rate, and the metrics start at 1."""
    good, bad = (read_validations(runs / f"lightning_opd-{f}" / "validation.jsonl")[0] for f in (1, 30))
    assert (good.iteration, good.value) == (0, bad.value)
    assert read_metrics(runs / "lightning_opd-1" / "metrics.jsonl")[0]["iteration"] == 1
    assert change([good]) is None
