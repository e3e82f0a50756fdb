"""Kills the offline pipeline with SIGKILL before the n-th file operation, for many n, and runs it again.

    python -m tests.unit.rollouts.kill_points FOLDER POINTS

Each run is a forked process that had imported everything, so a kill costs milliseconds. A file operation is
an audit event of Python (open, rename, remove, mkdir, utime); the engine is the FakeEngine, whose steps count
as well. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.dataset  # noqa: F401  (else every child imports it)

from tests.unit.rollouts import pipeline
from tests.unit.rollouts.fake_engine import FakeEngine

EVENTS = {"open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.utime"}


def main(folder: Path, points: int) -> None:
    os.fsync = lambda descriptor: None  # only a power cut needs it: the kernel keeps a killed writer's pages
    total = int(_in_child(lambda: _count(folder / "undisturbed")))
    want = pipeline.hashes(folder / "undisturbed")
    draw = random.Random(1)
    killed, wrong, leftovers = 0, [], 0
    for number, at in enumerate(draw.sample(range(1, total), points)):
        root = folder / f"kill-{number}"
        killed += _in_child(lambda root=root, at=at: _kill_at(root, at)) is None  # type: ignore[misc]
        _in_child(lambda root=root: _run(root))  # type: ignore[misc]
        if pipeline.hashes(root) != want:
            wrong.append(at)
        leftovers += len(list(root.rglob("*.lease")))
    print(
        json.dumps(
            {"events": total, "points": points, "killed": killed, "wrong": wrong, "leases_left": leftovers}
        )
    )


def _count(root: Path) -> str:
    seen = _watch(root, lambda count: None)
    _run(root)
    return str(seen())


def _kill_at(root: Path, at: int) -> str:
    _watch(root, lambda count: os.kill(os.getpid(), signal.SIGKILL) if count == at else None)
    return _run(root)


def _run(root: Path) -> str:
    pipeline.run_all(root)
    return "done"


def _watch(root: Path, act: Callable[[int], None]) -> Callable[[], int]:
    """Call `act(n)` before the n-th operation below `root` or step of an engine; returns the counter."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        act(count)

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event in EVENTS and str(arguments[0]).startswith(str(root)):
            tick()

    sys.addaudithook(audit)
    original = FakeEngine.on_answer
    FakeEngine.on_answer = lambda self: (tick(), original(self))[1]  # type: ignore[method-assign]
    return lambda: count


def _in_child(work: Callable[[], str]) -> str | None:
    """What `work` returned in a forked process; None when the process was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 2)
        code = 1
        try:
            os.write(writer, work().encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    assert status == 0, f"child failed with status {status}"
    return text


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
