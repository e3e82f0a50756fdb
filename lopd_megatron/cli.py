"""The command line that every program shares.

    lopd VERB FILE.py:FUNCTION [section.key=value ...] [--section-leaf value ...] [--dry-run]

Megatron's long flags work for every field whose last name is unique: `--train-iters 3` is
`train.train_iters=3`. Values are YAML scalars or lists. Precedence: recipe < command line.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lopd_megatron.config import RunConfig, Section
from lopd_megatron.errors import UserError
from lopd_megatron.progress import log_line

RECIPES = Path(__file__).parent / "recipes"
"""The shipped recipes: `recipes/` of the repository."""
RENAMED = {
    "rollout": "rollouts",
    "scoring": "scores",
    "launch.stages.score": "launch.stages.scores",
    "launch.stages.build": "launch.stages.dataset",
}
"""Sections that were renamed after 0.1.0; the old names work and are reported."""


def is_recipe(word: str) -> bool:
    """Whether an argument names a recipe and not a setting: `FILE.py:FUNCTION`, with or without arguments."""
    head = word.split("=", 1)[0]
    return not word.startswith("-") and (":" in head or head.endswith(".py"))


def load_recipe(spec: str) -> RunConfig:
    """The RunConfig of a recipe: `recipes/tiny.py:lightning_opd`, `recipes/qwen3_8b.py:sft(gpus=16)`.

    A file that does not exist here is looked up among the shipped recipes, by name.
    """
    file, colon, call = spec.partition(":")
    path = _recipe_file(file)
    module = recipe_module(path)
    names = recipe_names(module)
    if not colon or not call:
        raise UserError(f"recipe {spec!r} names no function; {file} has {', '.join(names)}")
    function, arguments = _call(spec, call)
    if function not in names:
        raise UserError(
            f"{file} has no recipe {function!r}{_closest(function, names)}; it has {', '.join(names)}"
        )
    recipe = getattr(module, function)
    known = list(inspect.signature(recipe).parameters)
    if unknown := next((name for name in arguments if name not in known), None):
        raise UserError(f"{spec}: no argument {unknown!r}; {function} takes {', '.join(known) or 'none'}")
    try:
        config = recipe(**arguments)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{spec} failed: {_described(error, path.resolve())}") from error
    if not isinstance(config, RunConfig):
        raise UserError(f"{spec} returned {type(config).__name__}; a recipe returns a RunConfig")
    return config


def _recipe_file(file: str) -> Path:
    path = Path(file)
    if path.is_file():
        return path
    shipped = {file.name: file for file in RECIPES.glob("*.py")}
    if path.parent in (Path("."), Path("recipes")) and path.with_suffix(".py").name in shipped:
        return shipped[path.with_suffix(".py").name]
    names = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
    near = _closest(path.name, [*names, *shipped])
    raise UserError(
        f"recipe file {file!r} does not exist{near}; shipped are {', '.join(f'recipes/{n}' for n in shipped)}"
    )


def _call(spec: str, call: str) -> tuple[str, dict[str, Any]]:
    """`name(key=value, …)` → name and arguments; values are literals, nothing is evaluated."""
    if "(" not in call:
        return call, {}
    try:
        node = ast.parse(call, mode="eval").body
        assert isinstance(node, ast.Call)
        assert isinstance(node.func, ast.Name)
        assert not node.args
        arguments = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords if word.arg}
        assert len(arguments) == len(node.keywords)
    except (SyntaxError, ValueError, AssertionError):
        raise UserError(f"cannot read recipe {spec!r}; write FILE.py:FUNCTION(name=value, ...)") from None
    return node.func.id, arguments


def recipe_module(path: Path) -> Any:
    """The module in a recipe file; wrong Python in it is a UserError with the line.

    A shipped file is imported as part of the package. Any other is executed, and its folder joins the search
    path, as with `python FILE.py`: what lies beside a recipe can be named in its settings. No bytecode is
    written, because a dry run writes nothing.
    """
    path = path.resolve()
    quiet, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        if path.is_relative_to(RECIPES.resolve()):
            inside = path.relative_to(RECIPES.resolve()).with_suffix("")
            return importlib.import_module(".".join(("lopd_megatron.recipes", *inside.parts)))
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
        module_spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
        assert module_spec is not None
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[module_spec.name] = module  # dataclasses look their module up
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
        return module
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"recipe file {path} cannot be loaded: {_described(error, path)}") from error
    finally:
        sys.dont_write_bytecode = quiet


def _described(error: Exception, path: Path) -> str:
    """An error of somebody's recipe in one line, with the last line of that file that it went through."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else (lines[-1] if lines else None)
    text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        text = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"{type(error).__name__}: {text}" + (f" (line {line})" if line else "")


