"""Content hashes of models and tokenizers.

A fingerprint is a dictionary `{"kind", "fingerprint", "origin"}`: the hash says what the thing is, the origin
(a path as it was given) says where it was found, and only hashes are compared. A model's hash covers its
config and the bytes of every tensor, whatever files hold them; a tokenizer's covers the map from token to id,
the special tokens and the chat template.
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

from lopd_megatron.errors import UserError
from lopd_megatron.files import write_json
from lopd_megatron.hf_folder import (
    EMBEDDING,
    HEAD,
    read_config,
    read_header,
    read_json,
    refuse_second_head,
    stored_tensors,
)
from lopd_megatron.progress import progress, say

Fingerprint = dict[str, str]

# Rewritten by every save_pretrained, and no part of the function that the model computes.
_VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")
_SHOW_PROGRESS_BYTES = 4 << 30


def model_fingerprint(folder: str | Path) -> Fingerprint:
    """Content hash of a Hugging Face folder: `config.json` and every tensor's name, dtype, shape and bytes.

    Independent of how tensors are spread over safetensors files. Hashes of files are cached under
    `$XDG_CACHE_HOME/lopd_megatron` by path, size and modification time; the first call reads every byte.
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
    """Content hash of a tokenizer: `vocabulary` (token ↔ id, compared between models) and `chat_template`."""
    path = Path(folder)
    vocabulary = _vocabulary_hash(path)
    template = path / "chat_template.jinja"
    settings = path / "tokenizer_config.json"
    if template.is_file():
        text = template.read_text()
    else:
        text = _canonical(read_json(settings).get("chat_template", "") if settings.is_file() else "").decode()
    chat_template = hashlib.sha256(text.encode()).hexdigest()
    both = hashlib.sha256(f"{vocabulary} {chat_template}".encode()).hexdigest()
    return {
        "kind": "tokenizer",
        "fingerprint": both,
        "origin": str(folder),
        "vocabulary": vocabulary,
        "chat_template": chat_template,
    }


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


def _vocabulary_hash(folder: Path) -> str:
    """Hash of the sorted (token, id) pairs, added tokens included, or of the files that imply them."""
    path = folder / "tokenizer.json"
    if path.is_file():
        tokenizer = read_json(path)
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


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
