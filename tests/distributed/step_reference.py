"""The same training steps without Megatron: transformers in float64, one document at a time, torch's AdamW.

It shares with the package the order of the documents and the files of the student, nothing else: the shift
from tokens to labels, the loss (`tests.unit.loss.dense`), the division and the update are written out here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lopd_megatron.config import RunConfig
from lopd_megatron.data.order import Order
from lopd_megatron.data.writer import DatasetWriter
from lopd_megatron.lineage import Lineage
from lopd_megatron.records import MicroBatch
from tests.distributed import tiny_hf
from tests.unit.loss.dense import dense_loss

TOPK = 2
COLUMNS = [
    "tokens",
    "loss_mask",
    "teacher_logprobs",
    "rollout_logprobs",
    "teacher_topk_ids",
    "teacher_topk_logprobs",
]


@dataclass(frozen=True)
class Document:
    """Token-aligned, as on disk."""

    tokens: np.ndarray  # int64 [s]
    mask: np.ndarray  # bool [s]
    teacher: np.ndarray  # float32 [s]
    rollout: np.ndarray  # float32 [s]
    topk_ids: np.ndarray  # int64 [s, k]
    topk: np.ndarray  # float16 [s, k]


def random_documents(count: int = 36, seed: int = 5) -> list[Document]:
    """Lengths of 4 to 40, so trained tokens are spread unevenly over rows and ranks; holes in some masks."""
    rng = np.random.default_rng(seed)
    documents = []
    for index in range(count):
        length = int(rng.integers(4, 41))
        tokens = rng.integers(0, tiny_hf.VOCABULARY, length)
        logits = rng.normal(0, 2, (length, tiny_hf.VOCABULARY))
        logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        ids = np.argsort(-logits, axis=1)[:, :TOPK]
        mask = np.arange(length) >= 1 + index % 3
        if index % 4 == 0:
            mask[length // 2 : length // 2 + 2] = False
            mask[-1] = True
        teacher = logprobs[np.arange(length), tokens].astype(np.float32)
        documents.append(
            Document(
                tokens=tokens,
                mask=mask,
                teacher=teacher * mask,
                rollout=(teacher + rng.normal(0, 0.2, length)).clip(max=0).astype(np.float32) * mask,
                topk_ids=ids,
                topk=np.take_along_axis(logprobs, ids, 1).astype(np.float16),
            )
        )
    return documents


def write_dataset(prefix: Path, documents: list[Document]) -> None:
    values = {
        "tokens": np.concatenate([d.tokens for d in documents]),
        "loss_mask": np.concatenate([d.mask for d in documents]).astype(np.uint8),
        "teacher_logprobs": np.concatenate([d.teacher for d in documents]),
        "rollout_logprobs": np.concatenate([d.rollout for d in documents]),
        "teacher_topk_ids": np.concatenate([np.where(d.mask[:, None], d.topk_ids, -1) for d in documents]),
        "teacher_topk_logprobs": np.concatenate(
            [np.where(d.mask[:, None], d.topk, 0).astype(np.float16).view(np.uint16) for d in documents]
        ),
    }
    with DatasetWriter(prefix, COLUMNS, TOPK, {}) as writer:
        writer.append(
            np.array([len(d.tokens) for d in documents]), {name: v.reshape(-1) for name, v in values.items()}
        )
        writer.commit(Lineage())


def as_batch(document: Document) -> MicroBatch:
    """The document alone, label-aligned: what stood at token t + 1 comes to stand at t."""

    def shifted(column: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([column[1:], column[:1]]))[None]

    mask = shifted(document.mask).float()
    mask[0, -1] = 0
    length = len(document.tokens)
    return MicroBatch(
        tokens=torch.from_numpy(document.tokens)[None],
        labels=shifted(document.tokens),
        loss_mask=mask,
        position_ids=torch.arange(length)[None],
        teacher_logprobs=shifted(document.teacher),
        rollout_logprobs=shifted(document.rollout),
        teacher_topk_ids=shifted(document.topk_ids),
        teacher_topk_logprobs=shifted(document.topk).float(),
        sequence_index=torch.zeros(1, length, dtype=torch.int32),
        response_lengths=mask.sum().int()[None],
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        max_seqlen=length,
        document_indices=(0,),
    )


@dataclass
class Trajectory:
    steps: list[tuple[float, float]]  # loss and gradient norm of each step
    update: dict[str, torch.Tensor]  # what the steps added to each weight


def reference_trajectory(config: RunConfig, documents: list[Document], steps: int) -> Trajectory:
    """`steps` optimizer steps of transformers in float64; update by Hugging Face names."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        config.model.student,
        experts_implementation="eager",  # the grouped product has no float64
    ).double()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    settings = config.optimizer
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
    )
    order = Order(len(documents), config.train.seed)
    batch = config.train.global_batch_size
    seen = []
    for step in range(steps):
        optimizer.zero_grad()
        chosen = [as_batch(documents[i]) for i in order.take(step * batch, batch)]
        total = 0.0
        for document in chosen:
            hidden = model.model(document.tokens).last_hidden_state[0]
            numerator, _, _ = dense_loss(config.loss, hidden, model.lm_head.weight, document)
            numerator.backward()
            total += numerator.item()
        count = len(chosen)
        if config.loss.normalization == "token_mean":
            count = sum(int(document.response_lengths) for document in chosen)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= count
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_grad).item()
        optimizer.step()
        seen.append((total / count, norm))
    update = {name: value.detach() - before[name] for name, value in model.named_parameters()}
    return Trajectory(seen, update)
