"""Prints what makes a shell complete `lopd`: verbs, recipe files and settings.

lopd completion bash     # in ~/.bashrc: source <(lopd completion bash)
lopd completion zsh      # in ~/.zshrc: source <(lopd completion zsh)
"""

from __future__ import annotations

import argparse

BASH = """\
_lopd() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}"
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{verbs}" -- "$word"))
  elif [[ "$word" == recipes/* || "$word" == *.py* ]]; then
    COMPREPLY=($(compgen -f -X '!*.py' -- "$word"))
  else
    compopt -o nospace
    COMPREPLY=($(compgen -W "{settings}" -- "$word") $(compgen -f -- "$word"))
  fi
}}
complete -F _lopd lopd
"""


def main() -> int:
    from lopd_megatron.commands import VERBS
    from lopd_megatron.config import RunConfig

    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("shell", choices=("bash", "zsh"))
    args = arguments.parse_args()
    if args.shell == "zsh":
        print("autoload -U +X bashcompinit && bashcompinit")
    settings = " ".join(f"{name}=" for name in RunConfig().leaves())
    print(BASH.format(verbs=" ".join(VERBS), settings=settings), end="")
    return 0
