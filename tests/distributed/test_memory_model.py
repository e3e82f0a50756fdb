"""Predicted memory against the bytes of the tensors that one real step keeps alive."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lopd_megatron.config import RunConfig
from lopd_megatron.loss.fused_head import HeadRows, fused_head
from lopd_megatron.loss.objectives import TokenLoss
from lopd_megatron.model.student_spec import student_spec
from lopd_megatron.parallel import topology as grid
from lopd_megatron.parallel.vocab import VocabRange
from tests.distributed.world import run_world

TOKENS = 256
DENSE: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
MOE = DENSE | {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "norm_topk_prob": True,
}
CASES: dict[str, tuple[dict, dict[str, Any]]] = {
    "fp32": (DENSE, {"train.precision": "fp32"}),
    "bf16": (DENSE, {}),
    "tied llama": (DENSE | {"model_type": "llama", "tie_word_embeddings": True}, {}),
    "large head chunk": (DENSE, {"loss.head_chunk_tokens": 256}),
    "full recompute": (DENSE, {"train.recompute_granularity": "full"}),
    "full recompute by two": (
        DENSE,
        {"train.recompute_granularity": "full", "train.recompute_num_layers": 2},
    ),
    "mlp and attention recompute": (
        DENSE,
        {"train.recompute_granularity": "selective", "train.recompute_modules": ["mlp", "core_attn"]},
    ),
    "experts": (MOE, {}),
    "experts recomputed": (
        MOE,
        {"train.recompute_granularity": "selective", "train.recompute_modules": ["moe"]},
    ),
}
TP2 = {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True}


class PeakBytes(TorchDispatchMode):
    """Bytes of storages created since the start and still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note((args, kwargs), new=False)
        result = func(*args, **(kwargs or {}))
        self._note(result, new=True)
        self.peak = max(self.peak, self.now)
        return result

    def _note(self, values: Any, *, new: bool) -> None:
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                key = storage._cdata
                if key not in self._known:
                    self._known[key] = storage.nbytes() if new else 0
                    self.now += self._known[key]
                    weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key)


def settings(changes: dict[str, Any]) -> RunConfig:
    config = RunConfig()
    config.data.seq_length = TOKENS
    config.loss.head_chunk_tokens = 64
    for key, value in changes.items():
        section, _, field = key.partition(".")
        setattr(getattr(config, section), field, value)
    return config


def next_token_loss(logprobs: torch.Tensor, rows: slice) -> TokenLoss:
    weights = torch.zeros_like(logprobs)
    weights[:, 0] = -1
    return TokenLoss(-logprobs[:, 0], weights)


def measure(hf: dict, changes: dict[str, Any]) -> tuple[float, float]:
    """(predicted, measured) bytes of this rank at the peak of a step."""
    from lopd_megatron.model.memory_estimate import estimate_stage
    from lopd_megatron.model.student import build_student
    from lopd_megatron.model.verify import pack_documents
    from lopd_megatron.train.setup import build_optimizer, wrap_model

    config = settings(changes)
    topology = grid.initialize(config.parallel, seed=1)
    spec = student_spec(hf, config)
    (chunk,) = build_student(spec, topology)
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.normal_(std=0.02)
    (model,) = wrap_model([chunk], spec, config)
    optimizer, _ = build_optimizer([model], spec, config)
    batch = pack_documents(
        [torch.randint(0, DENSE["vocab_size"], (TOKENS // 4,)) for _ in range(4)], topology
    )
    vocab = VocabRange.of(
        spec.vocab_size, spec.padded_vocab_size, topology.tp_group if topology.tp_size > 1 else None
    )
    rows = HeadRows(
        torch.arange(TOKENS),
        torch.randint(0, DENSE["vocab_size"], (TOKENS, 1)),
        torch.ones(TOKENS, dtype=torch.float64),
        next_token_loss,
    )

    def forward_and_backward() -> None:
        hidden = model(batch)
        loss, _ = fused_head(
            hidden.view(-1, hidden.size(-1)),
            chunk.head_weight,
            rows,
            vocab=vocab,
            sequence_parallel=config.parallel.sequence_parallel,
            chunk_tokens=config.loss.head_chunk_tokens,
        )
        loss.backward()

    forward_and_backward()
    optimizer.step()
    with PeakBytes() as tracked:
        forward_and_backward()
    static = sum(buffer.grad_data.nbytes for buffer in model.buffers + model.expert_parallel_buffers)
    static += sum(parameter.nbytes for parameter in chunk.parameters())
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        for parameter, state in one.optimizer.state.items():
            static += state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
            static += parameter.nbytes if config.train.precision == "bf16" else 0
    predicted = estimate_stage(spec, config, topology.world_size, topology.pp_rank).total
    grid.destroy()
    return predicted, static + tracked.peak


def measure_all(cases: list[tuple[dict, dict[str, Any]]]) -> list[tuple[float, float]]:
    return [measure(*case) for case in cases]


@pytest.mark.dist
def test_prediction_is_within_ten_percent() -> None:
    """On a CPU, where norms run by parts; `experts` route as random weights do, not evenly."""
    results = run_world(measure_all, 1, list(CASES.values()))[0]
    sharded = run_world(
        measure_all, 2, [(DENSE, TP2), (MOE, TP2 | {"parallel.expert_model_parallel_size": 2})]
    )[0]
    names = [*CASES, "tp2", "tp2 experts"]
    for name, (predicted, measured) in zip(names, results + sharded, strict=True):
        print(f"{name:30s} predicted {predicted / 1e6:7.2f} MB  measured {measured / 1e6:7.2f} MB")
        assert abs(predicted / measured - 1) < 0.1, name
