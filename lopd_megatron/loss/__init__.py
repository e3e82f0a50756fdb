"""The distillation loss: from the last stage's hidden states to sums and counts of one micro-batch.

objectives   what is minimised, token by token: pure functions
classes      the teacher's top-k, the sampled token and the rest as classes
fused_head   hidden states × vocabulary shard → loss and gradients in one pass; plain_head is its reference
make_objective  the entry of the table, bound to the tokens of a micro-batch
metrics      sums beside the loss, as pairs that pool by addition
nonfinite    stop before the optimizer step where a value is not finite
"""

from lopd_megatron.loss.loss import Loss
from lopd_megatron.loss.metrics import finalize_metrics
from lopd_megatron.loss.nonfinite import NonFiniteLoss
from lopd_megatron.loss.objectives import TokenLoss

__all__ = ["Loss", "NonFiniteLoss", "TokenLoss", "finalize_metrics"]
