"""Measures the dataset: opening, memory, packed reads against Parquet lists, packing and balance.

    python tools/bench/bench_data.py --folder /tmp/bench [--output docs/benchmarks/data.json]

The last line of stdout is one JSON object. Times are CPU seconds (`process_time`) of one thread, the least of
the rounds: other work on the machine changes the clock on the wall more. Data stay in the folder for a rerun.

    open_ms                   open 50,000 × 2,000 tokens, checks included (wall)
    private_mb                memory of one reader that has opened it and read every column of every document
    read_mtok_per_cpu_s       random documents → packed int64 tokens and two float32 log-probs, planned
    step_ms                   one whole step of 256 documents with every field of a micro-batch
    read_same_fields_mtok_per_cpu_s   the same with loss_mask, too: all that the official loader delivers
    parquet_lists_mtok_per_cpu_s      steps of the official loader on the same documents, imitated: table in
                              memory → copies → Python numbers, prompts tokenized → pickle → tensors → rows
    parquet_load_mtok_per_cpu_s       its start, once a run: file → table in memory; not in the rate above
    speedup_vs_parquet_lists  ours with the same fields over the official steps
    speedup_vs_parquet_random_rows    ours without loss_mask over random rows straight from the file
    balance_mean, _worst      mean/max FLOPs over DP ranks: the least over three length sets × DP 8/16/32
    extra_microbatches        most micro-batches above the lower bound
    pack_cpu_s                50,000 documents into rows, the slowest of the three sets
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from bench_data_official import load_official, walk_official, word_tokenizer

from lopd_megatron.data.loader import StepLoader
from lopd_megatron.data.packing import best_fit_decreasing, flop_cost, plan_step, utilisation
from lopd_megatron.data.store import ConcatDataset, open_dataset
from lopd_megatron.data.writer import DatasetWriter
from lopd_megatron.errors import run_program
from lopd_megatron.files import write_json
from lopd_megatron.lineage import Lineage
from lopd_megatron.progress import log_line, progress

COLUMNS = ["tokens", "loss_mask", "teacher_logprobs", "rollout_logprobs"]
PACKED = frozenset({"tokens", "teacher_logprobs", "rollout_logprobs"})
SAME_FIELDS = PACKED | {"loss_mask"}
PROMPT, VOCAB = 100, 150_001
BATCH, SEQ_LENGTH, CHUNK, RANDOM_ROWS = 256, 16_384, 1_000, 50
# Responses: log-normal(median, σ), cut; prompts of 80–300 tokens before them. Row lengths fit the set.
LENGTH_SETS = {
    "ref4k": (7_000, 0.9, 4_096, 17_408),
    "short4k": (900, 0.8, 4_096, 16_384),
    "long32k": (8_000, 0.8, 32_000, 32_768),
}


def main() -> int:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--folder", type=Path, required=True, help="1.3 GB for the dataset")
    arguments.add_argument("--documents", type=int, default=50_000)
    arguments.add_argument("--parquet-rows", type=int, default=2_000)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=60)
    arguments.add_argument("--output", type=Path, help="write the result there, too")
    arguments.add_argument("--dry-run", action="store_true")
    args = arguments.parse_args()
    if args.dry_run:
        print(
            f"would write: {args.folder}/*",
            *([f"would write: {args.output}"] if args.output else []),
            sep="\n",
        )
        return 0
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    prefix, parquet = args.folder / "train", args.folder / "lists.parquet"
    if not prefix.with_name("train.manifest.json").exists():
        make_dataset(prefix, args.documents)
    make_parquet(prefix, parquet, min(args.parquet_rows, args.documents))
    result: dict[str, Any] = bench_read(prefix, parquet, args.rounds)
    result |= bench_packing(args.steps) | machine()
    if args.output:
        write_json(args.output, result)
    print(json.dumps(result))
    return 0


def make_dataset(prefix: Path, documents: int) -> None:
    """Lengths normal 2,000 ± 400 in 200…4,000, Zipf-like ids, most log-probs near 0."""
    rng = np.random.default_rng(0)
    log_line(f"writing {documents} documents")
    with (
        DatasetWriter(prefix, COLUMNS, 0, {"bench": documents}) as writer,
        progress(documents, "write", "doc") as bar,
    ):
        for start in range(0, documents, CHUNK):
            count = min(CHUNK, documents - start)
            lengths = np.clip(rng.normal(2_000, 400, count), 200, 4_000).astype(np.int32)
            total = int(lengths.sum())
            mask = np.ones(total, np.uint8)
            mask[((np.cumsum(lengths) - lengths)[:, None] + np.arange(PROMPT)).ravel()] = 0
            logprobs = [-0.05 * rng.standard_exponential(total, np.float32) ** 3 * mask for _ in range(2)]
            tokens = np.minimum(rng.zipf(1.3, total), VOCAB - 1).astype(np.int32)
            writer.append(lengths, dict(zip(COLUMNS, (tokens, mask, *logprobs), strict=True)))
            bar.update(count)
        writer.commit(Lineage())


def make_parquet(prefix: Path, path: Path, rows: int) -> None:
    """The same documents as the official release stores them: lists of int64 and float64 in `metadata`.

    Prompts are text there, and tokenized anew in every step: here ids written out as words.
    """
    dataset = open_dataset([prefix])
    records = []
    for index in range(rows):
        columns = dataset.document(index)
        metadata = {
            "is_lightning_opd": True,
            "response_tokens": columns["tokens"][PROMPT:].tolist(),
            "loss_mask": columns["loss_mask"][PROMPT:].tolist(),
            "teacher_log_probs": columns["teacher_logprobs"][PROMPT:].astype(np.float64).tolist(),
            "student_log_probs": columns["rollout_logprobs"][PROMPT:].astype(np.float64).tolist(),
        }
        prompt = " ".join(map(str, columns["tokens"][:PROMPT].tolist()))
        records.append({"prompt": prompt, "label": "0", "metadata": metadata})
    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=1_000)


def bench_read(prefix: Path, parquet: Path, rounds: int) -> dict[str, Any]:
    """Both loaders in turn in one process, so that a busy machine slows both alike."""
    opened = min(wall(lambda: open_dataset([prefix])) for _ in range(2 * rounds))
    dataset = open_dataset([prefix])
    steps = max(1, min(40, len(dataset) // BATCH))
    table, tokenizer = load_official(parquet), word_tokenizer(VOCAB)
    list_tokens = int(dataset.lengths[: len(table)].sum())
    packed, whole = step_loader(dataset, PACKED), step_loader(dataset, None)
    same = step_loader(dataset, SAME_FIELDS)
    step_tokens = sum(packed.step(step * BATCH).num_total_tokens for step in range(steps))
    works: dict[str, Callable[[], object]] = {
        "packed": lambda: walk(packed, steps),
        "same": lambda: walk(same, steps),
        "whole": lambda: walk(whole, steps),
        "load": lambda: load_official(parquet),
        "lists": lambda: walk_official(table, tokenizer, BATCH, SEQ_LENGTH),
        "random": lambda: read_random(parquet, RANDOM_ROWS),
    }
    least = dict.fromkeys(works, float("inf"))
    with progress(rounds, "read", "round") as bar:
        for _ in range(rounds):
            least = {name: min(least[name], cpu(work)) for name, work in works.items()}
            bar.update(1)
    rate, same_rate = step_tokens / least["packed"], step_tokens / least["same"]
    list_rate = list_tokens / least["lists"]
    random_rate = list_tokens / len(table) * RANDOM_ROWS / least["random"]
    return {
        "documents": len(dataset),
        "tokens": int(dataset.lengths.sum()),
        "open_ms": round(opened * 1e3, 3),
        "private_mb": round(private_memory(prefix), 2),
        "read_mtok_per_cpu_s": round(rate / 1e6, 1),
        "read_same_fields_mtok_per_cpu_s": round(same_rate / 1e6, 1),
        "step_ms": round(least["whole"] / steps * 1e3, 2),
        "step_tokens": round(step_tokens / steps),
        "parquet_lists_mtok_per_cpu_s": round(list_rate / 1e6, 3),
        "parquet_load_mtok_per_cpu_s": round(list_tokens / least["load"] / 1e6, 3),
        "speedup_vs_parquet_lists": round(same_rate / list_rate, 1),
        "speedup_vs_parquet_random_rows": round(rate / random_rate, 1),
    }


def walk(loader: StepLoader, steps: int) -> None:
    """As training does: one step after another, each dropped before the one after the next."""
    for step in range(steps):
        loader.step(step * BATCH)


def step_loader(dataset: ConcatDataset, columns: frozenset[str] | None) -> StepLoader:
    return StepLoader(
        dataset,
        seed=1,
        global_batch_size=BATCH,
        micro_batch_size=1,
        seq_length=SEQ_LENGTH,
        data_parallel_rank=0,
        data_parallel_size=1,
        columns=columns,
    )


def read_random(path: Path, count: int) -> list[tuple[torch.Tensor, ...]]:
    """`count` random rows straight from the file, which needs no memory either: one row group for each."""
    packed = []
    with pq.ParquetFile(path) as file:
        groups = np.cumsum([0, *(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))])
        for index in np.random.default_rng(0).integers(0, groups[-1], count).tolist():
            group = int(np.searchsorted(groups, index, side="right")) - 1
            table = file.read_row_group(group, use_threads=False)
            packed.append(row_tensors(table.slice(index - groups[group], 1).to_pylist()[0]))
    return packed


def row_tensors(row: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    metadata = row["metadata"]
    prompt = [int(word) for word in row["prompt"].split()]
    tokens = torch.tensor(prompt + metadata["response_tokens"], dtype=torch.int64)
    mask = torch.tensor(metadata["loss_mask"], dtype=torch.int64)
    names = ("teacher_log_probs", "student_log_probs")
    return (tokens, mask, *(torch.tensor(metadata[name], dtype=torch.float32) for name in names))


def private_memory(prefix: Path) -> float:
    """MB of anonymous memory that opening and touching the whole dataset adds, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=measure_private, args=(prefix, sender))
    child.start()
    child.join()
    return receiver.recv()


