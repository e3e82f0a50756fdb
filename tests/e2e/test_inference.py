"""vLLM against transformers, in fp32 on CPU: the same numbers for the same token ids."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lopd_megatron.config import EngineConfig
from lopd_megatron.inference.engine import VllmEngine, _lost_engines, shutdown_pending_engines
from lopd_megatron.inference.requests import (
    Failure,
    Generation,
    GenerationRequest,
    Sampling,
    ScoreRequest,
    TokenScores,
    document_seed,
)
from lopd_megatron.inference.score_paths import choose_path
from lopd_megatron.lineage import Lineage
from lopd_megatron.records import ROLLOUT_SCHEMA
from lopd_megatron.rollouts import shard_files
from lopd_megatron.rollouts.prompts import prompt_id, write_prompts
from lopd_megatron.rollouts.rollout_stage import RolloutJob
from lopd_megatron.rollouts.score_stage import score_tokens
from lopd_megatron.rollouts.worker import Worker
from tests.e2e.random_models import EOS, MAX_POSITIONS, VOCABULARY, reference, save_model

pytestmark = pytest.mark.vllm

# vLLM and transformers add in another order; measured 1e-5 on these logits, whose scores reach −20 nats.
TOLERANCE = 1e-4
CONFIG = EngineConfig(max_model_len=MAX_POSITIONS, max_num_seqs=8, max_num_batched_tokens=64)


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """An engine in this process sets variables and a process group that later tests must not inherit."""
    before = dict(os.environ)
    yield
    shutdown_pending_engines()
    assert not torch.distributed.is_initialized()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp(name) for name in ("a", "b", "deep")}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, torch.nn.Module]:
    layers = {"a": 2, "b": 2, "deep": 3}
    return {name: save_model(folders[name], seed, layers=layers[name]) for seed, name in enumerate(folders)}


@pytest.fixture(scope="module")
def scorer(folders: dict[str, Path], models: dict[str, torch.nn.Module]) -> Iterator[VllmEngine]:
    """Prefills are cut in chunks of 64 tokens, so the longer documents cross chunks."""
    engine = VllmEngine(str(folders["a"]), CONFIG, task="score", max_topk=5)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def documents() -> list[ScoreRequest]:
    """Shapes with an edge: one-token prompt and response, whole context, EOS inside and at the end."""
    random = np.random.default_rng(3)
    shapes = [(1, 1), (1, 20), (30, 1), (5, 58), (5, 59), (64, 64), (1, MAX_POSITIONS - 1), (90, 70)]
    requests = []
    for row, (prompt, response) in enumerate(shapes):
        tokens = random.integers(0, VOCABULARY, prompt + response).tolist()
        tokens[-1] = EOS
        requests.append(ScoreRequest((0, row), tokens, prompt))
    return requests


def in_order(answers: Iterator) -> list:
    return sorted(answers, key=lambda answer: answer.key)


@pytest.mark.parametrize("path", ["stock", "flat"])
@pytest.mark.parametrize("topk", [0, 5])
def test_scores_equal_transformers(scorer, models, documents, path, topk) -> None:
    answers = in_order(scorer.score(documents, topk=topk, path=path))
    shifted = []
    for request, answer in zip(documents, answers, strict=True):
        assert isinstance(answer, TokenScores)
        table = reference(models["a"], request.tokens)[request.start - 1 : -1]
        rows, given = np.arange(len(table)), request.tokens[request.start :]
        assert np.abs(answer.logprobs - table[rows, given]).max() < TOLERANCE
        assert answer.topk_ids.shape == answer.topk_logprobs.shape == (len(given), topk)
        best = np.sort(table, axis=1)[:, ::-1][:, :topk]
        assert np.abs(answer.topk_logprobs - best).max(initial=0) < TOLERANCE
        chosen = np.take_along_axis(table, answer.topk_ids.astype(np.int64), axis=1)
        assert np.abs(answer.topk_logprobs - chosen).max(initial=0) < TOLERANCE
        shifted.append(np.abs(answer.logprobs[1:] - table[rows, given][:-1]))
    # The planted fault: the same numbers one token late are far off, so the comparison above has teeth.
    assert np.concatenate(shifted).mean() > 100 * TOLERANCE


def test_score_tokens_is_the_same_in_any_order(scorer: VllmEngine, documents: list[ScoreRequest]) -> None:
    pairs = [(r.tokens[: r.start], r.tokens[r.start :]) for r in documents]
    forward, backward = score_tokens(scorer, pairs), score_tokens(scorer, pairs[::-1])
    for a, b in zip(forward, backward[::-1], strict=True):
        # A chunk boundary elsewhere changes the order of the sums.
        assert np.abs(a - b).max() < TOLERANCE


def test_the_self_test_picks_the_flat_path_on_this_engine(scorer: VllmEngine) -> None:
    assert not scorer.has_native_scoring
    assert choose_path(scorer, "auto", 0, MAX_POSITIONS) == "flat"
    assert choose_path(scorer, "auto", 5, MAX_POSITIONS) == "flat"


def test_bad_requests_fail_alone(scorer: VllmEngine) -> None:
    good = ScoreRequest((0, 1), [5, 6, 7], 1)
    bad = [
        ScoreRequest((0, 2), [5, VOCABULARY], 1),
        ScoreRequest((0, 3), [5, -1], 1),
        ScoreRequest((0, 4), [5] * (MAX_POSITIONS + 1), 1),
    ]
    answers = in_order(scorer.score([bad[0], good, *bad[1:]], topk=0, path="flat"))
    assert [isinstance(answer, Failure) for answer in answers] == [False, True, True, True]
    assert f"between 0 and {VOCABULARY - 1}" in answers[1].error
    assert "maximum model length" in answers[3].error


def test_weights_are_replaced_in_place(scorer, folders, models, documents) -> None:
    assert scorer.reload(str(folders["b"]))
    (answer,) = scorer.score([documents[3]], topk=0, path="flat")
    table = reference(models["b"], documents[3].tokens)[documents[3].start - 1 : -1]
    given = documents[3].tokens[documents[3].start :]
    assert np.abs(answer.logprobs - table[np.arange(len(given)), given]).max() < TOLERANCE
    assert not scorer.reload(str(folders["deep"]))
    assert scorer.reload(str(folders["a"]))


SAMPLING = Sampling(1.0, 1.0, 40, (EOS,))


@pytest.fixture(scope="module")
def generator(
    scorer: VllmEngine, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmEngine]:
    """The engine that took over the rollouts of one that ran out of memory; both write to `folder`."""
    root = tmp_path_factory.mktemp("oom")
    prompts = [[5 + i, 6, 7] for i in range(20)]
    rows = [{"prompt_id": prompt_id(p), "prompt_tokens": p, "answer": None, "source": ""} for p in prompts]
    write_prompts(root / "prompts", rows, 2, Lineage())
    work = Worker(RolloutJob(SAMPLING, 1, 7, Lineage()), root / "prompts", root / "rollouts", 2)
    scorer._step = out_of_memory_after(scorer._step, 30)  # type: ignore[method-assign]

    def open_engine(config: EngineConfig) -> VllmEngine:
        assert (config.max_num_seqs, config.max_num_batched_tokens) == (4, 256)
        return VllmEngine(str(folders["a"]), config, task="generate")

    assert work.run(scorer, CONFIG.model_copy(update={"max_num_batched_tokens": 512}), open_engine) == 0
    assert isinstance(work.engine, VllmEngine)
    assert work.engine is not scorer
    work.engine.rollouts_after_oom = root / "rollouts"  # type: ignore[attr-defined]
    yield work.engine
    work.engine.close()


def out_of_memory_after(step: Callable[[], list], steps: int) -> Callable[[], list]:
    left = iter(range(steps))

    def run() -> list:
        if next(left, None) is None:
            with _lost_engines():
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return step()

    return run


def test_out_of_memory_opens_a_smaller_engine(generator: VllmEngine) -> None:
    folder = generator.rollouts_after_oom  # type: ignore[attr-defined]
    rows = [row for i in range(2) for row in shard_files.read_table(folder, i, ROLLOUT_SCHEMA).to_pylist()]
    assert len({row["document_id"] for row in rows}) == len(rows) == 20
    requests = [
        GenerationRequest((0, i), row["prompt_tokens"], document_seed(7, row["document_id"]))
        for i, row in enumerate(rows)
    ]
    for row, answer in zip(rows, in_order(generator.generate(requests, SAMPLING)), strict=True):
        assert row["response_tokens"] == answer.response_tokens


def generation_requests() -> list[GenerationRequest]:
    random = np.random.default_rng(5)
    prompts = [random.integers(4, VOCABULARY, random.integers(1, 30)).tolist() for _ in range(24)]
    return [GenerationRequest((0, i), p, document_seed(7, str(i))) for i, p in enumerate(prompts)]


def test_rollouts_keep_ids_eos_and_logprobs(generator: VllmEngine, models: dict) -> None:
    requests = generation_requests()
    answers = in_order(generator.generate(requests, SAMPLING))
    reasons = set()
    for request, answer in zip(requests, answers, strict=True):
        assert isinstance(answer, Generation)
        reasons.add(answer.finish_reason)
        tokens = answer.response_tokens
        assert (tokens[-1] == EOS) == (answer.finish_reason == "stop")
        assert EOS not in tokens[:-1]
        assert answer.finish_reason == "stop" or len(tokens) == 40
        table = reference(models["a"], request.prompt_tokens + tokens)[len(request.prompt_tokens) - 1 : -1]
        assert np.abs(answer.logprobs - table[np.arange(len(tokens)), tokens]).max() < TOLERANCE
    assert reasons == {"stop", "length"}


def test_a_document_is_the_same_alone_in_a_batch_and_again(generator: VllmEngine) -> None:
    requests = generation_requests()
    together = in_order(generator.generate(requests, SAMPLING))
    alone = [next(generator.generate([request], SAMPLING)) for request in requests[:6]]
    again = in_order(generator.generate(requests[::-1], SAMPLING))
    for a, b in zip(together, again, strict=True):
        assert a.response_tokens == b.response_tokens
        assert np.array_equal(a.logprobs, b.logprobs)
    for a, b in zip(together[: len(alone)], alone, strict=True):
        assert a.response_tokens == b.response_tokens


def test_extra_stop_tokens_and_greedy(generator: VllmEngine, models: dict) -> None:
    (greedy,) = generator.generate([GenerationRequest((0, 0), [5, 6], 1)], Sampling(0.0, 1.0, 6, (EOS,)))
    tokens = [5, 6]
    for token in greedy.response_tokens:
        assert int(reference(models["a"], tokens)[-1].argmax()) == token
        tokens.append(token)
    stop = greedy.response_tokens[2]
    first = greedy.response_tokens.index(stop)
    (cut,) = generator.generate([GenerationRequest((0, 0), [5, 6], 1)], Sampling(0.0, 1.0, 6, (EOS, stop)))
    assert cut.response_tokens == greedy.response_tokens[: first + 1]
    assert cut.finish_reason == "stop"


def test_logprobs_are_of_the_model_not_of_the_tempered_sampler(generator: VllmEngine, models: dict) -> None:
    request = GenerationRequest((0, 0), [5, 6, 7], 3)
    (answer,) = generator.generate([request], Sampling(0.7, 0.9, 20, (EOS,)))
    table = reference(models["a"], [5, 6, 7, *answer.response_tokens])[2:-1]
    want = table[np.arange(len(answer.response_tokens)), answer.response_tokens]
    assert np.abs(answer.logprobs - want).max() < TOLERANCE
