"""A one-layer random Qwen3, and rollouts of it that know their log-probs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from lopd_megatron.data.alignment import Sample

PROMPT, RESPONSE = 3, 12


def save_qwen(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.6,  # far from uniform, so that models and tokens differ by nats
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@torch.inference_mode()
def sample_rollouts(folder: Path, count: int, temperature: float = 1.0) -> list[Sample]:
    """Sampled token by token; the log-prob of each is what the sampler knew then, at its temperature."""
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 32, (count, PROMPT), generator=generator)
    logprobs = torch.zeros(count, PROMPT)
    for _ in range(RESPONSE):
        logits = (model(tokens).logits[:, -1] / temperature).log_softmax(-1)
        chosen = torch.multinomial(logits.exp(), 1, generator=generator)
        tokens = torch.cat([tokens, chosen], 1)
        logprobs = torch.cat([logprobs, logits.gather(1, chosen)], 1)
    mask = np.repeat(np.array([0, 1], np.uint8), [PROMPT, RESPONSE])
    return [
        Sample(index, ids.numpy(), mask, values.numpy())
        for index, (ids, values) in enumerate(zip(tokens, logprobs, strict=True))
    ]