def recipe_names(module: Any) -> list[str]:
    """Public functions of a recipe module that need no argument and are annotated to return RunConfig."""
    return [
        name
        for name, value in vars(module).items()
        if callable(value)
        and not name.startswith("_")
        and getattr(value, "__annotations__", {}).get("return") in ("RunConfig", RunConfig)
        and getattr(value, "__module__", module.__name__) == module.__name__
        and all(p.default is not p.empty for p in inspect.signature(value).parameters.values())
    ]


def apply_override(config: RunConfig, key: str, text: str) -> None:
    """Set one dotted field from its YAML text; unknown names and wrong types are UserErrors."""
    key = _current_name(key)
    *parents, leaf = key.split(".")
    section: Any = config
    known = list(config.leaves())
    for name in parents:
        section = getattr(section, name, None) if isinstance(section, Section) else None
    if not isinstance(section, Section) or leaf not in type(section).model_fields:
        raise UserError(f"unknown setting {key!r}; {_suggestion(key, known)}")
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
    if isinstance(old, list) and isinstance(value, str):
        value = [text]
    if isinstance(old, str) and (value is None or isinstance(value, int | float | bool)):
        value = text  # an empty text or a name of digits; YAML has its own opinion
    try:
        setattr(section, leaf, value)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{key}={text}: {first['msg']}") from None


def parser(description: str | None, *, dry_run: bool = True) -> argparse.ArgumentParser:
    """The shared arguments; a program adds its own before `parse`."""
    result = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="The recipe is the first argument FILE.py:FUNCTION, or follows --recipe. "
        "`lopd settings` lists all settings.",
    )
    result.add_argument("--recipe", metavar="FILE.py:FUNCTION")
    if dry_run:
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
    known, items = arguments.parse_known_args(argv)
    if known.recipe is None:
        known.recipe = next((item for item in items if is_recipe(item)), None)
        if known.recipe is None:
            raise UserError("name a recipe, as in recipes/tiny.py:sft; `lopd recipes` lists those shipped")
        items.remove(known.recipe)
    config = load_recipe(known.recipe)
    flags = _flags(config)
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


def _current_name(key: str) -> str:
    """Today's name of a setting that was renamed."""
    for old, new in RENAMED.items():
        if key.startswith(old + "."):
            log_line(f"{old}.* is called {new}.* now")
            return new + key[len(old) :]
    return key


def _suggestion(key: str, known: Sequence[str]) -> str:
    """The names of the section where it exists, else the nearest name."""
    section = key.rpartition(".")[0]
    inside = [name for name in known if section and name.startswith(section + ".")]
    # Inside a section only a near miss: all its names follow.
    near = _closest(key, inside or known, cutoff=0.85 if inside else 0.5).removeprefix("; ")
    if not inside:
        return near or "`lopd settings` lists all"
    names = ", ".join(name.removeprefix(section + ".") for name in inside)
    return f"{near.rstrip('?') + '? ' if near else ''}{section} has {names}"


def _closest(name: str, known: Sequence[str], cutoff: float = 0.5) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""
