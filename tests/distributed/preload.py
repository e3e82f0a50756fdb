"""Imported once by the fork server of `world.py`: what ranks import, or each of some two hundred would."""

# ruff: noqa: F401
from lopd_megatron.parallel import prepare_megatron
from tests.helpers.imports import quick_imports

prepare_megatron()

with quick_imports():  # or a collection in a rank would copy every page that it shares with the server
    import megatron.core.dist_checkpointing.serialization
    import megatron.core.dist_checkpointing.strategies.fully_parallel
    import megatron.core.dist_checkpointing.strategies.torch
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel
    import torch._dynamo  # by torch's optimizers, when they are built
    import transformers.models.qwen3.modeling_qwen3

    import lopd_megatron.model.attention
    import lopd_megatron.model.student
    import lopd_megatron.model.weights
    import lopd_megatron.train.loop
    import lopd_megatron.train.setup
    import tests.distributed.tiny_run
