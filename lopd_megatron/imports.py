"""Imports of packages that are a million objects."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Python's collector is off inside, and never looks again at what stands at the end of an import.

    What vLLM or Megatron-Core with torch import stays. Collections are about a quarter of the time of such an
    import, and each later one of the whole heap would go through all of it. Where all had been imported
    before, nothing is frozen: that would keep every cycle of the caller's objects for ever.
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
