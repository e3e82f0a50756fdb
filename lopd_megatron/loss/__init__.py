"""The distillation loss: from the last stage's hidden states to sums and counts of one micro-batch.

objectives   what is minimised, token by token: pure functions
classes      the teacher's top-k, the sampled token and the rest as classes
fused_head   hidden states × vocabulary shard → loss and gradients in one pass; plain_head is its reference
metrics      sums beside the loss, as pairs that pool by addition
nonfinite    stop before the optimizer step where a value is not finite
"""

from lopd_megatron.loss.loss import Loss, build_loss
from lopd_megatron.loss.metrics import finalize_metrics
from lopd_megatron.loss.nonfinite import NonFiniteLoss

__all__ = ["Loss", "NonFiniteLoss", "build_loss", "finalize_metrics"]
