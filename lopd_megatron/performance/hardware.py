"""The accelerators that the time model knows: peaks, bandwidths and how GPUs are connected, with sources."""

from __future__ import annotations

from dataclasses import dataclass

from lopd_megatron.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One GPU of a system, as its vendor states it. Dense rates in FLOP/s, bandwidths in bytes/s.

    `nvlink` and `nic` count one direction and one GPU. `nvlink_domain` GPUs reach each other over NVLink.
    `exponentials` are those of the special-function units per second, which softmax needs.
    """

    name: str
    bf16: float
    fp8: float
    fp4: float
    hbm: float
    memory: float
    nvlink: float
    nvlink_domain: int
    nic: float
    exponentials: float
    node: int
    """GPUs that share a host."""
    source: str

    def peak(self, precision: str) -> float:
        """Dense FLOP/s of the matrix units for operands of this precision; 0: not supported."""
        return {"bf16": self.bf16, "nvfp4": self.fp4}.get(precision, self.fp8)


_HOPPER = "NVIDIA H100 / H200 Tensor Core GPU data sheets (SXM), without sparsity"
_DGX = "NVIDIA DGX data sheet, per GPU, without sparsity; "
_NVL = "NVIDIA NVL72 data sheet, per GPU, without sparsity; "

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", 989e12, 1979e12, 0, 3.35e12, 80e9, 450e9, 8, 50e9, 3.9e12, 8, _HOPPER),
        Gpu("H200", 989e12, 1979e12, 0, 4.8e12, 141e9, 450e9, 8, 50e9, 3.9e12, 8, _HOPPER),
        Gpu(
            "B200",
            2250e12,
            4500e12,
            9000e12,
            8e12,
            180e9,
            900e9,
            8,
            50e9,
            4.6e12,
            8,
            _DGX + "ConnectX-7, 400 Gb/s",
        ),
        Gpu(
            "B300",
            2250e12,
            4500e12,
            13500e12,
            8e12,
            270e9,
            900e9,
            8,
            100e9,
            9.2e12,
            8,
            _DGX + "ConnectX-8, 800 Gb/s",
        ),
        Gpu(
            "GB200",
            2500e12,
            5000e12,
            10000e12,
            8e12,
            186e9,
            900e9,
            72,
            50e9,
            4.6e12,
            4,
            _NVL + "ConnectX-7, 400 Gb/s",
        ),
        Gpu(
            "GB300",
            2500e12,
            5000e12,
            15000e12,
            8e12,
            278e9,
            900e9,
            72,
            100e9,
            9.2e12,
            4,
            _NVL + "ConnectX-8, 800 Gb/s",
        ),
    )
}

PRECISIONS = ("bf16", "fp8_cs", "fp8_ds", "fp8_sc", "mxfp8", "nvfp4")
"""Of the matrix products: FP8 with current, delayed or block (sub-channel) scaling, MXFP8, NVFP4."""


def find_gpu(name: str) -> Gpu:
    """The GPU of this name; `DGX-` in front of it is allowed."""
    key = name.upper().removeprefix("DGX-").removeprefix("HGX-").split()[0] if name.strip() else ""
    if key not in GPUS:
        raise UserError(
            f"no GPU {name!r} in the table; known are {', '.join(GPUS)} (performance/hardware.py)"
        )
    return GPUS[key]
