"""The sides of `bench_peers.py`: one tiny student, one dataset, four ways to distil into it on a CPU.

A side is a function from the folder of `write_task` to a pass: a function that trains once over the
dataset, in the same steps of `BATCH` sequences at every call, and returns the loss of every step.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lopd_megatron.config import RunConfig
from lopd_megatron.data.order import Order
from lopd_megatron.data.store import open_dataset
from lopd_megatron.data.writer import DatasetWriter
from lopd_megatron.lineage import Lineage

Pass = Callable[[], list[float]]

DOCUMENTS, BATCH, LONGEST, SEED = 16, 4, 512, 1234
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPSILON, CLIP = 1e-4, 0.1, (0.9, 0.98), 1e-8, 1.0
ADVANTAGE_CLIP = 10.0
HEAD_CHUNK_TOKENS = 256
COLUMNS = ["tokens", "loss_mask", "teacher_logprobs", "rollout_logprobs"]
MODEL: dict[str, Any] = {
    "vocab_size": 32_768,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "attention_dropout": 0.0,
}


def mixed_lengths() -> np.ndarray:
    """int64 [DOCUMENTS]: lognormal with σ = 0.8 like short answers, about 200 tokens a document."""
    drawn = np.random.default_rng(SEED).lognormal(np.log(160), 0.8, DOCUMENTS)
    return drawn.clip(24, LONGEST).astype(np.int64)


def equal_lengths() -> np.ndarray:
    """int64 [DOCUMENTS]: nothing to pad, the best case of a padded batch."""
    return np.full(DOCUMENTS, round(mixed_lengths().mean()))


def padding_share(lengths: np.ndarray) -> float:
    """Of the tokens of batches of `BATCH` sequences, each as long as its longest."""
    batches = lengths[order()].reshape(-1, BATCH)
    return float(1 - lengths.sum() / (batches.max(1) * BATCH).sum())


def write_task(folder: Path, lengths: np.ndarray) -> None:
    """`folder/student`, `folder/teacher` and `folder/train`: random rollouts that both models have scored."""
    from lopd_megatron.recipes import tiny_task

    student, teacher = (_save_model(folder / name, seed) for seed, name in enumerate(("student", "teacher")))
    tiny_task.save_tokenizer(folder / "student")
    with torch.no_grad():
        for parameter in teacher.parameters():  # a teacher of many opinions: the loss is far from zero
            parameter.mul_(1.0 if parameter.dim() == 1 else 4.0)
    rng = np.random.default_rng(SEED)
    with DatasetWriter(folder / "train", COLUMNS, 0, {"seed": SEED}) as writer:
        for length in lengths.tolist():
            tokens = rng.integers(0, MODEL["vocab_size"], length)
            mask = np.arange(length) >= max(4, round(0.15 * length))
            scores = {
                name: _score(model, tokens) * mask
                for name, model in (("teacher_logprobs", teacher), ("rollout_logprobs", student))
            }
            values = {"tokens": tokens, "loss_mask": mask.astype(np.uint8), **scores}
            writer.append(np.array([length]), values)
        writer.commit(Lineage())


def _save_model(folder: Path, seed: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    _quiet_transformers()
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**MODEL)).float().eval()
    model.save_pretrained(folder)
    return model


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@torch.no_grad()
def _score(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Token-aligned float32 log-probs; 0 for the first token, which nothing predicts."""
    ids = torch.from_numpy(tokens)
    logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1)
    return F.pad(logprobs.gather(1, ids[1:, None])[:, 0], (1, 0)).numpy()


def order() -> np.ndarray:
    """int64 [DOCUMENTS]: the documents in the order in which our trainer takes them."""
    return Order(DOCUMENTS, SEED).take(0, DOCUMENTS)


def ours(folder: Path, head: Callable[..., Any] | None = None) -> Pass:
    """The trainer of every recipe: Megatron's model, packed rows, distributed optimizer, fused head."""
    from lopd_megatron.train.setup import build_trainer
    from lopd_megatron.train.step import train_step

    config = RunConfig()
    config.model.student = str(folder / "student")
    config.data.prefixes = [str(folder / "train")]
    config.data.seq_length = BATCH * LONGEST
    config.train.precision = "fp32"
    config.train.global_batch_size = BATCH
    config.train.seed = SEED
    config.loss.advantage_clip = ADVANTAGE_CLIP
    config.loss.head_chunk_tokens = HEAD_CHUNK_TOKENS
    config.optimizer.lr, config.optimizer.weight_decay = LEARNING_RATE, WEIGHT_DECAY
    config.optimizer.adam_beta1, config.optimizer.adam_beta2 = BETAS
    config.optimizer.adam_eps, config.optimizer.clip_grad = EPSILON, CLIP
    trainer = build_trainer(config)
    if head is not None:
        trainer.loss._head = head  # type: ignore[method-assign]

    def run() -> list[float]:
        losses = []
        for consumed in range(0, DOCUMENTS, BATCH):
            loss = train_step(trainer, trainer.batches.step(consumed)).metric_sums["loss"]
            losses.append(float(loss[0] / loss[1]))
        return losses

    return run


