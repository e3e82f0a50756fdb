"""Imports before a fork."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Garbage collection is off inside; later collections skip everything that is alive at the end.

    Forks of the process then share the pages of what was imported: a collection would write to each page.
    Where all had been imported before, nothing is frozen: that would keep every cycle of the caller.
    """
    was_on, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
            gc.freeze()
        if was_on:
            gc.enable()
