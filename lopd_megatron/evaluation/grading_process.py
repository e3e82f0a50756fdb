"""Math answers graded in a process of their own: no expression can hold or fill the machine.

sympy computes 9^(9^9) inside one call of C, which no signal handler of Python interrupts. So a helper process
imports math-verify once and forks a worker. The kernel ends the worker when an answer takes too long, and the
helper forks the next one in milliseconds. The limit is one of processor time, so a busy machine changes no
grade; the limit of elapsed time is there for the rest.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lopd_megatron.errors import UserError

CPU_SECONDS = 2.0
ELAPSED_SECONDS = 4.0
MEMORY_BYTES = 4 << 30


class GradingProcess:
    """The helper as its users see it; started at the first answer, ended with this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._helper: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def grade(self, response: str, answer: str) -> tuple[str | None, bool]:
        """(the answer found in the response, whether it is `answer`), within `ELAPSED_SECONDS`.

        An answer that takes longer is wrong; it is then given as it is written.
        """
        request = json.dumps([response, answer]).encode() + b"\n"
        with self._lock:
            reply = self._ask(request) or self._ask(request)
        if reply is None:
            raise UserError("the process that grades answers has ended twice; is there memory for it?")
        found = json.loads(reply)
        return found["extracted"], found["correct"]

    def _ask(self, request: bytes) -> bytes | None:
        """None where the helper is gone; the next call starts another."""
        helper = self._running()
        assert helper.stdin
        assert helper.stdout
        try:
            helper.stdin.write(request)
            helper.stdin.flush()
            reply = helper.stdout.readline()
        except OSError:
            reply = b""
        if not reply.endswith(b"\n"):
            self._helper = None
            return None
        return reply

    def _running(self) -> subprocess.Popen[bytes]:
        if self._helper is None or self._owner != os.getpid():  # a forked process needs its own
            path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *sys.path])
            self._helper = subprocess.Popen(
                [sys.executable, "-m", "lopd_megatron.evaluation.grading_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C ends this process, whose end ends the helper
            )
            self._owner = os.getpid()
            atexit.register(_close, self._helper, self._owner)
        return self._helper


def _close(helper: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner and helper.stdin:
        with contextlib.suppress(OSError):
            helper.stdin.close()
        helper.wait()


class _Worker:
    """A fork of the helper that grades until the kernel ends it."""

    def __init__(self) -> None:
        read_request, write_request = os.pipe()
        read_reply, write_reply = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(write_request)
            os.close(read_reply)
            _grade_all(os.fdopen(read_request, "rb"), os.fdopen(write_reply, "wb", buffering=0))
            os._exit(0)
        os.close(read_request)
        os.close(write_reply)
        self._requests = os.fdopen(write_request, "wb", buffering=0)
        self._replies = os.fdopen(read_reply, "rb")

    def grade(self, request: bytes) -> tuple[dict[str, Any], bool]:
        """What the worker found, all or up to its end; and whether it lives."""
        found: dict[str, Any] = {"extracted": None, "correct": False}
        self._requests.write(request)
        for line in self._replies:
            if line == b"\n":
                return found, True
            found |= json.loads(line)
        return found, False

    def close(self) -> None:
        self._requests.close()
        self._replies.close()
        os.waitpid(self.pid, 0)


def _grade_all(requests: IO[bytes], replies: IO[bytes]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for request in requests:
        signal.setitimer(
            signal.ITIMER_PROF, CPU_SECONDS
        )  # their signals end the process: nobody handles them
        signal.setitimer(signal.ITIMER_REAL, ELAPSED_SECONDS)
        for found in _grade(*json.loads(request)):
            replies.write(json.dumps(found).encode() + b"\n")
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(b"\n")


def _grade(response: str, answer: str) -> Iterator[dict[str, Any]]:
    """What is known of an answer, step by step: whatever a later step does, the earlier ones stay."""
    from lopd_megatron.evaluation.answers import find_answers
    from lopd_megatron.evaluation.equality import canonical, clean, same_answer

    answers = find_answers(response)
    if not answers:
        return
    joined = ", ".join(answers)
    yield {"extracted": clean(joined)[:1000]}
    golds = find_answers(answer) if "boxed" in answer else [answer]
    gold = ", ".join(golds)
    correct = False
    with contextlib.suppress(Exception):  # whatever sympy raises: such an answer is not shown to be right
        correct = same_answer(gold, joined) or (len(answers) > 1 and same_answer(gold, answers[-1]))
    yield {"correct": correct}
    with contextlib.suppress(Exception):
        yield {"extracted": canonical(joined)[:1000]}


def serve() -> None:
    """Requests, one JSON line each, from stdin; answers to stdout. Ends with stdin."""
    import math_verify  # noqa: F401  imported once, for all workers

    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    quiet = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # parsers print
        os.dup2(quiet, descriptor)
    worker = _Worker()
    for request in sys.stdin.buffer:
        found, alive = worker.grade(request)
        replies.write(json.dumps(found).encode() + b"\n")
        if not alive:
            worker.close()
            worker = _Worker()


if __name__ == "__main__":
    serve()
