"""Content hashes of models and tokenizers.

A fingerprint is a dictionary `{"kind", "fingerprint", "origin"}`: the hash says what the thing is, the origin
(a path as it was given) says where it was found, and only hashes are compared. A model's hash covers its
config and the bytes of every tensor, whatever files hold them; a tokenizer's covers the map from token to id,
the rules that split text, the settings and the chat template.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from lopd_megatron.errors import UserError
from lopd_megatron.files import sha256_file, write_json
from lopd_megatron.hf_folder import (
    EMBEDDING,
    HEAD,
    read_config,
    read_header,
    read_json,
    refuse_second_head,
    stored_tensors,
)
from lopd_megatron.progress import log_line, progress

Fingerprint = dict[str, str]

# Rewritten by every save_pretrained, and no part of the function that the model computes.
_VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
_SHOW_PROGRESS_BYTES = 4 << 30


def model_fingerprint(folder: str | Path) -> Fingerprint:
    """Content hash of a Hugging Face folder: `config.json` and every tensor's name, dtype, shape and bytes.

    Independent of how tensors are spread over safetensors files. Hashes of files are cached under
    `$XDG_CACHE_HOME/lopd_megatron` by path, size and times of the file; the first call reads every byte.
    """
    path = Path(folder)
    config = read_config(path)
    digest = hashlib.sha256()
    for name in _VOLATILE_CONFIG:
        config.pop(name, None)
    digest.update(_canonical(config))
    files = sorted({stored.file for stored in stored_tensors(path).values()})
    tensors: dict[str, str] = {}
    for hashes in _tensor_hashes(files):
        tensors |= hashes
    if config.get("tie_word_embeddings") and {HEAD, EMBEDDING} <= tensors.keys():
        refuse_second_head(path, same=tensors[HEAD] == tensors[EMBEDDING])
    digest.update(_canonical(tensors))
    return {"kind": "model", "fingerprint": digest.hexdigest(), "origin": str(folder)}


def tokenizer_fingerprint(folder: str | Path) -> Fingerprint:
    """Content hash of a tokenizer: `vocabulary` (token ↔ id, compared between models) and `chat_template`.

    `fingerprint` covers these, the files that say how text is split, and the settings. A vocabulary larger
    than the embedding of the folder's model is a UserError.
    """
    path = Path(folder)
    vocabulary, rules = _vocabulary_and_rules(path)
    template = path / "chat_template.jinja"
    settings = {name: read_json(path / name) for name in _TOKENIZER_SETTINGS if (path / name).is_file()}
    if template.is_file():
        text = template.read_bytes()
    else:
        text = _canonical(settings.get("tokenizer_config.json", {}).get("chat_template", ""))
    chat_template = hashlib.sha256(text).hexdigest()
    whole = _canonical([vocabulary, rules, chat_template, settings])
    return {
        "kind": "tokenizer",
        "fingerprint": hashlib.sha256(whole).hexdigest(),
        "origin": str(folder),
        "vocabulary": vocabulary,
        "chat_template": chat_template,
    }


def cache_folder(name: str) -> Path:
    """Where something is kept that can be computed again, `$XDG_CACHE_HOME/lopd_megatron/NAME`."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "lopd_megatron" / name


def _tensor_hashes(files: list[Path]) -> list[dict[str, str]]:
    """One {tensor: hash} per file, from the cache where size and times are unchanged."""
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
    header = read_header(file)
    with file.open("rb") as handle, mmap(handle.fileno(), 0, access=ACCESS_READ) as mapped:
        body = memoryview(mapped)

        def one(name: str) -> str:
            stored = header[name]
            digest = hashlib.sha256(f"{stored.kind} {list(stored.shape)} ".encode())
            digest.update(body[stored.offset : stored.end])
            return digest.hexdigest()

        names = sorted(header)
        try:
            return dict(zip(names, pool.map(one, names), strict=True))
        finally:
            body.release()


def _vocabulary_and_rules(folder: Path) -> tuple[str, str]:
    """Hash of the sorted (token, id) pairs, added tokens included, or of the files that imply them; and hash
    of the files that say how text is split."""
    path = folder / "tokenizer.json"
    if path.is_file():
        tokenizer = read_json(path)
        try:
            vocabulary = tokenizer["model"]["vocab"]
            if isinstance(vocabulary, list):  # unigram: [token, score] in the order of the ids
                vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
            added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
            largest = int(max(vocabulary.values(), default=0))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{path} is not a tokenizer; copy that of the model again") from None
        _refuse_larger_vocabulary(folder, largest)
        return hashlib.sha256(_canonical({**vocabulary, **added})).hexdigest(), sha256_file(path)
    names = ("tokenizer.model", "vocab.json", "added_tokens.json")
    if not any((folder / name).is_file() for name in names):
        raise UserError(f"{folder} holds no tokenizer.json; copy the tokenizer of the model there")
    return _hash_files(folder, names), _hash_files(folder, (*names, "merges.txt"))


def _hash_files(folder: Path, names: Sequence[str]) -> str:
    """Of those that exist."""
    digest = hashlib.sha256()
    for name in names:
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _refuse_larger_vocabulary(folder: Path, largest: int) -> None:
    """Added tokens may lie past the embedding, like a padding token of no text; data is checked for them."""
    if not (folder / "config.json").is_file():
        return
    config = read_config(folder)
    size = config.get("text_config", config).get("vocab_size")
    if isinstance(size, int) and largest >= size:
        raise UserError(
            f"the tokenizer in {folder} has the token id {largest}, and config.json says vocab_size {size}; "
            "copy the tokenizer of this model there"
        )


def _cache_path(file: Path) -> Path:
    key = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:32]
    return cache_folder("fingerprints") / f"{key}.json"


def _stamp(stat: os.stat_result) -> dict[str, int]:
    # Copies and tools may keep the modification time; nobody sets that of the last change.
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}


def _read_cache(file: Path, cache: Path) -> dict[str, str] | None:
    try:
        value = read_json(cache)
    except UserError:  # there is none, or it is damaged
        return None
    tensors = value.get("tensors")
    return tensors if isinstance(tensors, dict) and _stamp(file.stat()).items() <= value.items() else None


def _write_cache(cache: Path, value: dict[str, Any]) -> None:
    try:
        write_json(cache, value)
    except (OSError, UserError) as error:  # a home that is full or read-only costs time, not correctness
        log_line(f"fingerprint cache: {error}; it will be computed again next time")


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
