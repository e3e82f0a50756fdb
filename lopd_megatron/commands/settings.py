"""Lists the settings of a run: name, type, default and meaning.

lopd settings                     all sections
lopd settings loss                one section
lopd settings loss.topk           one setting, or all whose name holds the text
lopd settings --markdown          the page docs/settings.md
"""

from __future__ import annotations

import argparse
import shutil
import textwrap

from lopd_megatron.errors import UserError
from lopd_megatron.settings_reference import Setting, all_settings, as_markdown, section_meaning


def main() -> int:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("name", nargs="?", default="", metavar="SECTION|NAME")
    arguments.add_argument("--markdown", action="store_true", help="print the page of the documentation")
    args = arguments.parse_args()
    if args.markdown:
        print(as_markdown(), end="")
        return 0
    known = all_settings()
    found = [s for s in known if not args.name or s.section == args.name or args.name in s.name]
    if not found:
        sections = ", ".join(dict.fromkeys(s.section for s in known if s.section))
        raise UserError(f"no setting {args.name!r}; the sections are {sections}")
    section = None
    for setting in found:
        if setting.section != section:
            section = setting.section
            print(f"\n[{section or 'run'}] {section_meaning(section) if section else ''}".rstrip())
        print("\n".join(_lines(setting)))
    return 0


def _lines(setting: Setting) -> list[str]:
    width = max(60, shutil.get_terminal_size().columns - 8)
    head = f"  {setting.name} = {setting.default}   ({setting.type})"
    return [head, *textwrap.wrap(setting.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)]
