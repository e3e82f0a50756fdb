"""What a device can do at most: a bfloat16 product and a copy, and what is installed (for `bench_gpu.py`).

    python tools/bench/bench_gpu_device.py [--size 8192]

Random numbers, not zeros, which a GPU multiplies faster. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable

import torch
from bench_measure import machine

PACKAGES = ("transformer-engine", "apex", "flash-attn", "vllm", "triton", "transformers", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    device, n = "cuda" if torch.cuda.is_available() else "cpu", options.size
    left, right = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    source = torch.randn(8 * n, n, device=device)
    target = torch.empty_like(source)
    product_s = median_seconds(lambda: left @ right, options.repeats)
    copy_s = median_seconds(lambda: target.copy_(source), options.repeats)
    result = {
        "product_tflops": 2 * n**3 / product_s / 1e12,
        "copy_tb_per_s": 2 * source.nbytes / copy_s / 1e12,
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if device == "cuda" else None,
        "machine": machine() | {name: version(name) for name in PACKAGES},
    }
    print(json.dumps(result))


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """After three warm-ups; elapsed, with the device idle before and after each."""
    seconds = []
    for _ in range(3 + repeats):
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[3:])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
