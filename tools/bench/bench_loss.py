"""Speed and memory of the loss head and of a training step against what they replace.

    python tools/bench/bench_loss.py [--output docs/benchmarks/loss.json]

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
With CUDA: the head only, [16384, 4096, 151936] in bfloat16 on one GPU and a quarter of its vocabulary:
elapsed times and allocated memory, and beside them the three matrix products alone, which no head can beat,
other chunk sizes, Megatron-Core's fused cross-entropy, and how far float32 logits of the same numbers are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
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
from lopd_megatron.loss import Loss
from lopd_megatron.loss.fused_head import HeadRows, fused_head
from lopd_megatron.loss.make_objective import make_objective
from lopd_megatron.loss.trained_tokens import TrainedTokens
from lopd_megatron.parallel.vocab import VocabRange
from lopd_megatron.progress import log_line
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
    log_line("head: time at TP 2, T 1024, H 512")
    times = in_ranks(2, TIMING_ENVIRONMENT, head_times, Shape(1024, 512, VOCABULARY, chunk, rounds))
    log_line(f"head: CPU seconds {times}")
    memory = in_ranks(2, MEMORY_ENVIRONMENT, head_memory, Shape(4096, 128, VOCABULARY, chunk))
    log_line(f"head: MB at T 4096, H 128 {memory}")
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
        log_line(f"step: CPU seconds at V {vocabulary} {step}")
        peak = in_ranks(1, MEMORY_ENVIRONMENT, step_memory, shape, MASKED)
        log_line(f"step: MB at V {vocabulary} {peak}")
        result[f"step_time_ratio{suffix}"] = step["ours"] / step["reference"]
        result[f"step_memory_ratio{suffix}"] = peak["ours"] / peak["reference"]
        result[f"step_grad_rel_error{suffix}"] = step["grad_rel_error"]
        details |= {f"step_cpu_s{suffix} {name}": step[name] for name in ("ours", "reference")}
        details |= {f"step_memory_mb{suffix} {name}": value for name, value in peak.items()}
        details["spread"] = max(details["spread"], step["spread"])
    return result | details


def measure_cuda(chunk: int, rounds: int, shape: Shape | None = None) -> dict[str, float]:
    """The head as in training: ours adds to a standing main gradient, theirs returns one in bfloat16.

    `*_quarter`: a quarter of the vocabulary, what one of four tensor-parallel ranks computes between its
    collectives. `head_ms chunk n`: ours with chunks of n tokens.
    """
    shape = shape or Shape(16_384, 4096, VOCABULARY, chunk)
    repeats = max(rounds, 20)
    result = _measure_head(replace(shape, chunk_tokens=chunk), repeats)
    quarter = _measure_head(replace(shape, vocabulary=shape.vocabulary // 4, chunk_tokens=chunk), repeats)
    result |= {f"{name}_quarter": value for name, value in quarter.items()}
    for tokens in (chunk // 4, chunk // 2, chunk * 2):
        head = Head(replace(shape, chunk_tokens=tokens))
        ms, gb = _measure_ours(head, head.variants["ours"], repeats)
        result |= {f"head_ms chunk {tokens}": ms, f"head_memory_gb chunk {tokens}": gb}
        del head
    return result


def _measure_head(shape: Shape, repeats: int) -> dict[str, float]:
    head = Head(shape)
    precision = head.precision()
    error = head.gradient_error()
    with torch.no_grad():
        gemm_ms, _ = cuda_ms_gb(head.products, repeats, reset=head.clear)
    times, memory = {}, {}
    for name, run in head.variants.items():
        if name.startswith("ours"):
            times[name], memory[name] = _measure_ours(head, run, repeats)
        else:
            times[name], gb = cuda_ms_gb(run, repeats, reset=head.clear)
            memory[name] = gb - 2 * (head.hidden.numel() + head.weight.numel()) / 1e9
    products = 6 * head.hidden.size(0) * head.weight.numel()
    return {
        "memory_ratio": memory["ours"] / memory["megatron"],
        "time_ratio_masked": times["ours, masked"] / times["megatron"],
        "time_ratio_full": times["ours"] / times["megatron"],
        "time_ratio_to_fused_megatron": times["ours"] / times["megatron, fused"],
        "grad_rel_error": error,
        **precision,
        "products_alone_ms": gemm_ms,
        "products_alone_tflops": products / gemm_ms / 1e9,
        "useful_tflops": products / times["ours"] / 1e9,
        "share_of_products_alone": gemm_ms / times["ours"],
        **{f"head_ms {name}": value for name, value in times.items()},
        **{f"head_memory_gb {name}": value for name, value in memory.items()},
    }


def _measure_ours(head: Head, run: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Milliseconds and work memory in gigabytes: without the gradients, and until the backward ours holds
    its own sum of dW in float32."""
    head.weight.main_grad = torch.zeros_like(head.weight, dtype=torch.float32)  # type: ignore[attr-defined]
    ms, gb = cuda_ms_gb(run, repeats, reset=head.clear)
    del head.weight.main_grad  # type: ignore[attr-defined]
    return ms, gb - 2 * (head.hidden.numel() + 2 * head.weight.numel()) / 1e9