def measure_private(prefix: Path, sender: multiprocessing.connection.Connection) -> None:
    before = anonymous_kb()
    dataset = open_dataset([prefix])
    total = 0
    for index in range(len(dataset)):
        total += sum(int(values[-1] != 0) for values in dataset.document(index).values())
    sender.send((anonymous_kb() - before) / 1e3)


def anonymous_kb() -> int:
    """RssAnon: mapped pages of the files are the page cache, shared by all readers."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


def bench_packing(steps: int) -> dict[str, Any]:
    efficiencies: dict[str, list[float]] = {}
    extra, pack, used = 0, 0.0, {}
    for name, (median, sigma, cut, capacity) in LENGTH_SETS.items():
        rng = np.random.default_rng(0)
        responses = np.minimum(rng.lognormal(np.log(median), sigma, 50_000), cut).astype(np.int64)
        lengths = responses + rng.integers(80, 300, len(responses))
        pack = max(
            pack, min(cpu(functools.partial(best_fit_decreasing, lengths, capacity)) for _ in range(3))
        )
        used[name] = round(utilisation(lengths, capacity), 4)
        for ranks in (8, 16, 32):
            for step in range(steps):
                here = lengths[step * BATCH : (step + 1) * BATCH]
                plan = plan_step(here, data_parallel_size=ranks, capacity=capacity)
                cost = flop_cost(here)
                totals = np.array([sum(cost[row].sum() for row in rank) for rank in plan.microbatches])
                efficiencies.setdefault(f"{name}/{ranks}", []).append(float(totals.mean() / totals.max()))
                bound = -(-int(here.sum()) // (ranks * capacity))
                extra = max(extra, len(plan.microbatches[0]) - bound)
    return {
        "balance_mean": round(min(float(np.mean(values)) for values in efficiencies.values()), 5),
        "balance_worst": round(min(min(values) for values in efficiencies.values()), 5),
        "extra_microbatches": extra,
        "pack_cpu_s": round(pack, 4),
        "utilisation": used,
    }


def cpu(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def wall(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def machine() -> dict[str, str]:
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    versions = f"python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}"
    versions += f", pyarrow {pa.__version__}, pandas {pd.__version__}"
    return {"machine": f"{model}, one thread", "versions": versions}


if __name__ == "__main__":
    run_program(main)
