"""How long a run takes on a cluster, which layout is fastest, and what limits it.

    lopd plan recipes/qwen3_8b.py:lightning_opd --gpus 8 --gpu H100
    lopd plan --model Qwen3-235B-A22B --gpus 256 --gpu H100 --search --dollars-per-gpu-hour 2.5

Seconds come from a model of time that published runs confirm (docs/performance.md), memory from shapes.
No GPU has run this code: figures for this trainer are predictions. Exit code 1: no layout fits.
"""

from __future__ import annotations

import argparse
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lopd_megatron import cli
from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.performance.hardware import GPUS, Gpu, find_gpu
from lopd_megatron.performance.known_models import NAMES, known_config
from lopd_megatron.performance.prediction import Batch, fitted_model
from lopd_megatron.performance.search import Plan, plan_layout, search_layouts
from lopd_megatron.performance.shapes import ModelShape, shape_from_hf
from lopd_megatron.performance.stages import (
    Disk,
    decode,
    disk_bytes,
    response_lengths,
    score_seconds,
)

GIB = 1024**3
BAR = 40
SHOWN = 3
PAPER_PROMPTS = 17_398
"""DAPO-Math-17k of the paper, the prompts of stage 2."""


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.distributed")
    gpu = _gpu(args)
    config = _config(args)
    hf = _architecture(config.model.student)
    batch = _batch(config, args)
    print(
        f"{config.model.student}: {config.train.global_batch_size} sequences of {batch.length:.0f} tokens a "
        "step, "
        f"{config.train.train_iters} steps on {args.gpus} × {gpu.name} ({gpu.memory / 1e9:.0f} GB)"
    )
    if not (args.mean_tokens or args.response_median):
        cap = config.rollouts.max_response_tokens
        print(
            f"every response at its limit of {cap} tokens, an upper bound; --response-median says otherwise"
        )
    plans = _training_plans(hf, config, gpu, args, batch)
    if not plans:
        return 1
    rows, disk = _stage_rows(hf, config, gpu, args, plans[0])
    _print_stages(rows, args)
    _print_disk(disk, plans[0])
    _print_layouts(plans[:SHOWN])
    _print_choice(plans[0])
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    arguments = argparse.ArgumentParser(
        prog="lopd plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("recipe", nargs="?", default="", metavar="FILE.py:FUNCTION")
    arguments.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments.add_argument("--model", default="", help=f"Hugging Face folder, or one of {', '.join(NAMES)}")
    arguments.add_argument("--gpus", type=_positive, required=True)
    arguments.add_argument("--nodes", type=_positive, help="default: GPUs by those of a node")
    arguments.add_argument("--gpu", default="H100", help=", ".join(GPUS))
    arguments.add_argument("--gpu-memory", type=float, metavar="GB", help="default: that of the GPU")
    arguments.add_argument("--search", action="store_true", help="try all layouts, not the recipe's alone")
    arguments.add_argument("--seq-length", type=_positive, help="tokens per packed row")
    arguments.add_argument("--global-batch-size", type=_positive)
    arguments.add_argument("--train-iters", type=_positive)
    arguments.add_argument("--prompt-tokens", type=_positive, default=150, help="mean of a prompt")
    arguments.add_argument(
        "--mean-tokens", type=_positive, help="of a sequence; default: responses at their cap"
    )
    arguments.add_argument(
        "--response-median", type=_positive, help="median response of a lognormal; default: the cap"
    )
    arguments.add_argument(
        "--prompts",
        type=_positive,
        help="number of prompts; default: prompts.max_prompts, or the paper's 17,398",
    )
    arguments.add_argument(
        "--imbalance", type=float, default=1.0, help="tokens of the busiest expert rank over the mean"
    )
    arguments.add_argument("--attention", choices=("varlen", "transformer_engine"), default="varlen")
    arguments.add_argument(
        "--storage", type=float, default=5.0, metavar="GB/s", help="of the file system, assumed"
    )
    arguments.add_argument("--dollars-per-gpu-hour", type=float)
    return arguments.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _gpu(args: argparse.Namespace) -> Gpu:
    gpu = find_gpu(args.gpu)
    values = dict(vars(gpu))
    if args.gpu_memory:
        values["memory"] = args.gpu_memory * 1e9
    if args.nodes:
        if args.gpus % args.nodes:
            raise UserError(f"--gpus {args.gpus} is not a multiple of --nodes {args.nodes}")
        values["node"] = args.gpus // args.nodes
        if gpu.nvlink_domain == gpu.node:
            values["nvlink_domain"] = values["node"]
    return Gpu(**values)


def _config(args: argparse.Namespace) -> RunConfig:
    """The recipe with its overrides, or the defaults of a run of `--model`."""
    recipe, overrides = args.recipe, list(args.overrides)
    if recipe and re.match(r"[\w.]+=", recipe):
        recipe, overrides = "", [recipe, *overrides]
    if bool(recipe) == bool(args.model):
        raise UserError("give a recipe (FILE.py:FUNCTION) or --model NAME, one of the two")
    config = cli.load_recipe(recipe) if recipe else RunConfig()
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"{override!r} is no setting; write section.key=value")
        cli.apply_override(config, key, text)
    if args.model:
        config.model.student = args.model
        config.loss.head_chunk_tokens = 2048
        args.search = True
    config.data.seq_length = args.seq_length or config.data.seq_length
    config.train.global_batch_size = args.global_batch_size or config.train.global_batch_size
    config.train.train_iters = args.train_iters or config.train.train_iters
    return config


