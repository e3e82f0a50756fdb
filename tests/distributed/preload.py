"""Imported once by the fork server of `world.py`: everything slow to import that a rank needs."""

from lopd_megatron.parallel import prepare_megatron

prepare_megatron()

import megatron.core.dist_checkpointing.serialization  # noqa: E402
import megatron.core.models.gpt.gpt_layer_specs  # noqa: E402
import megatron.core.optimizer  # noqa: E402
import megatron.core.pipeline_parallel  # noqa: E402, F401
