"""One training step, ours and shaped like the released code's, on the same model (for `bench_loss.py`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from bench_measure import interleaved, peak_mb, relative

from lopd_megatron.config import LossConfig, ParallelConfig, RunConfig
from lopd_megatron.loss import Loss
from lopd_megatron.parallel.vocab import VocabRange
from lopd_megatron.records import MicroBatch


@dataclass(frozen=True)
class Shape:
    tokens: int
    hidden: int
    vocabulary: int
    chunk_tokens: int
    rounds: int = 3


def make_batch(shape: Shape, masked: float, device: torch.device | str = "cpu") -> MicroBatch:
    """Four documents whose first `masked` part is the prompt."""
    generator = torch.Generator().manual_seed(0)
    length = shape.tokens // 4
    position = torch.arange(shape.tokens) % length
    labels = torch.randint(shape.vocabulary, (1, shape.tokens), generator=generator)
    mask = (position >= round(masked * length)).float()
    batch = MicroBatch(
        tokens=labels.roll(1),
        labels=labels,
        loss_mask=mask[None],
        position_ids=position[None],
        teacher_logprobs=-torch.rand(1, shape.tokens, generator=generator) * 10,
        rollout_logprobs=None,
        teacher_topk_ids=None,
        teacher_topk_logprobs=None,
        sequence_index=(torch.arange(shape.tokens) // length).int()[None],
        response_lengths=torch.full((4,), int(mask[:length].sum())).int(),
        cu_seqlens=(torch.arange(5) * length).int(),
        max_seqlen=length,
        document_indices=(0, 1, 2, 3),
    )
    moved = {name: value.to(device) for name, value in vars(batch).items() if torch.is_tensor(value)}
    return replace(batch, **moved)


class Steps:
    """One Qwen3-shaped model of 8 layers and the two ways to take its gradient; a world of one rank."""

    def __init__(self, shape: Shape, masked: float) -> None:
        from lopd_megatron.model.student import build_student
        from lopd_megatron.model.student_spec import student_spec
        from lopd_megatron.parallel import topology as grid

        topology = grid.initialize(ParallelConfig(), seed=1)
        config = RunConfig()
        config.train.precision = "fp32"
        self.batch = make_batch(shape, masked)
        self.model = build_student(student_spec(_architecture(shape), config), topology)[0]
        config.train.recompute_granularity = "full"
        self.recomputing = build_student(student_spec(_architecture(shape), config), topology)[0]
        generator = torch.Generator().manual_seed(2)
        for parameter, twin in zip(self.model.parameters(), self.recomputing.parameters(), strict=True):
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.02, generator=generator)
            twin.data = parameter.data
        self.loss = Loss(
            LossConfig(head_chunk_tokens=shape.chunk_tokens),
            vocab=VocabRange.of(shape.vocabulary, shape.vocabulary, None),
            sequence_parallel=False,
        )

    def logits(self, model: Any) -> torch.Tensor:
        return F.linear(model(self.batch)[:, 0], model.head_weight)

    def forward(self) -> None:
        """A forward pass with whole logits, without a gradient."""
        with torch.no_grad():
            self.logits(self.model)

    def ours(self) -> None:
        hidden = self.model(self.batch)
        self.loss(hidden, self.model.head_weight, self.batch).numerator.backward()

    def reference(self) -> None:
        """The shape of the released step: the same gradient by twice the work."""
        with torch.no_grad():
            # Of the reference model, for a KL of weight 0.
            self._response_values(self.logits(self.recomputing), entropy=False)
            old, _ = self._response_values(self.logits(self.recomputing), entropy=False)
        logits = self.logits(self.recomputing)
        student, entropy = self._response_values(logits, entropy=True)
        del logits  # the pipeline schedule holds them until here
        assert self.batch.teacher_logprobs is not None
        assert self.batch.loss_mask is not None
        advantages = (self.batch.teacher_logprobs[self.batch.loss_mask > 0] - old).clamp(-10, 10)
        ratio = (student - old).exp()
        surrogate = torch.maximum(-ratio * advantages, -ratio.clamp(0.8, 1.2) * advantages)
        (surrogate.sum() - 0.0 * entropy.sum()).backward()

    def _response_values(self, logits: torch.Tensor, *, entropy: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropy: a copy divided by the temperature, then per sample one copy for each use."""
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        batch = self.batch
        assert batch.labels is not None
        scaled = logits.div(1.0)
        logprobs, entropies = [], []
        for stop, count in zip(batch.cu_seqlens[1:].tolist(), batch.response_lengths.tolist(), strict=True):
            sample = scaled[stop - count : stop]
            labels = batch.labels[0, stop - count : stop, None]
            logprobs.append(-vocab_parallel_cross_entropy(sample.clone()[:, None], labels)[:, 0])
            if entropy:
                log_softmax = sample.clone().log_softmax(-1)
                entropies.append(-(log_softmax.exp() * log_softmax).sum(-1))
        return torch.cat(logprobs), torch.cat(entropies) if entropy else logits.new_zeros(1)

    def clear(self) -> None:
        for parameter in [*self.model.parameters(), *self.recomputing.parameters()]:
            parameter.grad = None

    def gradient(self, model: Any) -> torch.Tensor:
        return torch.cat([parameter.grad.view(-1) for parameter in model.parameters()])


def _architecture(shape: Shape) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": 3 * shape.hidden,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "attention_bias": False,
    }


def step_flops(shape: Shape) -> dict[str, float]:
    """FLOPs of our step over three forwards, no row masked; torch does not count attention on a CPU."""
    from torch.utils.flop_counter import FlopCounterMode

    steps = Steps(shape, masked=0.0)
    flops = []
    for run in (steps.ours, steps.forward):
        with FlopCounterMode(display=False) as counter:
            run()
        flops.append(counter.get_total_flops())
    return {"ratio": flops[0] / (3 * flops[1])}


def step_times(shape: Shape, masked: float) -> dict[str, float]:
    steps = Steps(shape, masked)
    steps.ours()
    steps.reference()
    error = relative(steps.gradient(steps.model), steps.gradient(steps.recomputing))
    variants = {"ours": steps.ours, "reference": steps.reference}
    return {**interleaved(variants, shape.rounds, reset=steps.clear), "grad_rel_error": error}


def step_memory(shape: Shape, masked: float) -> dict[str, float]:
    """Peak above weights and gradients, which stand in both."""
    steps = Steps(shape, masked)
    peaks = {}
    for name, run in (("ours", steps.ours), ("reference", steps.reference)):
        steps.clear()
        run()  # leaves its gradients behind; the next run adds to them
        peaks[name] = peak_mb(run)
    return peaks
