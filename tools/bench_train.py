"""Speed and memory of training steps: a recipe, and variants of it measured in the same processes.

    torchrun --nproc-per-node N tools/bench_train.py --recipe FILE.py:FUNCTION [section.key=value ...] \
        [--variant section.key=value] ... [--steps 10] [--warmup 3]

Trains on the recipe's dataset without saving or logging and prints JSON: for the recipe and for each variant
iteration_time_ms (median), tokens_per_second_per_gpu, mfu (None where the device's peak is not known),
peak_memory_gib, and their ratio to the recipe's. Writes nothing.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

import torch
import torch.distributed as dist

from lopd_megatron import cli
from lopd_megatron.config import RunConfig
from lopd_megatron.parallel import prepare_megatron
from lopd_megatron.parallel import topology as grid
from lopd_megatron.train.abort import run_rank
from lopd_megatron.train.log import peak_memory_bytes
from lopd_megatron.train.peak import device_peak_flops


def main() -> int:
    arguments = cli.parser(__doc__)
    arguments.add_argument("--variant", action="append", default=[], metavar="section.key=value")
    arguments.add_argument("--steps", type=int, default=10)
    arguments.add_argument("--warmup", type=int, default=3)
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


def measure(config: RunConfig, warmup: int, steps: int) -> dict[str, Any]:
    """Median over `steps` steps after `warmup`."""
    from lopd_megatron.train.setup import build_trainer
    from lopd_megatron.train.step import train_step

    if dist.is_initialized():
        grid.destroy()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer = build_trainer(config)
    timed = []
    for index in range(warmup + steps):
        result = train_step(trainer, trainer.batches.step(trainer.consumed_train_samples))
        trainer.consumed_train_samples += config.train.global_batch_size
        if index >= warmup:
            timed.append(result)
    world_size, peak = dist.get_world_size(), device_peak_flops()
    memory = torch.tensor([peak_memory_bytes()], dtype=torch.float64, device=trainer.topology.device)
    dist.all_reduce(memory, op=dist.ReduceOp.MAX)
    return {
        "iteration_time_ms": 1e3 * statistics.median(r.seconds for r in timed),
        "tokens_per_second_per_gpu": statistics.median(r.num_tokens / r.seconds for r in timed) / world_size,
        "mfu": statistics.median(r.flops / r.seconds for r in timed) / world_size / peak if peak else None,
        "peak_memory_gib": float(memory) / 2**30,
    }


if __name__ == "__main__":
    run_rank(main)
