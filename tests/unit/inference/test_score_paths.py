"""The self-test at start-up: a path that is off by one token is never used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lopd_megatron.config import EngineConfig
from lopd_megatron.errors import UserError
from lopd_megatron.inference.score_paths import choose_path, sample_requests
from lopd_megatron.inference.sizes import (
    ModelShape,
    check_fits,
    cpu_kv_cache_bytes,
    read_shape,
    scoring_batch_tokens,
)
from lopd_megatron.rollouts.score_stage import score_tokens
from tests.unit.rollouts.fake_engine import FakeEngine, fake_logprob


def test_the_fastest_path_that_agrees() -> None:
    assert choose_path(FakeEngine(), "auto", 0, 64) == "native"
    assert choose_path(FakeEngine(), "auto", 3, 64) == "flat"
    assert choose_path(FakeEngine(shift={"native": 1}), "auto", 0, 64) == "flat"
    assert choose_path(FakeEngine(shift={"native": 1, "flat": -1}), "auto", 0, 64) == "stock"
    assert choose_path(FakeEngine(), "stock", 0, 64) == "stock"


def test_a_path_asked_for_must_agree() -> None:
    with pytest.raises(UserError, match=r"scores.path=flat failed its self-test: differs .* nats"):
        choose_path(FakeEngine(shift={"flat": 1}), "flat", 0, 64)
    with pytest.raises(UserError, match="native gives no top-k"):
        choose_path(FakeEngine(), "native", 4, 64)
    old = FakeEngine()
    old.has_native_scoring = False
    with pytest.raises(UserError, match="native needs vLLM's V2"):
        choose_path(old, "native", 0, 64)
    assert choose_path(old, "auto", 0, 64) == "flat"


@pytest.mark.parametrize("longest", [2, 10, 40, 4096])
def test_samples_fit_and_have_the_awkward_shapes(longest: int) -> None:
    requests = sample_requests(50, longest)
    assert all(1 <= r.start < len(r.tokens) <= longest for r in requests)
    assert min(len(r.tokens) for r in requests) == 2
    assert choose_path(FakeEngine(), "auto", 0, longest) == "native"


def test_score_tokens_keeps_the_order() -> None:
    documents = [([3], [4, 5]), ([6, 7, 8], [9]), ([1] * 5, [2] * 7)]
    found = score_tokens(FakeEngine(slots=3), documents, path="flat")
    for (prompt, response), logprobs in zip(documents, found, strict=True):
        tokens = prompt + response
        want = [fake_logprob(tokens, t) for t in range(len(prompt), len(tokens))]
        assert logprobs == pytest.approx(want)
        assert logprobs.dtype == np.float32


def test_score_tokens_refuses_what_the_engine_refuses() -> None:
    with pytest.raises(ValueError, match="document 1: fake failure"):
        score_tokens(FakeEngine(failures={(0, 1): 1}), [([3], [4]), ([3], [5])])


SHAPE = ModelShape(2, 2, 32, 151936, 4096, {})


def test_the_scoring_batch_follows_memory_and_vocabulary() -> None:
    assert scoring_batch_tokens(151936, 17 * 151936 * 4000) == 4000
    assert scoring_batch_tokens(151936, 1) == 256


def test_what_does_not_fit_is_refused_early() -> None:
    check_fits(SHAPE, EngineConfig(max_model_len=4096), "m", on_cpu=True)
    with pytest.raises(UserError, match="max_model_len=4097 is more than the 4096 positions"):
        check_fits(SHAPE, EngineConfig(max_model_len=4097), "m", on_cpu=False)
    small = ModelShape(2, 2, 16, 100, None, {})
    check_fits(small, EngineConfig(), "m", on_cpu=False)
    with pytest.raises(UserError, match="head_dim=16"):
        check_fits(small, EngineConfig(), "m", on_cpu=True)


def test_the_cpu_cache_holds_at_least_one_document() -> None:
    config = EngineConfig(max_model_len=1000, max_num_seqs=3)
    per_token = 2 * 2 * 2 * 32 * 4
    assert 3 * 1001 * per_token <= cpu_kv_cache_bytes(SHAPE, config, 4) < 4 * 1001 * per_token
    large = ModelShape(80, 8, 128, 1, None, {})
    assert cpu_kv_cache_bytes(large, EngineConfig(max_model_len=32768), 2) > 32768 * 2 * 80 * 8 * 128 * 2


@pytest.mark.parametrize("value", [None, 0, -1, 2.5, "64", True])
def test_a_model_without_its_sizes_is_refused(tmp_path: Path, value: object) -> None:
    sizes = {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 100}
    config = {"model_type": "gemma3", "text_config": sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_shape(str(tmp_path)).head_dim == 16
    for name in sizes:
        (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": sizes | {name: value}}))
        with pytest.raises(UserError, match=rf"{name}={value!r} in config\.json is no positive whole number"):
            read_shape(str(tmp_path))
