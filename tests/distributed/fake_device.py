"""One training step of a wide student on a device that computes nothing and knows where every tensor lies.

    python -m tests.distributed.fake_device

torch's fake tensors on a made-up accelerator: an operation on tensors of two devices, a wrong dtype or shape
raises as on a GPU, also in the backward. Whatever Megatron-Core sends to CUDA goes there, the CUDA branches
of this package run, and the numbers are never looked at. Prints where each case read from the device.
A process of its own, since all of torch is patched.
"""

from __future__ import annotations

import contextlib
import json
import traceback
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("npy")
DEVICE = torch.device("npy", 0)
LENGTHS = [3000, 1000, 96]
CASES = {
    "plain": [],
    "precision-aware, recomputed, tied": [
        "tied",
        "optimizer.use_precision_aware_optimizer=true",
        "train.recompute_granularity=full",
        "loss.head_chunk_tokens=1000",
    ],
}
reads: Counter[str] = Counter()


def install() -> None:
    """The CPU backend of the package, with the made-up device in the place of the CPU."""
    from lopd_megatron.parallel import cpu, prepare_megatron
    from lopd_megatron.parallel import topology as grid

    cpu._CPU = DEVICE
    prepare_megatron()
    names = {torch.float32: "torch.cuda.FloatTensor", torch.bfloat16: "torch.cuda.BFloat16Tensor"}
    tensor_class: Any = torch.Tensor
    tensor_class.type = lambda self, *args: names[self.dtype]
    tensor_class.cuda = lambda self, *args, **kwargs: self.to(DEVICE)
    tensor_class.is_cuda = property(lambda self: self.device == DEVICE)
    torch.cuda.get_device_capability = lambda *args: (9, 0)
    _patch_creation()
    _patch_reads()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    dist.all_gather_object = lambda out, value, group=None: out.__setitem__(slice(None), [value] * len(out))
    grid._device = lambda: DEVICE
    _patch_megatron()


def _patch_creation() -> None:
    stock = torch.tensor

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        made = stock(data, *args, **kwargs)
        return made if device is None else torch.empty(made.shape, dtype=made.dtype, device=DEVICE)

    torch.tensor = tensor


def _patch_reads() -> None:
    """Numbers that the host reads are made up, and where it reads is counted: a GPU waits there."""
    trained = sum(LENGTHS) - 7

    def count(name: str) -> None:
        frames = [frame for frame in traceback.extract_stack()[:-2] if "/torch/" not in frame.filename]
        reads[f"{name} in {frames[-1].name} of {frames[-1].filename.rsplit('/', 1)[-1]}"] += 1

    def reader(name: str, answer: Any) -> None:
        def read(self: torch.Tensor, *args: Any) -> Any:
            if self.device == DEVICE:
                count(name)
            return answer(self)

        setattr(FakeTensor, name, read)

    bounds = {3: LENGTHS, 4: [0, 3000, 4000, 4096]}
    reader("__bool__", lambda self: False)
    reader("item", lambda self: 1.0 if self.dtype.is_floating_point else 1)
    reader("__float__", lambda self: 1.0)
    reader("tolist", lambda self: bounds[self.numel()])
    reader("nonzero", lambda self: torch.empty(trained, 1, dtype=torch.int64, device=self.device))


def _patch_megatron() -> None:
    """What a single fake rank cannot do: gloo beside it, coalesced collectives, a norm that is a number."""
    from megatron.core import parallel_state
    from megatron.core.distributed import param_and_grad_buffer as buffers
    from megatron.core.optimizer import optimizer

    parallel_state.get_data_parallel_group_gloo = lambda *args, **kwargs: None
    parallel_state.get_expert_data_parallel_group_gloo = lambda *args, **kwargs: None
    buffers._coalescing_manager = lambda *args, **kwargs: contextlib.nullcontext()
    buffers.dist_reduce_scatter_func = buffers.dist_all_gather_func = lambda *args, **kwargs: None
    optimizer.get_grad_norm_fp32 = lambda *args, **kwargs: 1.0


