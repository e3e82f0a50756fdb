"""Prints a recipe: all settings as JSON, or only those that differ from the defaults.

lopd show recipes/qwen3_8b.py:lightning_opd [section.key=value ...] [--diff]
lopd recipes
"""

from __future__ import annotations

import argparse
import inspect
import json

from lopd_megatron import cli
from lopd_megatron.config import RunConfig


def main() -> int:
    arguments = cli.parser(__doc__, dry_run=False)
    arguments.add_argument("--diff", action="store_true", help="only what differs from the defaults")
    config, options = cli.parse(arguments)
    if not options.diff:
        print(json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False))
        return 0
    defaults = RunConfig().leaves()
    changed = {name: value for name, value in config.leaves().items() if value != defaults[name]}
    width = max(map(len, changed), default=0)
    for name, value in changed.items():
        print(f"{name:<{width}}  {_text(value)}   (default {_text(defaults[name])})")
    return 0


def recipes() -> int:
    """Every shipped recipe with its arguments and the first line of its docstring."""
    argparse.ArgumentParser(description=recipes.__doc__).parse_args()
    for file in sorted(cli.RECIPES.glob("*.py")):
        module = cli.recipe_module(file)
        names = cli.recipe_names(module)
        if names:
            print(f"recipes/{file.name}: {_first_line(module)}")
        for name in names:
            function = getattr(module, name)
            parameters = inspect.signature(function).parameters.values()
            given = ", ".join(f"{p.name}={p.default}" for p in parameters if p.name != "root")
            print(f"  :{name + (f'({given})' if given else ''):<32}{_first_line(function)}".rstrip())
    return 0


def _first_line(documented: object) -> str:
    return (inspect.getdoc(documented) or "").split("\n")[0]


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
