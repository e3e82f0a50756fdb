"""Where this process stands among the others, and a Megatron-Core that runs on this host.

`prepare_megatron()` comes before the first import of `megatron.core`.
"""

from __future__ import annotations

import functools


@functools.cache
def prepare_megatron() -> None:
    """Make Megatron-Core usable here: the CPU backend where there is no CUDA, and the corrections everywhere.

    Patches the process; a second call does nothing.
    """
    from lopd_megatron.parallel import cpu, fixes, safe_pickles

    cpu.install()
    fixes.install()
    safe_pickles.install()
