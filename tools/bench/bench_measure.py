"""How the benchmarks measure: CPU seconds of interleaved variants, peak memory, processes of their own."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# What a peer allocates every step must not be billed as page faults, which a GPU allocator does not have.
TIMING_ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000"}
# And what it frees must leave the process, so that the next peak is its own.
MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "262144"}


def interleaved(
    variants: dict[str, Callable[[], Any]],
    rounds: int,
    *,
    reset: Callable[[], None],
    clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:
    """Minimum seconds of each variant after a warm-up round; `spread`: the largest (median − min)/min."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            reset()
            start = clock()
            run()
            seconds[name].append(clock() - start)
    kept = {name: values[1:] for name, values in seconds.items()}
    spread = max(statistics.median(values) / min(values) - 1 for values in kept.values())
    return {**{name: min(values) for name, values in kept.items()}, "spread": spread}


def peak_mb(run: Callable[[], Any]) -> float:
    """Megabytes of resident memory that `run` adds at its highest point. Linux."""
    with contextlib.suppress(OSError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kb("VmRSS")
    run()
    return (_status_kb("VmHWM") - before) * 1024 / 1e6


def _status_kb(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def cuda_ms_gb(run: Callable[[], None], repeats: int, *, reset: Callable[[], None]) -> tuple[float, float]:
    """Median milliseconds of `repeats` after three warm-ups, and gigabytes above what stood before."""
    milliseconds = []
    for i in range(3 + repeats):
        reset()
        if i == 3:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        milliseconds.append(start.elapsed_time(stop))
    return statistics.median(milliseconds[3:]), (torch.cuda.max_memory_allocated() - before) / 1e9


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """‖value − reference‖ / ‖reference‖."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def in_ranks(size: int, environment: dict[str, str], measure: Any, *arguments: Any) -> dict[str, float]:
    """What rank 0 of a fresh gloo world measured; malloc reads its settings when a process starts."""
    context = multiprocessing.get_context("spawn")
    stock = dict(os.environ)
    os.environ |= environment | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(
                target=_rank, args=(results, rank, size, f"{folder}/store", measure, arguments), daemon=True
            )
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        os.environ.clear()
        os.environ.update(stock)
        for process in ranks:
            process.join()
    if any(process.exitcode for process in ranks):
        raise RuntimeError("a measuring process failed; its traceback is above")
    return results.get()


def _rank(results: Any, rank: int, size: int, store: str, measure: Any, arguments: tuple) -> None:
    from lopd_megatron.parallel import prepare_megatron

    prepare_megatron()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    measured = measure(*arguments)
    if rank == 0:
        results.put(measured)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    import megatron.core

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, {os.cpu_count()} cores"
    return {
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron_core": megatron.core.__version__,
    }
