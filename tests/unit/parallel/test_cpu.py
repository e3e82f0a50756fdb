"""The CPU backend leaves torch as other libraries need it."""

import subprocess
import sys

import pytest
import torch

from lopd_megatron.parallel import prepare_megatron


def test_cuda_literals_land_on_the_cpu() -> None:
    prepare_megatron()
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.tensor([1.0], device="cuda", pin_memory=True).device.type == "cpu"
    assert torch.ones(2).cuda().device.type == "cpu"
    assert torch.ones(2).type() == "torch.FloatTensor"  # only Megatron's own files see torch.cuda.*


@pytest.mark.processes
def test_meta_device_still_works_when_the_backend_came_first() -> None:
    """transformers builds on the meta device; when that failed it kept random weights without a word."""
    program = (
        "from lopd_megatron.parallel import prepare_megatron; prepare_megatron(); import torch\n"
        "with torch.device('meta'): print(torch.empty(2).device, torch.nn.Linear(2, 2).weight.device)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["meta", "meta"]


def test_streams_are_classes() -> None:
    prepare_megatron()
    assert (torch.cuda.Stream | None) is not None  # accelerate writes this in an annotation
