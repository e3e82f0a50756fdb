"""Proof that two forms of a model are the same: logits on fixed tokens, tensors bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lopd_megatron.hf_folder import HfFolder
from lopd_megatron.imports import quick_imports
from lopd_megatron.model.student import StudentModel, full_logits
from lopd_megatron.parallel.topology import Topology
from lopd_megatron.records import MicroBatch


def pack_documents(documents: Sequence[torch.Tensor], topology: Topology) -> MicroBatch:
    """Token ids of documents as one packed row, padded at the end for sequence parallelism; no loss columns.

    Not for context parallelism.
    """
    assert topology.cp_size == 1
    lengths = [len(document) for document in documents]
    padding = -sum(lengths) % topology.tp_size
    if padding:
        documents = [*documents, torch.zeros(padding, dtype=torch.int64)]
        lengths = [*lengths, padding]
    bounds = [0, *itertools.accumulate(lengths)]
    device = topology.device
    return MicroBatch(
        tokens=torch.cat(list(documents)).long()[None].to(device),
        labels=None,
        loss_mask=None,
        position_ids=None,
        teacher_logprobs=None,
        rollout_logprobs=None,
        teacher_topk_ids=None,
        teacher_topk_logprobs=None,
        sequence_index=None,
        response_lengths=torch.zeros(len(lengths), dtype=torch.int32, device=device),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=device),
        max_seqlen=max(lengths),
        document_indices=(-1,) * len(lengths),
    )


def student_logits(
    chunks: Sequence[StudentModel], documents: Sequence[torch.Tensor], topology: Topology
) -> list[torch.Tensor] | None:
    """Logits [length, vocab_size], float32, of each document; None on ranks before the last pipeline stage.

    One pass over all documents packed into one row, through the real pipeline schedule, without gradients.
    Collective over the model-parallel ranks. Costs tokens · vocabulary · 4 bytes on the last stage.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    batch = pack_documents(documents, topology)
    assert batch.tokens is not None

    def forward_step(iterator: Any, chunk: StudentModel) -> Any:
        def collect(hidden: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
            return full_logits(chunk, hidden, topology)

        return chunk(next(iterator)), collect

    # The interleaved schedule wants micro-batches in multiples of the pipeline size.
    repeats = topology.pp_size if topology.virtual_size > 1 else 1
    collected = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter([batch] * repeats) for _ in chunks] if len(chunks) > 1 else iter([batch]),
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=repeats,
        seq_length=batch.tokens.shape[1],
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not topology.is_last_stage:
        return None
    logits = collected[0][: sum(map(len, documents))]
    return list(logits.split([len(document) for document in documents]))


def fixed_documents(vocab_size: int, lengths: Sequence[int] = (16, 33, 64)) -> list[torch.Tensor]:
    """The same random token ids on every machine and at every time, int64."""
    generator = torch.Generator().manual_seed(1234)
    return [torch.randint(0, vocab_size, (length,), generator=generator) for length in lengths]


def transformers_logits(folder: str | Path, documents: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What transformers computes for the same documents, float32, eager attention, on the CPU."""
    with quick_imports():
        from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    ).eval()
    with torch.no_grad():
        return [model(document[None]).logits[0] for document in documents]


def differing_tensors(first: str | Path, second: str | Path) -> list[str]:
    """Names of tensors that two Hugging Face folders do not share bit for bit; reads them one at a time."""
    a, b = HfFolder(first), HfFolder(second)
    differing = sorted(a.names() ^ b.names())
    for name in sorted(a.names() & b.names()):
        x, y = a.read(name), b.read(name)
        if x.dtype != y.dtype or not torch.equal(x, y):
            differing.append(name)
    return differing
