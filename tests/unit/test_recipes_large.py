"""Every recipe of a large model, on every cluster size it has a layout for, without a GPU.

The models are built on the meta device in a process group of the real size that communicates nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.model.memory_estimate import OVERHEAD_BYTES, estimate_memory, rank_parameters
from lopd_megatron.model.student_spec import student_spec
from lopd_megatron.parallel import topology as grid
from lopd_megatron.recipes import models, paper, qwen3_4b, qwen3_8b, qwen3_30b_a3b, qwen3_32b

GPU_BYTES = 79.6 * 1024**3  # what a GPU of "80 GB" reports
CONFIGS = {
    qwen3_4b: models.QWEN3_4B,
    qwen3_8b: models.QWEN3_8B,
    qwen3_30b_a3b: models.QWEN3_30B_A3B,
    qwen3_32b: models.QWEN3_32B,
}
TOTAL_PARAMETERS = {  # published sizes
    qwen3_4b: 4.02e9,
    qwen3_8b: 8.19e9,
    qwen3_30b_a3b: 30.53e9,
    qwen3_32b: 32.76e9,
}
LAYOUTS = [(module, gpus) for module in CONFIGS for gpus in module.LAYOUTS]


@functools.cache
def name_of(module: object) -> str:
    return Path(module.__file__).stem


@pytest.fixture
def fake_world() -> Iterator[None]:
    """Any rank of any world size, without peers."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def start(rank: int, world_size: int) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)

    yield start
    grid.destroy()
    dist.destroy_process_group()


@pytest.mark.parametrize("function", ["sft", "lightning_opd", "lightning_opd_topk", "standard_opd"])
@pytest.mark.parametrize("module", CONFIGS, ids=name_of)
def test_recipe_fits_every_layout(module, function: str) -> None:
    for gpus in module.LAYOUTS:
        config: RunConfig = getattr(module, function)(gpus)
        config.check()
        spec = student_spec(CONFIGS[module], config, attention="varlen")
        memory = estimate_memory(spec, config, gpus)
        assert memory.total + OVERHEAD_BYTES < GPU_BYTES, (gpus, memory)
        stage = config.launch.stages.train
        assert stage.nodes * stage.gpus_per_node == gpus
        data_parallel = config.parallel.data_parallel_size(gpus)
        assert config.train.global_batch_size % data_parallel == 0


@pytest.mark.parametrize(
    ("module", "gpus"), LAYOUTS, ids=lambda value: str(value) if isinstance(value, int) else name_of(value)
)
def test_parameters_per_rank_on_the_meta_device(module, gpus: int, fake_world) -> None:
    from lopd_megatron.model.student import build_student
    from lopd_megatron.model.weights import named_parameters

    config: RunConfig = module.lightning_opd(gpus)
    fake_world(gpus - 1, gpus)  # the last pipeline stage, whose head makes it the largest
    topology = replace(grid.initialize(config.parallel, seed=1), device=torch.device("meta"))
    spec = student_spec(CONFIGS[module], config, attention="varlen")
    with torch.device("meta"):
        chunks = build_student(spec, topology)
    expert = dense = 0
    for name, parameter in named_parameters(chunks, spec, topology):
        assert parameter.device.type == "meta"
        if ".experts." in name:
            expert += parameter.numel()
        else:
            dense += parameter.numel()
    counted = rank_parameters(spec, topology.pp_rank)
    assert (counted.dense, counted.expert) == (dense, expert)


@pytest.mark.parametrize("module", CONFIGS, ids=name_of)
def test_all_ranks_together_hold_the_model(module) -> None:
    spec = student_spec(CONFIGS[module], RunConfig(), attention="varlen")
    assert rank_parameters(spec, 0).total == pytest.approx(TOTAL_PARAMETERS[module], rel=2e-3)


def test_hyper_parameters_are_the_papers() -> None:
    config = qwen3_8b.lightning_opd()
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (2e-6, 0.1)
    assert (config.optimizer.adam_beta1, config.optimizer.adam_beta2) == (0.9, 0.98)
    assert (config.train.train_iters, config.train.global_batch_size) == (150, 256)
    assert (config.rollouts.temperature, config.rollouts.top_p) == (0.8, 1.0)
    assert config.rollouts.max_response_tokens == 4096
    assert config.loss.advantage_clip == 10.0
    assert config.model.student == f"{qwen3_8b.sft().run_dir}/hf"


def test_a_cluster_without_a_layout_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"no layout for 24 GPUs; there are \[8, 16, 32\]"):
        qwen3_8b.lightning_opd(24)
    assert paper.GPUS_PER_NODE == 8
