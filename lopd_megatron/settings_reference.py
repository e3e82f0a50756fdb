"""Every setting of a run with its type, default and meaning, read from the sections and their docstrings."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union

from pydantic.fields import FieldInfo

from lopd_megatron.config import RunConfig, Section


@dataclass(frozen=True)
class Setting:
    """One field of a run's description, as a reader needs it."""

    name: str
    """Dotted, as on the command line."""
    type: str
    default: str
    meaning: str

    @property
    def section(self) -> str:
        """The first part of the name; empty for the fields of the run itself."""
        return self.name.partition(".")[0] if "." in self.name else ""


def all_settings() -> list[Setting]:
    """All settings in the order of the sections."""
    return list(_walk(RunConfig, RunConfig(), ""))


def section_meaning(section: str) -> str:
    """The first line of a section's docstring; empty where it has none of its own."""
    kind = RunConfig.model_fields[section].annotation
    text = kind.__doc__ if kind is not None else None
    return text.strip().splitlines()[0] if text and text != Section.__doc__ else ""


def as_markdown() -> str:
    """The page docs/settings.md: one table per section."""
    settings = all_settings()
    parts = [
        "# Settings\n",
        "Written by `make docs-settings` from the docstrings in `lopd_megatron/config/`.",
        "`lopd settings SECTION` prints the same. Set a field with `section.key=value`, or with Megatron's",
        "long flag where the last name is unique.\n",
    ]
    for section in dict.fromkeys(setting.section for setting in settings):
        parts.append(f"## {section or 'run'}\n")
        if section and (meaning := section_meaning(section)):
            parts.append(meaning + "\n")
        parts.append("| setting | type | default | meaning |\n| --- | --- | --- | --- |")
        rows = [setting for setting in settings if setting.section == section]
        parts += [f"| `{s.name}` | {_cell(s.type)} | `{s.default}` | {_cell(s.meaning)} |" for s in rows]
        parts.append("")
    return "\n".join(parts)


def _walk(kind: type[Section], values: Section, prefix: str) -> Iterator[Setting]:
    for name, field in kind.model_fields.items():
        value = getattr(values, name)
        if isinstance(value, Section):
            yield from _walk(type(value), value, f"{prefix}{name}.")
        else:
            meaning = " ".join((field.description or "").split())
            yield Setting(f"{prefix}{name}", _type(field), json.dumps(value), meaning)


def _type(field: FieldInfo) -> str:
    """A type for people: `integer ≥ 1`, `one of a, b`."""
    text = _kind(field.annotation)
    for limit in field.metadata:
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            if (bound := getattr(limit, name, None)) is not None:
                text += f" {sign} {bound:g}"
    return text


def _kind(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(part) for part in arguments)
    if origin is list:
        return f"list of {_kind(arguments[0])}s"
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _cell(text: str) -> str:
    return re.sub(r"\|", r"\\|", text)
