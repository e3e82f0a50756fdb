"""What the launcher says of this process, known before torch.distributed is."""

from __future__ import annotations

import os

import torch.distributed as dist


def launch_rank() -> int:
    """Rank of this process; 0 without a launcher."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def launch_world_size() -> int:
    """Number of processes; 1 without a launcher."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
