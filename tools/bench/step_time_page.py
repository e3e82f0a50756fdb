"""Tables and the plot of the step-time model for docs/performance.md."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lopd_megatron.files import atomic_path
from lopd_megatron.performance.constants import FIT, MEANING, Constants
from lopd_megatron.performance.fit import summary
from lopd_megatron.performance.hardware import GPUS
from lopd_megatron.performance.published import THROUGHPUT, read_rows
from lopd_megatron.performance.published_models import PUBLISHED_MODELS
from lopd_megatron.performance.software import Software
from lopd_megatron.performance.step_time import Layout, Step, StepModel

PLOT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "step_time.png"
TUNED = Software(graphs="none", dispatcher="hybridep")
BRIDGE = Software(graphs="partial", dispatcher="hybridep", overlap_experts=True)


@dataclass(frozen=True)
class Anchor:
    """A published H100 run that is not in the table and was not fitted."""

    name: str
    source: str
    step: Step
    published: float


def _step(
    model: str, layout: Layout, precision: str, row: int, length: int, microbatches: int, software: Software
) -> Step:
    shape = PUBLISHED_MODELS[model]
    return Step(shape, GPUS["H100"], layout, precision, row, length, microbatches, software)


_DGXC = "NVIDIA/dgxc-benchmarking"
ANCHORS = (
    Anchor("Llama3-8B SFT bf16", _DGXC, _step("llama3-8b", Layout(8), "bf16", 4096, 4096, 4, TUNED), 12412),
    Anchor("Llama3-8B SFT FP8", _DGXC, _step("llama3-8b", Layout(8), "fp8_cs", 4096, 4096, 4, TUNED), 17246),
    Anchor(
        "Llama3.1-8B pretraining bf16, CP2",
        _DGXC,
        _step("llama3-8b", Layout(8, cp=2), "bf16", 8192, 8192, 32, TUNED),
        10153,
    ),
    Anchor(
        "Qwen3-30B-A3B bf16, EP16",
        "Megatron-Bridge docs",
        _step("qwen3-30b-a3b", Layout(16, ep=16), "bf16", 4096, 4096, 64, BRIDGE),
        13012,
    ),
    Anchor(
        "Qwen3-30B-A3B bf16, EP8, micro-batch 4",
        "NeMo AutoModel",
        _step(
            "qwen3-30b-a3b",
            Layout(8, ep=8),
            "bf16",
            16384,
            4096,
            16,
            Software(dispatcher="deepep", fsdp=True),
        ),
        12040,
    ),
    Anchor(
        "Qwen3-30B-A3B bf16, EP16, all-to-all",
        "Megatron-Bridge docs",
        _step("qwen3-30b-a3b", Layout(16, ep=16), "bf16", 4096, 4096, 64, Software()),
        5750,
    ),
    Anchor(
        "Llama3.1-8B, torchtitan FSDP with selective recomputation (recomputation not modelled)",
        "torchtitan benchmarks",
        _step("llama3-8b", Layout(8), "bf16", 8192, 8192, 1, Software(fsdp=True)),
        6667,
    ),
)


def error_table() -> list[str]:
    """Markdown: errors of the fit and of the cross-validation, by system."""
    fit: dict[str, Any] = json.loads(FIT.read_text())
    rows, _ = read_rows(THROUGHPUT)
    model = StepModel()
    ratios = np.log([row.predicted(model) / row.tokens_per_second for row in rows])
    lines = ["| rows | median error | 90th percentile | goal |", "|---|---:|---:|---|"]
    for name, key, goal in (
        ("fitted", "fitted", "≤ 8 %, ≤ 20 %"),
        ("a model left out of the fit", "leave_one_model_out", "≤ 12 %, ≤ 30 %"),
        ("a family left out of the fit", "leave_one_family_out", ""),
    ):
        lines.append(f"| {fit['rows']}, {name} | {_percent(fit[key])} | {goal} |")
    for system in sorted({row.system for row in rows}):
        members = [n for n, row in enumerate(rows) if row.system == system]
        lines.append(f"| {len(members)}, {system}, fitted | {_percent(summary(ratios[members]))} | |")
    return lines


def _percent(errors: dict[str, float]) -> str:
    return f"{100 * errors['median_abs_rel_error']:.1f} % | {100 * errors['p90_abs_rel_error']:.1f} %"


def anchor_table() -> list[str]:
    """Markdown: runs of other sources, which the fit has not seen."""
    model = StepModel()
    lines = ["| run, H100 | source | published | predicted | |", "|---|---|---:|---:|---:|"]
    for anchor in ANCHORS:
        value = anchor.step.tokens / model.predict(anchor.step).seconds / anchor.step.layout.gpus
        error = value / anchor.published - 1
        lines.append(
            f"| {anchor.name} | {anchor.source} | {anchor.published:,.0f} | {value:,.0f} | {error:+.0%} |"
        )
    return lines


def constant_table() -> list[str]:
    """Markdown: every fitted constant, its prior and what it means."""
    priors, fitted = asdict(Constants()), asdict(Constants.fitted())
    lines = ["| constant | fitted | prior | meaning |", "|---|---:|---:|---|"]
    lines += [f"| `{n}` | {fitted[n]:.3g} | {priors[n]:.3g} | {MEANING[n]} |" for n in priors]
    return lines


def hardware_table() -> list[str]:
    """Markdown: what is taken from vendors."""
    lines = [
        "| GPU | bf16 / FP8 / FP4, TFLOP/s | memory, TB/s | GB | NVLink, GB/s | domain | NIC, GB/s "
        "| source |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for gpu in GPUS.values():
        rates = " / ".join(f"{rate / 1e12:,.0f}" for rate in (gpu.bf16, gpu.fp8, gpu.fp4))
        lines.append(
            f"| {gpu.name} | {rates} | {gpu.hbm / 1e12:g} | {gpu.memory / 1e9:.0f} | {gpu.nvlink / 1e9:.0f} "
            f"| {gpu.nvlink_domain} | {gpu.nic / 1e9:.0f} | {gpu.source} |"
        )
    return lines


def draw(path: Path = PLOT) -> None:
    """Predicted against published tokens per second and GPU, one colour a system."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, _ = read_rows(THROUGHPUT)
    model = StepModel()
    figure, axes = pyplot.subplots(figsize=(6, 5.5), layout="constrained")
    for system in sorted({row.system for row in rows}):
        members = [row for row in rows if row.system == system]
        axes.plot(
            [row.tokens_per_second for row in members],
            [row.predicted(model) for row in members],
            "o",
            markersize=4,
            alpha=0.7,
            label=system,
        )
    ends = np.array([200.0, 60_000.0])
    axes.plot(ends, ends, "k-", linewidth=0.8)
    for factor in (0.8, 1.25):
        axes.plot(ends, factor * ends, "k:", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="published, tokens/s/GPU", ylabel="predicted, tokens/s/GPU")
    axes.set_title(f"{len(rows)} published runs; dotted: ± 25 %")
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})
    pyplot.close(figure)
