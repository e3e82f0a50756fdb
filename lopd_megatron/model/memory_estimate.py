"""Memory of one rank, predicted from the shapes: what must fit before a job is worth starting.

    weights      parameters in their dtype
    gradients    Megatron's gradient buffer, float32 (bfloat16 with the precision-aware optimizer)
    optimizer    float32 main parameters and Adam's two moments, sharded over data-parallel ranks
    activations  what autograd keeps of every micro-batch in flight
    recompute    working set of the backward of one layer, which recomputation fills first
    head         the fused head's gradient buffers and one chunk of logits, on the last stage
`head` and `recompute` are never alive together: the larger counts.

Bytes are those of the tensors; an allocator, CUDA and NCCL take more (`OVERHEAD_BYTES`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lopd_megatron.config import RunConfig
from lopd_megatron.model.student_spec import StudentSpec

OVERHEAD_BYTES = 3 * 1024**3
"""CUDA context, NCCL buffers and fragmentation; an allowance, not a measurement."""

HEAD_BYTES_PER_LOGIT = 4.5
"""Temporaries of the fused head beside the logits themselves (float32 differences); measured."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank, by part."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    recompute: float
    head: float

    @property
    def total(self) -> float:
        fixed = self.weights + self.gradients + self.optimizer
        return fixed + self.activations + max(self.recompute, self.head)


@dataclass(frozen=True)
class RankParameters:
    """Parameter elements that a rank of one pipeline stage holds."""

    dense: int  # replicated over data- and context-parallel ranks
    expert: int  # replicated over expert-data-parallel ranks

    @property
    def total(self) -> int:
        return self.dense + self.expert


def rank_parameters(spec: StudentSpec, pp_rank: int) -> RankParameters:
    """Elements of all chunks of pipeline rank `pp_rank`; exact, equal for all its ranks."""
    config = spec.transformer_config
    tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    h = config.hidden_size
    query, kv = _attention_sizes(spec)
    attention = (query + 2 * kv) * (h + config.add_qkv_bias) // tp + query * h // tp
    norms = 2 * h + (2 * config.kv_channels if config.qk_layernorm else 0)
    dense = expert = 0
    for layer in stage_layers(spec, pp_rank):
        dense += attention + norms
        if spec.moe_layers[layer]:
            dense += h * spec.num_experts
            shard = config.expert_model_parallel_size * config.expert_tensor_parallel_size
            expert += spec.num_experts * 3 * h * config.moe_ffn_hidden_size // shard
        else:
            dense += 3 * h * config.ffn_hidden_size // tp
    vocabulary = spec.padded_vocab_size // tp * h
    first, last = pp_rank == 0, pp_rank == pp - 1
    dense += vocabulary * first
    dense += (vocabulary + h) * last if not (first and last and spec.tied_embeddings) else h
    return RankParameters(dense, expert)


def stage_layers(spec: StudentSpec, pp_rank: int) -> list[int]:
    """Numbers of the layers on pipeline rank `pp_rank`, over its virtual stages."""
    config = spec.transformer_config
    pp = config.pipeline_model_parallel_size
    virtual = config.virtual_pipeline_model_parallel_size or 1
    per_chunk = spec.num_layers // (pp * virtual)
    return [
        (chunk * pp + pp_rank) * per_chunk + layer for chunk in range(virtual) for layer in range(per_chunk)
    ]


def estimate_memory(spec: StudentSpec, config: RunConfig, world_size: int) -> MemoryEstimate:
    """The largest estimate over pipeline stages, for packed rows of `data.seq_length` tokens."""
    stages = range(config.parallel.pipeline_model_parallel_size)
    return max(
        (estimate_stage(spec, config, world_size, stage) for stage in stages), key=lambda stage: stage.total
    )


def estimate_stage(spec: StudentSpec, config: RunConfig, world_size: int, pp_rank: int) -> MemoryEstimate:
    """One pipeline stage."""
    parameters = rank_parameters(spec, pp_rank)
    element = spec.transformer_config.params_dtype.itemsize
    optimizer = config.optimizer
    aware = optimizer.use_precision_aware_optimizer
    state = 12 if element == 2 else 8  # float32 training updates the parameters themselves
    state = 8 if aware else state
    dense_replicas, expert_replicas = _replicas(config, world_size)
    if not optimizer.use_distributed_optimizer:
        dense_replicas = expert_replicas = 1
    activations, recompute = _activations(spec, config, world_size, pp_rank)
    return MemoryEstimate(
        weights=parameters.total * element,
        gradients=parameters.total * (2 if aware else 4),
        optimizer=state * (parameters.dense / dense_replicas + parameters.expert / expert_replicas),
        activations=activations,
        recompute=recompute,
        head=_head(spec, config) if pp_rank == config.parallel.pipeline_model_parallel_size - 1 else 0,
    )


def rank_tokens(config: RunConfig) -> int:
    """Tokens of one micro-batch on one rank."""
    row = config.train.micro_batch_size * config.data.seq_length
    return row // config.parallel.context_parallel_size


def _attention_sizes(spec: StudentSpec) -> tuple[int, int]:
    config = spec.transformer_config
    return (
        config.num_attention_heads * config.kv_channels,
        config.num_query_groups * config.kv_channels,
    )


