"""The CPU backend: on a host without CUDA, Megatron-Core's CUDA calls reach the CPU instead.

Megatron-Core writes `device="cuda"`, `torch.cuda.current_device()` and the like at its call sites. They are
patched as attributes of torch: a `TorchFunctionMode` is thread-local and is off while `backward` runs, where
activation recomputation calls the same functions. The list is what traced runs over TP, SP, PP, CP, EP,
DistributedOptimizer and dist_checkpointing have hit, nothing more.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from typing import Any

import torch
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")


def install() -> None:
    """Patch torch and Megatron-Core for CPU; does nothing where CUDA is available."""
    if torch.cuda.is_available():
        return
    # `with torch.device(...)` recognises factories by identity in a list made at its first use: make it now,
    # of the stock ones, or transformers would build models outside its meta device and keep random weights.
    _device_constructors()
    for name in ("zeros", "ones", "empty", "full", "tensor", "empty_like", "zeros_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    _patch_tensor()
    _patch_torch_cuda()
    _share_gloo_devices()
    _import_megatron_uncompiled()
    _patch_megatron()


def _on_cpu(factory: Any) -> Any:
    """`factory` with a literal device="cuda" read as CPU and pinned memory as ordinary memory."""

    def create(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _patch_tensor() -> None:
    stock_type = torch.Tensor.type

    def tensor_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return stock_type(self, dtype, *args, **kwargs)
        name = stock_type(self)
        # Megatron's optimizers sort parameters by the names 'torch.cuda.FloatTensor', '...BFloat16Tensor'.
        asked_by_megatron = "megatron" in sys._getframe(1).f_code.co_filename
        return name.replace("torch.", "torch.cuda.", 1) if asked_by_megatron else name

    torch.Tensor.type = tensor_type
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


class _Stream:
    """Stands for a CUDA stream or event: the CPU has one queue, so every wait is already over.

    A class and not a function, because libraries write `torch.cuda.Stream | None` in annotations.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self


def _patch_torch_cuda() -> None:
    cuda: Any = torch.cuda
    stream = _Stream()
    cuda.current_device = lambda: _CPU
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: stream
    cuda.Stream = cuda.Event = _Stream
    cuda.stream = lambda *args: contextlib.nullcontext()
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    # torch.manual_seed itself calls this one: it must not call back.
    cuda.manual_seed_all = lambda seed: None


def _share_gloo_devices() -> None:
    """All gloo groups of a process use one device for each interface.

    torch gives each group its own, whose thread wakes a hundred times a second and never ends: of the groups
    of one Megatron-Core layout that is a sixth of a small world's time, and a process that builds many slows
    down.
    """
    gloo: Any = torch.distributed.ProcessGroupGloo
    stock = gloo.__init__

    @functools.cache
    def devices() -> list[Any]:
        names = os.environ.get("GLOO_SOCKET_IFNAME")
        if names is None:
            return [gloo.create_default_device()]
        return [gloo.create_device(interface=name) for name in names.split(",")]

    def create(self: Any, store: Any, rank: int, size: int, *options: Any, timeout: Any = None) -> None:
        if timeout is not None:  # how torch.distributed makes its groups
            options = (gloo._Options(),)
            options[0]._timeout, options[0]._devices = timeout, devices()
            options[0]._threads = 2 * len(devices())
        stock(self, store, rank, size, *options)

    gloo.__init__ = create


def _import_megatron_uncompiled() -> None:
    """Megatron-Core decorates its element-wise functions with torch.compile as it is imported.

    On a CPU the compilation takes longer than any test, so the functions stay what they are.
    """
    stock, torch.compile = torch.compile, lambda function: function
    try:
        import megatron.core  # noqa: F401
    finally:
        torch.compile = stock


def _patch_megatron() -> None:
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    def split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        """The stock function leaves a CPU tensor alone; all_to_all_single takes no tensors as sizes."""
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = split_sizes
    token_dispatcher.maybe_move_tensor_to_cpu = split_sizes
