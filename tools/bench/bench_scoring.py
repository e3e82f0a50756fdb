"""Speed, host cost, exactness and memory of teacher scoring with vLLM.

    python tools/bench/bench_scoring.py [--output docs/benchmarks/scoring.json] [--model FOLDER]

Every ratio is measured in this run; the last line is one JSON object.

score_vs_prefill         tokens/s of scoring over tokens/s of prefilling the same documents
host_us_per_token        CPU time of Python per token between the engine's tensors and our arrays, with the 64
                         most likely tokens; host_us_per_token_k0 with the sampled token only
host_us_per_token_stock  the same for vLLM's dictionaries, 64 tokens
max_abs_diff             largest difference to transformers' float32 log-softmax, nats (random model only)
memory_mb                peak work memory of scoring one document, by its length, in steps of at most 256
                         tokens; memory_mb_one_step: in one step each (CPU only, V 32,768)

Without --model a random Qwen3 of 4 layers, H 256 and V 1,024: its head is 8 % of the work, as in an 8B model.
CPU: CPU seconds, one thread, minimum of interleaved rounds. CUDA: elapsed time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_measure import MEMORY_ENVIRONMENT, interleaved, machine, peak_mb

from lopd_megatron.config import EngineConfig
from lopd_megatron.errors import run_program
from lopd_megatron.files import write_json
from lopd_megatron.inference import engine as engine_module
from lopd_megatron.inference.engine import VllmEngine
from lopd_megatron.inference.requests import (
    Failure,
    GenerationRequest,
    Sampling,
    ScoreRequest,
    ScoringPath,
    TokenScores,
)
from lopd_megatron.inference.score_paths import choose_path
from lopd_megatron.progress import log_line

TOPK = 64
PROMPT, RESPONSE = 100, 300
MEMORY_LENGTHS = (256, 512, 1024, 2048)
MEMORY_BATCH = 256


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="also write the JSON object here")
    parser.add_argument("--model", help="Hugging Face folder; default: a random small one")
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of-batch", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if args.memory_of_batch:
        print(json.dumps(memory_by_length(args.memory_of_batch)))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args.model or save_random_model(folder), args.documents, args.rounds)
        if not args.model:
            result["max_abs_diff"] = difference_to_transformers(folder, result.pop("sample"))
    result.pop("sample", None)
    if not torch.cuda.is_available():
        log_line("memory by document length")
        result["memory_mb"] = in_own_process(MEMORY_BATCH)
        result["memory_mb_one_step"] = in_own_process(max(MEMORY_LENGTHS))
    result |= {"machine": machine()}
    if args.output:
        write_json(args.output, result)
    print(json.dumps(result))


def save_random_model(folder: str, *, hidden: int = 256, layers: int = 4, vocabulary: int = 1024) -> str:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 64, 1),
        num_key_value_heads=max(hidden // 128, 1),
        head_dim=64,
        max_position_embeddings=4096,
        initializer_range=0.08,
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(folder)
    return folder


def random_documents(vocabulary: int, lengths: list[int], prompt: int) -> list[ScoreRequest]:
    random = np.random.default_rng(0)
    return [
        ScoreRequest((0, row), random.integers(0, vocabulary, length).tolist(), prompt)
        for row, length in enumerate(lengths)
    ]


def measure(model: str, count: int, rounds: int) -> dict[str, Any]:
    longest = PROMPT + RESPONSE
    config = EngineConfig(max_model_len=longest, max_num_seqs=32, max_num_batched_tokens=2048)
    log_line("starting vLLM")
    engine = VllmEngine(model, config, task="score", max_topk=TOPK)
    path = choose_path(engine, "auto", 0, longest)
    documents = random_documents(engine.vocab_size, [longest] * count, PROMPT)
    prefills = [GenerationRequest(document.key, document.tokens, 0) for document in documents]
    tokens = count * longest

    def prefill() -> None:
        list(engine.generate(prefills, Sampling(0.0, 1.0, 1, ())))

    log_line(f"{tokens} tokens, path {path}, {rounds} rounds")
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds = interleaved(
        {"prefill": prefill, "score": lambda: scores(engine, documents, 0, path)},
        rounds,
        reset=lambda: None,
        clock=clock,
    )
    fewer = documents[: max(count // 4, 1)]
    logprobs = [answer.logprobs for answer in scores(engine, fewer, 0, path)]
    ours, none = host_us(engine, fewer, TOPK, "flat"), host_us(engine, fewer, 0, path)
    return {
        "score_vs_prefill": seconds["prefill"] / seconds["score"],
        "host_us_per_token": ours,
        "host_us_per_token_k0": none,
        "host_us_per_token_stock": host_us(engine, fewer, TOPK, "stock"),
        "path": path,
        "prefill_tokens_per_second": tokens / seconds["prefill"],
        "score_tokens_per_second": tokens / seconds["score"],
        "spread": seconds["spread"],
        "topk": TOPK,
        "documents": count,
        "document_tokens": longest,
        "engine": engine.describe(),
        "sample": list(zip(fewer, logprobs, strict=True)),
    }


def scores(
    engine: VllmEngine, documents: list[ScoreRequest], topk: int, path: ScoringPath
) -> list[TokenScores]:
    found: list[TokenScores] = []
    for answer in engine.score(documents, topk=topk, path=path):
        assert not isinstance(answer, Failure), answer.error
        found.append(answer)
    return sorted(found, key=lambda answer: answer.key)


def host_us(engine: VllmEngine, documents: list[ScoreRequest], topk: int, path: ScoringPath) -> float:
    """CPU microseconds per token in vLLM's output processor and in our reading of its answers; best of 5."""
    readers = ("read_tensors", "read_native", "read_stock")
    spent = 0.0

    def timed(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal spent
            start = time.process_time()
            try:
                return work(*arguments, **options)
            finally:
                spent += time.process_time() - start

        return run

    processor = engine._engine.output_processor
    originals = {name: getattr(engine_module, name) for name in readers}
    process_outputs = processor.process_outputs
    best = float("inf")
    try:
        processor.process_outputs = timed(process_outputs)
        for name, original in originals.items():
            setattr(engine_module, name, timed(original))
        for _ in range(5):
            spent = 0.0
            scores(engine, documents, topk, path)
            best = min(best, spent)
    finally:
        processor.process_outputs = process_outputs
        for name, original in originals.items():
            setattr(engine_module, name, original)
    return 1e6 * best / sum(len(document.tokens) for document in documents)


def difference_to_transformers(folder: str, sample: list[tuple[ScoreRequest, np.ndarray]]) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    largest = 0.0
    for document, logprobs in sample:
        ids = torch.tensor([document.tokens])
        with torch.no_grad():
            rows = model(ids).logits[0, document.start - 1 : -1].log_softmax(-1)
        want = rows.gather(1, ids[0, document.start :, None])[:, 0].numpy()
        largest = max(largest, float(np.abs(want - logprobs).max()))
    return largest


def in_own_process(batch: int) -> dict[str, float]:
    """`memory_by_length` in a process whose malloc gives everything back."""
    command = [sys.executable, __file__, "--memory-of-batch", str(batch)]
    run = subprocess.run(command, env=os.environ | MEMORY_ENVIRONMENT, stdout=subprocess.PIPE, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def memory_by_length(batch: int) -> dict[str, float]:
    """Peak megabytes of scoring one document of each length, in steps of at most `batch` tokens, V 32,768."""
    longest = max(MEMORY_LENGTHS)
    config = EngineConfig(max_model_len=longest, max_num_seqs=1, max_num_batched_tokens=batch)
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(folder, hidden=64, layers=1, vocabulary=32_768)
        engine = VllmEngine(folder, config, task="score")
    documents = random_documents(32_768, list(MEMORY_LENGTHS), 1)
    scores(engine, documents, 0, "flat")  # what is allocated once and kept
    peaks = {}
    for document in documents:
        peak = peak_mb(partial(scores, engine, [document], 0, "flat"))
        peaks[str(len(document.tokens))] = round(peak, 1)
    return peaks


if __name__ == "__main__":
    run_program(main)
