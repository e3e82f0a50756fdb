"""`lopd plan`: how long a run takes on a cluster, which layout is fastest, and what limits it."""

from __future__ import annotations

from lopd_megatron.performance.plan import main

__all__ = ["main"]
