"""The command line that every program shares.

    PROGRAM --recipe FILE.py:FUNCTION [section.key=value ...] [--section-leaf value ...] [--dry-run]

Megatron's long flags work for every field whose last name is unique: `--train-iters 3` is
`train.train_iters=3`. Values are YAML scalars or lists. Precedence: recipe < command line.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lopd_megatron.config import RunConfig, Section
from lopd_megatron.errors import UserError


def load_recipe(spec: str) -> RunConfig:
    """`recipes/tiny.py:lightning_opd` → the RunConfig which that function returns."""
    file, _, function = spec.partition(":")
    path = Path(file)
    if not function:
        raise UserError(f"recipe {spec!r} has no function name; write FILE.py:FUNCTION")
    if not path.is_file():
        near = _closest(path.stem, [p.stem for p in path.parent.glob("*.py")])
        raise UserError(f"recipe file {file!r} does not exist{near}")
    module = recipe_module(path)
    names = recipe_names(module)
    if function not in names:
        raise UserError(
            f"{file} has no recipe {function!r}{_closest(function, names)}; it has {', '.join(names)}"
        )
    config = getattr(module, function)()
    assert isinstance(config, RunConfig), f"{spec} returned {type(config)}"
    return config


def recipe_module(path: Path) -> Any:
    """The module in a recipe file, which need not be importable by name."""
    module_spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path.resolve())
    assert module_spec is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look their module up
    # Not by the loader, which leaves bytecode beside the recipe: a dry run writes nothing.
    exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    return module


def recipe_names(module: Any) -> list[str]:
    """Public functions of a recipe module that need no argument and are annotated to return RunConfig."""
    return [
        name
        for name, value in vars(module).items()
        if callable(value)
        and not name.startswith("_")
        and getattr(value, "__annotations__", {}).get("return") in ("RunConfig", RunConfig)
        and all(p.default is not p.empty for p in inspect.signature(value).parameters.values())
    ]


def apply_override(config: RunConfig, key: str, text: str) -> None:
    """Set one dotted field from its YAML text; unknown names and wrong types are UserErrors."""
    *parents, leaf = key.split(".")
    section: Any = config
    known = list(config.leaves())
    for name in parents:
        section = getattr(section, name, None) if isinstance(section, Section) else None
    if not isinstance(section, Section) or leaf not in type(section).model_fields:
        raise UserError(f"unknown setting {key!r}{_closest(key, known)}")
    if isinstance(getattr(section, leaf), Section):
        raise UserError(f"{key!r} is a section; set one of its fields, as in {key}.NAME=VALUE")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if isinstance(value, str):  # YAML reads 1e-3 as text
        try:
            value = float(value)
        except ValueError:
            value = text
    old = getattr(section, leaf)
    if isinstance(value, int | float) and not isinstance(value, bool) and isinstance(old, str):
        value = text
    try:
        setattr(section, leaf, value)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{key}={text}: {first['msg']}") from None


def parser(description: str | None) -> argparse.ArgumentParser:
    """The shared arguments; a program adds its own before `parse`."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--recipe", required=True, metavar="FILE.py:FUNCTION")
    result.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config and what would be read and written; touch nothing",
    )
    return result


def parse(
    arguments: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[RunConfig, argparse.Namespace]:
    """Read the recipe, apply the overrides in order, check the whole."""
    known, rest = arguments.parse_known_args(argv)
    config = load_recipe(known.recipe)
    flags = _flags(config)
    items = list(rest)
    while items:
        item = items.pop(0)
        if item.startswith("--"):
            flag, equals, value = item.partition("=")
            if flag not in flags:
                raise UserError(f"unknown option {flag!r}{_closest(flag, list(flags))}")
            if not equals:
                if not items:
                    raise UserError(f"option {flag} needs a value")
                value = items.pop(0)
            apply_override(config, flags[flag], value)
        elif "=" in item:
            key, _, value = item.partition("=")
            apply_override(config, key, value)
        else:
            raise UserError(f"cannot read argument {item!r}; write section.key=value")
    config.check()
    return config, known


def dry_run(config: RunConfig, reads: Sequence[object], writes: Sequence[object]) -> int:
    """Print what a program would do. Returns exit code 0."""
    print(json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False))
    for path in reads:
        print(f"would read:  {path}")
    for path in writes:
        print(f"would write: {path}")
    return 0


def _flags(config: RunConfig) -> dict[str, str]:
    """`--leaf-name` → dotted name, for the leaf names that only one section has."""
    by_leaf: dict[str, list[str]] = {}
    for key in config.leaves():
        by_leaf.setdefault(key.rsplit(".", 1)[-1], []).append(key)
    return {"--" + n.replace("_", "-"): keys[0] for n, keys in by_leaf.items() if len(keys) == 1}


def _closest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