def _architecture(model: str) -> dict[str, Any]:
    """config.json of a folder, or of a known name when there is no such folder."""
    from lopd_megatron.model.student_spec import read_hf_config

    try:
        return read_hf_config(model)
    except UserError:
        found = known_config(model) or known_config(re.sub(r"-(Thinking|Instruct|Base)[-\w]*$", "", model))
        found = found or known_config(_of_run(model))
        if found is None:
            raise UserError(
                f"no folder {model!r} with a config.json and no known model; known are {', '.join(NAMES)}"
            ) from None
        return found


def _of_run(model: str) -> str:
    """`runs/qwen3_8b/sft/hf` → `qwen3_8b`: the student that an earlier run of the recipe exports."""
    parts = model.split("/")
    return parts[1] if len(parts) > 2 and parts[0] == "runs" else model


def _batch(config: RunConfig, args: argparse.Namespace) -> Batch:
    cap = config.rollouts.max_response_tokens
    if args.mean_tokens:
        response = max(1.0, args.mean_tokens - args.prompt_tokens)
    else:
        lengths = response_lengths(512, cap, args.response_median)
        response = sum(lengths) / len(lengths)
    length = min(args.prompt_tokens + response, config.data.seq_length)
    return Batch(config.train.global_batch_size * length, length, response / (response + args.prompt_tokens))


def _training_plans(
    hf: dict[str, Any], config: RunConfig, gpu: Gpu, args: argparse.Namespace, batch: Batch
) -> list[Plan]:
    """The recipe's layout, or all that fit, fastest first."""
    options: dict[str, Any] = {"attention": args.attention, "imbalance": args.imbalance}
    if not args.search:
        plan, fits = plan_layout(hf, config, gpu, args.gpus, batch, **options)
        if not fits:
            print(
                f"the recipe's layout {plan.label} needs {plan.memory.total / GIB:.0f} GiB of "
                f"{gpu.memory / GIB:.0f} per GPU; --search looks for one that fits"
            )
        return [plan] if fits else []
    plans, tried = search_layouts(hf, config, gpu, args.gpus, batch, node_gpus=gpu.node, **options)
    if plans:
        print(f"{len(plans)} of {tried} layouts fit")
    else:
        print(f"none of {tried} layouts fits {args.gpus} GPUs of {gpu.memory / 1e9:.0f} GB; use more GPUs")
    return plans


