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


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def under_plain_torchrun() -> bool:
    """Under torch's own torchrun instead of `lopd_megatron.launch.torchrun`."""
    return under_torchrun() and "LOPD_TORCHRUN" not in os.environ
