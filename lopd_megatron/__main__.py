"""`lopd`: one command for the whole pipeline.

    lopd VERB [ARGUMENTS]          lopd VERB --help

A recipe is FILE.py:FUNCTION or FILE.py:FUNCTION(gpus=64). `lopd recipes` lists those that are shipped.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from lopd_megatron.commands import GROUPS, VERBS
from lopd_megatron.errors import UserError, run_program


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    verb, *arguments = words
    if verb == "--version":
        from lopd_megatron import __version__

        print(f"lopd_megatron {__version__}")
        return 0
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"lopd has no verb {verb!r}{hint} There are {', '.join(VERBS)}")
    module, _, function = VERBS[verb][0].partition(":")
    # Programs read their arguments from here, as if they had been started by themselves.
    sys.argv = [f"lopd {verb}", *arguments]
    return getattr(importlib.import_module(module), function)() or 0


def overview() -> str:
    """The text of `lopd --help`."""
    lines = [(__doc__ or "").strip()]
    for group, verbs in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {verb:<12}{text}" for verb, (_, text) in verbs.items())]
    return "\n".join(lines)


def run_verb(verb: str) -> None:
    """Run a verb as a whole program; for the files in tools/."""
    run_program(lambda: main([verb, *sys.argv[1:]]))


def run() -> None:
    """The console script."""
    run_program(main)


if __name__ == "__main__":
    run()
