"""Imports of packages that are a million objects."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Python's collector is off inside, and never looks again at what stands at the end.

    What vLLM or Megatron-Core with torch import stays. Collections are a quarter to a third of the time of
    such an import, and each later one of the whole heap would go through all of it.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
