"""Errors a user can act on: one line with the value, the limit and the fix; exit code 2; no traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2
EXIT_REQUEUE = 85
"""The program saved its state and stopped before it was finished: start the same command again."""


EXIT_DOCUMENTS_FAILED = 3
"""The stage is finished, but documents were set aside with their errors."""


class UserError(Exception):
    """A wrong input. `str(error)` is shown as it is, so it names the value, the limit and the fix."""


def run_program(main: Callable[[], int | None]) -> None:
    """Run `main` as a whole program: a `UserError` becomes one line on stderr and exit code 2.

    A reader that closes the pipe, such as `head`, ends the program without a traceback.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_USER_ERROR
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit would raise again
        code = 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    sys.exit(code)
