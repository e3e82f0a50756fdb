"""Everything that one GPU can show about this package, in one go and within a time limit.

    python tools/bench/bench_gpu.py [--output FILE.json] [--total-s 720] [--only PART ...] [--tiny]

Each part is a process with a limit of its own. The file is written after each, with device and versions; a
part that fails, runs out of time or does not fit says so there and the next one starts. A part whose result
on the same device is in the file already is not run again, so a second call goes on where the first stopped.

In order of importance:

device                  bfloat16 product of 8192³ and a device copy: what everything else is measured against
head                    the loss head [16384, 4096, 151936] and a quarter of its vocabulary, by chunk size,
                        beside its three products alone and Megatron-Core's losses (bench_loss.py)
slice_8b                MFU of a step of 8 true-width layers and the head, 16k tokens, with torch's own packed
                        attention (bench_train.py)
full_8b                 a step of all parameters of an 8B student, 8k tokens
tests                   tests/gpu: attention kernels, head, distributed steps and resume on CUDA
step_1_7b, step_4b      whole students, 16k tokens
slice_8b_16_layers      with slice_8b: the time of 8 layers alone
full_8b_recompute_mlp   the 8B step with less repeated work
slice_8b_te             slice_8b with Transformer Engine, where it is installed

Nothing has to be installed: the repository is put on the path, and beside it `.gpu-packages`, where
`make gpu-packages` puts what a machine without a network lacks. `--tiny` runs small shapes of the same code,
on a CPU too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ROOT / ".gpu-packages"
sys.path[:0] = [str(ROOT), *([str(PACKAGES)] if PACKAGES.is_dir() else [])]

from lopd_megatron.errors import run_program  # noqa: E402
from lopd_megatron.files import write_json  # noqa: E402
from lopd_megatron.progress import log_line  # noqa: E402

LEAST_S = 20.0
"""A part is not begun with less time left."""


@dataclass(frozen=True)
class Part:
    command: list[str]  # after the interpreter; prints JSON as its last line
    limit_s: float


def _train(case: str, limit_s: float, *more: str) -> Part:
    return Part(["tools/bench/bench_train.py", "--case", case, *more], limit_s)


PARTS = {
    "device": Part(["tools/bench/bench_gpu_device.py"], 60),
    "head": Part(["tools/bench/bench_loss.py", "--rounds", "20"], 150),
    "slice_8b": _train("slice_8b", 100, "--attention", "varlen"),
    "full_8b": _train("full_8b", 150, "--steps", "5"),
    "tests": Part(["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"], 240),
    "step_1_7b": _train("step_1_7b", 90),
    "step_4b": _train("step_4b", 110),
    "slice_8b_16_layers": _train("slice_8b_16_layers", 100, "--attention", "varlen"),
    "full_8b_recompute_mlp": _train("full_8b_recompute_mlp", 150, "--steps", "5"),
    "slice_8b_te": _train("slice_8b", 100, "--attention", "transformer_engine"),
}
TINY = {
    "device": Part(["tools/bench/bench_gpu_device.py", "--size", "64"], 120),
    "slice_8b": _train("tiny", 240, "--steps", "2", "--warmup", "1"),
    "tests": Part(["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"], 240),
    "slice_8b_te": replace(PARTS["slice_8b_te"], limit_s=240),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks" / "gpu.json")
    parser.add_argument("--total-s", type=float, default=720, help="no part runs beyond this")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts, even if they were run before")
    parser.add_argument("--tiny", action="store_true", help="small shapes, any device")
    parser.add_argument("--dry-run", action="store_true", help="list the parts and stop")
    options = parser.parse_args()
    parts = TINY if options.tiny else PARTS
    chosen = {name: part for name, part in parts.items() if not options.only or name in options.only}
    if options.dry_run:
        for name, part in chosen.items():
            print(f"{name:22s} at most {part.limit_s:3.0f} s  {' '.join(part.command)}")
        return
    report = read_report(options.output)
    deadline = time.monotonic() + options.total_s
    for name, part in chosen.items():
        device = report["machine"].get("device") if report else None
        done = report.get("parts", {}).get(name, {})
        if not options.only and done.get("status") == "done" and done.get("device") == device:
            log_line(f"{name}: in the file already")
            continue
        outcome = run_part(name, part, deadline - time.monotonic())
        if name == "device" and outcome["status"] == "done":
            report["machine"] = outcome["result"].pop("machine")
        outcome["device"] = report.setdefault("machine", {}).get("device")
        report.setdefault("parts", {})[name] = outcome
        write_json(options.output, report)
        log_line(f"{name}: {outcome['status']} after {outcome['seconds']:.0f} s {outcome.get('reason', '')}")
    print(json.dumps({name: outcome["status"] for name, outcome in report["parts"].items()}))


def read_report(path: Path) -> dict[str, Any]:
    """What an earlier call left, or an empty report."""
    return json.loads(path.read_text()) if path.is_file() else {"machine": {}, "parts": {}}


def run_part(name: str, part: Part, left_s: float) -> dict[str, Any]:
    """status done, failed, timeout or skipped; seconds; result or reason. Never raises."""
    limit = min(part.limit_s, left_s)
    if limit < LEAST_S:
        return _outcome("skipped", 0.0, reason=f"{max(0.0, left_s):.0f} s left of the total")
    log_line(f"{name}: at most {limit:.0f} s")
    start = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, *part.command],
            cwd=ROOT,
            env=environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # the process and what it started
            process.wait()
            code = None
        log.seek(0)
        text = log.read().decode(errors="replace")
    seconds = time.monotonic() - start
    if code is None:
        return _outcome("timeout", seconds, reason=f"not done after {limit:.0f} s", log=text[-2000:])
    return _judge(code, text, seconds)


def _judge(code: int, text: str, seconds: float) -> dict[str, Any]:
    """What a finished process has to say: a JSON last line, or pytest's closing line."""
    lines = text.strip().splitlines() or [""]
    if code == 2 and lines[-1].startswith("error: "):  # a UserError: it cannot be done here
        return _outcome("skipped", seconds, reason=lines[-1].removeprefix("error: "))
    if code:
        return _outcome("failed", seconds, reason=f"exit code {code}: {lines[-1]}", log=text[-4000:])
    try:
        result = json.loads(lines[-1])
    except ValueError:
        reasons = [line for line in lines if line.startswith("SKIPPED")]
        result = {"summary": lines[-1].strip("= "), "skipped": reasons}
    return _outcome("done", seconds, result=result)


def _outcome(status: str, seconds: float, **more: Any) -> dict[str, Any]:
    return {"status": status, "seconds": round(seconds, 1), **more}


def environment() -> dict[str, str]:
    """The package and what was carried along are importable; fragments of freed memory are given back."""
    paths = [str(ROOT), str(PACKAGES), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTHONWARNINGS": "ignore",
    }


if __name__ == "__main__":
    run_program(main)
