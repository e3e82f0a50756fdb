"""A scorer for the alignment proof without an engine: one transformers forward per document, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lopd_megatron.data.alignment import Scorer
from lopd_megatron.progress import progress


def hf_scorer(folder: str | Path) -> Scorer:
    """Load the causal LM of a Hugging Face folder on the CPU; for models of up to about a billion weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()

    @torch.inference_mode()
    def one(prompt: Sequence[int], response: Sequence[int]) -> np.ndarray:
        ids = torch.tensor([[*prompt, *response]])
        # The logits at position t predict token t + 1, so those of the response start one before it.
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])
        return chosen[:, 0].numpy()

    def score(documents: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[np.ndarray]:
        with progress(len(documents), "alignment", "doc") as bar:
            found = []
            for prompt, response in documents:
                found.append(one(prompt, response))
                bar.update(1)
        return found

    return score
