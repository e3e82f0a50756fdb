"""Raw data sets → prompt shards: template applied, tokenized once, filtered, deduplicated, with counts."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lopd_megatron.config import PromptsConfig, RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.files import write_json
from lopd_megatron.fingerprints import tokenizer_fingerprint
from lopd_megatron.lineage import Lineage
from lopd_megatron.progress import log_line, progress
from lopd_megatron.records import PROMPT_SCHEMA
from lopd_megatron.rollouts import shard_files
from lopd_megatron.rollouts.input_files import input_hash, short_names
from lopd_megatron.rollouts.sources import Messages, read_rows
from lopd_megatron.rollouts.templates import Template, load_tokenizer


def prompt_id(tokens: Iterable[int]) -> str:
    """A stable name for a prompt: a hash of its token ids."""
    return hashlib.sha256(np.asarray(list(tokens), np.int32).tobytes()).hexdigest()[:16]


class Contamination:
    """Word n-grams of evaluation problems. A shorter problem counts as one n-gram of its own length."""

    def __init__(self, files: Iterable[str], ngram: int) -> None:
        self._grams: dict[int, set[str]] = {}
        for file in files:
            for row in read_rows(file):
                words = _words(row.content)
                for gram in _ngrams(words, min(ngram, len(words))):
                    self._grams.setdefault(min(ngram, len(words)), set()).add(gram)

    def touches(self, content: str | Messages) -> bool:
        words = _words(content)
        return any(not grams.isdisjoint(_ngrams(words, n)) for n, grams in self._grams.items())


def _words(content: str | Messages) -> list[str]:
    text = content if isinstance(content, str) else " ".join(message["content"] for message in content)
    return text.lower().split()


def _ngrams(words: list[str], n: int) -> Iterator[str]:
    return (" ".join(words[i : i + n]) for i in range(len(words) - n + 1))


class _Kept:
    """The rows that are kept: the first `limit`, or with a seed those of the smallest hash of seed and text.

    The second is a random sample of the distinct rows in one pass, with `limit` rows in memory. It depends on
    neither the order of the input nor its repetitions.
    """

    def __init__(self, limit: int | None, seed: int | None) -> None:
        self.rows: dict[str, tuple[int, dict[str, Any]]] = {}
        self._limit = limit
        self._seed = seed
        self._largest: list[tuple[int, str]] = []  # a heap of (−hash, name)

    @property
    def is_complete(self) -> bool:
        """Whether no later row can be kept."""
        return self._seed is None and self._is_full

    def draws(self, text_hash: bytes) -> bool:
        """Whether a row with this text is among those drawn up to now."""
        return self._seed is None or not self._is_full or self._rank(text_hash) < -self._largest[0][0]

    def add(self, position: int, name: str, row: dict[str, Any], text_hash: bytes) -> None:
        self.rows[name] = (position, row)
        if self._seed is not None and self._limit is not None:
            heapq.heappush(self._largest, (-self._rank(text_hash), name))
            if len(self.rows) > self._limit:
                del self.rows[heapq.heappop(self._largest)[1]]

    @property
    def _is_full(self) -> bool:
        return self._limit is not None and len(self.rows) >= self._limit

    def _rank(self, text_hash: bytes) -> int:
        return int.from_bytes(hashlib.sha256(f"{self._seed} ".encode() + text_hash).digest()[:16], "big")


def collect(config: PromptsConfig, template: Template) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows of PROMPT_SCHEMA in the order of the input, and how many were read, kept, dropped and why."""
    if not config.input:
        raise UserError("prompts.input is empty; set it to the files with the prompts")
    contamination = Contamination(config.contamination_files, config.contamination_ngram)
    kept = _Kept(config.max_prompts, config.sample_seed)
    seen: set[bytes] = set()
    counts: Counter[str] = Counter(read=0, kept=0, too_long=0, duplicate=0, contaminated=0)
    tokenized = same_tokens = answers = 0
    names = short_names(config.input)
    rows = ((name, row) for name, path in zip(names, config.input, strict=True) for row in read_rows(path))
    with progress(None, "prompts", "prompt") as bar:
        for source, row in rows:
            if kept.is_complete:
                break
            bar.update(1)
            counts["read"] += 1
            if row.is_empty:
                counts["empty"] += 1
                continue
            text = repr((row.content, row.tools)) if row.tools else str(row.content)
            text_hash = hashlib.sha256(text.encode()).digest()[:16]
            if (
                text_hash in seen
            ):  # a release of DAPO-Math holds every prompt a hundred times: do not tokenize
                counts["duplicate"] += 1
                continue
            seen.add(text_hash)
            answers += row.answer_dropped
            if not kept.draws(text_hash):
                counts["not_drawn"] += 1
                continue
            tokenized += 1
            tokens = template.row_tokens(row)
            name = prompt_id(tokens)
            if not tokens:
                counts["empty"] += 1
            elif len(tokens) > config.max_prompt_tokens:
                counts["too_long"] += 1
            elif name in kept.rows:
                counts["duplicate"] += 1
                same_tokens += 1
            elif contamination.touches(row.content):
                counts["contaminated"] += 1
            else:
                values = (name, np.asarray(tokens, np.int32), row.answer, source)
                before = len(kept.rows)
                kept.add(counts["read"], name, dict(zip(PROMPT_SCHEMA.names, values, strict=True)), text_hash)
                if len(kept.rows) == before:  # another one went out
                    counts["not_drawn"] += 1
    counts["kept"] = len(kept.rows)
    _refuse_collapse(counts, len(seen), tokenized, same_tokens)
    if answers:
        log_line(f"prompts: the last assistant turn of {answers} conversations is an answer and was left out")
    return [row for _, row in sorted(kept.rows.values(), key=lambda item: item[0])], counts


