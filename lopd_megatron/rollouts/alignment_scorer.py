"""Which engine scores the sample of the alignment proof."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from lopd_megatron.config import RunConfig
from lopd_megatron.data.alignment import AlignmentReport, Sample, Scorer, compare
from lopd_megatron.inference.hf_scorer import hf_scorer
from lopd_megatron.rollouts.score_stage import score_tokens


@contextlib.contextmanager
def open_scorer(config: RunConfig, model: str, kind: str = "auto") -> Iterator[Scorer]:
    """A scorer with the weights of `model`: `vllm`, or one `transformers` forward per document in float32.

    `auto` takes vLLM where there is CUDA, with the engine settings of the rollouts, so that only the noise of
    batch shapes is left.
    """
    import torch

    if kind == "transformers" or (kind == "auto" and not torch.cuda.is_available()):
        yield hf_scorer(model)
        return
    from lopd_megatron.inference.engine import VllmEngine

    engine = VllmEngine(model, config.rollouts.engine, task="score")
    try:
        yield lambda documents: score_tokens(engine, documents, path="flat")
    finally:
        engine.close()


def alignment_proof(config: RunConfig, model: str) -> Callable[[list[Sample]], AlignmentReport]:
    """What `build_dataset` takes: the model is loaded only when a build comes to its end."""

    def prove(samples: list[Sample]) -> AlignmentReport:
        with open_scorer(config, model) as scorer:
            return compare(samples, scorer, config.data.alignment_tolerance)

    return prove