def _replicas(config: RunConfig, world_size: int) -> tuple[int, int]:
    """Ranks that share one shard of dense parameters, and of expert parameters."""
    parallel = config.parallel
    dense = world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    expert = world_size // (
        parallel.expert_tensor_parallel_size
        * parallel.expert_model_parallel_size
        * parallel.pipeline_model_parallel_size
    )
    return dense, expert


def layer_activations(spec: StudentSpec, tokens: int, *, moe: bool, modules: frozenset[str]) -> float:
    """Bytes that autograd keeps of one layer and micro-batch; `modules` are recomputed selectively.

    Counted from the layer as it runs, in elements per token: inputs of the linear layers (this rank's part
    under sequence parallelism); the query-key-value projection, of which the values are a view; queries and
    keys after the rotation; the attention output; inputs of the norms; the MLP. On a CPU (`sdpa`) norms run
    by parts and keep two float32 tensors, and attention keeps the output of each document beside the whole.
    """
    config = spec.transformer_config
    tp, element = config.tensor_model_parallel_size, config.params_dtype.itemsize
    by_parts = spec.attention == "sdpa"
    query, kv = (size / tp for size in _attention_sizes(spec))
    hidden = config.hidden_size / (tp if config.sequence_parallel else 1)
    recomputed_norms = "layernorm" in modules

    width = 0.0 if recomputed_norms else 2 * hidden  # outputs of the norms
    width += 3 * query + 3 * kv  # projection, rotated queries and keys, attention output
    width += 4 * config.kv_channels  # cosine and sine, for queries and for keys
    if by_parts and "core_attn" not in modules:
        width += query
    if moe:
        width += 0 if "moe" in modules else _moe_width(spec)
    elif "mlp" not in modules:
        width += 3 * config.ffn_hidden_size / tp  # gate, up and the product
    norms = 2 * hidden * (element if recomputed_norms else _norm_bytes(spec))
    if config.qk_layernorm:
        norms += (8 * query + (4 if element == 4 else 8) * kv) if by_parts else query * element
    softmax = 0 if "core_attn" in modules else 4 * config.num_attention_heads / tp
    return tokens * (width * element + norms + softmax)


def _norm_bytes(spec: StudentSpec) -> int:
    """What a norm keeps per element: its input, or two float32 tensors where it runs by parts."""
    return 8 if spec.attention == "sdpa" else spec.transformer_config.params_dtype.itemsize


def _moe_width(spec: StudentSpec) -> float:
    """Elements per token of a mixture layer under balanced routing: each token's copies and their MLPs."""
    config = spec.transformer_config
    tp = config.tensor_model_parallel_size if config.sequence_parallel else 1
    etp = config.expert_tensor_parallel_size
    copies = config.moe_router_topk * etp / tp
    return copies * (config.hidden_size + 3 * config.moe_ffn_hidden_size / etp)


def _activations(spec: StudentSpec, config: RunConfig, world_size: int, pp_rank: int) -> tuple[float, float]:
    """(kept for all micro-batches in flight, working set of the layers being recomputed)."""
    train, tokens = config.train, rank_tokens(config)
    modules = frozenset(train.recompute_modules if train.recompute_granularity == "selective" else ())
    kept = {moe: layer_activations(spec, tokens, moe=moe, modules=modules) for moe in set(spec.moe_layers)}
    layers = stage_layers(spec, pp_rank)
    transformer = spec.transformer_config
    tp, element = transformer.tensor_model_parallel_size, transformer.params_dtype.itemsize
    hidden = transformer.hidden_size / (tp if config.parallel.sequence_parallel else 1)
    boundary = tokens * hidden * element
    gradients = tokens * element * (hidden + transformer.ffn_hidden_size / tp)
    if train.recompute_granularity == "full":
        groups = math.ceil(len(layers) / train.recompute_num_layers)
        per_microbatch = groups * boundary
        working = train.recompute_num_layers * max(kept.values()) + gradients
    else:
        per_microbatch = sum(kept[spec.moe_layers[layer]] for layer in layers)
        working = gradients
    per_microbatch += boundary  # what the stage hands on, or what the final norm returns
    if pp_rank == transformer.pipeline_model_parallel_size - 1:
        per_microbatch += boundary / element * _norm_bytes(spec)
    return _in_flight(spec, config, world_size, pp_rank) * per_microbatch, working


def _in_flight(spec: StudentSpec, config: RunConfig, world_size: int, pp_rank: int) -> float:
    """Micro-batches whose activations a stage holds at the peak of 1F1B, in units of the whole stage."""
    parallel = config.parallel
    pp, virtual = (
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size or 1,
    )
    dp = parallel.data_parallel_size(world_size)
    microbatches = max(1, config.train.global_batch_size // (dp * config.train.micro_batch_size))
    if virtual == 1:
        return min(pp - pp_rank, microbatches)
    chunks = 2 * (pp - pp_rank - 1) + (virtual - 1) * pp + 1
    return min(chunks, microbatches * virtual) / virtual


def _head(spec: StudentSpec, config: RunConfig) -> float:
    transformer = spec.transformer_config
    tp, element = transformer.tensor_model_parallel_size, transformer.params_dtype.itemsize
    rows = spec.padded_vocab_size / tp
    tokens = rank_tokens(config)
    chunk = min(config.loss.head_chunk_tokens, tokens)
    weight_gradient = rows * transformer.hidden_size * 4
    hidden_gradient = tokens * transformer.hidden_size * element
    return weight_gradient + hidden_gradient + chunk * rows * (element + HEAD_BYTES_PER_LOGIT)