def plain_head(folder: Path) -> Pass:
    """Our trainer with whole logits and Megatron's cross-entropy, without the entropy that ours reports."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from lopd_megatron.loss.fused_head import TokenValues

    def head(hidden: torch.Tensor, weight: torch.Tensor, rows: Any) -> tuple[torch.Tensor, TokenValues]:
        logits = F.linear(hidden.view(-1, hidden.size(-1))[rows.rows], weight)
        student = -vocab_parallel_cross_entropy(logits, rows.ids[:, 0])
        named = student.detach().double()
        classes = torch.stack([named, torch.log1p(-named.exp())], dim=1)
        loss, weights = rows.objective(classes, slice(None))
        numerator = (weights[:, 0].float() * student * rows.token_weights.float()).sum()
        return numerator, TokenValues(loss, named, torch.zeros_like(named))

    return ours(folder, head)


def hf_loop(folder: Path) -> Pass:
    """What one would write by hand: padded batches, log_softmax over the vocabulary, gather."""
    from transformers import AutoModelForCausalLM

    _quiet_transformers()
    model = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32).train()
    optimizer = _adam(model)
    documents = open_dataset([folder / "train"])

    def run() -> list[float]:
        losses = []
        for indices in order().reshape(-1, BATCH):
            batch = pad([documents.document(index) for index in indices.tolist()])
            optimizer.zero_grad()
            logits = model(
                input_ids=batch["tokens"], attention_mask=batch["attention_mask"], use_cache=False
            ).logits[:, :-1]
            labels, mask = batch["tokens"][:, 1:], batch["loss_mask"][:, 1:]
            student = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
            advantages = batch["teacher_logprobs"][:, 1:] - student.detach()
            advantages = advantages.clamp(-ADVANTAGE_CLIP, ADVANTAGE_CLIP)
            loss = -(advantages * student * mask).sum() / mask.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            losses.append(loss.item())
        return losses

    return run


def trl_gkd(folder: Path) -> Pass:
    """TRL's GKDTrainer: reverse KL over the vocabulary to a live teacher of the student's size."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    _quiet_transformers()
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        for name in ("student", "teacher")
    )
    documents = open_dataset([folder / "train"])
    settings = GKDConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=BATCH,
        max_steps=DOCUMENTS // BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP,
        lmbda=0.0,
        beta=1.0,
        temperature=1.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    losses: list[float] = []

    class Recorded(GKDTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

    trainer = Recorded(
        model=student,
        teacher_model=teacher,
        args=settings,
        data_collator=lambda rows: _trl_batch(pad([documents.document(row["index"]) for row in rows])),
        train_dataset=Dataset.from_dict({"index": order().tolist()}),
        processing_class=AutoTokenizer.from_pretrained(folder / "student"),
        optimizers=(_adam(student), None),
    )

    trainer.remove_callback(PrinterCallback)

    def run() -> list[float]:
        losses.clear()
        trainer.train()
        return list(losses)

    return run


def _trl_batch(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    labels = batch["tokens"].masked_fill(batch["loss_mask"] == 0, -100)
    return {"input_ids": batch["tokens"], "attention_mask": batch["attention_mask"], "labels": labels}


def pad(documents: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Columns → [documents, longest], zeros on the right; `attention_mask` is 1 where there is a token."""
    longest = max(len(document["tokens"]) for document in documents)

    def column(name: str, dtype: type[np.generic]) -> torch.Tensor:
        rows = [np.pad(document[name], (0, longest - len(document[name]))) for document in documents]
        return torch.from_numpy(np.stack(rows).astype(dtype))

    lengths = torch.tensor([len(document["tokens"]) for document in documents])
    return {
        "tokens": column("tokens", np.int64),
        "loss_mask": column("loss_mask", np.float32),
        "teacher_logprobs": column("teacher_logprobs", np.float32),
        "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
    }


def _adam(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW with the settings of our trainer: no decay on vectors."""

    def parameters(vectors: bool) -> Iterator[torch.nn.Parameter]:
        return (parameter for parameter in model.parameters() if (parameter.dim() == 1) == vectors)

    groups = [
        {"params": list(parameters(False)), "weight_decay": WEIGHT_DECAY},
        {"params": list(parameters(True)), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON)


SIDES: dict[str, Callable[[Path], Pass]] = {
    "ours": ours,
    "hf_loop": hf_loop,
    "trl_gkd": trl_gkd,
    "plain_head": plain_head,
}
_OURS = ["lopd_megatron.train.setup", "lopd_megatron.train.step"]
_OURS_MEGATRON = ["lopd_megatron.model.student", "lopd_megatron.model.weights"]
_HF = ["transformers.models.qwen3.modeling_qwen3"]


def import_libraries(side: str) -> None:
    """What a side would import at its first call, so that code is not counted as its memory."""
    if side in ("ours", "plain_head"):
        from lopd_megatron.parallel import prepare_megatron

        prepare_megatron()
        names = [*_OURS, *_OURS_MEGATRON]
    else:
        names = [*_HF, "trl.experimental.gkd"] if side == "trl_gkd" else _HF
    for name in names:
        importlib.import_module(name)


def weight_mb(side: str) -> float:
    """Of the models that a side holds, float32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**MODEL))
    copies = 2 if side == "trl_gkd" else 1
    return copies * 4 * sum(parameter.numel() for parameter in model.parameters()) / 1e6
