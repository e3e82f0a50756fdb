"""Shows what a dataset holds: counts, documents as text with their log-probs, histograms, how full rows get.

gap = teacher_logprobs − rollout_logprobs        nats; below 0 the teacher finds the token less likely
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lopd_megatron.data.manifest import Manifest
from lopd_megatron.data.packing import utilisation
from lopd_megatron.data.store import ConcatDataset

Decode = Callable[[int], str]
"""Token id → its text."""

_PLOT_DOCUMENTS = 20_000
# 256-colour codes from "teacher far less likely" to "far more likely"; two nats are far.
_COLOURS = (160, 203, 217, 250, 157, 84, 34)
_FAR = 2.0


def summary(prefix: str, manifest: Manifest) -> Iterator[str]:
    """The manifest as lines."""
    size = sum(entry.bytes for entry in manifest.files.values())
    yield f"{prefix}   schema {manifest.schema_version}   fingerprint {manifest.fingerprint[:16]}"
    yield (
        f"  {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
        f"{manifest.trained_tokens:,} trained; {size / 1e6:,.1f} MB, {size / manifest.tokens:.1f} B a token"
    )
    topk = f", k = {manifest.topk}" if manifest.topk else ""
    yield f"  columns    {', '.join(manifest.columns)}{topk}"
    yield f"  left out   {_counts(manifest.dropped)}"
    yield f"  flagged    {_counts(manifest.flagged_kept)}"
    if manifest.teacher_proof is not None:
        difference = manifest.teacher_proof["mean_abs_difference"]
        yield f"  re-scored  by the teacher, mean |difference| {difference:.2e} nats"
    if manifest.alignment is None:
        yield "  alignment  not proved"
    else:
        proof = manifest.alignment
        yield (
            f"  alignment  mean |difference| {proof['mean_abs_difference']:.2e} nats, max "
            f"{proof['max_abs_difference']:.2e}, over {proof['documents']} documents"
        )
    for name in ("generator", "teacher", "sft_teacher", "tokenizer"):
        made_by = getattr(manifest.lineage, name)
        text = f"{made_by['fingerprint'][:16]}  {made_by['origin']}" if made_by else "unknown"
        yield f"  {name:<10} {text}"
    if manifest.lineage.allow_mismatch:
        yield f"  allowed mismatch: {manifest.lineage.allow_mismatch}"


def row_advice(lengths: np.ndarray, align: int = 1024) -> Iterator[str]:
    """How full packed rows get, for row lengths from the longest document up to eight times it."""
    longest = int(lengths.max())
    yield f"  longest document {longest}, mean {lengths.mean():.0f}; share of real tokens in packed rows:"
    candidates = {-(-longest * factor // align) * align for factor in (1, 1.25, 1.5, 2, 3, 4, 4.25, 6, 8)}
    for capacity in sorted(int(value) for value in candidates):
        yield f"    data.seq_length={capacity:<8} {utilisation(lengths, capacity):7.2%}"


def document_lines(dataset: ConcatDataset, index: int, decode: Decode | None, colour: bool) -> Iterator[str]:
    """One document: its text coloured by the gap, then a line for each token."""
    columns = dataset.document(index)
    tokens, mask = columns["tokens"].tolist(), columns["loss_mask"].tolist()
    words = [decode(token) if decode else str(token) for token in tokens]
    both = {"teacher_logprobs", "rollout_logprobs"} <= dataset.columns
    gaps = columns["teacher_logprobs"] - columns["rollout_logprobs"] if both else np.zeros(len(tokens))
    mean = _mean(gaps, mask)
    label = dataset.document_label(index)
    yield f"document {label}: {len(tokens)} tokens, {sum(mask)} trained, mean gap {mean:+.3f} nats"
    text = (_painted(w, g) if colour and m else w for w, g, m in zip(words, gaps, mask, strict=True))
    yield ("" if decode else " ").join(text)
    yield f"{'position':>8} {'id':>7} {'trained':>7} {'teacher':>9} {'rollout':>9} {'gap':>8}  token"
    for position, token in enumerate(tokens):
        values = [
            f"{columns[name][position]:9.4f}" if name in columns and mask[position] else f"{'·':>9}"
            for name in ("teacher_logprobs", "rollout_logprobs")
        ]
        gap = f"{gaps[position]:+8.3f}" if both and mask[position] else f"{'·':>8}"
        line = f"{position:>8} {token:>7} {mask[position]:>7} {' '.join(values)} {gap}  {words[position]!r}"
        yield _painted(line, float(gaps[position])) if colour and both and mask[position] else line


def save_histograms(dataset: ConcatDataset, folder: Path) -> list[Path]:
    """`lengths.png`, and `logprob_gap.png` where both log-probs are there. Returns the files."""
    lengths = folder / "lengths.png"
    _histogram(dataset.lengths, "tokens per document", lengths, log=False)
    if not {"teacher_logprobs", "rollout_logprobs"} <= dataset.columns:
        return [lengths]
    step = max(1, len(dataset) // _PLOT_DOCUMENTS)
    gaps = []
    for index in range(0, len(dataset), step):
        columns = dataset.document(index)
        trained = columns["loss_mask"] != 0
        gaps.append((columns["teacher_logprobs"] - columns["rollout_logprobs"])[trained])
    gap = folder / "logprob_gap.png"
    _histogram(np.concatenate(gaps), "teacher − rollout log-prob, nats", gap, log=True)
    return [lengths, gap]


def _histogram(values: np.ndarray, label: str, path: Path, *, log: bool) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.hist(values, bins=100, log=log, color="#4477aa")
    axes.set_xlabel(f"{label} (mean {values.mean():.4g}, {len(values):,} values)")
    axes.set_ylabel("count")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _painted(text: str, gap: float) -> str:
    share = (min(_FAR, max(-_FAR, float(gap))) / _FAR + 1) / 2
    code = _COLOURS[round(share * (len(_COLOURS) - 1))]
    return f"\x1b[38;5;{code}m{text}\x1b[0m"


def _mean(gaps: np.ndarray, mask: list[int]) -> float:
    return float(np.sum(gaps * np.array(mask)) / sum(mask)) if sum(mask) else math.nan


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "nothing counted"
