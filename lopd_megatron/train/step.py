"""One optimizer step: gradients of every micro-batch, one global division, one update."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lopd_megatron.errors import UserError
from lopd_megatron.loss import NonFiniteLoss
from lopd_megatron.model.flops import train_flops
from lopd_megatron.records import LossOutput, MicroBatch
from lopd_megatron.train.state import StepResult, Trainer

if TYPE_CHECKING:
    from lopd_megatron.data.loader import StepBatch


def train_step(trainer: Trainer, batch: StepBatch) -> StepResult:
    """Forward, backward and update on one global batch.

    Gradients are Σ ∇numerator / Σ denominator over micro-batches, data- and context-parallel ranks, divided
    once by Megatron's `finalize_model_grads`. A non-finite loss or gradient norm is a UserError on every
    rank; for the loss, before the optimizer has touched the weights.
    """
    start = time.perf_counter()
    for chunk in trainer.model:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    outputs = run_microbatches(trainer, batch, forward_only=False)
    metric_sums = pool_metric_sums([output.metric_sums for output in outputs], trainer)
    check_finite(trainer, metric_sums, batch)
    lr = current_learning_rate(trainer.optimizer)
    _, grad_norm, _ = trainer.optimizer.step()
    if not math.isfinite(grad_norm):
        raise UserError(
            f"iteration {trainer.iteration + 1}: the gradient norm is {grad_norm}, so the weights in memory "
            "are lost; the last checkpoint is good: start again from it with a lower optimizer.lr"
        )
    trainer.scheduler.step(increment=trainer.config.train.global_batch_size)
    return StepResult(
        metric_sums=metric_sums,
        num_tokens=batch.num_total_tokens,
        grad_norm=grad_norm,
        lr=lr,
        flops=train_flops(trainer.spec, batch.sequence_lengths.tolist(), head_tokens=batch.num_tokens),
        seconds=time.perf_counter() - start,
    )


def run_microbatches(trainer: Trainer, batch: StepBatch, *, forward_only: bool) -> list[LossOutput]:
    """Megatron's pipeline schedule over the micro-batches; its losses on the last stage, [] elsewhere."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    outputs: list[LossOutput] = []
    get_forward_backward_func()(
        forward_step_func=functools.partial(_forward_step, trainer, outputs),
        # Each virtual stage walks over the same micro-batches on its own.
        data_iterator=[on_device(batch.microbatches, trainer.topology.device) for _ in trainer.model],
        model=trainer.model,
        num_microbatches=len(batch.microbatches),
        seq_length=batch.seq_length,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return outputs


def on_device(microbatches: list[MicroBatch], device: torch.device) -> Iterator[MicroBatch]:
    """Each micro-batch with its tensors on the device, copied when it is its turn."""
    for microbatch in microbatches:
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(microbatch)
            if isinstance(value := getattr(microbatch, field.name), torch.Tensor)
        }
        yield dataclasses.replace(microbatch, **moved)


def _forward_step(
    trainer: Trainer, outputs: list[LossOutput], microbatches: Iterator[MicroBatch], chunk: Any
) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict]]]:
    microbatch = next(microbatches)
    hidden = chunk(microbatch)

    def loss(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
        output = trainer.loss(hidden, head_weight(chunk), microbatch)
        outputs.append(output)
        # The schedule may scale what it is given in place.
        return output.numerator.clone(), output.denominator, {}

    return hidden, loss


def head_weight(chunk: Any) -> torch.Tensor:
    """The output weight of the last chunk, whole.

    Under overlap_param_gather a weight is gathered when the module that owns it runs; the output layer is
    never run (the loss takes its weight), so its gather is waited for here.
    """
    weight = chunk.module.head_weight
    if chunk.ddp_config.overlap_param_gather:
        chunk.param_to_bucket_group[weight].finish_param_sync()
    return weight


def pool_metric_sums(parts: list[dict[str, torch.Tensor]], trainer: Trainer) -> dict[str, torch.Tensor]:
    """Sum [numerator, denominator] pairs over micro-batches, data and context parallel ranks.

    One all-reduce on the last stage, then one broadcast down the pipeline, so every rank has the sums.
    """
    topology = trainer.topology
    pooled: dict[str, torch.Tensor] = {}
    if topology.is_last_stage:
        names = list(parts[0])
        sums = torch.stack([torch.stack([part[name] for name in names]) for part in parts]).sum(0)
        dist.all_reduce(sums, group=topology.dp_cp_group)
        pooled = dict(zip(names, sums.cpu(), strict=True))
    if topology.pp_size > 1:
        box = [pooled]
        dist.broadcast_object_list(box, src=topology.last_stage_rank, group=topology.pp_group)
        pooled = box[0]
    return pooled


def check_finite(trainer: Trainer, metric_sums: dict[str, torch.Tensor], batch: StepBatch) -> None:
    """A UserError on every rank that names the document, if the loss of any token was not finite.

    Decided from the pooled sums, which all ranks have; only then one gather of who saw it.
    """
    try:
        trainer.loss.finite.raise_if_any(metric_sums, batch.document_label)
    except NonFiniteLoss as error:
        messages = [""] * trainer.topology.world_size
        dist.all_gather_object(messages, str(error))
        first = next((message for message in messages if "document" in message), messages[0])
        raise UserError(
            f"iteration {trainer.iteration + 1}: {first}; the last checkpoint is good; look at the document "
            "with lopd inspect, or lower optimizer.lr"
        ) from None


def current_learning_rate(optimizer: Any) -> float:
    """The learning rate that the next update will use."""
    from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging

    return get_canonical_lr_for_logging(optimizer.param_groups)
