"""What a run starts from and trains on: checked before an accelerator is touched, recorded in checkpoints."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from lopd_megatron.config import RunConfig
from lopd_megatron.data.held_out import held_out_prefixes
from lopd_megatron.data.manifest import Manifest, read_manifest
from lopd_megatron.data.store import open_dataset
from lopd_megatron.fingerprints import Fingerprint, model_fingerprint, tokenizer_fingerprint
from lopd_megatron.lineage import Lineage, check_consistency, read_model_lineage


@dataclass(frozen=True)
class Inputs:
    """Content of the inputs, and the lineage of the model that training makes of them."""

    model: Fingerprint
    dataset: Fingerprint
    lineage: dict[str, Any]
    """`lineage.Lineage` of the trained weights; an export writes it beside them."""

    def describe(self) -> dict[str, Any]:
        """Plain values, for `checkpoint.json`."""
        return asdict(self)


def check_inputs(config: RunConfig) -> Inputs:
    """Hold the lineage rules on the student, the teacher and every dataset; one process is enough.

    Every byte of the datasets is hashed, 13 a token: a flipped bit would train on. The first time it reads
    every byte of the student too; those hashes are cached.
    """
    for prefix in (*config.dataset_prefixes, *held_out_prefixes(config)):
        open_dataset([prefix]).verify()
    manifests = [read_manifest(prefix) for prefix in config.dataset_prefixes]
    reasons = []
    for prefix, manifest in zip(config.dataset_prefixes, manifests, strict=True):
        reason = check_consistency(
            student=config.model.student,
            teacher=config.model.teacher or None,
            data=manifest.lineage,
            data_origin=prefix,
            needs_teacher=config.needs_teacher,
            allow_mismatch=config.lineage.allow_mismatch,
        )
        reasons += [reason] if reason and reason not in reasons else []
    start = model_fingerprint(config.model.student)
    lineage = trained_lineage(config, manifests, start, "; ".join(reasons))
    return Inputs(start, _datasets_fingerprint(config, manifests), lineage.model_dump())


def trained_lineage(config: RunConfig, manifests: list[Manifest], start: Fingerprint, reason: str) -> Lineage:
    """What is to be known of the trained weights: SFT names its teacher, distillation keeps that name."""
    data = manifests[0].lineage
    parent = read_model_lineage(config.model.student)
    is_sft = not config.needs_teacher
    return Lineage(
        teacher=None if is_sft else data.teacher,
        sft_teacher=data.generator if is_sft else parent.sft_teacher,
        start=start,
        tokenizer=tokenizer_fingerprint(config.model.student),
        parents=[start["fingerprint"], *(manifest.fingerprint for manifest in manifests)],
        allow_mismatch=reason,
    )


def _datasets_fingerprint(config: RunConfig, manifests: list[Manifest]) -> Fingerprint:
    content = " ".join(manifest.fingerprint for manifest in manifests)
    return {
        "kind": "dataset",
        "fingerprint": hashlib.sha256(content.encode()).hexdigest(),
        "origin": ", ".join(config.dataset_prefixes),
    }
