"""Plans: stages, layouts, and what the command prints."""

from __future__ import annotations

import time

import pytest

from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.model.memory_estimate import OVERHEAD_BYTES
from lopd_megatron.performance.hardware import GPUS
from lopd_megatron.performance.known_models import known_config
from lopd_megatron.performance.ours import price_list
from lopd_megatron.performance.plan import main
from lopd_megatron.performance.prediction import Batch, predicted_step_ms, training_step
from lopd_megatron.performance.published_models import PUBLISHED_MODELS
from lopd_megatron.performance.search import USABLE, even_pipeline, search_layouts
from lopd_megatron.performance.shapes import shape_from_hf
from lopd_megatron.performance.stages import decode, disk_bytes, kv_bytes, response_lengths

BATCH = Batch(256 * 4246.0, 4246.0, 4096 / 4246)
H100 = GPUS["H100"]


def hf(name: str) -> dict:
    found = known_config(name)
    assert found is not None
    return found


def test_everything_that_is_offered_fits_and_the_fastest_comes_first() -> None:
    plans, tried = search_layouts(hf("Qwen3-8B"), RunConfig(), H100, 8, BATCH)
    assert 0 < len(plans) < tried
    assert all(plan.memory.total + OVERHEAD_BYTES <= USABLE * H100.memory for plan in plans)
    times = [plan.seconds for plan in plans]
    assert times == sorted(times)


def test_too_small_a_cluster_has_no_layout() -> None:
    plans, tried = search_layouts(hf("Qwen3-32B"), RunConfig(), H100, 2, BATCH)
    assert (plans, tried > 0) == ([], True)


def test_experts_are_spread_only_as_megatron_reduces_them() -> None:
    plans, _ = search_layouts(hf("Qwen3-30B-A3B"), RunConfig(), H100, 16, BATCH)
    assert plans
    for plan in plans:
        parallel = plan.config.parallel
        if parallel.expert_model_parallel_size == 1:
            assert parallel.expert_tensor_parallel_size == parallel.tensor_model_parallel_size


def test_only_even_pipelines_are_offered() -> None:
    assert even_pipeline(96, 8, 4)
    assert not even_pipeline(94, 4, 1)
    plans, _ = search_layouts(hf("Qwen3-235B-A22B"), RunConfig(), GPUS["H200"], 256, BATCH)
    assert {plan.config.parallel.pipeline_model_parallel_size for plan in plans} <= {1, 2}


def test_decoding_by_hand() -> None:
    """All responses at the cap: memory used over bandwidth used, and the fixed part of every step."""
    shape = shape_from_hf(hf("Qwen3-8B"))
    assert kv_bytes(shape) == 147_456
    found = decode(
        shape, H100, lengths=[4096.0] * 512, prompt=150, engines=1, gpus_per_engine=1, max_sequences=64
    )
    read = 2 * shape.parameters + 64 * (150 + 2048) * 147_456
    step = read / (0.6 * H100.hbm) + 1.5e-3
    assert found.slots == 64
    assert found.seconds == pytest.approx(512 / 64 * 4096 * step, rel=1e-6)


def test_long_answers_make_a_tail() -> None:
    shape = shape_from_hf(hf("Qwen3-8B"))
    options = {"prompt": 150.0, "engines": 1, "gpus_per_engine": 1, "max_sequences": 128}
    even = decode(shape, H100, lengths=[900.0] * 300, **options)
    mixed = decode(shape, H100, lengths=response_lengths(300, 4096, 600), **options)
    assert mixed.tail_share > even.tail_share


def test_a_model_too_large_for_its_engine_never_ends() -> None:
    shape = PUBLISHED_MODELS["llama3.1-405b"]
    found = decode(shape, H100, lengths=[10.0], prompt=1, engines=1, gpus_per_engine=1, max_sequences=8)
    assert found.seconds == float("inf")


def test_disk_of_a_run() -> None:
    shape = shape_from_hf(hf("Qwen3-8B"))
    disk = disk_bytes(shape, tokens=1e6, topk=16, kept_checkpoints=2, save_optimizer=True)
    assert disk.dataset == 109e6
    assert disk.checkpoint == pytest.approx(14 * shape.parameters)
    assert disk.total > 2 * disk.checkpoint


def test_every_item_of_the_work_list_saves_time_or_costs_nothing() -> None:
    config = RunConfig()
    config.parallel.expert_model_parallel_size = 8
    step = training_step(shape_from_hf(hf("Qwen3-30B-A3B")), config, H100, 16, BATCH)
    items = price_list(step)
    assert all(after <= before * 1.001 for name, before, after in items if "graphs" not in name)
    assert items[-1][2] < 0.8 * items[0][1]


def test_predicted_step_of_a_device() -> None:
    known = predicted_step_ms(hf("Qwen3-8B"), RunConfig(), "NVIDIA H100 80GB HBM3", 8, BATCH)
    assert known is not None
    assert 5_000 < known < 60_000
    assert predicted_step_ms(hf("Qwen3-8B"), RunConfig(), "Tesla T4", 8, BATCH) is None
    assert predicted_step_ms(hf("Qwen3-8B"), RunConfig(), "NVIDIA H100 PCIe", 8, BATCH) is None
    assert predicted_step_ms({}, RunConfig(), "NVIDIA H100 80GB HBM3", 8, BATCH) is None


def test_a_recipe_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = "recipes/qwen3_8b.py:lightning_opd"
    assert main([recipe, "--gpus", "8", "--gpu", "H100", "--dollars-per-gpu-hour", "2"]) == 0
    shown = capsys.readouterr().out
    for word in ("rollouts", "scores", "train", "checkpoints", "export", "GPU-hours", "$", "disk:", "█"):
        assert word in shown
    assert main([recipe, "train.train_iters=300", "--gpus", "8"]) == 0
    assert "300 steps" in capsys.readouterr().out


def test_a_search_over_235b_on_256_gpus_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    """The promise is half a minute; this is no benchmark, so the limit is far above what it takes (2 s)."""
    start = time.process_time()
    assert main(["--model", "Qwen3-235B-A22B", "--gpus", "256", "--search"]) == 0
    assert time.process_time() - start < 30
    assert capsys.readouterr().out.count("GiB\n") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "8"], "give a recipe"),
        (["--model", "Qwen3-8B", "--gpus", "8", "--gpu", "TPU"], "no GPU 'TPU'"),
        (["--model", "no/such", "--gpus", "8"], "no folder 'no/such'"),
        (["--model", "Qwen3-8B", "--gpus", "8", "--nodes", "3"], "not a multiple of --nodes"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(arguments)


def test_no_layout_is_exit_code_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "Qwen3-32B", "--gpus", "2"]) == 1
    assert "none of" in capsys.readouterr().out