@dataclass(frozen=True)
class StageRow:
    name: str
    seconds: float
    gpus: int
    note: str


def _stage_rows(
    hf: dict[str, Any], config: RunConfig, gpu: Gpu, args: argparse.Namespace, plan: Plan
) -> tuple[list[StageRow], Disk]:
    student = shape_from_hf(hf)
    rollouts, scores = config.rollouts, config.scores
    is_sft = config.loss.objective == "sft"
    teacher = student
    if config.model.teacher and (rollouts.generator == "teacher" or not is_sft):
        teacher = shape_from_hf(_architecture(config.model.teacher))
    prompts = args.prompts or config.prompts.max_prompts or PAPER_PROMPTS
    count = prompts * rollouts.num_samples_per_prompt
    lengths = response_lengths(count, rollouts.max_response_tokens, args.response_median)
    rows: list[StageRow] = []
    tokens = sum(lengths) + count * args.prompt_tokens
    online = config.online.enabled
    steps = config.train.train_iters
    if online:  # a step samples and scores its own batch before it trains; the GPUs take turns
        batch = config.train.global_batch_size
        own = lengths[:: max(1, len(lengths) // batch)][:batch]
        shown = sum(own) + batch * args.prompt_tokens
        for row in (
            _rollout_row(config, gpu, args, own, student),
            _score_row(config, gpu, args, teacher, shown, sum(own) / len(own)),
        ):
            note = f"{row.seconds:.1f} s in each step; {row.note}"
            rows.append(StageRow(row.name, steps * row.seconds, row.gpus, note))
    elif not config.data.prefixes:
        rows.append(
            _rollout_row(config, gpu, args, lengths, teacher if rollouts.generator == "teacher" else student)
        )
        if not is_sft:
            rows.append(_score_row(config, gpu, args, teacher, tokens, sum(lengths) / count))
    limit = max(plan.time.parts, key=lambda name: plan.time.parts[name])
    rows.append(
        StageRow("train", steps * plan.seconds, args.gpus, f"{plan.seconds:.2f} s a step, limited by {limit}")
    )
    kept = config.checkpoint.keep_last
    if config.checkpoint.keep_every:
        kept += steps // config.checkpoint.keep_every
    disk = disk_bytes(
        student,
        tokens=tokens,
        topk=scores.topk,
        kept_checkpoints=min(kept, max(1, steps // config.checkpoint.save_interval)),
        save_optimizer=config.checkpoint.save_optimizer,
    )
    saves = max(1, steps // config.checkpoint.save_interval)
    storage = args.storage * 1e9
    blocked = 0.1 if config.checkpoint.async_save else 1.0
    rows.append(
        StageRow(
            "checkpoints",
            saves * blocked * disk.checkpoint / storage,
            args.gpus,
            f"{saves} saves at {args.storage:g} GB/s",
        )
    )
    rows.append(StageRow("export", 2 * disk.export / storage, 0, "reads a checkpoint, writes weights"))
    return rows, disk


def _rollout_row(
    config: RunConfig, gpu: Gpu, args: argparse.Namespace, lengths: list[float], shape: ModelShape
) -> StageRow:
    engine = config.rollouts.engine
    size = min(args.gpus, max(engine.tensor_parallel_size, _least_gpus(shape, gpu)))
    engines = max(1, args.gpus // size)
    found = decode(
        shape,
        gpu,
        lengths=lengths,
        prompt=args.prompt_tokens,
        engines=engines,
        gpus_per_engine=size,
        max_sequences=engine.max_num_seqs,
    )
    rate = found.tokens / found.seconds / (engines * size) if math.isfinite(found.seconds) else 0.0
    note = (
        f"{engines} engines × {size}, {found.slots} sequences each, {rate:.0f} tokens/s/GPU, "
        f"tail {found.tail_share:.0%}"
    )
    return StageRow("rollouts", found.seconds, engines * size, note)


def _score_row(
    config: RunConfig, gpu: Gpu, args: argparse.Namespace, shape: ModelShape, tokens: float, response: float
) -> StageRow:
    size = min(args.gpus, max(config.scores.engine.tensor_parallel_size, _least_gpus(shape, gpu)))
    seconds = score_seconds(
        fitted_model(),
        shape,
        gpu,
        tokens=tokens,
        length=response + args.prompt_tokens,
        response=response,
        tp=size,
    )
    gpus = args.gpus // size * size
    note = f"{tokens / seconds:.0f} tokens/s/GPU"
    if not config.model.teacher:
        note += "; no teacher is set, so one like the student"
    return StageRow("scores", seconds / gpus, gpus, note)


def _least_gpus(shape: ModelShape, gpu: Gpu) -> int:
    """Smallest power of two whose memory holds the weights and as much again for the cache."""
    need = 2.0 * shape.parameters / (0.75 * gpu.memory)
    return 2 ** max(0, math.ceil(math.log2(need)))


def _print_stages(rows: list[StageRow], args: argparse.Namespace) -> None:
    price = args.dollars_per_gpu_hour
    print(f"\n{'stage':12s}{'time':>12s}{'GPU-hours':>11s}" + (f"{'price':>12s}" if price else "") + "  ")
    total = 0.0
    for row in rows:
        hours = row.seconds * row.gpus / 3600
        total += hours
        cost = f"{hours * price:11,.0f} $" if price else ""
        print(f"{row.name:12s}{duration(row.seconds):>12s}{hours:11.2f}{cost}  {row.note}")
    cost = f"{total * price:11,.0f} $" if price else ""
    print(f"{'all':12s}{duration(sum(row.seconds for row in rows)):>12s}{total:11.2f}{cost}")


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "never"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _print_disk(disk: Disk, plan: Plan) -> None:
    memory = plan.memory
    print(
        f"\ndisk: {disk.total / 1e9:,.0f} GB = rollouts and scores {disk.rollouts / 1e9:.1f}, dataset "
        f"{disk.dataset / 1e9:.1f}, {disk.kept_checkpoints} checkpoints of {disk.checkpoint / 1e9:,.0f}, "
        f"export {disk.export / 1e9:.0f}"
    )
    parts = ("weights", "gradients", "optimizer", "activations", "recompute", "head")
    shown = ", ".join(f"{name} {getattr(memory, name) / GIB:.1f}" for name in parts)
    print(f"memory of the fullest rank, GiB: {memory.total / GIB:.1f} = {shown}")


def _print_layouts(plans: list[Plan]) -> None:
    print("\nbest layouts, seconds of a step by part:" if len(plans) > 1 else "\nseconds of a step by part:")
    for plan in plans:
        print(f"{plan.label}: {plan.seconds:.2f} s, {plan.memory.total / GIB:.0f} GiB")
        for name, seconds in sorted(plan.time.parts.items(), key=lambda item: -item[1]):
            share = seconds / plan.seconds
            if share >= 0.005:
                print(f"  {name:18s}{seconds:8.2f} s {share:6.1%} {'█' * max(1, round(BAR * share))}")


def _print_choice(plan: Plan) -> None:
    parallel, train = plan.config.parallel, plan.config.train
    vp = parallel.virtual_pipeline_model_parallel_size
    print(
        f"\nsettings: parallel.tensor_model_parallel_size={parallel.tensor_model_parallel_size} "
        f"parallel.sequence_parallel={str(parallel.sequence_parallel).lower()} "
        f"parallel.pipeline_model_parallel_size={parallel.pipeline_model_parallel_size} "
        + (f"parallel.virtual_pipeline_model_parallel_size={vp} " if vp else "")
        + f"parallel.expert_model_parallel_size={parallel.expert_model_parallel_size} "
        f"parallel.expert_tensor_parallel_size={parallel.expert_tensor_parallel_size} "
        f"train.recompute_granularity={train.recompute_granularity} "
        f'"train.recompute_modules=[{", ".join(train.recompute_modules)}]"'
    )
