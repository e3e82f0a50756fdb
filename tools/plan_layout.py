"""Which layouts of a student fit a cluster, what they need and how long the run takes.

    python tools/plan_layout.py --model Qwen3-8B --gpus 8 --gpu-memory 80
    python tools/plan_layout.py --model models/Qwen3-8B-Base --gpus 16 --gpu-memory 141 --mfu 0.45

Memory is predicted from shapes (lopd_megatron/model/memory_estimate.py), in GiB per GPU of the
fullest rank. The step time is exact FLOPs divided by an MFU that you state: arithmetic, not a measurement.
Exit code 1: none fits.
"""

from __future__ import annotations

import argparse

from lopd_megatron.config import RunConfig
from lopd_megatron.errors import run_program
from lopd_megatron.model.memory_estimate import OVERHEAD_BYTES
from lopd_megatron.model.planning import Layout, feasible_layouts, step_flops
from lopd_megatron.model.student_spec import read_hf_config
from lopd_megatron.recipes.models import BY_NAME

GIB = 1024**3
USABLE = 0.97
"""Of the memory on the label; a layout that fills the rest is not worth the risk."""


def main() -> int:
    args = parse_arguments()
    hf = BY_NAME.get(args.model) or read_hf_config(args.model)
    config = RunConfig()
    config.data.seq_length = args.seq_length
    config.train.train_iters = args.train_iters
    config.train.global_batch_size = args.global_batch_size
    config.train.precision = args.precision
    config.loss.head_chunk_tokens = 2048
    layouts, tried = feasible_layouts(
        hf,
        config,
        gpus=args.gpus,
        gpu_bytes=args.gpu_memory * GIB * USABLE,
        mean_tokens=args.mean_tokens,
    )
    flops = step_flops(hf, config, args.mean_tokens)
    print_head(args, flops)
    if not layouts:
        print(f"none of {tried} layouts fits {args.gpus} GPUs of {args.gpu_memory:.0f} GB; use more GPUs")
        return 1
    print_table(layouts[: args.show], len(layouts), tried)
    print_choice(layouts[0], args, flops)
    return 0


def parse_arguments() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument(
        "--model", required=True, help=f"Hugging Face folder, or one of {', '.join(BY_NAME)}"
    )
    arguments.add_argument("--gpus", type=int, required=True)
    arguments.add_argument("--gpu-memory", type=float, required=True, metavar="GB")
    arguments.add_argument("--seq-length", type=int, default=16384, help="tokens per packed row")
    arguments.add_argument("--global-batch-size", type=int, default=256)
    arguments.add_argument("--mean-tokens", type=int, default=4246, help="of a sequence, prompt included")
    arguments.add_argument("--train-iters", type=int, default=150)
    arguments.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    arguments.add_argument("--mfu", type=float, default=0.4, help="assumed, without recomputation")
    arguments.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 peak of one GPU")
    arguments.add_argument("--show", type=int, default=10, help="layouts to print")
    return arguments.parse_args()


def print_head(args: argparse.Namespace, flops: float) -> None:
    print(
        f"{args.model}, {args.gpus} GPUs of {args.gpu_memory:.0f} GB; {args.global_batch_size} sequences of "
        f"{args.mean_tokens} tokens a step: {flops:.3e} FLOPs a step, {flops * args.train_iters:.3e} in all"
    )


def print_table(layouts: list[Layout], fitting: int, tried: int) -> None:
    print(f"{fitting} of {tried} layouts fit; GiB per GPU, with {OVERHEAD_BYTES / GIB:.0f} allowed for CUDA:")
    columns = ("weights", "gradients", "optimizer", "activations", "recompute", "head")
    print(f"{'layout':32s}" + "".join(f"{name:>12s}" for name in (*columns, "total", "time")))
    for layout in layouts:
        parts = [getattr(layout.memory, name) / GIB for name in columns]
        parts.append((layout.memory.total + OVERHEAD_BYTES) / GIB)
        print(
            f"{layout.label:32s}"
            + "".join(f"{part:12.1f}" for part in parts)
            + f"{layout.relative_time:11.2f}×"
        )


def print_choice(layout: Layout, args: argparse.Namespace, flops: float) -> None:
    seconds = flops / (args.gpus * args.peak_tflops * 1e12 * args.mfu) * layout.relative_time
    hours = seconds * args.train_iters / 3600
    parallel, train = layout.config.parallel, layout.config.train
    print(
        f"\nchosen: {layout.label}\n"
        f"at {args.mfu:.0%} MFU before the layout's own cost: {seconds:.1f} s a step, {hours:.1f} h for "
        f"{args.train_iters} steps, {hours * args.gpus:.1f} GPU-hours\n"
        f"  parallel.tensor_model_parallel_size={parallel.tensor_model_parallel_size} "
        f"parallel.sequence_parallel={str(parallel.sequence_parallel).lower()} "
        f"parallel.pipeline_model_parallel_size={parallel.pipeline_model_parallel_size} "
        f"parallel.expert_model_parallel_size={parallel.expert_model_parallel_size} "
        f"parallel.expert_tensor_parallel_size={parallel.expert_tensor_parallel_size} "
        f"train.recompute_granularity={train.recompute_granularity} "
        f'"train.recompute_modules=[{", ".join(train.recompute_modules)}]"'
    )


if __name__ == "__main__":
    run_program(main)
