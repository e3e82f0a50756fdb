"""Standard OPD over two pipeline stages: which weights make which rollouts, and the proof of transfers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed import tiny_hf
from tests.distributed.tiny_run import layout, tiny_config
from tests.distributed.world import run_world

pytestmark = pytest.mark.dist
STEPS = 3


class HfStudent:
    """A student server without the server: random tokens by the seed, log-probs by transformers."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.version = "default"
        self.used: list[str] = []

    def reload(self, folder: str, version: str) -> None:
        self.folder, self.version = folder, version

    def generate(self, requests: Any, sampling: Any) -> list[Any]:
        from lopd_megatron.inference.requests import Generation, ScoreRequest

        self.used.append(self.version)
        drawn = []
        for request in requests:
            rng = np.random.default_rng(request.seed)
            drawn.append(rng.integers(0, tiny_hf.VOCABULARY, rng.integers(3, 9)).tolist())
        whole = [
            ScoreRequest(r.key, [*r.prompt_tokens, *tokens], len(r.prompt_tokens))
            for r, tokens in zip(requests, drawn, strict=True)
        ]
        scores = self.score(whole, topk=0)
        return [
            Generation(r.key, tokens, s.logprobs, "stop")
            for r, tokens, s in zip(requests, drawn, scores, strict=True)
        ]

    def score(self, requests: Any, *, topk: int) -> list[Any]:
        from transformers import AutoModelForCausalLM

        from lopd_megatron.inference.requests import Score

        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        scores = []
        for request in requests:
            with torch.no_grad():
                logprobs = model(torch.tensor([request.tokens])).logits[0].log_softmax(-1)
            rows = logprobs[request.start - 1 : -1]
            labels = torch.tensor(request.tokens[request.start :])
            top = rows.topk(topk)
            scores.append(
                Score(
                    request.key,
                    rows.gather(1, labels[:, None])[:, 0].numpy(),
                    top.indices.int().numpy(),
                    top.values.numpy(),
                )
            )
        return scores


class FakeStaleStudent(HfStudent):
    """Takes the first weights and keeps them."""

    def reload(self, folder: str, version: str) -> None:
        if version == "iteration 0":
            super().reload(folder, version)
            self.kept = Path(folder).rename(Path(folder).with_name("kept"))
            self.folder = str(self.kept)


class FakeLostTeacher:
    def score(self, requests: Any, *, topk: int) -> list[Any]:
        from lopd_megatron.errors import UserError

        raise UserError("teacher server: gone")


def train_online(inputs: str, run_dir: str, overlap: int, topk: int, student: str, teacher: str) -> Any:
    """A whole run: what the student was asked with, and what each step reported."""
    from lopd_megatron.errors import UserError
    from lopd_megatron.inference.requests import Sampling
    from lopd_megatron.loss import finalize_metrics
    from lopd_megatron.online.batches import Engines, OnlineRollouts, Prompt
    from lopd_megatron.parallel import topology as grid
    from lopd_megatron.train.loop import train
    from lopd_megatron.train.setup import build_trainer
    from lopd_megatron.train.state import Hook

    class Reports(Hook):
        def __init__(self) -> None:
            self.seen: list[dict[str, float]] = []

        def after_step(self, trainer: Any, result: Any) -> None:
            self.seen.append(finalize_metrics(result.metric_sums))

    config = tiny_config(Path(inputs), Path(run_dir), train__train_iters=STEPS, **layout(pp=2))
    config.data.prefixes = []
    config.online.overlap_steps = overlap
    config.online.sync_tolerance = 1e-4
    if topk:
        config.loss.objective, config.loss.topk, config.scores.topk = "topk_reverse_kl", topk, topk
    prompts = [Prompt(str(i), [1 + i, 2, 3][: 1 + i % 3]) for i in range(7)]
    engines = None
    if torch.distributed.get_rank() == 0:
        kinds = {kind.__name__: kind for kind in (HfStudent, FakeStaleStudent)}
        scorer = FakeLostTeacher() if teacher == "lost" else HfStudent(teacher)
        engines = Engines(kinds[student](config.model.student), scorer, Sampling(1.0, 1.0, 8, ()))
    rollouts = OnlineRollouts(config, prompts, engines)
    reports = Reports()
    grid.destroy()
    trainer = build_trainer(config, hooks=[rollouts, reports], batches=rollouts)
    try:
        train(trainer)
    except UserError as error:
        return str(error)
    used = engines.student.used if engines else []
    return used, reports.seen


def all_runs(inputs: str, work: str) -> dict[str, Any]:
    teacher = f"{inputs}/teacher"
    cases = {
        "synchronous": (0, 0, "HfStudent", teacher),
        "overlapped": (1, 0, "HfStudent", teacher),
        "top-k": (0, 2, "HfStudent", teacher),
        "stale": (0, 0, "FakeStaleStudent", teacher),
        "lost teacher": (0, 0, "HfStudent", "lost"),
    }
    return {name: train_online(inputs, f"{work}/{name}", *case) for name, case in cases.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    from lopd_megatron.recipes import tiny_task

    work = tmp_path_factory.mktemp("online")
    tiny_hf.save_model("qwen3", work / "student")
    tiny_hf.save_model("qwen3", work / "teacher", seed=5)
    tiny_task.save_tokenizer(work / "student")
    return run_world(all_runs, 2, str(work), str(work))


def test_every_step_uses_the_weights_before_it(runs: list[dict[str, Any]]) -> None:
    used, _ = runs[0]["synchronous"]
    probe, *steps = used
    assert probe == "iteration 0"
    assert steps == [f"iteration {i}" for i in range(STEPS)]


def test_fresh_rollouts_have_an_importance_ratio_of_one(runs: list[dict[str, Any]]) -> None:
    """The sampler's log-probs are those of the weights that train on them: only rounding is left."""
    for name in ("synchronous", "top-k"):
        for report in runs[0][name][1]:
            assert report["importance_ratio_mean"] == pytest.approx(1, abs=1e-4)
            assert report["effective_sample_fraction"] == pytest.approx(1, abs=1e-6)


def test_overlap_is_one_update_behind(runs: list[dict[str, Any]]) -> None:
    used, reports = runs[0]["overlapped"]
    assert used[1:] == ["iteration 0", *(f"iteration {i}" for i in range(STEPS - 1))]
    assert reports[0]["importance_ratio_std"] < 1e-4
    assert reports[2]["importance_ratio_std"] > 1e-3  # the rollouts of step 3 are made by the weights of 2


def test_all_ranks_see_the_same_steps(runs: list[dict[str, Any]]) -> None:
    assert runs[0]["synchronous"][1] == runs[1]["synchronous"][1]


def test_a_student_that_kept_old_weights_is_found(runs: list[dict[str, Any]]) -> None:
    for rank in runs:
        assert "iteration 1: after the weights were sent, vLLM and Megatron differ" in rank["stale"]


def test_an_error_of_a_server_is_raised_on_every_rank(runs: list[dict[str, Any]]) -> None:
    assert [rank["lost teacher"] for rank in runs] == ["teacher server: gone"] * 2
