"""What made an artifact, and the rules that keep one teacher, student and vocabulary through a pipeline.

Rules (Lightning OPD, section 3.3: a teacher that did not write the SFT data biases every update)
    1  the teacher that scores the rollouts is the teacher that wrote the SFT data of the student
    2  the rollouts were sampled by the weights that training starts from
    3  student, teacher and data have one vocabulary
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lopd_megatron.errors import UserError
from lopd_megatron.fingerprints import Fingerprint, model_fingerprint, tokenizer_fingerprint
from lopd_megatron.hf_folder import read_json
from lopd_megatron.progress import log_line

LINEAGE_FILE = "lineage.json"


class Lineage(BaseModel):
    """The `lineage` of every manifest and of `lineage.json` in a model folder; unknown stays None."""

    model_config = ConfigDict(extra="forbid")

    generator: Fingerprint | None = None
    """Data: the model that sampled the responses."""
    teacher: Fingerprint | None = None
    """Data: the model that scored the responses. Model: the one whose scores it was trained on."""
    sft_teacher: Fingerprint | None = None
    """The model that wrote the SFT data which the student (or this model) was fine-tuned on."""
    start: Fingerprint | None = None
    """Model: the weights its last training started from."""
    tokenizer: Fingerprint | None = None
    prompts: dict[str, Any] = {}
    sampling: dict[str, Any] = {}
    scoring: dict[str, Any] = {}
    engine: dict[str, Any] = {}
    """Engine and version, dtype, log-prob mode: whatever can move a log-prob."""
    parents: list[str] = []
    """Hashes of the artifacts this one was made from."""
    allow_mismatch: str = ""
    """The reason for which broken rules were let pass, here or in a parent."""

    def same_content(self, other: Lineage) -> bool:
        """Equal up to the places where models and tokenizers were found."""
        return _without_origin(self.model_dump()) == _without_origin(other.model_dump())


def read_model_lineage(folder: str | Path) -> Lineage:
    """`lineage.json` of a model folder; all unknown where there is none (a model from elsewhere)."""
    path = Path(folder) / LINEAGE_FILE
    return parse_lineage(read_json(path), path) if path.is_file() else Lineage()


def parse_lineage(value: Any, source: str | Path) -> Lineage:
    """A lineage that was read from `source`."""
    try:
        return Lineage.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{source}: lineage field {place or '(all)'}: {first['msg']}; make the file again"
        ) from None


def check_consistency(
    *,
    student: str | Path | None = None,
    teacher: str | Path | None = None,
    data: Lineage | None = None,
    data_origin: str | Path = "",
    needs_teacher: bool = True,
    allow_mismatch: str = "",
) -> str:
    """Hold the three rules on whatever is known: call it before any accelerator is touched.

    `student` and `teacher` are Hugging Face folders, `data` is the lineage of rollouts, scored rollouts or a
    dataset. A broken rule is a UserError with both fingerprints and their origins, unless `allow_mismatch`
    gives a reason. Returns the reason to record: empty where no rule is broken.
    """
    known = data or Lineage()
    if (known.teacher or known.generator) and teacher and not Path(teacher).is_dir():
        teacher = None  # training needs no teacher at hand: the data says who it was
    start = model_fingerprint(student) if student else None
    present = model_fingerprint(teacher) if teacher else None
    broken = []
    if not needs_teacher:
        broken.append(_differs("the SFT data was written by", known.generator, "model.teacher is", present))
    else:
        sft_teacher = (read_model_lineage(student).sft_teacher if student else None) or known.sft_teacher
        scorer = known.teacher or present
        broken.append(_differs("the rollouts were scored by", known.teacher, "model.teacher is", present))
        broken.append(_differs("the scoring teacher is", scorer, "the SFT data was written by", sft_teacher))
        broken.append(
            _differs("the rollouts were sampled by", known.generator, "training starts from", start)
        )
    tokenizers = [tokenizer_fingerprint(folder) for folder in (student, teacher) if folder]
    tokenizers += [known.tokenizer] if known.tokenizer else []
    for other in tokenizers[1:]:
        broken.append(_differs("tokenizer", tokenizers[0], "tokenizer", other, key="vocabulary"))
    found = [text for text in broken if text]
    if not found:
        return known.allow_mismatch
    where = f"{data_origin}: " if data_origin else ""
    if not allow_mismatch:
        raise UserError(
            f"{where}{'; '.join(found)}; use the same, or set lineage.allow_mismatch=REASON to record why not"
        )
    log_line(f"{where}{'; '.join(found)}; allowed: {allow_mismatch}")
    return allow_mismatch


def _differs(
    first: str, a: Fingerprint | None, second: str, b: Fingerprint | None, key: str = "fingerprint"
) -> str:
    if a is None or b is None or a[key] == b[key]:
        return ""
    return f"{first} {a['origin']} ({key} {a[key][:16]}), but {second} {b['origin']} ({key} {b[key][:16]})"


def _without_origin(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_origin(item) for key, item in value.items() if key != "origin"}
    return value
