"""Speed and memory of training steps: a recipe, and variants of it measured in the same processes.

    torchrun --nproc-per-node N tools/bench/bench_train.py --recipe FILE.py:FUNCTION [section.key=value ...] \
        [--variant section.key=value] ... [--steps 10] [--warmup 3]
    python tools/bench/bench_train.py --case NAME [--attention varlen] [--steps 10] [--warmup 3]

Trains on the recipe's dataset without saving or logging and prints JSON: for the recipe and for each variant
iteration_time_ms (median, from the gradient buffers zeroed to the weights updated), optimizer_ms of it,
tokens_per_second_per_gpu, mfu (None where the device's peak is not known), peak_memory_gib, and their ratio
to the recipe's. A case needs no files: random weights, one packed row of random rollouts without padding, a
student of true width; it also prints the memory predicted. Writes nothing.

slice_8b                8 layers of the 8B student and its whole head, 16k tokens; slice_8b_16_layers the same
                        with 16: the difference of the two is 8 layers alone
step_1_7b, step_4b      whole students, 16k tokens; 4B recomputes its MLPs
full_8b                 all parameters of the 8B student on one 141 GB GPU, 8k tokens: precision-aware
                        optimizer, full recomputation; full_8b_recompute_mlp repeats only the MLPs
tiny                    runs on a CPU
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lopd_megatron import cli
from lopd_megatron.config import RunConfig
from lopd_megatron.parallel import prepare_megatron
from lopd_megatron.parallel import topology as grid
from lopd_megatron.train.launch_env import launch_world_size
from lopd_megatron.train.log import peak_memory_bytes
from lopd_megatron.train.peak_flops import device_peak_flops
from lopd_megatron.train.run_rank import run_rank


def main() -> int:
    arguments = cli.parser(__doc__)
    arguments.add_argument("--variant", action="append", default=[], metavar="section.key=value")
    _add_counts(arguments)
    if "--case" in sys.argv:
        return run_case()
    config, options = cli.parse(arguments)
    if options.dry_run:
        return cli.dry_run(config, [config.model.student, *config.dataset_prefixes], [])
    prepare_megatron()
    results = {"recipe": measure(config, options.warmup, options.steps)}
    for variant in options.variant:
        changed = config.model_copy(deep=True)
        cli.apply_override(changed, *variant.split("=", 1))
        results[variant] = measure(changed, options.warmup, options.steps)
    base = results["recipe"]
    for result in results.values():
        result["ratio_to_recipe"] = {
            name: result[name] / base[name] for name in base if base[name] and name != "ratio_to_recipe"
        }
    if dist.get_rank() == 0:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        print(json.dumps({"device": device, "ranks": dist.get_world_size(), "results": results}, indent=2))
    return 0


def _add_counts(arguments: argparse.ArgumentParser) -> None:
    arguments.add_argument("--steps", type=int, default=10)
    arguments.add_argument("--warmup", type=int, default=3)


def run_case() -> int:
    """One case; its last line is one JSON object."""
    from bench_train_cases import CASES, RandomRow, case_config, random_weights, refuse_what_cannot_fit

    arguments = argparse.ArgumentParser()
    arguments.add_argument("--case", choices=CASES, required=True)
    arguments.add_argument("--attention", default="auto", help="model.attention")
    _add_counts(arguments)
    options = arguments.parse_args()
    case = CASES[options.case]
    prepare_megatron()
    with tempfile.TemporaryDirectory() as folder:
        config = case_config(case, Path(folder))
        cli.apply_override(config, "model.attention", options.attention)
        on_cuda = torch.cuda.is_available()
        limit = torch.cuda.get_device_properties(0).total_memory if on_cuda else float("inf")
        predicted = refuse_what_cannot_fit(config, limit)
        result = measure(
            config,
            options.warmup,
            options.steps,
            batches=RandomRow(case, launch_world_size()),
            weights=random_weights,
        )
    result["predicted_memory_gib"] = predicted / 2**30
    if dist.get_rank() == 0:
        print(json.dumps(result))
    return 0


def measure(config: RunConfig, warmup: int, steps: int, **build: Any) -> dict[str, Any]:
    """Median over `steps` steps after `warmup`; `build` goes to `build_trainer`."""
    from lopd_megatron.train.setup import build_trainer
    from lopd_megatron.train.step import train_step

    if dist.is_initialized():
        grid.destroy()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer = build_trainer(config, **build)
    optimizer_seconds = _time_optimizer(trainer)
    timed, seconds = [], []
    for index in range(warmup + steps):
        batch = trainer.batches.step(trainer.consumed_train_samples)
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = train_step(trainer, batch)
        torch.cuda.synchronize()
        trainer.consumed_train_samples += config.train.global_batch_size
        if index >= warmup:
            timed.append(result)
            seconds.append(time.perf_counter() - start)
    world_size, peak = dist.get_world_size(), device_peak_flops()
    memory = torch.tensor([peak_memory_bytes()], dtype=torch.float64, device=trainer.topology.device)
    dist.all_reduce(memory, op=dist.ReduceOp.MAX)
    step_s = statistics.median(seconds)
    rates = [(r.num_tokens / s, r.flops / s) for r, s in zip(timed, seconds, strict=True)]
    return {
        "iteration_time_ms": 1e3 * step_s,
        "optimizer_ms": 1e3 * statistics.median(optimizer_seconds[warmup:]),
        "tokens_per_second_per_gpu": statistics.median(tokens for tokens, _ in rates) / world_size,
        "mfu": statistics.median(flops for _, flops in rates) / world_size / peak if peak else None,
        "peak_memory_gib": float(memory) / 2**30,
    }


def _time_optimizer(trainer: Any) -> list[float]:
    """Seconds of each update from now on: gradient norm, clipping and Adam."""
    stock, seconds = trainer.optimizer.step, []

    def step() -> Any:
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = stock()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        return result

    trainer.optimizer.step = step
    return seconds


if __name__ == "__main__":
    run_rank(main)
