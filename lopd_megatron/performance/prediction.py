"""The predicted time of this trainer's step, from a run's config: for plans, the training log and reports."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.performance.hardware import Gpu, find_gpu
from lopd_megatron.performance.shapes import ModelShape, shape_from_hf
from lopd_megatron.performance.software import Software, our_software
from lopd_megatron.performance.step_time import Layout, Step, StepModel, StepTime


@dataclass(frozen=True)
class Batch:
    """Tokens of one optimizer step, over all ranks."""

    tokens: float
    length: float
    """Mean of a sequence, prompt included."""
    head_share: float = 1.0
    """Share of the tokens that pass the output head."""


def layout_of(config: RunConfig, gpus: int) -> Layout:
    """The layout of `parallel.*` on so many GPUs; refused when they do not divide."""
    parallel = config.parallel
    parallel.data_parallel_size(gpus)
    return Layout(
        gpus=gpus,
        tp=parallel.tensor_model_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        cp=parallel.context_parallel_size,
        vp=parallel.virtual_pipeline_model_parallel_size or 1,
        ep=parallel.expert_model_parallel_size,
        etp=parallel.expert_tensor_parallel_size,
    )


def training_step(
    shape: ModelShape,
    config: RunConfig,
    gpu: Gpu,
    gpus: int,
    batch: Batch,
    *,
    software: Software | None = None,
    imbalance: float = 1.0,
) -> Step:
    """One step of this trainer: packed rows of `data.seq_length`, filled as `batch` says.

    Every data-parallel rank runs the same whole number of micro-batches; the last ones may be partly empty,
    which the fuller ones set the pace for.
    """
    layout = layout_of(config, gpus)
    capacity = float(config.data.seq_length * config.train.micro_batch_size)
    per_rank = batch.tokens / layout.dp
    count = max(1, math.ceil(per_rank / capacity - 0.02))
    return Step(
        shape=shape,
        gpu=gpu,
        layout=layout,
        precision="bf16",
        row_tokens=min(capacity, per_rank / count),
        length=batch.length,
        microbatches=float(count),
        software=software or our_software(config),
        head_share=batch.head_share,
        imbalance=imbalance,
    )


@lru_cache(maxsize=1)
def fitted_model() -> StepModel:
    """The model with the committed constants."""
    return StepModel()


def predict_training(
    hf: dict[str, Any], config: RunConfig, gpu: Gpu, gpus: int, batch: Batch, **options: Any
) -> StepTime:
    """Seconds of one step by part."""
    return fitted_model().predict(training_step(shape_from_hf(hf), config, gpu, gpus, batch, **options))


def predicted_step_ms(
    hf: dict[str, Any],
    config: RunConfig,
    device_name: str,
    world_size: int,
    batch: Batch,
    *,
    transformer_engine: bool = False,
) -> float | None:
    """Milliseconds that a step should take on this device; None for one that the table does not know.

    The log writes it beside the measured time, so an unknown device or model is no error.
    """
    if config.train.precision != "bf16" or "PCIe" in device_name or "NVL" in device_name.split():
        return None  # boards with less power and another network than the table's
    try:
        gpu = find_gpu(device_name.replace("NVIDIA", "").strip())
        software = our_software(config, transformer_engine=transformer_engine)
        return 1e3 * predict_training(hf, config, gpu, world_size, batch, software=software).seconds
    except UserError:
        return None
