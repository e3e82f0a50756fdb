"""The fused head: hidden states × vocabulary shard → log-probs → gradients, chunk by chunk, in the forward.

Distillation losses are functions of a few log-probs per token, and their derivative with respect to those is
known as soon as they are (`objectives`). So each chunk of rows takes one GEMM to its logits, one small
all-gather to the softmax over all shards, one scaling in place from exponentials to the gradient of the
logits, and two GEMMs to the gradients of hidden states and weight. `[tokens, vocab]` never exists, nothing is
recomputed, and `backward` only multiplies by the upstream scalar.

Numerics. Logits are float32, those of bfloat16 weights too: rounded to bfloat16 they would move a log-prob by
up to 0.1 nats, while rollouts and teacher are scored from float32 logits. Ids whose log-probs the objective
needs are taken out of the logits before the exponential, so the probability of everything else, the tail, is
a sum of its own and never 1 − Σ: exact for a tail of 1e-30 as for a label with p = 1 − 1e-12. Row quantities
are float64, [c, J]. The gradient of the logits has the dtype of the weight.

With z the logits, p_j the probability of named id j, R the rest, p_R its mass, and weights g = ∂ℓ/∂log p:
    G       = Σ_j g_j + g_R
    ∂ℓ/∂z_v = g_R · p_v/p_R − G · p_v                     v in R
    ∂ℓ/∂z_j = −g_j · expm1(log p_j) − (G − g_j) · p_j
Cost: three GEMMs of 2·n·h·V/TP FLOPs; chunk_tokens · V/TP numbers of the weight's dtype of work memory; per
block of c rows one all-gather of [c, 2 + J] float64 over TP, and per call one all-gather and one
reduce-scatter of the hidden states under sequence parallelism, else one all-reduce of their gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lopd_megatron.loss.objectives import TokenLoss
from lopd_megatron.parallel.vocab import VocabRange

Objective = Callable[[torch.Tensor, slice], TokenLoss]
"""(log-probs [c, J + 1] of J named ids and the rest, which of the n rows) → loss [c], weights [c, J + 1]."""


@dataclass(frozen=True)
class HeadRows:
    """The rows a head works on and what it has to find for them; n rows of a micro-batch of t tokens."""

    rows: torch.Tensor  # int64 [n], positions of the trained tokens
    ids: torch.Tensor  # int64 [n, J], ids whose log-probs the objective takes; column 0 is the label
    token_weights: torch.Tensor  # float64 [n], weight of each token's loss in the numerator
    objective: Objective


class TokenValues(NamedTuple):
    """Per trained token, float64 [n], without a graph."""

    loss: torch.Tensor
    student_logprobs: torch.Tensor
    entropy: torch.Tensor  # of the student over the whole vocabulary, nats


def fused_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    rows: HeadRows,
    *,
    vocab: VocabRange,
    sequence_parallel: bool,
    chunk_tokens: int,
) -> tuple[torch.Tensor, TokenValues]:
    """Σ token_weight · loss as a float32 scalar with a graph to `hidden` and `weight`, and per-token values.

    `hidden` [t, h] ([t/TP, h] under sequence parallelism), `weight` [V/TP, h], both float32 or bfloat16.
    Collective over `vocab.group`, whose ranks must pass the same rows. Where `weight` has Megatron's
    `main_grad`, its gradient is added there in float32 by `backward`, unrounded.
    """
    want_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    settings = _Settings(rows, vocab, sequence_parallel, chunk_tokens, want_gradient)
    numerator, *values = _FusedHead.apply(hidden, weight, settings)
    return numerator, TokenValues(*values)


@dataclass(frozen=True)
class _Settings:
    rows: HeadRows
    vocab: VocabRange
    sequence_parallel: bool
    chunk_tokens: int
    want_gradient: bool


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, settings: _Settings) -> Any:
        group = settings.vocab.group if settings.vocab.group_size > 1 else None
        whole = _all_gather(hidden, group) if settings.sequence_parallel and group else hidden
        work = _Pass(whole, weight, settings)
        loss, student_logprobs, entropy = work.run()
        d_hidden = work.d_hidden
        if d_hidden is not None and group:
            if settings.sequence_parallel:
                d_hidden = _reduce_scatter(d_hidden, group)
            else:
                dist.all_reduce(d_hidden, group=group)
        ctx.gradients = d_hidden, work.d_weight
        ctx.weight = weight
        ctx.mark_non_differentiable(loss, student_logprobs, entropy)
        numerator = (loss * settings.rows.token_weights).sum().float()
        return numerator, loss, student_logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        scale = upstream[0]
        d_hidden, d_weight = ctx.gradients
        ctx.gradients = None  # the buffers are scaled in place, so a second backward must not find them
        if d_weight is not None:
            d_weight = _deliver(ctx.weight, _scale_(d_weight, scale))
        return _scale_(d_hidden, scale), d_weight, None


class _Pass:
    """The chunks of one call, and the buffers that they share or fill."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, settings: _Settings) -> None:
        self._hidden, self._weight, self._settings = hidden, weight, settings
        self._count = settings.rows.rows.numel()
        in_place = weight.dtype == torch.float32
        limit = settings.chunk_tokens if in_place else math.ceil(_ROUNDED_ROWS * settings.chunk_tokens)
        # Chunks of equal size: a thin last one would read the whole weight for a few rows.
        chunks = max(1, math.ceil(self._count / limit))
        self._size = max(1, math.ceil(self._count / chunks))
        self._block = self._size if in_place else _block_rows(self._size)
        self._logits = weight.new_empty(self._block, weight.size(0), dtype=torch.float32)
        kept = self._size if settings.want_gradient else 0
        self._gradient = self._logits if in_place else weight.new_empty(kept, weight.size(0))
        self.d_hidden: torch.Tensor | None = None
        self.d_weight: torch.Tensor | None = None
        if settings.want_gradient:
            self.d_hidden = torch.zeros_like(hidden)
            if weight.requires_grad:
                self.d_weight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)

    def run(self) -> torch.Tensor:
        """All chunks: `TokenValues` as float64 [3, n]."""
        values = torch.empty(3, self._count, dtype=torch.float64, device=self._hidden.device)
        for part in _slices(0, self._count, self._size):
            where = self._settings.rows.rows[part]
            hidden = self._hidden[where]
            for block in _slices(part.start, part.stop, self._block):
                inside = slice(block.start - part.start, block.stop - part.start)
                values[:, block] = self._logit_gradients(block, hidden[inside], self._gradient[inside])
            if self.d_hidden is None:
                continue
            gradient = self._gradient[: part.stop - part.start]
            if self.d_weight is not None:
                _add_product_(self.d_weight, gradient, hidden, keep=part.start > 0)
            # The copy of the rows has done its work and takes their gradient.
            self.d_hidden[where] = torch.mm(gradient, self._weight, out=hidden)
        if self.d_weight is not None and not self._count:
            self.d_weight.zero_()
        return values

    def _logit_gradients(self, part: slice, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """`TokenValues` of c rows as float64 [3, c]; leaves the gradient of their logits in `out`."""
        rows, vocab = self._settings.rows, self._settings.vocab
        logits = _logits_(hidden, self._weight, self._logits[: part.stop - part.start])
        logits[:, vocab.num_real :] = -torch.inf
        column, owned = _columns(rows.ids[part], vocab)
        named = _take_out_(logits, column, owned)
        row_max, sum_exp, weighted_sum = _exponentiate_(logits)
        softmax = _reduce(row_max, sum_exp, weighted_sum, named, vocab)
        loss, weights = rows.objective(softmax.class_logprobs, part)
        if self.d_hidden is not None:
            weights = weights * rows.token_weights[part, None]
            named_gradient, tail_scale = _logit_gradient(softmax, weights, row_max, sum_exp)
            torch.mul(logits, tail_scale.float()[:, None], out=out)
            out.scatter_add_(1, column, (named_gradient * owned).to(out.dtype))
        return torch.stack([loss, softmax.class_logprobs[:, 0], softmax.entropy])


_ROUNDED_ROWS = 0.8
"""Rows of a chunk per `chunk_tokens` where the gradient is bfloat16. With the float32 logits of an eighth of
them, 0.8 · (2 + 4/8) bytes, the work memory is that of chunk_tokens rows of bfloat16."""


def _block_rows(size: int) -> int:
    """Rows of a chunk of `size` whose float32 logits exist at a time; a multiple of 64 suits a GEMM."""
    rows = max(1, size // 8)
    return rows - rows % 64 if rows > 64 else rows


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def _logits_(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out ← hidden · weightᵀ in float32, [c, V/TP]."""
    if out.is_cuda and weight.dtype != torch.float32:
        return torch.ops.aten.mm.dtype_out(hidden, weight.t(), torch.float32, out=out)
    if out.is_cuda:
        return torch.mm(hidden, weight.t(), out=out)
    hidden = hidden.float()  # the CPU has no bfloat16 product with a float32 result
    for columns, rows in zip(out.split(_COLUMNS, dim=1), weight.split(_COLUMNS), strict=True):
        torch.mm(hidden, rows.float().t(), out=columns)
    return out


_COLUMNS = 1024
"""Logits per row that a CPU computes in one product: 128 rows times a whole vocabulary in one call took a
quarter longer (MKL, h 512)."""


def _columns(ids: torch.Tensor, vocab: VocabRange) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each id in this shard [c, J] and whether it is there; a foreign id gets column 0."""
    column = ids - vocab.vocab_start_index
    owned = (column >= 0) & (column < vocab.num_real)
    return column.where(owned, 0), owned


def _take_out_(logits: torch.Tensor, column: torch.Tensor, owned: torch.Tensor) -> torch.Tensor:
    """Logits of the owned ids, float64 [c, J], −∞ for foreign ones; leaves −∞ in their place."""
    minus_infinity = torch.full((), -torch.inf, dtype=logits.dtype, device=logits.device)
    named = logits.gather(1, column).where(owned, minus_infinity).double()
    # Added, not assigned: a foreign id points at column 0 and must leave what is there.
    logits.scatter_add_(1, column, minus_infinity.where(owned, 0.0).to(logits.dtype))
    return named


def _exponentiate_(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z ← exp(z − row_max) in place. Returns float64 [c]: row_max = max z, sum_exp = Σ exp(z − row_max),
    weighted_sum = Σ exp(z − row_max) · (z − row_max)."""
    if logits.is_cuda:
        sums = _compiled_exponentiate()(logits)
    else:
        rows = max(1, _CACHED_ELEMENTS // logits.size(1))
        sums = torch.cat([_exponentiate_rows_(block) for block in logits.split(rows)], dim=1)
    row_max, sum_exp, weighted_sum = sums.double()
    return row_max, sum_exp, weighted_sum


_CACHED_ELEMENTS = 1 << 18
"""float32 values of the rows that a CPU core exponentiates in one go: 1 MiB stays in its caches, and
single rows of a large vocabulary would mean many more calls."""


def _exponentiate_rows_(logits: torch.Tensor) -> torch.Tensor:
    """`_exponentiate_` of some rows with temporaries of their size; float32 [3, rows]."""
    lowest = torch.finfo(torch.float32).min
    # Clamped, because a shard of nothing but −∞ must give exponentials of 0, and 0 · −∞ a sum of 0.
    row_max = logits.amax(1, keepdim=True).clamp(min=lowest)
    shifted = (logits - row_max).clamp_(min=lowest)
    exponentials = torch.exp(shifted, out=logits)
    return torch.stack([row_max.squeeze(1), exponentials.sum(1), shifted.mul_(exponentials).sum(1)])


@functools.cache
def _compiled_exponentiate() -> Callable[[torch.Tensor], torch.Tensor]:
    """The same as fused kernels: two reads and one write of the logits instead of a dozen."""
    return torch.compile(_exponentiate_rows_, dynamic=True)


class _Softmax(NamedTuple):
    class_logprobs: torch.Tensor  # [c, J + 1], named ids and the tail
    lse: torch.Tensor  # [c], log Σ exp over the vocabulary
    tail_lse: torch.Tensor  # [c], the same without the named ids
    entropy: torch.Tensor  # [c]


def _reduce(
    row_max: torch.Tensor,
    sum_exp: torch.Tensor,
    weighted_sum: torch.Tensor,
    named: torch.Tensor,
    vocab: VocabRange,
) -> _Softmax:
    """The softmax over all shards from each one's sums. One all-gather of [c, 2 + J] float64."""
    local_lse = sum_exp.log() + row_max
    mean_logit = torch.where(sum_exp > 0, weighted_sum / sum_exp + row_max, 0.0)  # of this shard's tail
    sums = torch.cat([local_lse[:, None], mean_logit[:, None], named], dim=1)
    shards = sums[None] if vocab.group_size == 1 else _all_gather(sums[None], vocab.group)
    tail_lse = shards[..., 0].logsumexp(0)
    named = shards[..., 2:].amax(0)
    classes = torch.cat([named, tail_lse[:, None]], dim=1)
    lse = classes.logsumexp(1)
    class_logprobs = classes - lse[:, None]
    shard_probability = (shards[..., 0] - lse).exp()
    mean = (shard_probability * shards[..., 1]).sum(0)
    mean += torch.where(named > -torch.inf, class_logprobs[:, :-1].exp() * named, 0.0).sum(1)
    return _Softmax(class_logprobs, lse, tail_lse, lse - mean)


def _logit_gradient(
    softmax: _Softmax, weights: torch.Tensor, row_max: torch.Tensor, sum_exp: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of the named logits [c, J], and the factor [c] from exp(z − row_max) to the tail's."""
    total = weights.sum(1)
    g, logprobs = weights[:, :-1], softmax.class_logprobs[:, :-1]
    # The total without g_j is summed directly: for one id it is the tail's weight, often exactly 0.
    others = weights @ (1.0 - torch.eye(weights.size(1), dtype=weights.dtype, device=weights.device))
    named_gradient = -g * logprobs.expm1() - others[:, :-1] * logprobs.exp()
    tail_scale = weights[:, -1] * (row_max - softmax.tail_lse).exp() - total * (row_max - softmax.lse).exp()
    return named_gradient, torch.where(sum_exp > 0, tail_scale, 0.0)


def _add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, keep: bool) -> None:
    """total ← keep · total + leftᵀ · right in float32, [v, h]."""
    beta = float(keep)
    if left.dtype == torch.float32:
        torch.addmm(total, left.t(), right, beta=beta, out=total)
    elif left.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, left.t(), right, torch.float32, beta=beta, out=total)
    else:  # the CPU has no bfloat16 product with a float32 result
        torch.addmm(total, left.t().float(), right.float(), beta=beta, out=total)


def _scale_(gradient: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """gradient · scale in place. It is nearly always 1, and on a CPU looking is cheaper than a pass."""
    return gradient if scale.is_cpu and scale == 1 else gradient.mul_(scale)


def _deliver(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Hand `gradient` (float32) to Megatron's main gradient, or return it for autograd where there is none.

    Same contract as Megatron's fused weight gradient (tensor_parallel/layers.py): the sum goes to
    `main_grad`, the flag tells the hook of DistributedDataParallel to leave `.grad` out, and a tensor of the
    right shape is returned so that the hook fires. For an embedding tied on one stage (`zero_out_wgrad`) the
    hook does add `.grad`, which also holds the gradient of the lookup, so that tensor is zero.
    """
    if getattr(weight, "main_grad", None) is None:
        return gradient.to(weight.dtype)
    weight.main_grad.add_(gradient)
    weight.grad_added_to_main_grad = True
    if getattr(weight, "zero_out_wgrad", False):
        return torch.zeros_like(weight)
    return torch.empty_like(weight)


def _all_gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Concatenation over the group along dimension 0."""
    whole = tensor.new_empty((tensor.size(0) * group.size(), *tensor.shape[1:]))
    dist.all_gather_into_tensor(whole, tensor.contiguous(), group=group)
    return whole


def _reduce_scatter(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's part along dimension 0 of the sum over the group."""
    part = tensor.new_empty((tensor.size(0) // group.size(), *tensor.shape[1:]))
    dist.reduce_scatter_tensor(part, tensor, group=group)
    return part
