"""The lineage chain as a picture, and the three rules of `lopd_megatron.lineage` held against it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

from lopd_megatron.config import RunConfig
from lopd_megatron.fingerprints import Fingerprint
from lopd_megatron.lineage import Lineage, read_model_lineage
from lopd_megatron.report.run_folder import RunFolder

BOX_WIDTH, BOX_HEIGHT, GAP, ROW = 136, 62, 30, 104


@dataclass(frozen=True)
class Box:
    title: str
    lines: tuple[str, str]
    exists: bool = True


@dataclass(frozen=True)
class Rule:
    """One rule of lineage and what the files say: True holds, False broken, None unknown."""

    text: str
    verdict: bool | None
    detail: str


def lineage_picture(run: RunFolder) -> Markup:
    """Teacher above, the run's stages in the middle, the weights it starts from below."""
    stages = _stages(run)
    data = run.data_lineage
    start = _start(run)
    column = {box.title: index for index, box in enumerate(stages)}
    width = len(stages) * (BOX_WIDTH + GAP) - GAP + 2
    parts = [_arrow_head()]
    for index, box in enumerate(stages):
        parts.append(_box(box, index, 1))
        if index:
            parts.append(_line([_side(index - 1, 1, "right"), _side(index, 1, "left")]))
    teacher = data.generator if run.is_sft else data.teacher
    reader = "rollouts" if run.is_sft else "scores"
    if reader in column:
        title = "teacher"
        parts.append(_box(_model_box(title, teacher, run.config, "teacher"), column[reader], 0))
        parts.append(_line([_side(column[reader], 0, "bottom"), _side(column[reader], 1, "top")]))
    at = column.get("rollouts", max(column["training"] - 1, 0)) if not run.is_sft else 1
    parts.append(_box(_model_box("starting student", start, run.config, "student"), at, 2))
    if not run.is_sft and "rollouts" in column:
        parts.append(_line([_side(at, 2, "top"), _side(at, 1, "bottom")]))
    x, y = _side(at, 2, "right")
    below, _ = _side(column["training"], 1, "bottom")
    parts.append(_line([(x, y), (below, y), _side(column["training"], 1, "bottom")]))
    parent = _parent(run)
    if parent and at > 0:
        parts.append(_box(parent, at - 1, 2))
        parts.append(_line([_side(at - 1, 2, "right"), _side(at, 2, "left")]))
    height = 2 * ROW + BOX_HEIGHT + 2
    return Markup(f'<svg class="wide" viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>')


def rules(run: RunFolder) -> list[Rule]:
    """The three rules, as far as the files of this run tell."""
    data, start = run.data_lineage, _start(run)
    if run.is_sft:
        return []
    sft_teacher = data.sft_teacher or (run.weights.sft_teacher if run.weights else None)
    trained = run.weights.tokenizer if run.weights else None
    return [
        _rule("The teacher that scored the rollouts wrote the student's SFT data", data.teacher, sft_teacher),
        _rule("The rollouts were sampled by the weights that training starts from", data.generator, start),
        _rule("Data and trained weights have one vocabulary", data.tokenizer, trained, key="vocabulary"),
    ]


def short(path: str) -> str:
    """The end of a path, enough to know it by."""
    parts = Path(path).parts
    return "/".join(parts[-2:]) if len(parts) > 1 else path


def _start(run: RunFolder) -> Fingerprint | None:
    """The weights that training started from, as its export says."""
    return run.weights.start if run.weights else None


def _rule(text: str, a: Fingerprint | None, b: Fingerprint | None, key: str = "fingerprint") -> Rule:
    if a is None or b is None:
        return Rule(text, None, "not recorded in this run's files")
    if a[key] == b[key]:
        return Rule(text, True, a[key][:16])
    return Rule(text, False, f"{short(a['origin'])} {a[key][:16]} ≠ {short(b['origin'])} {b[key][:16]}")


