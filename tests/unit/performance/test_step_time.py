"""The model of step time: physics that must hold whatever the constants, and the published runs."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.model.flops import forward_flops
from lopd_megatron.model.student_spec import student_spec
from lopd_megatron.performance.communication import ring_seconds
from lopd_megatron.performance.constants import FIT, MEANING, Constants
from lopd_megatron.performance.fit import fit, log_ratios, summary
from lopd_megatron.performance.hardware import GPUS, find_gpu
from lopd_megatron.performance.known_models import NAMES, known_config
from lopd_megatron.performance.layer_time import Device
from lopd_megatron.performance.published import THROUGHPUT, parse_row, read_rows
from lopd_megatron.performance.published_models import PUBLISHED_MODELS
from lopd_megatron.performance.rank import layout_correlations, spearman
from lopd_megatron.performance.shapes import shape_from_hf
from lopd_megatron.performance.software import Software
from lopd_megatron.performance.step_time import Layout, Step, StepModel

ROOT = Path(__file__).resolve().parents[3]
MODEL = StepModel()
DENSE = Step(PUBLISHED_MODELS["llama3-8b"], GPUS["H100"], Layout(8), "bf16", 8192.0, 8192.0, 16.0, Software())


def seconds(step: Step) -> float:
    return MODEL.predict(step).seconds


def test_the_fit_meets_its_goals_on_the_published_runs() -> None:
    rows, unknown = read_rows(THROUGHPUT)
    found = summary(log_ratios(rows, Constants.fitted()))
    kept = json.loads(FIT.read_text())
    assert len(rows) == 174
    assert [line.split(":")[1] for line in unknown] == ["113"]
    assert found == kept["fitted"], "run: python tools/bench/fit_step_time.py"
    assert found["median_abs_rel_error"] <= 0.08
    assert found["p90_abs_rel_error"] <= 0.20
    assert kept["leave_one_model_out"]["median_abs_rel_error"] <= 0.12
    assert kept["leave_one_model_out"]["p90_abs_rel_error"] <= 0.30


def test_a_layout_that_no_gpu_can_hold_is_no_run() -> None:
    """A published row: Llama 3 70B with TP1 PP1 on a GB300, whose weights and gradients take 282 GB alone."""
    (line,) = read_rows(THROUGHPUT)[1]
    assert "take 295 GB, GB300 has 278 GB" in line


def test_a_fit_without_the_models_of_a_row_is_another_fit() -> None:
    """Few iterations: the fit moves, and a constant that is planted wrong costs accuracy."""
    rows = read_rows(THROUGHPUT)[0][::8]
    fitted = fit(rows, iterations=3)
    wrong = replace(fitted, bf16=fitted.bf16 / 2, mxfp8=fitted.mxfp8 / 2)
    right_error = summary(log_ratios(rows, fitted))["median_abs_rel_error"]
    assert right_error < 0.5 * summary(log_ratios(rows, wrong))["median_abs_rel_error"]


def test_every_constant_is_explained() -> None:
    assert list(MEANING) == Constants.names()
    assert all(math.isfinite(value) and value > 0 for value in vars(Constants.fitted()).values())


def test_published_flops_are_those_of_the_shapes() -> None:
    """Published TFLOP/s over tokens/s is FLOPs per token; sliding windows are counted differently there."""
    with THROUGHPUT.open() as file:
        for fields in csv.DictReader(file):
            if fields["kind"] == "lora" or fields["model"].startswith("GPT OSS"):
                continue
            try:
                step = parse_row(fields).step
            except UserError:  # the row that no GPU can hold
                continue
            published = (
                1e12 * float(fields["model_tflops_per_gpu"]) / float(fields["tokens_per_second_per_gpu"])
            )
            assert 3 * step.shape.forward_flops(step.length) == pytest.approx(published, rel=0.08), fields


@pytest.mark.parametrize("name", ["qwen3-8b", "qwen3-30b-a3b", "llama3-8b"])
def test_flops_of_a_shape_are_those_of_the_trainer(name: str) -> None:
    hf = known_config(name)
    assert hf is not None
    spec = student_spec(hf, RunConfig(), attention="varlen")
    assert shape_from_hf(hf).forward_flops(4096) * 4096 == pytest.approx(
        forward_flops(spec, [4096]), rel=2e-3
    )


@pytest.mark.parametrize("name", NAMES)
def test_known_configs_give_their_shape_back(name: str) -> None:
    hf = known_config(name)
    assert hf is not None
    shape = shape_from_hf(hf)
    assert shape.layers == PUBLISHED_MODELS[name].layers
    assert shape.hidden == PUBLISHED_MODELS[name].hidden


def test_no_step_is_faster_than_its_arithmetic() -> None:
    for row in read_rows(THROUGHPUT)[0]:
        step = row.step
        products = 3 if not step.frozen else 2
        flops = products * step.shape.forward_flops(step.length) * step.tokens
        # bfloat16 attention runs at its own peak: the lowest bound counts everything at the highest rate
        floor = flops / (step.layout.gpus * step.gpu.peak(step.precision))
        assert seconds(step) > floor, row.label


def test_more_of_what_costs_time_takes_longer() -> None:
    base = seconds(DENSE)
    assert seconds(replace(DENSE, length=4096.0)) < base, "shorter documents have less attention"
    assert seconds(replace(DENSE, head_share=0.5)) < base
    assert seconds(replace(DENSE, frozen=True)) < base
    assert seconds(replace(DENSE, microbatches=32.0)) > 1.9 * base
    assert seconds(replace(DENSE, software=Software(fused_layers=False))) > base
    full = Software(recompute_layers=1000)
    assert 1.2 < seconds(replace(DENSE, software=full)) / base < 1.36
    assert seconds(replace(DENSE, gpu=GPUS["GB300"])) < 0.6 * base
    assert seconds(replace(DENSE, precision="fp8_cs")) < base


def test_tensor_parallelism_halves_the_work_and_adds_collectives() -> None:
    split = replace(DENSE, layout=Layout(8, tp=2), microbatches=32.0)
    parts = MODEL.predict(split).parts
    assert parts["tensor parallel"] > 0
    assert parts["products"] == pytest.approx(MODEL.predict(DENSE).parts["products"], rel=0.1)
    hidden = replace(split, software=Software(overlap_tensor=False))
    assert MODEL.predict(hidden).parts["tensor parallel"] > parts["tensor parallel"]


def test_pipeline_bubble_by_hand() -> None:
    """Equal stages: (PP − 1) / VP stages of one micro-batch; the head makes the last stage the slowest."""
    step = replace(DENSE, layout=Layout(32, pp=4), shape=replace(DENSE.shape, vocab=128))
    parts = MODEL.predict(step).parts
    busy = sum(
        v for k, v in parts.items() if k not in ("pipeline bubble", "data parallel", "optimizer", "step")
    )
    assert parts["pipeline bubble"] == pytest.approx(3 * busy / 16, rel=0.02)
    interleaved = MODEL.predict(replace(step, layout=Layout(32, pp=4, vp=4))).parts
    assert interleaved["pipeline bubble"] == pytest.approx(parts["pipeline bubble"] / 4, rel=0.05)


def test_uneven_stages() -> None:
    """Two layers taken from the stage with the head shorten the step; the slowest stage sets the pace."""
    even = replace(DENSE, layout=Layout(32, pp=4))
    lighter = replace(DENSE, layout=Layout(32, pp=4, chunk_layers=(8, 9, 9, 6)))
    heavier = replace(DENSE, layout=Layout(32, pp=4, chunk_layers=(2, 2, 2, 26)))
    assert seconds(lighter) < seconds(even) < seconds(heavier)
    assert Layout(8, pp=8).chunks(94) == (12, 12, 12, 12, 12, 12, 12, 10)
    assert sum(Layout(64, pp=16, vp=4).chunks(61)) == 61


MIXTURE = Step(
    PUBLISHED_MODELS["qwen3-30b-a3b"],
    GPUS["H100"],
    Layout(16, ep=8),
    "bf16",
    16384.0,
    4096.0,
    8.0,
    Software(),
)


def test_experts_over_the_network_cost_more_than_inside_a_node() -> None:
    inside = MODEL.predict(MIXTURE).parts["expert parallel"]
    across = MODEL.predict(replace(MIXTURE, layout=Layout(16, ep=16))).parts["expert parallel"]
    assert across > 2 * inside
    wide = replace(MIXTURE, gpu=GPUS["GB200"])
    near = MODEL.predict(wide).parts["expert parallel"]
    far = MODEL.predict(replace(wide, layout=Layout(16, ep=16))).parts["expert parallel"]
    assert far == pytest.approx(near, rel=0.2), "sixteen GPUs of an NVL72 are one domain"


def test_imbalance_and_software_of_a_mixture() -> None:
    base = seconds(MIXTURE)
    assert seconds(replace(MIXTURE, imbalance=1.5)) > 1.1 * base
    for better in (
        Software(dispatcher="hybridep"),
        Software(overlap_experts=True),
        Software(graphs="full"),
    ):
        assert seconds(replace(MIXTURE, software=better)) < base
    assert seconds(replace(MIXTURE, software=Software(sequential_experts=True))) >= base


def test_small_microbatches_wait_for_the_host() -> None:
    small = replace(MIXTURE, row_tokens=1024.0)
    assert MODEL.predict(small).parts["host"] > 0.3 * seconds(small)
    assert MODEL.predict(replace(small, software=Software(graphs="full"))).parts["host"] == 0


def test_ring_over_nodes_uses_the_network_of_all_ranks_in_a_node() -> None:
    device = Device(GPUS["H100"], Constants.fitted())
    one_per_node = ring_seconds(1e9, 4, 8, device)
    assert one_per_node == pytest.approx(0.75e9 / (50e9 * device.constants.nic))
    assert ring_seconds(1e9, 1, 1, device) == 0
    assert ring_seconds(1e9, 32, 1, device) < 0.5 * one_per_node


def fields(**changes: str) -> dict[str, str]:
    with THROUGHPUT.open() as file:
        return next(csv.DictReader(file)) | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "Secret-1T"}, "model 'Secret-1T' is not in"),
        ({"system": "DGX-X900"}, "no GPU 'DGX-X900'"),
        ({"system": ""}, "no GPU ''"),
        ({"precision": "INT2"}, "precision 'INT2' is none of"),
        ({"system": "DGX-H100", "precision": "NVFP4"}, "is no run"),
        ({"gpus": "many"}, "not a number"),
        ({"gpus": "7", "tp": "2"}, "no multiple of TP"),
        ({"tokens_per_second_per_gpu": "0"}, "is no run"),
    ],
)
def test_a_row_that_cannot_be_known_is_named(changes: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_row(fields(**changes))


@pytest.mark.processes
def test_the_bench_names_unknown_rows_and_ends_with_one_object(tmp_path: Path) -> None:
    table = tmp_path / "held_out.csv"
    rows = [fields(), fields(model="Secret-1T"), dict.fromkeys(fields(), "")]
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(fields()))
        writer.writeheader()
        writer.writerows(rows)
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "bench" / "bench_step_time.py", table],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    result = json.loads(lines[-1])
    assert len(lines) == 3
    assert "held_out.csv:3: not predicted: model 'Secret-1T'" in lines[0]
    assert (result["rows"], result["skipped"]) == (1, 2)
    assert set(result) >= {"median_abs_rel_error", "p90_abs_rel_error", "by_system", "by_model"}


def test_rank_correlation() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert math.isnan(spearman([1, 2, 3], [5, 5, 5]))
    rows, _ = read_rows(THROUGHPUT)
    found = layout_correlations(rows, [row.predicted(MODEL) for row in rows])
    assert len(found) >= 3
    assert min(value for _, value in found.values()) >= 0.8


def test_gpus_by_the_names_that_torch_gives() -> None:
    assert find_gpu("H100 80GB HBM3").name == "H100"
    with pytest.raises(UserError, match="known are H100"):
        find_gpu("T4")