def patch_kernels() -> None:
    """Uncompiled forms of the compiled functions, and the float32 product that fake tensors lack."""
    from lopd_megatron.loss import fused_head
    from lopd_megatron.train import precision_aware_adam

    def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, keep: bool) -> None:
        assert (total.dtype, left.dtype, right.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
        torch.addmm(total, left.t().float(), right.float(), out=total)

    fused_head._add_product_ = add_product
    fused_head._compiled_exponentiate = lambda: fused_head._exponentiate_rows_
    precision_aware_adam._compiled_update = lambda: precision_aware_adam.adamw_


def to_device(self: torch.nn.Module, *, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """`Module.to`, which cannot swap fake parameters; keeps the marks that Megatron-Core set."""
    for module in self.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = torch.nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device))
                marks = ("tensor_model_parallel", "partition_dim", "partition_stride", "sequence_parallel")
                for mark in (*marks, "allreduce", "shared", "shared_embedding"):
                    if hasattr(parameter, mark):
                        setattr(moved, mark, getattr(parameter, mark))
                module._parameters[name] = moved
    return self


def step(overrides: list[str]) -> dict[str, int]:
    """Two layers of an 8B student, 4096 tokens in three documents: forward, backward, update.

    Returns how often each place read from the device.
    """
    import numpy as np

    from lopd_megatron.cli import apply_override
    from lopd_megatron.config import RunConfig
    from lopd_megatron.data.loader import StepBatch
    from lopd_megatron.model.student import StudentModel, build_student
    from lopd_megatron.model.student_spec import student_spec
    from lopd_megatron.parallel import topology as grid
    from lopd_megatron.recipes.models import QWEN3_4B, QWEN3_8B
    from lopd_megatron.train import setup
    from lopd_megatron.train.state import Trainer
    from lopd_megatron.train.step import run_microbatches
    from tests.unit.loss.dense import random_batch

    config, tied = RunConfig(), "tied" in overrides
    for override in overrides:
        if override != "tied":
            apply_override(config, *override.split("=", 1))
    grid.destroy()
    topology = grid.initialize(config.parallel, seed=1)
    hf = (QWEN3_4B if tied else QWEN3_8B) | {"num_hidden_layers": 2}
    spec = student_spec(hf, config, attention="varlen")
    batch = random_batch(LENGTHS, vocab_size=64)  # nobody looks at the numbers
    batch = replace(batch, tokens=batch.labels)
    StudentModel.to = to_device  # type: ignore[method-assign]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tensors = {name: mode.from_tensor(v) for name, v in vars(batch).items() if torch.is_tensor(v)}
        model = setup.wrap_model(build_student(spec, topology), spec, config)
        optimizer, scheduler = setup.build_optimizer(model, spec, config)
        setup._connect_schedule(spec.transformer_config, model, optimizer, config)
        trainer = Trainer(
            config=config,
            topology=topology,
            spec=spec,
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            batches=None,  # type: ignore[arg-type]
            loss=setup.loss_of_run(config, spec, topology),
            checkpoints=None,  # type: ignore[arg-type]
        )
        lengths = np.array(LENGTHS, dtype=np.int32)
        work = StepBatch([replace(batch, **tensors)], sum(LENGTHS), 3, 1, sum(LENGTHS), lengths)
        for chunk in model:
            chunk.zero_grad_buffer()
        reads.clear()
        (output,) = run_microbatches(trainer, work, forward_only=False)
        for name, pair in output.metric_sums.items():
            assert pair.device == DEVICE, name
        optimizer.step()
        for parameter in model[0].parameters():
            assert parameter.device == parameter.main_grad.device == DEVICE
    return dict(reads)


if __name__ == "__main__":
    install()
    patch_kernels()
    print(json.dumps({name: step(overrides) for name, overrides in CASES.items()}))
