"""Rows of the published throughput table as steps that the model can predict."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lopd_megatron.errors import UserError
from lopd_megatron.performance.hardware import find_gpu
from lopd_megatron.performance.published_models import PUBLISHED_MODELS
from lopd_megatron.performance.shapes import ModelShape
from lopd_megatron.performance.software import Software
from lopd_megatron.performance.step_time import Layout, Step, StepModel, least_bytes

BENCHMARKS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
THROUGHPUT = BENCHMARKS / "published_throughput.csv"
SETTINGS = BENCHMARKS / "published_settings.csv"

_PRECISIONS = {
    "BF16": "bf16",
    "FP8": "fp8_cs",
    "FP8-CS": "fp8_cs",
    "FP8-DS": "fp8_ds",
    "FP8-SC": "fp8_sc",
    "FP8-MX": "mxfp8",
    "MXFP8": "mxfp8",
    "NVFP4": "nvfp4",
}
NEWEST_RELEASE = "26.08"
"""Of the table that the constants were fitted to."""
_LAYOUT = ("tp", "pp", "cp", "vp", "ep", "micro_batch_size")


@dataclass(frozen=True)
class Row:
    """One published run and the step it stands for."""

    model: str
    system: str
    kind: str
    """pre-training, sft or lora."""
    label: str
    step: Step
    tokens_per_second: float
    """Published, of one GPU."""

    def predicted(self, model: StepModel) -> float:
        """Tokens per second and GPU."""
        return self.step.tokens / model.predict(self.step).seconds / self.step.layout.gpus


def read_rows(path: Path) -> tuple[list[Row], list[str]]:
    """(rows that can be predicted, a line for each of the others)."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a CSV with the columns of {THROUGHPUT.name}")
    rows, unknown = [], []
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.DictReader(line for line in file if not line.startswith("#"))
        for number, fields in enumerate(lines, start=2):
            try:
                rows.append(parse_row(fields))
            except UserError as error:
                unknown.append(f"{path.name}:{number}: not predicted: {error}")
    return rows, unknown


def parse_row(fields: dict[str, str]) -> Row:
    """The step of one line of the table; what cannot be known is a UserError."""
    try:
        gpus, batch, micro, length = (
            int(fields[name]) for name in ("gpus", "global_batch_size", "micro_batch_size", "seq_length")
        )
        tp, pp, cp, vp, ep = (max(1, int(fields[name] or 1)) for name in _LAYOUT[:-1])
        layout = Layout(gpus, tp, pp, cp, vp, ep)
        published = float(fields["tokens_per_second_per_gpu"])
        fsdp = int(fields.get("fsdp") or 0) > 0
        system, precision_name = fields["system"], fields["precision"].strip()
        name, kind, release = model_key(fields["model"]), fields["kind"], fields["release"]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"a column is missing or not a number ({error})") from None
    if name not in PUBLISHED_MODELS:
        raise UserError(f"model {fields['model']!r} is not in performance/published_models.py")
    precision = _PRECISIONS.get(re.sub(r"\s*\(.*", "", precision_name).upper())
    if precision is None:
        raise UserError(f"precision {precision_name!r} is none of {', '.join(_PRECISIONS)}")
    gpu = find_gpu(system)
    if min(gpus, batch, micro, length) < 1 or published <= 0 or not gpu.peak(precision):
        raise UserError(f"{gpu.name} at {precision} with {gpus} GPUs and batch {batch} is no run")
    if gpus % (layout.tp * layout.pp * layout.cp):
        raise UserError(f"{gpus} GPUs are no multiple of TP·PP·CP = {layout.tp * layout.pp * layout.cp}")
    shape = PUBLISHED_MODELS[name]
    software = published_software(name, kind, gpu.name, precision, release, layout, micro, fsdp)
    step = Step(
        shape=shape,
        gpu=gpu,
        layout=layout,
        precision=precision,
        row_tokens=float(micro * length),
        length=float(length),
        microbatches=batch / (layout.dp * micro),
        software=software,
        frozen=kind == "lora",
    )
    needed = least_bytes(step)
    if needed > gpu.memory:
        raise UserError(
            f"weights, gradients and optimizer of a rank take {needed / 1e9:.0f} GB, {gpu.name} has "
            f"{gpu.memory / 1e9:.0f} GB: the run had another layout than the table says"
        )
    label = (
        f"{release} {gpu.name} {name} {kind} {precision} TP{layout.tp} PP{layout.pp} CP{layout.cp} "
        f"VP{layout.vp} EP{layout.ep} MBS{micro}"
    )
    return Row(name.removesuffix("-no-mtp"), gpu.name, kind, label, step, published)


