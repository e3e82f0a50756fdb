"""Speed and memory of the loss head and of a training step against what they replace.

    python tools/bench_loss.py [--output docs/benchmarks/loss.json]

Every ratio is ours ÷ theirs, both measured in this run; the last line is one JSON object.

memory_ratio       work memory of the head (peak − before − dX − dW) over that of Megatron-Core's
                   vocab_parallel_cross_entropy on whole logits
time_ratio_*       CPU time (CUDA: elapsed) of forward + backward: 15 % of the rows masked, or none
grad_rel_error     largest relative difference of dX and dW between the two
step_flops_ratio   FLOPs of one of our training steps over three forward passes
step_time_ratio,   one of our steps over the reference-shaped step: no-grad forwards of a reference and an old
step_memory_ratio  policy, full recompute, per-sample logit copies, and an entropy with a graph at weight 0;
                   15 % of the rows masked. Eight layers of H 256 under the vocabulary of Qwen3, so the head
                   weighs more than in a real model; *_32k the same with a vocabulary of 32,768.

Without CUDA: two gloo ranks at TP 2 and a vocabulary of 151,936, one thread each; times are the minimum CPU
seconds of interleaved rounds, and memory is resident memory, measured in processes of their own.
With CUDA: the head only, [16384, 4096, 151936] in bfloat16 on one GPU, elapsed times and allocated memory,
and beside them the three matrix products alone, which no head can beat.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_loss_step import Shape, make_batch, step_flops, step_memory, step_times
from bench_measure import (
    MEMORY_ENVIRONMENT,
    TIMING_ENVIRONMENT,
    cuda_ms_gb,
    in_ranks,
    interleaved,
    machine,
    peak_mb,
    relative,
)

from lopd_megatron.config import LossConfig, ParallelConfig
from lopd_megatron.errors import run_program
from lopd_megatron.files import write_json
from lopd_megatron.loss import build_loss
from lopd_megatron.parallel.vocab import VocabRange
from lopd_megatron.progress import say
from lopd_megatron.records import MicroBatch

VOCABULARY = 151_936  # Qwen3
SMALL_VOCABULARY = 32_768
MASKED = 0.15


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="also write the result here, with machine and versions")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds after the warm-up")
    parser.add_argument("--chunk-tokens", type=int, help="default: 128 on a CPU, 4096 on CUDA")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured and stop")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    chunk = options.chunk_tokens or (4096 if cuda else 128)
    if options.dry_run:
        print(f"would measure on {'CUDA' if cuda else 'a CPU, TP 2 over gloo'} with chunks of {chunk} tokens")
        return
    result = measure_cuda(chunk, options.rounds) if cuda else measure_cpu(chunk, options.rounds)
    if options.output:
        write_json(options.output, {"result": result, "machine": machine(), "chunk_tokens": chunk})
    print(json.dumps(result))


def measure_cpu(chunk: int, rounds: int) -> dict[str, float]:
    say("head: time at TP 2, T 1024, H 512")
    times = in_ranks(2, TIMING_ENVIRONMENT, head_times, Shape(1024, 512, VOCABULARY, chunk, rounds))
    say(f"head: CPU seconds {times}")
    memory = in_ranks(2, MEMORY_ENVIRONMENT, head_memory, Shape(4096, 128, VOCABULARY, chunk))
    say(f"head: MB at T 4096, H 128 {memory}")
    result = {
        "memory_ratio": memory["ours"] / memory["megatron"],
        "time_ratio_masked": times["ours, masked"] / times["megatron"],
        "time_ratio_full": times["ours"] / times["megatron"],
        "grad_rel_error": times["grad_rel_error"],
    }
    details = {f"head_cpu_s {name}": times[name] for name in ("ours", "ours, masked", "megatron")}
    details |= {f"head_memory_mb {name}": value for name, value in memory.items()}
    details["spread"] = times["spread"]
    for suffix, vocabulary in (("", VOCABULARY), ("_32k", SMALL_VOCABULARY)):
        shape = Shape(1024, 256, vocabulary, chunk, rounds)
        if not suffix:
            result["step_flops_ratio"] = in_ranks(1, TIMING_ENVIRONMENT, step_flops, shape)["ratio"]
        step = in_ranks(1, TIMING_ENVIRONMENT, step_times, shape, MASKED)
        say(f"step: CPU seconds at V {vocabulary} {step}")
        peak = in_ranks(1, MEMORY_ENVIRONMENT, step_memory, shape, MASKED)
        say(f"step: MB at V {vocabulary} {peak}")
        result[f"step_time_ratio{suffix}"] = step["ours"] / step["reference"]
        result[f"step_memory_ratio{suffix}"] = peak["ours"] / peak["reference"]
        result[f"step_grad_rel_error{suffix}"] = step["grad_rel_error"]
        details |= {f"step_cpu_s{suffix} {name}": step[name] for name in ("ours", "reference")}
        details |= {f"step_memory_mb{suffix} {name}": value for name, value in peak.items()}
        details["spread"] = max(details["spread"], step["spread"])
    return result | details


def measure_cuda(chunk: int, rounds: int) -> dict[str, float]:
    """The head as in training: ours adds to a standing main gradient, theirs returns one in bfloat16."""
    head = Head(Shape(16_384, 4096, VOCABULARY, chunk, rounds))
    error = head.gradient_error()
    repeats = max(rounds, 20)
    with torch.no_grad():
        gemm_ms, _ = cuda_ms_gb(head.products, repeats, reset=head.clear)
    times, memory = {}, {}
    for name, run in head.variants.items():
        gradients_gb = 2 * (head.hidden.numel() + head.weight.numel()) / 1e9
        if name != "megatron":
            head.weight.main_grad = torch.zeros_like(head.weight, dtype=torch.float32)  # type: ignore[attr-defined]
            # Until the backward ours holds its own sum in float32.
            gradients_gb += 2 * head.weight.numel() / 1e9
        times[name], gb = cuda_ms_gb(run, repeats, reset=head.clear)
        memory[name] = gb - gradients_gb
    return {
        "memory_ratio": memory["ours"] / memory["megatron"],
        "time_ratio_masked": times["ours, masked"] / times["megatron"],
        "time_ratio_full": times["ours"] / times["megatron"],
        "grad_rel_error": error,
        "products_alone_ms": gemm_ms,
        **{f"head_ms {name}": value for name, value in times.items()},
        **{f"head_memory_gb {name}": value for name, value in memory.items()},
    }


class Head:
    """The package's loss and whole logits through Megatron-Core, on the same hidden states and weight."""

    def __init__(self, shape: Shape) -> None:
        from lopd_megatron.parallel import topology as grid

        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        topology = grid.initialize(ParallelConfig(tensor_model_parallel_size=world), seed=1)
        self.vocab = VocabRange.of(shape.vocabulary, shape.vocabulary, topology.tp_group)
        dtype = torch.bfloat16 if topology.device.type == "cuda" else torch.float32
        generator = torch.Generator(topology.device).manual_seed(1)

        def random(rows: int, scale: float) -> torch.Tensor:
            values = torch.randn(rows, shape.hidden, generator=generator, device=topology.device)
            return values.mul_(scale).to(dtype).requires_grad_()

        self.hidden, self.weight = random(shape.tokens, 1.0), random(self.vocab.shard_size, 0.02)
        self.loss = build_loss(
            LossConfig(head_chunk_tokens=shape.chunk_tokens), vocab=self.vocab, sequence_parallel=False
        )
        self.full = make_batch(shape, 0.0, topology.device)
        self.masked = make_batch(shape, MASKED, topology.device)
        self.variants: dict[str, Callable[[], None]] = {
            "megatron": lambda: self.megatron(self.full),
            "ours": lambda: self.ours(self.full),
            "ours, masked": lambda: self.ours(self.masked),
        }

    def ours(self, batch: MicroBatch) -> None:
        self.loss(self.hidden[:, None], self.weight, batch).numerator.backward()

    def megatron(self, batch: MicroBatch) -> None:
        from megatron.core import tensor_parallel

        assert batch.labels is not None
        assert batch.teacher_logprobs is not None
        assert batch.loss_mask is not None
        copied = tensor_parallel.copy_to_tensor_model_parallel_region(self.hidden, group=self.vocab.group)
        logits = F.linear(copied, self.weight)
        student = -tensor_parallel.vocab_parallel_cross_entropy(logits[:, None], batch.labels.T)[:, 0]
        advantages = (batch.teacher_logprobs[0] - student.detach()).clamp(-10, 10)
        (-advantages * student * batch.loss_mask[0]).sum().backward()

    def products(self) -> None:
        """The three matrix products that a gradient of the head cannot do without."""
        logits = self.hidden @ self.weight.t()
        logits @ self.weight
        logits.t() @ self.hidden

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def gradient_error(self) -> float:
        errors = []
        for batch in (self.full, self.masked):
            gradients = []
            for head in (self.megatron, self.ours):
                self.clear()
                head(batch)
                gradients.append((self.hidden.grad, self.weight.grad))
            (dx, dw), (our_dx, our_dw) = gradients
            errors += [relative(our_dx, dx), relative(our_dw, dw)]
        self.clear()
        return max(errors)


def head_times(shape: Shape) -> dict[str, float]:
    head = Head(shape)
    times = interleaved(head.variants, shape.rounds, reset=head.clear)
    return {**times, "grad_rel_error": head.gradient_error()}


def head_memory(shape: Shape) -> dict[str, float]:
    head = Head(shape)
    gradients_mb = 4 * (head.hidden.numel() + head.weight.numel()) / 1e6
    peaks = {}
    for name in ("ours", "megatron"):
        head.variants[name]()  # buffers that stay, such as those of gloo, belong to neither
        head.clear()
        peaks[name] = peak_mb(head.variants[name]) - gradients_mb
        head.clear()
    return peaks


if __name__ == "__main__":
    run_program(main)