def _stages(run: RunFolder) -> list[Box]:
    config, boxes = run.config, []
    for title, part, unit in (
        ("prompts", run.prompts, "prompts"),
        ("rollouts", run.rollouts, "rollouts"),
        ("scores", run.scored, "scores"),
    ):
        if title == "scores" and run.is_sft:
            continue
        if part:
            boxes.append(Box(title, (f"{part.rows:,} {unit}", f"{part.tokens:,} tokens")))
        elif not (config and config.data.prefixes):
            boxes.append(Box(title, ("not there yet", ""), False))
    if run.datasets:
        documents = sum(manifest.documents for manifest in run.datasets)
        boxes.append(Box("dataset", (f"{documents:,} documents", run.datasets[0].fingerprint[:12])))
    else:
        boxes.append(Box("dataset", ("not there yet", ""), False))
    if run.metrics and config:
        done = f"{run.metrics[-1]['iteration']:,} of {config.train.train_iters:,} steps"
        boxes.append(Box("training", (config.loss.objective, done)))
    else:
        boxes.append(Box("training", ("not there yet", ""), False))
    exported = run.weights is not None
    boxes.append(Box("HF weights", ("safetensors" if exported else "not there yet", ""), exported))
    if run.evaluations:
        first = run.evaluations[0]
        text = f"{100 * first['accuracy']:.1f} ± {100 * first['standard_error']:.1f} %"
        boxes.append(Box("evaluation", (text, f"{first['num_problems']:,} problems")))
    elif config is None or config.evaluation.input:
        boxes.append(Box("evaluation", ("not there yet", ""), False))
    return boxes


def _model_box(title: str, made_by: Fingerprint | None, config: RunConfig | None, field: str) -> Box:
    if made_by:
        return Box(title, (short(made_by["origin"]), made_by["fingerprint"][:12]))
    given = getattr(config.model, field) if config else ""
    return Box(title, (short(given) if given else "unknown", "hash not recorded"), bool(given))


def _parent(run: RunFolder) -> Box | None:
    """What the starting weights were made from, by the lineage in their own folder."""
    if run.config is None or not Path(run.config.model.student).is_dir():
        return None
    lineage: Lineage = read_model_lineage(run.config.model.student)
    if lineage.start is None:
        return None
    by = f"SFT data: {short(lineage.sft_teacher['origin'])}" if lineage.sft_teacher else "trained from"
    return Box(short(lineage.start["origin"]), (by, lineage.start["fingerprint"][:12]))


def _place(column: int, row: int) -> tuple[float, float]:
    return 1 + column * (BOX_WIDTH + GAP), 1 + row * ROW


def _side(column: int, row: int, side: str) -> tuple[float, float]:
    x, y = _place(column, row)
    return {
        "left": (x, y + BOX_HEIGHT / 2),
        "right": (x + BOX_WIDTH, y + BOX_HEIGHT / 2),
        "top": (x + BOX_WIDTH / 2, y),
        "bottom": (x + BOX_WIDTH / 2, y + BOX_HEIGHT),
    }[side]


def _box(box: Box, column: int, row: int) -> str:
    x, y = _place(column, row)
    kind = "box" if box.exists else "box missing"
    texts = "".join(
        f'<text x="{x + 10}" y="{y + 37 + 16 * i}">{escape(_fitted(line))}</text>'
        for i, line in enumerate(box.lines)
    )
    return (
        f'<rect class="{kind}" x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6"/>'
        f'<text class="strong" x="{x + 10}" y="{y + 19}">{escape(_fitted(box.title))}</text>{texts}'
    )


def _fitted(text: str, characters: int = 21) -> str:
    return text if len(text) <= characters else "…" + text[1 - characters :]


def _line(points: list[tuple[float, float]]) -> str:
    return f'<path class="arrow" marker-end="url(#head)" d="M{"L".join(f"{x} {y}" for x, y in points)}"/>'


def _arrow_head() -> str:
    return (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path class="head" d="M0 0L8 4L0 8Z"/></marker></defs>'
    )