def _refuse_collapse(counts: Counter[str], texts: int, tokenized: int, same_tokens: int) -> None:
    """A column or a tokenizer that makes all prompts alike is a mistake, however many are left.

    Repeated texts alone are none: a data set may hold each prompt a hundred times.
    """
    if 2 * same_tokens > tokenized:
        raise UserError(
            f"{same_tokens} of {tokenized} different texts have the tokens of another ({_listed(counts)}); "
            "copy the tokenizer and the chat template of the model again"
        )
    if 2 * counts["empty"] > counts["read"]:
        raise UserError(
            f"{counts['empty']} of {counts['read']} prompts are empty ({_listed(counts)}); "
            "give the input whose prompt column holds the text"
        )
    if texts == 1 and counts["duplicate"] >= 9:
        raise UserError(
            f"all {counts['read']} rows hold one prompt ({_listed(counts)}); "
            "give the input whose prompt column holds the questions"
        )


def write_prompts(folder: Path, rows: list[dict[str, Any]], num_shards: int, lineage: Lineage) -> None:
    """Split by prompt id, so that a prompt stays in its shard when the order of the input changes."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[list[dict[str, Any]]] = [[] for _ in range(num_shards)]
    for row in rows:
        digest = hashlib.sha256(row["prompt_id"].encode()).digest()
        parts[int.from_bytes(digest[:8], "big") % num_shards].append(row)
    for index, part in enumerate(parts):
        table = pa.Table.from_pylist(part, schema=PROMPT_SCHEMA)
        shard_files.write_shard(folder, index, table, kind="prompts", num_shards=num_shards, lineage=lineage)


def input_lineage(paths: list[str]) -> dict[str, Any]:
    """The inputs in order: `sha256` is compared with a later run's, `origin` only says where they were."""
    return {"sha256": list(map(input_hash, paths)), "origin": paths}


def run_prompts(config: RunConfig) -> int:
    """Input files → prompt shards. Returns the exit code."""
    section, folder, model = config.prompts, config.paths.prompts, config.model.student
    settings = section.model_dump(mode="json", exclude={"input", "contamination_files"})
    for name in ("input", "contamination_files"):
        settings[name] = input_lineage(getattr(section, name))
    lineage = Lineage(tokenizer=tokenizer_fingerprint(model), prompts=settings)
    shard_files.refuse_other_lineage(folder, section.num_shards, lineage)
    if len(shard_files.manifests(folder, section.num_shards)) == section.num_shards:
        shard_files.complete_manifests(folder, "prompts")
        log_line(f"{folder} is complete")
        return 0
    tokenizer = load_tokenizer(model, trust_remote_code=config.model.trust_remote_code)
    template = Template(tokenizer, section.apply_chat_template, section.enable_thinking)
    rows, counts = collect(section, template)
    if not rows:
        raise UserError(f"no prompt is left of {counts['read']} ({_listed(counts)}); look at prompts.*")
    write_prompts(folder, rows, section.num_shards, lineage)
    write_json(folder / "counts.json", dict(counts))
    log_line(f"{folder}: {_listed(counts)}")
    return 0


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
