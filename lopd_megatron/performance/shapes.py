"""Shapes of models as the time model needs them: blocks with their widths, independent of any layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lopd_megatron.errors import UserError


@dataclass(frozen=True)
class Attention:
    """Softmax attention; with `kv_rank` multi-head latent attention: low-rank queries, keys and values."""

    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    window: int = 0
    """Keys that a query meets at most; 0: all before it."""
    q_rank: int = 0
    kv_rank: int = 0
    rope_dim: int = 0
    """Of latent attention: the shared rotary key."""
    out_rank: int = 0
    out_groups: int = 1
    """Of a grouped low-rank output projection."""
    gathered: int = 0
    """Keys that each query picks for itself, so that no two queries share a read."""

    def linear(self, hidden: int) -> list[tuple[int, int]]:
        """(inner, outer) sizes of the linear layers."""
        query = self.heads * self.qk_dim
        value = self.heads * self.v_dim
        if self.q_rank and not self.kv_rank:  # low-rank queries, one key that is the value too
            products = [(hidden, self.q_rank + self.kv_heads * self.qk_dim), (self.q_rank, query)]
        elif not self.kv_rank:
            products = [(hidden, query + self.kv_heads * (self.qk_dim + self.v_dim))]
        else:
            down = [(hidden, self.q_rank), (hidden, self.kv_rank + self.rope_dim)]
            up = [(self.q_rank, query), (self.kv_rank, self.heads * (self.qk_dim - self.rope_dim) + value)]
            products = down + up
        if self.out_rank:
            return [*products, (value // self.out_groups, self.out_rank), (self.out_rank, hidden)]
        return [*products, (value, hidden)]

    def attended(self, length: float) -> float:
        """Mean number of keys that a query of a document of this length meets."""
        if self.window and self.window < length:
            return self.window - self.window**2 / (2 * length)
        return length / 2


@dataclass(frozen=True)
class Mlp:
    """Dense MLP; gated: gate, up and down, else up and down."""

    width: int
    gated: bool = True


@dataclass(frozen=True)
class Experts:
    """Mixture of experts with optional shared experts, and a latent width that tokens are sent in."""

    count: int
    topk: int
    width: int
    shared: int = 0
    latent: int = 0
    gated: bool = True
    clamped: bool = False
    """Biases and a clamped activation, which trainers run as separate kernels."""


@dataclass(frozen=True)
class Mamba:
    """Mamba-2 mixer."""

    heads: int
    head_dim: int
    state: int
    groups: int

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim


Block = Attention | Mlp | Experts | Mamba
Layer = tuple[Block, ...]


@dataclass(frozen=True)
class ModelShape:
    """A model: its layers in order, vocabulary, and what follows the last layer."""

    hidden: int
    vocab: int
    layers: tuple[Layer, ...]
    tied: bool = False
    extra: tuple[Layer, ...] = ()
    """Layers of multi-token prediction, each with one more pass through the head."""
    streams: int = 1
    """Residual streams (hyper-connections)."""

    @cached_property
    def kinds(self) -> Counter[Layer]:
        return Counter(self.layers)

    @property
    def is_mixture(self) -> bool:
        return any(isinstance(block, Experts) for layer in self.kinds for block in layer)

    @cached_property
    def parameters(self) -> float:
        own = sum(dense + expert for dense, expert in map(self.layer_parameters, self.layers + self.extra))
        return own + self.vocab * self.hidden * (1 if self.tied else 2)

    def layer_parameters(self, layer: Layer) -> tuple[float, float]:
        """(parameters outside experts, parameters of all routed experts)."""
        dense = expert = 0.0
        for block in layer:
            dense += sum(inner * outer for inner, outer, _ in dense_products(block, self.hidden))
            if isinstance(block, Experts):
                width = block.latent or self.hidden
                expert += block.count * (3 if block.gated else 2) * width * block.width
        return dense, expert

    def forward_flops(self, length: float) -> float:
        """FLOPs per token of one forward pass over documents of `length` tokens, as published runs count."""
        total = 2.0 * self.vocab * self.hidden * (1 + len(self.extra))
        for layer in self.layers + self.extra:
            for block in layer:
                total += sum(2.0 * i * o for i, o, _ in dense_products(block, self.hidden))
                if isinstance(block, Experts):
                    width = block.latent or self.hidden
                    total += 2.0 * block.topk * (3 if block.gated else 2) * width * block.width
                elif isinstance(block, Attention):
                    total += 2.0 * block.heads * (block.qk_dim + block.v_dim) * block.attended(length)
                elif isinstance(block, Mamba):
                    total += 6.0 * block.inner * block.state
        return total


def dense_products(block: Block, hidden: int) -> list[tuple[int, int, str]]:
    """(inner, outer, how TP cuts it: `column`, `row` or `whole`) of the products that every token meets."""
    if isinstance(block, Attention):
        products = block.linear(hidden)
        down = 2 if block.kv_rank else int(bool(block.q_rank))
        return [
            (i, o, "whole" if n < down else ("row" if n == len(products) - 1 else "column"))
            for n, (i, o) in enumerate(products)
        ]
    if isinstance(block, Mlp):
        return [(hidden, block.width * (2 if block.gated else 1), "column"), (block.width, hidden, "row")]
    if isinstance(block, Mamba):
        into = 2 * block.inner + 2 * block.groups * block.state + block.heads
        return [(hidden, into, "column"), (block.inner, hidden, "row")]
    products_ = [(hidden, block.count, "whole")]
    if block.shared:
        products_ += [
            (hidden, block.shared * (2 if block.gated else 1), "column"),
            (block.shared, hidden, "row"),
        ]
    if block.latent:
        products_ += [(hidden, block.latent, "whole"), (block.latent, hidden, "whole")]
    return products_


def shape_from_hf(hf: dict[str, Any]) -> ModelShape:
    """The shape in a Hugging Face config.json of Qwen2, Qwen3, Qwen3-MoE or Llama.

    A mixture layer is every `decoder_sparse_step`-th one that `mlp_only_layers` does not name.
    """
    try:
        heads, hidden = hf["num_attention_heads"], hf["hidden_size"]
        head_dim = hf.get("head_dim") or hidden // heads
        attention = Attention(heads, hf.get("num_key_value_heads") or heads, head_dim, head_dim)
        experts = hf.get("num_experts") or 0
        layers: list[Layer] = []
        for number in range(hf["num_hidden_layers"]):
            sparse = experts and number not in hf.get("mlp_only_layers", [])
            if sparse and (number + 1) % hf.get("decoder_sparse_step", 1) == 0:
                mixture = Experts(experts, hf["num_experts_per_tok"], hf["moe_intermediate_size"])
                layers.append((attention, mixture))
            else:
                layers.append((attention, Mlp(hf["intermediate_size"])))
        return ModelShape(hidden, hf["vocab_size"], tuple(layers), bool(hf.get("tie_word_embeddings", False)))
    except KeyError as error:
        raise UserError(f"config.json has no {error.args[0]!r}; the planner needs it") from None


def hybrid(pattern: str, blocks: dict[str, Block]) -> tuple[Layer, ...]:
    """Layers from a pattern of letters, one block a layer."""
    return tuple((blocks[letter],) for letter in pattern)


def repeat(*groups: tuple[Iterable[Block], int]) -> tuple[Layer, ...]:
    """Layers from (blocks, count) groups."""
    return tuple(layer for blocks, count in groups for layer in [tuple(blocks)] * count)
