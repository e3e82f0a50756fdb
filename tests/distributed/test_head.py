"""The heads over tensor-parallel ranks against the dense float64 reference. Gradients, not only losses.

Hidden states and weights are multiples of 1/32, so that the float32 logits are exact and the tolerance judges
the softmax over shards, the collectives and the gradient products: 1e-6 of the norm, observed ≤ 4e-7.
The plain head keeps Megatron's float32 softmax and takes the rest as 1 − Σ: 1e-5 for one id.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lopd_megatron.config import LossConfig, ParallelConfig
from lopd_megatron.loss import Loss, NonFiniteLoss, fused_head
from lopd_megatron.parallel import topology as grid
from lopd_megatron.parallel.topology import Topology
from lopd_megatron.parallel.vocab import VocabRange
from lopd_megatron.records import LossOutput, MicroBatch
from lopd_megatron.train.step import on_device
from tests.distributed.world import run_world
from tests.unit.loss.dense import all_masked, dense_loss, random_batch

TOLERANCE = 1e-6


@dataclass(frozen=True)
class Case:
    name: str
    config: LossConfig
    batch: MicroBatch
    vocab_size: int = 211
    padded_vocab_size: int = 256
    hidden_size: int = 40
    sequence_parallel: bool = False
    scales: tuple[float, ...] = (1.0,)  # of the hidden states, row by row in turn
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class Errors:
    """Relative errors of one case on one rank."""

    numerator: float
    student_logprobs: float
    d_hidden: float
    d_weight: float
    padding: float  # largest gradient of a padding row


def exact(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 32).round() / 32


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm().clamp(min=1e-30))


def tensors(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    assert case.batch.labels is not None
    t = case.batch.labels.size(1)
    hidden = exact((t, case.hidden_size), 1)
    hidden *= torch.tensor(case.scales).repeat(t)[:t, None]
    return hidden, exact((case.padded_vocab_size, case.hidden_size), 2)


def run_case(
    case: Case, topology: Topology
) -> tuple[LossOutput, torch.Tensor, torch.Tensor, VocabRange, slice]:
    hidden, weight = tensors(case)
    vocab = VocabRange.of(case.vocab_size, case.padded_vocab_size, topology.tp_group)
    rows = slice(0, hidden.size(0))
    if case.sequence_parallel:
        part = hidden.size(0) // topology.tp_size
        rows = slice(topology.tp_rank * part, (topology.tp_rank + 1) * part)
    device = topology.device
    x = hidden[rows, None].clone().to(device).requires_grad_()
    w = weight[vocab.vocab_start_index : vocab.vocab_end_index].clone().to(device).requires_grad_()
    loss = Loss(case.config, vocab=vocab, sequence_parallel=case.sequence_parallel)
    (batch,) = on_device([case.batch], device)
    output = loss(x, w, batch)
    output.numerator.backward()
    assert x.grad is not None
    assert w.grad is not None
    return output, x.grad[:, 0].cpu(), w.grad.cpu(), vocab, rows


def errors_of(case: Case, topology: Topology) -> Errors:
    output, d_hidden, d_weight, vocab, rows = run_case(case, topology)
    hidden, weight = tensors(case)
    x = hidden.double().requires_grad_()
    w = weight[: case.vocab_size].double().requires_grad_()
    numerator, logprobs, _ = dense_loss(case.config, x, w, case.batch)
    numerator.backward()
    assert x.grad is not None
    assert w.grad is not None
    shard = w.grad[vocab.vocab_start_index : vocab.vocab_end_index]
    return Errors(
        numerator=abs(output.numerator.item() - numerator.item()) / max(1e-30, abs(numerator.item())),
        student_logprobs=abs(output.metric_sums["student_logprobs"][0].item() - logprobs.sum().item())
        / max(1e-30, logprobs.abs().sum().item()),
        # The whole norm as the scale: a shard that no label falls into may have hardly any gradient.
        d_hidden=float((d_hidden.double() - x.grad[rows]).norm() / x.grad.norm().clamp(min=1e-30)),
        d_weight=float((d_weight[: len(shard)].double() - shard).norm() / w.grad.norm().clamp(min=1e-30)),
        padding=float(d_weight[vocab.num_real :].abs().sum()),
    )


def no_reduction_of_the_hidden_gradient() -> None:
    """Each rank keeps the gradient of its own shard: the loss stays exact."""
    dist.all_reduce = lambda *args, **kwargs: None


def softmax_of_the_own_shard() -> None:
    """The normaliser of this rank instead of that of all ranks."""
    stock = fused_head._all_gather

    def wrong(tensor: torch.Tensor, group: Any) -> torch.Tensor:
        gathered = stock(tensor, group)
        gathered[:, :, 0] = tensor[:, :, 0] - torch.tensor(float(group.size())).log()
        return gathered

    fused_head._all_gather = wrong


def foreign_ids_hit_column_0() -> None:
    """The clamped column of an id of another shard taken for its own."""
    stock = fused_head._columns

    def wrong(ids: torch.Tensor, vocab: VocabRange) -> tuple[torch.Tensor, torch.Tensor]:
        column, owned = stock(ids, vocab)
        return column, torch.ones_like(owned)

    fused_head._columns = wrong


PLANTED = {
    plant.__name__: plant
    for plant in (no_reduction_of_the_hidden_gradient, softmax_of_the_own_shard, foreign_ids_hit_column_0)
}


def errors_in_world(tp_size: int, cases: list[Case], planted: str = "") -> list[Errors]:
    topology = grid.initialize(ParallelConfig(tensor_model_parallel_size=tp_size), seed=1)
    if planted:
        PLANTED[planted]()
    errors = [errors_of(case, topology) for case in cases]
    grid.destroy()
    return errors


def all_errors(cases: list[Case]) -> dict[int, list[Errors]]:
    """By tensor-parallel size, of those that this world holds."""
    sizes = [size for size in (1, 2, 4) if size <= dist.get_world_size()]
    return {tp_size: errors_in_world(tp_size, cases) for tp_size in sizes}


def the_cases() -> list[Case]:
    shards = torch.tensor([0, 63, 64, 127, 128, 191, 192, 210, 105, 106, 52, 53])  # edges at TP 2 and 4
    on_edges = random_batch([24], vocab_size=211, labels=shards.repeat(2), masked=0.0)
    ragged = random_batch([17, 1, 30, 2, 7], vocab_size=211, topk=4)
    cases = [
        Case("ragged", LossConfig(head_chunk_tokens=13), ragged),
        Case("one chunk", LossConfig(), ragged),
        Case("odd sizes", LossConfig(head_chunk_tokens=1), random_batch([7], vocab_size=5), 5, 8, 3),
        Case("shards of padding alone", LossConfig(), random_batch([9, 8], vocab_size=30), 30, 512, 7),
        Case("labels on shard edges", LossConfig(objective="sft", head_chunk_tokens=5), on_edges),
        Case("per sequence", LossConfig(normalization="per_sequence"), ragged),
        Case("extreme logits", LossConfig(advantage_clip=None), ragged, scales=(1.0, 10.0, 400.0)),
        Case("tokens masked between", LossConfig(head_chunk_tokens=4), scattered_mask(ragged)),
        Case(
            "sequence parallel",
            LossConfig(head_chunk_tokens=9),
            random_batch([20, 12, 12], vocab_size=211),
            sequence_parallel=True,
        ),
    ]
    for objective in ("topk_forward_kl", "topk_reverse_kl", "topk_jsd"):
        config = LossConfig(objective=objective, topk=3, head_chunk_tokens=10)
        cases.append(Case(objective, config, ragged))
        cases.append(Case(f"{objective}, extreme", config, ragged, scales=(1.0, 10.0, 400.0)))
    plain = LossConfig(head="plain")
    cases += [
        Case("plain", plain, ragged, tolerance=1e-5),
        Case(
            "plain, top-k",
            LossConfig(head="plain", objective="topk_reverse_kl", topk=3),
            ragged,
            scales=(0.1,),
            tolerance=1e-5,
        ),
        Case(
            "plain, sequence parallel",
            plain,
            random_batch([20, 12, 12], vocab_size=211),
            sequence_parallel=True,
            tolerance=1e-5,
        ),
    ]
    return cases


def scattered_mask(batch: MicroBatch) -> MicroBatch:
    """Every third trained token untrained, as in a rollout with tool output inside."""
    assert batch.loss_mask is not None
    assert batch.sequence_index is not None
    mask = batch.loss_mask.clone()
    mask[0, ::3] = 0
    lengths = torch.zeros(len(batch.response_lengths)).index_add_(0, batch.sequence_index[0].long(), mask[0])
    return replace(batch, loss_mask=mask, response_lengths=lengths.int())


def check_errors(cases: list[Case], results: list[dict[int, list[Errors]]], slack: float = 1.0) -> float:
    """Hold every case on every rank to `slack` times its tolerance; the largest error of a gradient."""
    worst = 0.0
    for rank, by_tp in enumerate(results):
        for tp_size, errors in by_tp.items():
            for case, error in zip(cases, errors, strict=True):
                if case.sequence_parallel and tp_size == 1:
                    continue
                where = f"{case.name}, TP{tp_size}, rank {rank}: {error}"
                assert error.numerator < slack * case.tolerance, where
                assert error.student_logprobs < slack * case.tolerance, where
                assert error.d_hidden < slack * case.tolerance, where
                assert error.d_weight < slack * case.tolerance, where
                assert error.padding == 0, where
                if case.tolerance == TOLERANCE:
                    worst = max(worst, error.d_hidden, error.d_weight)
    return worst


@pytest.mark.dist
def test_gradients_equal_the_dense_reference_over_tp_1_2_4() -> None:
    cases = the_cases()
    worst = check_errors(cases, run_world(all_errors, 4, cases))
    print(f"largest relative error of a gradient: {worst:.1e}")


@pytest.mark.dist
@pytest.mark.parametrize("planted", sorted(PLANTED))
def test_a_planted_fault_is_caught(planted: str) -> None:
    """Two of the three leave the loss itself right: only the gradient tells."""
    case = Case("ragged", LossConfig(head_chunk_tokens=13), random_batch([17, 1, 30], vocab_size=211))
    errors = [errors[0] for errors in run_world(errors_in_world, 2, 2, [case], planted)]
    assert max(max(error.d_hidden, error.d_weight) for error in errors) > 1000 * TOLERANCE
    if planted == "no_reduction_of_the_hidden_gradient":
        assert all(error.numerator < TOLERANCE for error in errors)


def losses_of_context_parallel_ranks(batches: list[MicroBatch]) -> LossOutput:
    """Each CP rank holds half of every document; the reports and denominators add up."""
    topology = grid.initialize(ParallelConfig(context_parallel_size=2), seed=1)
    batch = batches[topology.cp_rank]
    assert batch.labels is not None
    vocab = VocabRange.of(211, 256, topology.tp_group)
    loss = Loss(
        LossConfig(normalization="per_sequence"),
        vocab=vocab,
        sequence_parallel=False,
        cp_group=topology.cp_group,
    )
    hidden = exact((44, 40), 1)[_part(topology.cp_rank)]
    output = loss(hidden[:, None], exact((256, 40), 2), batch)
    empty = loss(hidden[:, None], exact((256, 40), 2), all_masked(batch))
    assert empty.denominator == 0
    grid.destroy()
    return output


def _part(rank: int) -> torch.Tensor:
    """Rows of a rank: the documents have 20, 12 and 12 tokens, cut into quarters, 0 and 3 against 1 and 2."""
    rows, start = [], 0
    for length in (20, 12, 12):
        quarters = torch.arange(start, start + length).chunk(4)
        rows += [quarters[rank], quarters[3 - rank]]
        start += length
    return torch.cat(rows)


@pytest.mark.dist
def test_context_parallel_ranks_pool_to_the_whole() -> None:
    whole = random_batch([20, 12, 12], vocab_size=211)
    halves = []
    for rank in (0, 1):
        rows = _part(rank)
        fields = {
            name: getattr(whole, name)[:, rows]
            for name in (
                "labels",
                "loss_mask",
                "position_ids",
                "teacher_logprobs",
                "rollout_logprobs",
                "sequence_index",
            )
        }
        halves.append(replace(whole, **fields))
    outputs = run_world(losses_of_context_parallel_ranks, 2, halves)
    loss = Loss(
        LossConfig(normalization="per_sequence"), vocab=VocabRange.of(211, 256, None), sequence_parallel=False
    )
    expected = loss(exact((44, 40), 1)[:, None], exact((256, 40), 2), whole)
    assert sum(int(output.denominator) for output in outputs) == int(expected.denominator) == 3
    assert sum(float(output.numerator) for output in outputs) == pytest.approx(float(expected.numerator))
    for name, pair in expected.metric_sums.items():
        torch.testing.assert_close(sum(output.metric_sums[name] for output in outputs), pair, msg=name)


def non_finite_in_one_shard() -> str:
    """A NaN in the weights of one shard only: every rank sees it, and names the same token."""
    topology = grid.initialize(ParallelConfig(tensor_model_parallel_size=2), seed=1)
    vocab = VocabRange.of(211, 256, topology.tp_group)
    weight = exact((128, 40), 2)
    if topology.tp_rank == 1:
        weight[5] = torch.nan
    batch = random_batch([20, 12], vocab_size=211)
    loss = Loss(LossConfig(), vocab=vocab, sequence_parallel=False)
    output = loss(exact((32, 1, 40), 1), weight, batch)
    grid.destroy()
    try:
        loss.finite.raise_if_any(output.metric_sums)
    except NonFiniteLoss as error:
        return str(error)
    return ""


@pytest.mark.dist
def test_a_non_finite_shard_is_seen_by_all_ranks() -> None:
    first, second = run_world(non_finite_in_one_shard, 2)
    assert "document 100, token 7" in first  # the first trained token of the first document
    assert first == second