def model_key(text: str) -> str:
    """The name in PUBLISHED_MODELS of a model as tables write it."""
    plain = re.sub(r"\s*\(.*?\)", "", text)
    squeezed = re.sub(r"[^a-z0-9.]", "", plain.lower())
    squeezed = squeezed.replace("llama3.18b", "llama38b").replace("llama3.170b", "llama370b")
    squeezed = squeezed.replace("nemotron35", "nemotron3.5").replace("llama3405b", "llama3.1405b")
    found = {re.sub(r"[^a-z0-9.]", "", name): name for name in PUBLISHED_MODELS}.get(squeezed, plain)
    without = "w/o mtp" in text.lower()
    return f"{found}-no-mtp" if without and f"{found}-no-mtp" in PUBLISHED_MODELS else found


@lru_cache(maxsize=1)
def _settings() -> tuple[dict[str, str], ...]:
    with SETTINGS.open(newline="", encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


def published_software(
    model: str, kind: str, gpu: str, precision: str, release: str, layout: Layout, micro: int, fsdp: bool
) -> Software:
    """Settings of the recipe behind a published row: that of the same release and layout, or the nearest.

    Without any recipe of the model: the partial graphs and fused dispatch that most recipes of 2026 use.
    """
    wanted = dict(zip(_LAYOUT, (layout.tp, layout.pp, layout.cp, layout.vp, layout.ep, micro), strict=True))

    def nearness(line: dict[str, str]) -> tuple[int, float]:
        score = 4 * (precision in line["precisions"].split("|")) + 4 * (gpu in line["systems"].split("|"))
        score += 3 * (kind == line["kind"]) + 5 * (release in line["releases"].split("|"))
        score += sum(int(line[name]) == value for name, value in wanted.items())
        ages = [_age(release) - _age(other) for other in line["releases"].split("|")]
        age = min(age if age >= 0 else 20 - age for age in ages)  # a later recipe only where none came before
        return score - 5 * (age >= 20), -age

    months = max(0.0, _age(NEWEST_RELEASE) - _age(release))
    lines = [line for line in _settings() if line["model"] == model.removesuffix("-no-mtp")]
    if not lines:
        mixture = PUBLISHED_MODELS[model].is_mixture
        return Software(
            graphs="partial" if mixture else "none",
            dispatcher="hybridep",
            overlap_tensor=not mixture,
            fsdp=fsdp,
            months_behind=months,
        )
    line = max(lines, key=nearness)
    return Software(
        graphs=line["graphs"],  # type: ignore[arg-type]
        dispatcher=line["dispatcher"],  # type: ignore[arg-type]
        overlap_experts=line["overlap_experts"] == "1",
        overlap_tensor=not PUBLISHED_MODELS[model].is_mixture,
        fused_experts=line["fused_experts"] == "1",
        fsdp=fsdp or line["fsdp"] == "1",
        months_behind=months,
        fp8_attention=line["fused_experts"] == "1" and precision == "mxfp8",
        recompute_layers=int(line["recompute_layers"]),
        recompute_modules=frozenset(filter(None, line["recompute_modules"].split("+"))),
        high_precision_share=14 / 88 if model == "nemotron-3-super" and precision == "nvfp4" else 0.0,
    )


def _age(release: str) -> float:
    """Months of a release like 26.04.01."""
    parts = [int(part) for part in re.findall(r"\d+", release)[:3]] + [0, 0, 0]
    return 12.0 * parts[0] + parts[1] + parts[2] / 10


def relative_errors(rows: Iterable[Row], model: StepModel) -> list[float]:
    """|predicted / published − 1| of tokens per second."""
    return [abs(row.predicted(model) / row.tokens_per_second - 1) for row in rows]


def shape_of(name: str) -> ModelShape | None:
    """A shape by its published name, or None."""
    return PUBLISHED_MODELS.get(model_key(name))