class Head:
    """The package's loss and whole logits through Megatron-Core, on the same hidden states and weight."""

    def __init__(self, shape: Shape) -> None:
        from lopd_megatron.parallel import topology as grid

        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if torch.distributed.is_initialized():
            grid.destroy()  # of the head before this one
        topology = grid.initialize(ParallelConfig(tensor_model_parallel_size=world), seed=1)
        self.vocab = VocabRange.of(shape.vocabulary, shape.vocabulary, topology.tp_group)
        dtype = torch.bfloat16 if topology.device.type == "cuda" else torch.float32
        generator = torch.Generator(topology.device).manual_seed(1)

        def random(rows: int, scale: float) -> torch.Tensor:
            values = torch.randn(rows, shape.hidden, generator=generator, device=topology.device)
            return values.mul_(scale).to(dtype).requires_grad_()

        self.hidden, self.weight = random(shape.tokens, 1.0), random(self.vocab.shard_size, 0.02)
        self.loss = Loss(
            LossConfig(head_chunk_tokens=shape.chunk_tokens), vocab=self.vocab, sequence_parallel=False
        )
        self.full = make_batch(shape, 0.0, topology.device)
        self.masked = make_batch(shape, MASKED, topology.device)
        self.variants: dict[str, Callable[[], None]] = {
            "megatron": lambda: self.megatron(self.full),
            "ours": lambda: self.ours(self.full),
            "ours, masked": lambda: self.ours(self.masked),
        }
        if dtype == torch.bfloat16:  # compiled, and its gradient rounded to bfloat16
            self.variants["megatron, fused"] = lambda: self.megatron(self.full, fused=True)

    def ours(self, batch: MicroBatch) -> None:
        self.loss(self.hidden[:, None], self.weight, batch).numerator.backward()

    def megatron(self, batch: MicroBatch, *, fused: bool = False) -> None:
        from megatron.core import tensor_parallel
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

        assert batch.labels is not None
        assert batch.teacher_logprobs is not None
        assert batch.loss_mask is not None
        copied = tensor_parallel.copy_to_tensor_model_parallel_region(self.hidden, group=self.vocab.group)
        logits = F.linear(copied, self.weight)
        if fused:
            loss = fused_vocab_parallel_cross_entropy(logits[:, None], batch.labels.T, self.vocab.group)
        else:
            loss = tensor_parallel.vocab_parallel_cross_entropy(logits[:, None], batch.labels.T)
        student = -loss[:, 0]
        advantages = (batch.teacher_logprobs[0] - student.detach()).clamp(-10, 10)
        (-advantages * student * batch.loss_mask[0]).sum().backward()

    def products(self) -> None:
        """The three matrix products that a gradient of the head cannot do without."""
        logits = self.hidden @ self.weight.t()
        logits @ self.weight
        logits.t() @ self.hidden

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def precision(self, rows: int = 512) -> dict[str, float]:
        """Ours against float32 logits of the same numbers, on the first rows: log-probs and dX."""
        rows = min(rows, self.hidden.size(0))
        batch = make_batch(
            Shape(rows, self.hidden.size(1), self.vocab.vocab_size, rows), 0.0, self.hidden.device
        )
        assert batch.labels is not None
        assert batch.teacher_logprobs is not None
        assert batch.loss_mask is not None
        hidden = self.hidden[:rows].detach().requires_grad_()
        output = self.loss(hidden[:, None], self.weight, batch)
        output.numerator.backward()
        exact = hidden.detach().float().requires_grad_()
        logprobs = F.linear(exact, self.weight.detach().float()).log_softmax(1)
        student = logprobs.gather(1, batch.labels.T)[:, 0]
        advantages = (batch.teacher_logprobs[0] - student.detach()).clamp(-10, 10)
        (-advantages * student * batch.loss_mask[0]).sum().backward()
        assert hidden.grad is not None
        assert exact.grad is not None
        tokens = TrainedTokens.of(batch)
        ids, objective = make_objective(LossConfig())(tokens)
        head_rows = HeadRows(tokens.rows, ids, torch.ones_like(tokens.rows, dtype=torch.float64), objective)
        with torch.no_grad():
            _, values = fused_head(
                hidden, self.weight, head_rows, vocab=self.vocab, sequence_parallel=False, chunk_tokens=rows
            )
        difference = values.student_logprobs - student.detach()[tokens.rows]
        result = {
            "logprob_max_difference": float(difference.abs().max()),
            "dx_cosine": float(
                F.cosine_similarity(hidden.grad.float().flatten(), exact.grad.flatten(), dim=0)
            ),
        }
        self.clear()
        return result

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
