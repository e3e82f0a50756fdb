"""Imported once by the fork server of `world.py`: what ranks import, or each of some two hundred would."""

# ruff: noqa: E402, F401
import gc

from lopd_megatron.parallel import prepare_megatron

prepare_megatron()

import megatron.core.dist_checkpointing.serialization
import megatron.core.dist_checkpointing.strategies.fully_parallel
import megatron.core.dist_checkpointing.strategies.torch
import megatron.core.models.gpt.gpt_layer_specs
import megatron.core.optimizer
import megatron.core.pipeline_parallel
import torch._dynamo  # by torch's optimizers, when they are built

import lopd_megatron.model.attention
import lopd_megatron.model.student
import lopd_megatron.model.weights
import lopd_megatron.train.loop
import lopd_megatron.train.setup
import tests.distributed.tiny_run

# A collection in a rank would look at all of these objects, and so copy every page shared with the server.
gc.collect()
gc.freeze()
