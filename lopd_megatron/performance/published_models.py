"""Shapes of the models in the published table, from their Hugging Face config.json or technical reports."""

from __future__ import annotations

from lopd_megatron.performance.shapes import (
    Attention,
    Block,
    Experts,
    Layer,
    Mamba,
    Mlp,
    ModelShape,
    hybrid,
    repeat,
)

_LATENT = Attention(128, 128, 192, 128, q_rank=1536, kv_rank=512, rope_dim=64)
_LATENT_64 = Attention(64, 64, 192, 128, q_rank=1536, kv_rank=512, rope_dim=64)
_V3_EXPERTS = Experts(256, 8, 2048, shared=2048)


def _llama(hidden: int, layers: int, heads: int, width: int, vocab: int = 128256) -> ModelShape:
    return ModelShape(hidden, vocab, repeat(((Attention(heads, 8, 128, 128), Mlp(width)), layers)))


def _qwen(
    hidden: int, layers: int, heads: int, kv: int, width: int, experts: int = 0, topk: int = 8
) -> ModelShape:
    mlp = Experts(experts, topk, width) if experts else Mlp(width)
    return ModelShape(hidden, 151936, repeat(((Attention(heads, kv, 128, 128), mlp), layers)))


def _gpt_oss(layers: int, experts: int) -> ModelShape:
    mixture = Experts(experts, 4, 2880, clamped=True)
    pair = [(Attention(64, 8, 64, 64, window=128), mixture), (Attention(64, 8, 64, 64), mixture)]
    return ModelShape(2880, 201088, tuple(pair * (layers // 2)))


_NANO: dict[str, Block] = {
    "M": Mamba(64, 64, 128, 8),
    "E": Experts(128, 6, 1856, shared=3712, gated=False),
    "*": Attention(32, 2, 128, 128),
}
_NANO_PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
_SUPER: dict[str, Block] = {
    "M": Mamba(128, 64, 128, 8),
    "E": Experts(512, 22, 2688, shared=5376, latent=1024, gated=False),
    "*": Attention(32, 2, 128, 128),
}
_SUPER_PATTERN = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
_ULTRA: dict[str, Block] = {
    "M": Mamba(256, 64, 128, 8),
    "E": Experts(512, 22, 5120, shared=10240, latent=2048, gated=False),
    "*": Attention(64, 2, 128, 128),
}
_H56: dict[str, Block] = {
    "M": Mamba(256, 64, 256, 8),
    "-": Mlp(32768, gated=False),
    "*": Attention(64, 8, 128, 128),
}
_H56_PATTERN = "M-M-M-M*" + 9 * "-M-M-M-M-M*" + "-M-M-M-M-M-"
_V4 = Attention(64, 1, 512, 512, window=640, q_rank=1024, out_rank=8192, out_groups=8, gathered=512)
_V4_EXPERTS = Experts(256, 6, 2048, shared=2048)

_V4_PRO = Attention(128, 1, 512, 512, window=1152, q_rank=1536, out_rank=16384, out_groups=16, gathered=1024)
_V4_PRO_EXPERTS = Experts(384, 6, 3072, shared=3072)
_NEXT_EXPERTS = Experts(512, 10, 512, shared=512)
_DELTA: Layer = (Mamba(32, 128, 128, 16), _NEXT_EXPERTS)  # gated delta rule: its scan is taken for Mamba's

PUBLISHED_MODELS: dict[str, ModelShape] = {
    "llama3-8b": _llama(4096, 32, 32, 14336),
    "llama3-70b": _llama(8192, 80, 64, 28672),
    "llama3.1-405b": _llama(16384, 126, 128, 53248),
    "qwen3-4b": _qwen(2560, 36, 32, 8, 9728),
    "qwen3-8b": _qwen(4096, 36, 32, 8, 12288),
    "qwen3-14b": _qwen(5120, 40, 40, 8, 17408),
    "qwen3-32b": _qwen(5120, 64, 64, 8, 25600),
    "qwen3-30b-a3b": _qwen(2048, 48, 32, 4, 768, 128),
    "qwen3-235b-a22b": _qwen(4096, 94, 64, 4, 1536, 128),
    "deepseek-v3": ModelShape(
        7168,
        129280,
        repeat(((_LATENT, Mlp(18432)), 3), ((_LATENT, _V3_EXPERTS), 58)),
        extra=((_LATENT, _V3_EXPERTS),),
    ),
    "deepseek-v3-no-mtp": ModelShape(
        7168, 129280, repeat(((_LATENT, Mlp(18432)), 3), ((_LATENT, _V3_EXPERTS), 58))
    ),
    "deepseek-v4-flash": ModelShape(
        4096,
        129280,
        repeat(((_V4, _V4_EXPERTS), 43)),
        streams=4,
        extra=((_V4, _V4_EXPERTS),),
    ),
    "deepseek-v4-pro": ModelShape(
        7168,
        129280,
        repeat(((_V4_PRO, _V4_PRO_EXPERTS), 61)),
        streams=4,
        extra=((_V4_PRO, _V4_PRO_EXPERTS),),
    ),
    "qwen3-next-80b-a3b": ModelShape(
        2048, 151936, ((_DELTA,) * 3 + ((Attention(16, 2, 256, 256), _NEXT_EXPERTS),)) * 12
    ),
    "kimi-k2": ModelShape(
        7168,
        163840,
        repeat(((_LATENT_64, Mlp(18432)), 1), ((_LATENT_64, Experts(384, 8, 2048, shared=2048)), 60)),
    ),
    "gpt-oss-120b": _gpt_oss(36, 128),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "nemotron-3-nano": ModelShape(2688, 131072, hybrid(_NANO_PATTERN, _NANO)),
    "nemotron-3.5-lightning": ModelShape(
        2688, 131072, hybrid(_NANO_PATTERN, _NANO), extra=((_NANO["*"], _NANO["E"]),) * 2
    ),
    "nemotron-3-super": ModelShape(
        4096, 131072, hybrid(_SUPER_PATTERN, _SUPER), extra=((_SUPER["*"], _SUPER["E"]),) * 2
    ),
    "nemotron-3-ultra": ModelShape(
        8192, 131072, hybrid("MEMEMEMEM*E" * 9 + "MEMEMEMEM", _ULTRA), extra=((_ULTRA["*"], _ULTRA["E"]),) * 2
    ),
    "nemotronh-56b": ModelShape(8192, 131072, hybrid(_H56_PATTERN, _H56)),
}
