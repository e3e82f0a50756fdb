"""Progress of work that takes seconds: a bar with rate and ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm


class _Lines(tqdm):
    """tqdm that prints a whole line at most every `mininterval` seconds instead of redrawing one."""

    @staticmethod
    def status_printer(file: Any) -> Any:
        def show(line: str) -> None:
            file.write(line.strip() + "\n")
            file.flush()

        return show


def progress(total: int | None, description: str, unit: str, *, initial: int = 0) -> tqdm:
    """A counter to `update(n)`; use as a context manager. It writes to stderr only.

    On a terminal it is a bar; in a log file it is one plain line every ten seconds. Work of less than a
    second shows nothing.
    """
    terminal = sys.stderr.isatty()
    kind = tqdm if terminal else _Lines
    return kind(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        unit_scale=True,
        file=sys.stderr,
        mininterval=0.2 if terminal else 10.0,
        delay=1.0,
        ncols=100 if terminal else 0,
        ascii=not terminal,
        dynamic_ncols=False,
        leave=True,
    )


def log_line(message: str) -> None:
    """One line about what happens now, with the time of day, on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)
