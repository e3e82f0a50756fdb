"""Our trainer against what else one could train with, on a CPU: speed, memory, equal loss curves.

    python tools/bench/bench_peers.py [--output docs/benchmarks/peers.json]

The same tiny random Qwen3, the same random rollouts with the same stored teacher log-probs, AdamW, gradient
clip, float32, one thread. Every ratio is ours ÷ theirs; the last line is one JSON object.

hf_loop     a loop of transformers and PyTorch: padded batches, log_softmax and gather; the same objective
trl_gkd     TRL's GKDTrainer, no sampling, with a live teacher of the student's size. ANOTHER objective: the
            reverse KL over the whole vocabulary; no trainer of TRL takes stored log-probs of sampled tokens
plain_head  our trainer with Megatron-Core's vocab_parallel_cross_entropy on whole logits; the same objective

speed       useful tokens (prompt and response, no padding) per CPU second, the best of interleaved rounds
memory      peak resident memory of building the trainer and a pass, less libraries and weights: gradients,
            Adam, activations, logits. In processes of their own

`equal_lengths` repeats hf_loop with sequences of one length, where its batches hold no padding.

Before anything is compared, the losses of the sides with our objective must agree to 1e-5.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_measure import MEMORY_ENVIRONMENT, TIMING_ENVIRONMENT, machine, peak_mb
from bench_peers_sides import (
    SIDES,
    equal_lengths,
    import_libraries,
    mixed_lengths,
    padding_share,
    weight_mb,
    write_task,
)

from lopd_megatron.errors import UserError, run_program
from lopd_megatron.files import write_json
from lopd_megatron.progress import log_line

SAME_OBJECTIVE = {"hf_loop", "plain_head"}
LARGEST_LOSS_DIFFERENCE = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="also write the result here, with machine and versions")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds after the warm-up")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured and stop")
    options = parser.parse_args()
    if options.dry_run:
        print(f"would train {', '.join(SIDES)} on {int(mixed_lengths().sum())} tokens a round")
        return
    result = compare(mixed_lengths(), list(SIDES), options.rounds)
    log_line("again with sequences of one length: what is left without padding")
    result["equal_lengths"] = compare(equal_lengths(), ["ours", "hf_loop"], options.rounds)
    if options.output:
        versions = {name: importlib.metadata.version(name) for name in ("transformers", "trl")}
        write_json(options.output, result | {"machine": machine() | versions})
    print(json.dumps(result))


def compare(lengths: np.ndarray, sides: list[str], rounds: int) -> dict[str, Any]:
    """Train every side on documents of these lengths."""
    with tempfile.TemporaryDirectory() as folder:
        write_task(Path(folder), lengths)
        seconds, losses = measure_speed(Path(folder), sides, rounds)
        memory = {side: measure_memory(Path(folder), side) for side in sides}
    return summary(lengths, seconds, memory, losses)


def summary(
    lengths: np.ndarray,
    seconds: dict[str, list[float]],
    memory: dict[str, float],
    losses: dict[str, list[float]],
) -> dict[str, Any]:
    """Ratios ours ÷ theirs of speed and memory, and what they were made of."""
    tokens = int(lengths.sum())
    speed = {side: tokens / min(values) for side, values in seconds.items()}
    ratios: dict[str, Any] = {
        side: {"speed": speed["ours"] / speed[side], "memory": memory["ours"] / memory[side]}
        for side in seconds
        if side != "ours"
    }
    for side in ratios.keys() & SAME_OBJECTIVE:
        ratios[side]["loss_rel_difference"] = loss_difference(losses["ours"], losses[side])
    return ratios | {
        "tokens_per_cpu_s": speed,
        "memory_mb": memory,
        "spread": max(statistics.median(values) / min(values) - 1 for values in seconds.values()),
        "tokens": tokens,
        "documents": len(lengths),
        "padding_share": padding_share(lengths),
    }


def loss_difference(ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference of two loss curves."""
    return max(abs(a - b) / abs(a) for a, b in zip(ours, theirs, strict=True))


def measure_speed(
    folder: Path, sides: list[str], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """CPU seconds of each timed pass and the losses of all steps, by side.

    Rounds are interleaved over processes that stay, so that a busy machine is busy for all of them. Losses
    are compared after every round, the first time before a time is taken.
    """
    workers = {side: Worker(folder, side, TIMING_ENVIRONMENT) for side in sides}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    losses: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, worker in workers.items():
            taken, curve = worker.ask("pass")
            losses[side] += curve
            if number:
                seconds[side].append(taken)
            log_line(f"{'round ' + str(number) if number else 'warm-up'}, {side}: {taken:.2f} CPU s")
        for side in SAME_OBJECTIVE & losses.keys():
            difference = loss_difference(losses["ours"], losses[side])
            if not difference <= LARGEST_LOSS_DIFFERENCE:
                raise UserError(
                    f"{side}: its losses differ by {difference:.1e} from ours, more than "
                    f"{LARGEST_LOSS_DIFFERENCE:.0e}; times of different work are not compared, mend the side"
                )
    for worker in workers.values():
        worker.close()
    return seconds, losses


def measure_memory(folder: Path, side: str) -> float:
    worker = Worker(folder, side, MEMORY_ENVIRONMENT)
    megabytes = worker.ask("memory")
    worker.close()
    log_line(f"memory, {side}: {megabytes:.0f} MB")
    return megabytes


class Worker:
    """A process of one side; malloc reads its settings when a process starts."""

    def __init__(self, folder: Path, side: str, environment: dict[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        stock = dict(os.environ)
        os.environ |= environment | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self._process = context.Process(target=_serve, args=(theirs, folder, side), daemon=True)
        self._process.start()
        os.environ.clear()
        os.environ.update(stock)
        theirs.close()
        self._side = side

    def ask(self, question: str) -> Any:
        try:
            self._pipe.send(question)
            return self._pipe.recv()
        except (EOFError, BrokenPipeError):
            raise RuntimeError(f"the process of {self._side} failed; its traceback is above") from None

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


def _serve(pipe: Any, folder: Path, side: str) -> None:
    torch.set_num_threads(1)
    import_libraries(side)
    run = None
    while True:
        try:
            question = pipe.recv()
        except EOFError:
            return
        if question == "memory":
            pipe.send(peak_mb(lambda: SIDES[side](folder)()) - weight_mb(side))
            continue
        run = run or SIDES[side](folder)
        start = time.process_time()
        losses = run()
        pipe.send((time.process_time() - start, losses))


if __name__ == "__main__":
    run_program(main)
