"""The student: Megatron-Core's GPTModel on packed documents, ending in hidden states.

The loss head multiplies hidden states with the output weight itself, so that the [tokens, vocabulary] matrix
never exists; `full_logits` makes it for verification.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

from lopd_megatron.model.specs import block_spec
from lopd_megatron.model.student_spec import StudentSpec
from lopd_megatron.parallel.topology import Topology
from lopd_megatron.records import MicroBatch


class StudentModel(GPTModel):
    """One model chunk: the layers of one (virtual) pipeline stage, with the embedding or the final norm."""

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Run this chunk.

        The first chunk reads `batch.tokens`; every chunk reads `batch.cu_seqlens` and `max_seqlen`.
        Returns hidden states [t, 1, h] in the parameter dtype, after the final norm on the last chunk;
        under sequence parallelism [t / TP, 1, h], under context parallelism t is this rank's part.
        """
        return super().forward(
            input_ids=batch.tokens if self.pre_process else None,
            position_ids=None,  # rotary positions follow cu_seqlens
            attention_mask=None,
            packed_seq_params=packed_seq_params(batch, self.config.context_parallel_size),
        )

    real_vocab_size: int
    """Ids that mean a token; the head masks the padded ones from here on."""

    def _postprocess(self, hidden_states: torch.Tensor, **unused: Any) -> torch.Tensor:
        return hidden_states

    @property
    def head_weight(self) -> torch.Tensor:
        """This rank's rows of the output matrix, [padded vocabulary / TP, h]; the embedding where tied.

        Only on a chunk with `post_process`. Rows that stand for ids ≥ vocab_size are padding.
        """
        assert self.post_process, "only the last pipeline stage has an output matrix"
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def packed_seq_params(batch: MicroBatch, context_parallel_size: int) -> PackedSeqParams:
    """Megatron-Core's description of a packed row."""
    cu_seqlens = batch.cu_seqlens
    # Transformer Engine wants the padded bounds under context parallelism, and elsewhere compares them on the
    # host. Documents are padded inside, so both are the same.
    padded = cu_seqlens if context_parallel_size > 1 else None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )


def build_student(spec: StudentSpec, topology: Topology) -> list[StudentModel]:
    """The model chunks of this rank, one per virtual stage, on its device and in its dtype.

    Parameters are uninitialised: `weights.load_hf` or a checkpoint sets them. Collective where the
    embeddings are tied and PP > 1.
    """
    config = spec.transformer_config
    chunks = []
    for stage in range(topology.virtual_size):
        vp_stage = stage if topology.virtual_size > 1 else None
        chunk = StudentModel(
            config=config,
            transformer_layer_spec=block_spec(spec, pp_rank=topology.pp_rank, vp_stage=vp_stage),
            vocab_size=spec.padded_vocab_size,
            max_sequence_length=spec.max_position_embeddings,
            pre_process=topology.is_first_stage and stage == 0,
            post_process=topology.is_last_stage and stage == topology.virtual_size - 1,
            share_embeddings_and_output_weights=spec.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=spec.rotary_base,
            rotary_percent=spec.rotary_percent,
            rope_scaling=spec.rope_scaling,
            rope_scaling_factor=spec.rope_scaling_factor,
            vp_stage=vp_stage,
        )
        chunk.real_vocab_size = spec.vocab_size
        _mark_tensor_parallel(chunk)
        # Norms are created in float32 whatever params_dtype says.
        chunks.append(chunk.to(dtype=config.params_dtype, device=topology.device))
    return chunks


def _mark_tensor_parallel(chunk: torch.nn.Module) -> None:
    """Mark the weights that are cut over tensor-parallel ranks.

    Megatron-Core marks them while it initialises them, which is switched off. Without the mark a weight
    counts as a copy of rank 0's: the gradient norm misses the other parts (27 % at TP2) and clips too little.
    """
    cut = ((ColumnParallelLinear, 0), (VocabParallelEmbedding, 0), (RowParallelLinear, 1))
    for module in chunk.modules():
        for kind, dim in cut:
            weight = module.weight if isinstance(module, kind) else None
            if weight is not None and not hasattr(weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(weight, True, dim, 1)


def full_logits(model: StudentModel, hidden: torch.Tensor, topology: Topology) -> torch.Tensor:
    """hidden of the last chunk → logits [t, vocabulary] in float32, whole on every tensor-parallel rank.

    For verification: no gradient, and it costs t · vocabulary · 4 bytes. One or two all-gathers over TP.
    """
    with torch.no_grad():
        if model.config.sequence_parallel:
            hidden = _gather(hidden, topology.tp_group, dim=0)
        local = hidden.squeeze(1).float() @ model.head_weight.float().T
        return _gather(local, topology.tp_group, dim=1)[:, : model.real_vocab_size]


def _gather(part: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim)
