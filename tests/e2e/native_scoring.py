"""vLLM's V2 model runner, which scores natively, on a CPU: its Triton kernels under Triton's interpreter.

    PYTHONPATH=.venv/triton-interpreter python -m tests.e2e.native_scoring FOLDER

Scores one set of documents by every path and by transformers; prints one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import numpy as np


def use_interpreter() -> None:
    """Let vLLM find Triton and the V2 runner on a machine without an accelerator; before vllm is imported."""
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    import triton.backends

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=Driver, compiler=None)  # type: ignore


def main(folder: Path) -> None:
    use_interpreter()
    from lopd_megatron.config import EngineConfig
    from lopd_megatron.inference.engine import VllmEngine
    from lopd_megatron.inference.requests import ScoreRequest
    from lopd_megatron.inference.score_paths import choose_path
    from tests.e2e.random_models import MAX_POSITIONS, VOCABULARY, reference, save_model

    model = save_model(folder, 0)
    random = np.random.default_rng(3)
    shapes = [(1, 1), (1, 12), (20, 1), (5, 60), (30, 64)]
    requests = [
        ScoreRequest((0, row), random.integers(0, VOCABULARY, prompt + response).tolist(), prompt)
        for row, (prompt, response) in enumerate(shapes)
    ]
    config = EngineConfig(max_model_len=MAX_POSITIONS, max_num_seqs=4, max_num_batched_tokens=64)
    engine = VllmEngine(str(folder), config, task="score", max_topk=3)
    want = []
    for request in requests:
        table = reference(model, request.tokens)[request.start - 1 : -1]
        want.append(table[np.arange(len(table)), request.tokens[request.start :]])
    result = {
        "model_runner": engine.describe()["model_runner"],
        "has_native_scoring": engine.has_native_scoring,
        "chosen": choose_path(engine, "auto", 0, 24),
        "chosen_topk": choose_path(engine, "auto", 3, 24),
    }
    for path in ("native", "flat", "stock"):
        answers = sorted(engine.score(requests, topk=0, path=path), key=lambda answer: answer.key)
        differences = [np.abs(a.logprobs - w).max() for a, w in zip(answers, want, strict=True)]
        result[path] = float(max(differences))
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
