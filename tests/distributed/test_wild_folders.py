"""Model folders as people have them: our logits are those of transformers, or the folder is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lopd_megatron.errors import UserError
from tests.distributed.world import run_world
from tests.helpers import wild_folders

TOLERANCE = 2e-4
"""Float32 rounding of two implementations over two layers, on logits of a few units; a wrong weight gives 0.1
and more. Weights in bfloat16 and float16 are the same numbers on both sides."""


def logits_of_all(out: str, names: list[str]) -> dict[str, float | str]:
    """Largest difference to transformers by folder, or the text of the refusal."""
    from lopd_megatron.config import RunConfig
    from lopd_megatron.fingerprints import model_fingerprint
    from lopd_megatron.model.student import build_student
    from lopd_megatron.model.student_spec import student_spec
    from lopd_megatron.model.verify import fixed_documents, student_logits, transformers_logits
    from lopd_megatron.model.weights import load_hf
    from lopd_megatron.parallel import topology as grid

    config = RunConfig()
    config.train.precision = "fp32"
    config.model.attention = "sdpa"
    topology = grid.initialize(config.parallel, seed=1)
    found: dict[str, float | str] = {}
    for name in names:
        folder = Path(out) / name
        try:
            model_fingerprint(folder)
            spec = student_spec(folder, config)
            chunks = build_student(spec, topology)
            load_hf(chunks, folder, spec, topology)
        except UserError as error:
            found[name] = str(error)
            continue
        documents = fixed_documents(spec.vocab_size)
        ours = student_logits(chunks, documents, topology)
        assert ours is not None
        theirs = transformers_logits(folder, documents)
        found[name] = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    return found


@pytest.mark.dist
def test_every_folder_is_read_as_transformers_reads_it_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected = wild_folders.write(tmp_path / "folders")
    (found,) = run_world(logits_of_all, 1, str(tmp_path / "folders"), list(expected))
    wrong = []
    for name, refusal in expected.items():
        outcome = found[name]
        if refusal is None:
            right = isinstance(outcome, float) and outcome <= TOLERANCE
        else:
            right = isinstance(outcome, str) and refusal in outcome and "\n" not in outcome
        if not right:
            wrong.append(f"{name}: wanted {refusal or 'equal logits'}, got {outcome}")
    assert wrong == [], "\n".join(wrong)
    assert sum(refusal is not None for refusal in expected.values()) >= 25
