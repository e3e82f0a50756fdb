"""Dense bf16 peak of the accelerators we know, the denominator of MFU."""

from __future__ import annotations

import torch

PEAK_BF16_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
}
"""Vendor data sheets, without sparsity. The longest matching name counts."""


def device_peak_flops() -> float | None:
    """Peak of this device; None on a CPU and for one that is not in the table: no MFU is reported."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    known = sorted((key for key in PEAK_BF16_FLOPS if key in name), key=len)
    return PEAK_BF16_FLOPS[known[-1]] if known else None
