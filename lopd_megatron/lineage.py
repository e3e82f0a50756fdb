"""What made an artifact, and the rules that keep one teacher, student and vocabulary through a pipeline.

A fingerprint is a dictionary `{"kind", "fingerprint", "origin"}`: the hash says what the thing is, the origin
(a path as it was given) says where it was found, and only hashes are compared. A model's hash covers its
config and the bytes of every tensor, whatever files hold them; a tokenizer's covers the map from token to id,
the special tokens and the chat template.

Rules (Lightning OPD, section 3.3: a teacher that did not write the SFT data biases every update)
    1  the teacher that scores the rollouts is the teacher that wrote the SFT data of the student
    2  the rollouts were sampled by the weights that training starts from
    3  student, teacher and data have one vocabulary
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lopd_megatron.errors import UserError
from lopd_megatron.files import write_json
from lopd_megatron.progress import progress, say

Fingerprint = dict[str, str]

LINEAGE_FILE = "lineage.json"
# Rewritten by every save_pretrained, and no part of the function that the model computes.
_VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")
_SHOW_PROGRESS_BYTES = 4 << 30


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


def model_fingerprint(folder: str | Path) -> Fingerprint:
    """Content hash of a Hugging Face folder: `config.json` and every tensor's name, dtype, shape and bytes.

    Independent of how tensors are spread over safetensors files. Hashes of files are cached under
    `$XDG_CACHE_HOME/lopd_megatron` by path, size and modification time; the first call reads every byte.
    """
    path = Path(folder)
    config = _read_json(path / "config.json")
    digest = hashlib.sha256()
    for name in _VOLATILE_CONFIG:
        config.pop(name, None)
    digest.update(_canonical(config))
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path} holds no *.safetensors file; give a Hugging Face folder with weights")
    tensors: dict[str, str] = {}
    for hashes in _tensor_hashes(files):
        tensors |= hashes
    digest.update(_canonical(tensors))
    return {"kind": "model", "fingerprint": digest.hexdigest(), "origin": str(folder)}


def tokenizer_fingerprint(folder: str | Path) -> Fingerprint:
    """Content hash of a tokenizer: `vocabulary` (token ↔ id, compared between models) and `chat_template`."""
    path = Path(folder)
    vocabulary = _vocabulary_hash(path)
    template = path / "chat_template.jinja"
    settings = path / "tokenizer_config.json"
    if template.is_file():
        text = template.read_text()
    else:
        text = _canonical(
            _read_json(settings).get("chat_template", "") if settings.is_file() else ""
        ).decode()
    chat_template = hashlib.sha256(text.encode()).hexdigest()
    both = hashlib.sha256(f"{vocabulary} {chat_template}".encode()).hexdigest()
    return {
        "kind": "tokenizer",
        "fingerprint": both,
        "origin": str(folder),
        "vocabulary": vocabulary,
        "chat_template": chat_template,
    }


def read_model_lineage(folder: str | Path) -> Lineage:
    """`lineage.json` of a model folder; all unknown where there is none (a model from elsewhere)."""
    path = Path(folder) / LINEAGE_FILE
    return parse_lineage(_read_json(path), path) if path.is_file() else Lineage()


def write_model_lineage(folder: str | Path, lineage: Lineage) -> None:
    write_json(Path(folder) / LINEAGE_FILE, lineage.model_dump())


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
    objective: str = "lightning_opd",
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
    if objective == "sft":
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
    say(f"{where}{'; '.join(found)}; allowed: {allow_mismatch}")
    return allow_mismatch


def _differs(
    first: str, a: Fingerprint | None, second: str, b: Fingerprint | None, key: str = "fingerprint"
) -> str:
    if a is None or b is None or a[key] == b[key]:
        return ""
    return f"{first} {a['origin']} ({key} {a[key][:16]}), but {second} {b['origin']} ({key} {b[key][:16]})"


def _tensor_hashes(files: list[Path]) -> list[dict[str, str]]:
    """One {tensor: hash} per file, from the cache where size and mtime are unchanged."""
    caches = [_cache_path(file) for file in files]
    found = [_read_cache(file, cache) for file, cache in zip(files, caches, strict=True)]
    missing = [index for index, hashes in enumerate(found) if hashes is None]
    total = sum(files[index].stat().st_size for index in missing)
    bar = progress(total, "fingerprint", "B") if total > _SHOW_PROGRESS_BYTES else None
    # hashlib lets go of the GIL, so threads hash on all cores.
    with bar or contextlib.nullcontext(), ThreadPoolExecutor(os.cpu_count()) as pool:
        for index in missing:
            file = files[index]
            stat = file.stat()
            hashes = _hash_safetensors(file, pool)
            _write_cache(caches[index], {**_stamp(stat), "tensors": hashes})
            found[index] = hashes
            if bar is not None:
                bar.update(stat.st_size)
    return [hashes for hashes in found if hashes is not None]


def _hash_safetensors(file: Path, pool: ThreadPoolExecutor) -> dict[str, str]:
    with file.open("rb") as handle, mmap(handle.fileno(), 0, access=ACCESS_READ) as mapped:
        size = int.from_bytes(mapped[:8], "little")
        try:
            header = json.loads(mapped[8 : 8 + size])
        except ValueError:
            raise UserError(f"{file} is not a safetensors file; download or export it again") from None
        header.pop("__metadata__", None)
        body = memoryview(mapped)[8 + size :]

        def one(name: str) -> str:
            entry = header[name]
            begin, end = entry["data_offsets"]
            if end > len(body):
                raise UserError(f"{file} ends inside tensor {name}; download or export it again")
            digest = hashlib.sha256(f"{entry['dtype']} {entry['shape']} ".encode())
            digest.update(body[begin:end])
            return digest.hexdigest()

        names = sorted(header)
        try:
            return dict(zip(names, pool.map(one, names), strict=True))
        finally:
            body.release()


def _vocabulary_hash(folder: Path) -> str:
    """Hash of the sorted (token, id) pairs, added tokens included, or of the files that imply them."""
    path = folder / "tokenizer.json"
    if path.is_file():
        tokenizer = _read_json(path)
        vocabulary = tokenizer["model"]["vocab"]
        if isinstance(vocabulary, list):  # unigram: [token, score] in the order of the ids
            vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
        return hashlib.sha256(_canonical({**vocabulary, **added})).hexdigest()
    digest = hashlib.sha256()
    names = [
        name for name in ("tokenizer.model", "vocab.json", "added_tokens.json") if (folder / name).is_file()
    ]
    if not names:
        raise UserError(f"{folder} holds no tokenizer.json; copy the tokenizer of the model there")
    for name in names:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _cache_path(file: Path) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:32]
    return root / "lopd_megatron" / "fingerprints" / f"{key}.json"


def _stamp(stat: os.stat_result) -> dict[str, int]:
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _read_cache(file: Path, cache: Path) -> dict[str, str] | None:
    if not cache.is_file():
        return None
    value = json.loads(cache.read_text())
    return value["tensors"] if _stamp(file.stat()).items() <= value.items() else None


def _write_cache(cache: Path, value: dict[str, Any]) -> None:
    try:
        write_json(cache, value)
    except OSError as error:  # a home that is full or read-only costs time, not correctness
        say(f"fingerprint cache {cache.parent}: {error.strerror}; it will be computed again next time")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a Hugging Face folder") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); make or download it again") from None


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def _without_origin(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_origin(item) for key, item in value.items() if key != "origin"}
    return value
