"""The log hook: one line on the terminal and one record in `metrics.jsonl` per interval."""

from __future__ import annotations

import resource
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from lopd_megatron.config import RunConfig
from lopd_megatron.loss import finalize_metrics
from lopd_megatron.performance.prediction import Batch, predicted_step_ms
from lopd_megatron.progress import log_line
from lopd_megatron.train.metrics import Writer, open_writers
from lopd_megatron.train.peak_flops import device_peak_flops
from lopd_megatron.train.state import Hook, StepResult, Trainer

_LINE = (
    ("loss", "loss {:.5f}"),
    ("reverse_kl", "reverse_kl {:.4f}"),
    ("k2", "k2 {:.4g}"),
    ("log_ratio_mean", "log_ratio_mean {:.4f}"),
    ("valid_reverse_kl", "held-out reverse_kl {:.4f}"),
    ("valid_kl_estimate", "held-out kl_estimate {:.4f}"),
    ("valid_k2", "held-out k2 {:.4g}"),
    ("valid_loss", "held-out loss {:.4f}"),
    ("grad_norm", "grad_norm {:.3f}"),
    ("lr", "lr {:.2e}"),
    ("iteration_time_ms", "{:.0f} ms"),
    ("predicted_iteration_time_ms", "predicted {:.0f} ms"),
    ("tokens_per_second_per_gpu", "{:.0f} tokens/s/GPU"),
    ("mfu", "MFU {:.1%}"),
    ("peak_memory_gib", "{:.1f} GiB"),
)


class LogHook(Hook):
    """Pools metrics over `log_interval` iterations: sums of numerators and denominators, divided once."""

    def __init__(self, config: RunConfig) -> None:
        self.interval = config.train.log_interval
        self.writers: list[Writer] = []
        self.results: list[StepResult] = []

    def on_start(self, trainer: Trainer) -> None:
        self.peak_flops = device_peak_flops()
        self.first, self.started = trainer.iteration, time.monotonic()
        if trainer.topology.rank == 0:
            self.writers = open_writers(trainer.config, trainer.iteration)
            log_line(
                f"training {trainer.config.model.student}, iterations {trainer.iteration + 1} to "
                f"{trainer.config.train.train_iters} on {trainer.topology.world_size} rank(s)"
            )

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self.results.append(result)
        last = trainer.is_done or bool(trainer.stop_reason)
        if trainer.iteration % self.interval and not last:
            return
        metrics = self._metrics(trainer)
        self.results = []
        for writer in self.writers:
            writer.write(trainer.iteration, metrics)
        if trainer.topology.rank == 0:
            if "valid_k2" in metrics:  # only the gradient of such a loss means something
                metrics.pop("valid_loss")
            shown = "  ".join(form.format(metrics[name]) for name, form in _LINE if name in metrics)
            total = trainer.config.train.train_iters
            log_line(
                f"iteration {trainer.iteration}/{total}  {shown}  {self._left(trainer.iteration, total)}"
            )

    def _left(self, iteration: int, total: int) -> str:
        """The time that the other iterations take, if they take what those of this start took on average."""
        seconds = (time.monotonic() - self.started) / (iteration - self.first) * (total - iteration)
        return f"{timedelta(seconds=round(seconds))} left"

    def on_end(self, trainer: Trainer) -> None:
        for writer in self.writers:
            writer.close()

    def _metrics(self, trainer: Trainer) -> dict[str, float]:
        """Every rank's part is pooled by two small all-reduces."""
        pooled: dict[str, torch.Tensor] = {}
        for result in self.results:
            for name, pair in result.metric_sums.items():  # a hook may add pairs to some steps only
                pooled[name] = pooled.get(name, torch.zeros_like(pair)) + pair
        seconds = sum(result.seconds for result in self.results)
        tokens = sum(result.num_tokens for result in self.results)
        world_size = trainer.topology.world_size
        memory = torch.tensor([peak_memory_bytes()], dtype=torch.float64, device=trainer.topology.device)
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        metrics = finalize_metrics(pooled)
        metrics |= {
            "consumed_train_samples": trainer.consumed_train_samples,
            "grad_norm": self.results[-1].grad_norm,
            "lr": self.results[-1].lr,
            "iteration_time_ms": 1e3 * seconds / len(self.results),
            "tokens_per_second_per_gpu": tokens / seconds / world_size,
            "peak_memory_gib": float(memory) / 2**30,
        }
        if self.peak_flops:
            flops = sum(result.flops for result in self.results)
            metrics["mfu"] = flops / seconds / world_size / self.peak_flops
        predicted = predicted_ms(trainer, tokens / len(self.results))
        if predicted:
            metrics["predicted_iteration_time_ms"] = predicted
        return metrics


def predicted_ms(trainer: Trainer, tokens: float) -> float | None:
    """Milliseconds that a step of so many tokens should take here; None on a device without a prediction."""
    if not torch.cuda.is_available():
        return None
    batch = Batch(tokens, tokens / trainer.config.train.global_batch_size)
    return predicted_step_ms(
        trainer.spec.hf_config,
        trainer.config,
        torch.cuda.get_device_name(),
        trainer.topology.world_size,
        batch,
        transformer_engine=trainer.spec.attention == "transformer_engine",
    )


def peak_memory_bytes() -> float:
    """Largest memory this process held: of the accelerator, or of the host where there is none."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
