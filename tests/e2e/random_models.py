"""Random Qwen3 models that vLLM's CPU build can run, with sharp logits and a word-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

VOCABULARY = 97
EOS = 2
MAX_POSITIONS = 160


def save_model(
    folder: Path, seed: int, *, layers: int = 2, vocabulary: int = VOCABULARY, word: str = "w"
) -> torch.nn.Module:
    """Write a model and its tokenizer; returns the model, fp32, in eval mode. `word` starts every token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        initializer_range=0.15,
        eos_token_id=EOS,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config).float().eval()
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 1.5  # responses that end, and responses that are cut
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<unk>": 1, "<eos>": EOS, "#": 3, **{f"{word}{i}": i for i in range(4, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return model


def reference(model: torch.nn.Module, tokens: list[int]) -> np.ndarray:
    """Log-softmax of the logits in fp32, [length, vocabulary]; row t predicts token t + 1."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().log_softmax(-1).numpy()
