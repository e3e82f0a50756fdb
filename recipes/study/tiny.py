"""What `make study` compares: every system of the papers on the tiny task, one cell each, for one seed.

A cell is trained from the model another cell made, on a dataset or on fresh rollouts. The recipes of tiny.py
are the base of all; a cell changes a line. Teachers, base student and problems are the same for all seeds;
everything after them depends on the seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lopd_megatron.config import RunConfig
from lopd_megatron.refresh import refresh_rounds
from lopd_megatron.study.cells import Cell, Data, Part

from .. import tiny

STUDY = "runs/study"
TOPK = (1, 2, 4, 8, 16, 26)
"""26 beside the sampled token are the whole vocabulary of 27 words."""
CLIPS = (0.1, 0.5, 2.0, 10.0, None)
SCORES = ("topk_kl", "squared_log_ratio", "accuracy")


class Study:
    """The cells of one seed."""

    def __init__(self, seed: int, study: str = STUDY) -> None:
        self.seed = seed
        self.models = f"{study}/models"
        self.root = f"{study}/seed_{seed}"
        self.held_out = Data(
            "held_out",
            self._model("sft"),
            self._teacher("teacher"),
            f"{self.models}/task/problems/valid.jsonl",
            topk=16,
        )

    def pretraining(self, name: str) -> RunConfig:
        """The run that makes a teacher or the base student, on one rank."""
        config: RunConfig = getattr(tiny, name)(self.models)
        return _one_rank(config)

    def recipes(self) -> dict[str, str]:
        """Cell → hash of all settings that its result comes from, back to the random weights."""
        recipes: dict[str, str] = {}
        for cell in self.cells():
            parts = [
                [_settings(part.config), asdict(part.data) if part.data else part.prompts]
                for part in cell.parts
            ]
            models = [self.model_recipe(name) for name in ("base", *cell.teachers)]
            recipes[cell.name] = _hash([models, [recipes[name] for name in cell.needs], parts])
        return recipes

    def model_recipe(self, name: str) -> str:
        """Hash of all settings of a teacher or the base student."""
        return _hash(_settings(self.pretraining(name)))

    def cells(self) -> list[Cell]:
        """In an order in which they can run: what the others start from first."""
        sft = self._sft("sft", "teacher")
        return [
            sft,
            *self._controls(),
            *self._lightning(),
            *self._online(),
            *self._topk(),
            *self._effopd(),
            *self._mismatch(),
            *self._soft(),
            *self._variants(),
        ]

    def _controls(self) -> list[Cell]:
        more = self._config(tiny.sft, "more_sft", "sft")
        more.train.train_iters = 150
        fresh = self._config(tiny.sft, "sft_fresh", "sft")
        fresh.train.train_iters = 150
        answers = Data(
            "fresh_answers", self._teacher("teacher"), None, f"{self.models}/task/prompts/opd.jsonl"
        )
        return [
            self._cell("more_sft", "core", more, self._sft_data("teacher"), needs=("sft",)),
            self._cell("sft_fresh", "core", fresh, answers, needs=("sft",)),
        ]

    def _lightning(self) -> list[Cell]:
        cells = [self._offline("lightning", "core")]
        for clip in CLIPS:
            if clip != 0.5:
                cells.append(self._offline(f"lightning_clip_{clip or 'none'}", "clip", _clip(clip)))
        return cells

    def _online(self) -> list[Cell]:
        return [
            self._standard("standard", "core"),
            self._standard("standard_topk_1", "core", _topk(1)),
            self._standard("standard_overlap", "online", _overlap),
            self._standard("standard_clip_10.0", "clip", _clip(10.0)),
        ]

    def _topk(self) -> list[Cell]:
        cells = [self._offline(f"lightning_topk_{k}", "core" if k == 1 else "topk", _topk(k)) for k in TOPK]
        forward = self._offline("lightning_forward_topk_1", "topk", _topk(1, "topk_forward_kl"))
        return [*cells, forward]

    def _effopd(self) -> list[Cell]:
        cells = []
        for score in SCORES:
            group = "core" if score == "topk_kl" else "effopd"
            cells.append(self._offline(f"lightning_effopd_{score}", group, _effopd(score)))
            cells.append(self._standard(f"standard_effopd_{score}", "effopd", _effopd(score)))
            both = _both(_topk(1), _effopd(score))
            cells.append(self._offline(f"lightning_topk_1_effopd_{score}", "effopd", both))
        return cells

    def _mismatch(self) -> list[Cell]:
        """Rows: SFT teacher A or B; columns: OPD teacher. (A, A) are lightning and standard themselves."""
        cells = [self._sft("sft_b", "teacher_b", group="mismatch")]
        for start, teacher in (("sft", "teacher_b"), ("sft_b", "teacher"), ("sft_b", "teacher_b")):
            name = f"{'a' if start == 'sft' else 'b'}_{'a' if teacher == 'teacher' else 'b'}"
            cells.append(self._offline(f"lightning_{name}", "mismatch", start=start, teacher=teacher))
            cells.append(self._standard(f"standard_{name}", "mismatch", start=start, teacher=teacher))
        cells.append(self._offline("lightning_a_hard_b", "mismatch", teacher="teacher_hard_b"))
        cells.append(self._standard("standard_a_hard_b", "mismatch", teacher="teacher_hard_b"))
        for teacher in ("teacher_b", "teacher_hard_b"):
            name = f"lightning_topk_1_a_{teacher.removeprefix('teacher_')}"
            cells.append(self._offline(name, "mismatch", _topk(1), teacher=teacher))
        return cells

    def _soft(self) -> list[Cell]:
        """One teacher that leaves more open: more of what it knows is outside of its first few tokens."""
        start, teacher = "sft_soft", "teacher_soft"
        return [
            self._sft(start, teacher, group="soft"),
            self._offline("lightning_soft", "soft", start=start, teacher=teacher),
            *(
                self._offline(f"lightning_topk_{k}_soft", "soft", _topk(k), start=start, teacher=teacher)
                for k in (1, 2, 4)
            ),
            self._standard("standard_soft", "soft", start=start, teacher=teacher),
            self._standard("standard_topk_1_soft", "soft", _topk(1), start=start, teacher=teacher),
        ]

    def _variants(self) -> list[Cell]:
        cells = []
        for objective, change in (("", None), ("topk_1_", _topk(1))):
            few = self._offline(f"lightning_{objective}500x4", "rollouts", change)
            (part,) = few.parts
            assert part.data is not None
            data = replace(part.data, name="rollouts_500x4", samples=4, max_prompts=500)
            cells.append(replace(few, parts=(replace(part, data=data),)))
        for count in (2, 3, 5):
            cells.append(self._rounds(count))
        return cells

    def _rounds(self, count: int) -> Cell:
        whole = self._offline(f"lightning_{count}_rounds", "rounds")
        (part,) = whole.parts
        parts: list[Part] = []
        for config in refresh_rounds(part.config, count):
            assert part.data is not None
            name = f"{part.data.name}_{config.name}" if parts else part.data.name
            data = replace(part.data, name=name, generator=config.model.student)
            parts.append(Part(config, data))
        return replace(whole, parts=tuple(parts))

    def _sft(self, name: str, teacher: str, group: str = "core") -> Cell:
        config = self._config(tiny.sft, name, f"{self.models}/base/hf")
        return self._cell(name, group, config, self._sft_data(teacher), teacher=teacher)

    def _sft_data(self, teacher: str) -> Data:
        return Data(
            f"sft_answers_of_{teacher}", self._teacher(teacher), None, f"{self.models}/task/prompts/sft.jsonl"
        )

    def _offline(
        self,
        name: str,
        group: str,
        change: Callable[[RunConfig], None] | None = None,
        *,
        start: str = "sft",
        teacher: str = "teacher",
    ) -> Cell:
        config = self._config(tiny.lightning_opd, name, start, teacher, change)
        prompts = f"{self.models}/task/prompts/opd.jsonl"
        # Scored once with the largest k: a cell with a smaller one reads the first columns.
        data = Data(
            f"rollouts_of_{start}_by_{teacher}",
            config.model.student,
            config.model.teacher,
            prompts,
            topk=max(TOPK),
        )
        return self._cell(name, group, config, data, teacher=teacher, needs=(start,))

    def _standard(
        self,
        name: str,
        group: str,
        change: Callable[[RunConfig], None] | None = None,
        *,
        start: str = "sft",
        teacher: str = "teacher",
    ) -> Cell:
        config = self._config(tiny.standard_opd, name, start, teacher, change)
        part = Part(config, None, f"{self.models}/task/prompts/opd.jsonl")
        return Cell(name, group, (part,), config.model.teacher, (start,), ("teacher", teacher))

    def _cell(
        self,
        name: str,
        group: str,
        config: RunConfig,
        data: Data,
        *,
        teacher: str = "teacher",
        needs: tuple[str, ...] = (),
    ) -> Cell:
        return Cell(name, group, (Part(config, data),), self._teacher(teacher), needs, ("teacher", teacher))

    def _config(
        self,
        recipe: Callable[[str], RunConfig],
        name: str,
        start: str,
        teacher: str = "teacher",
        change: Callable[[RunConfig], None] | None = None,
    ) -> RunConfig:
        config = recipe(self.models)
        config.name = name
        config.run_dir = f"{self.root}/{name}"
        config.model.student = start if "/" in start else self._model(start)
        config.model.teacher = self._teacher(teacher)
        _one_rank(config)
        config.train.seed = config.rollouts.seed = 1000 + self.seed
        config.train.log_interval = 25
        config.data.alignment_sample = 0
        config.scores.topk = max(TOPK)
        config.data.valid_prefixes = [f"{self.root}/data/{self.held_out.name}"] if name != "sft" else []
        config.effopd.accuracy_problems = [f"{self.models}/task/problems/valid.jsonl"]
        if change is not None:
            change(config)
        return config

    def _model(self, cell: str) -> str:
        return f"{self.root}/{cell}/hf"

    def _teacher(self, name: str) -> str:
        return str(Path(self.models) / name / "hf")


def _one_rank(config: RunConfig) -> RunConfig:
    """World size 1, the documents of a whole step in one row, all problems in the engine at once."""
    config.parallel.tensor_model_parallel_size = 1
    config.parallel.pipeline_model_parallel_size = 1
    config.data.seq_length = 4096
    config.evaluation.engine.max_num_seqs = 512
    return config


def _settings(config: RunConfig) -> Any:
    """What the recipe sets; a setting that is new later, at its default, changes no hash."""
    return config.model_dump(mode="json", exclude_defaults=True)


def _hash(described: Any) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def _clip(value: float | None) -> Callable[[RunConfig], None]:
    def change(config: RunConfig) -> None:
        config.loss.advantage_clip = value

    return change


def _topk(k: int, objective: str = "topk_reverse_kl") -> Callable[[RunConfig], None]:
    def change(config: RunConfig) -> None:
        config.loss.objective = objective
        config.loss.topk = k

    return change


def _overlap(config: RunConfig) -> None:
    config.online.overlap_steps = 1


def _effopd(score: str) -> Callable[[RunConfig], None]:
    def change(config: RunConfig) -> None:
        config.effopd.enabled = True
        config.effopd.score = score  # type: ignore[assignment]

    return change


def _both(*changes: Callable[[RunConfig], None]) -> Callable[[RunConfig], None]:
    def change(config: RunConfig) -> None:
        for one in changes:
            one(config)

    return change
