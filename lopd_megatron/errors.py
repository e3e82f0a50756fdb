"""Errors a user can act on: one line with the value, the limit and the fix; exit code 2; no traceback."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_REQUEUE = 85
"""The program saved its state and stopped before it was finished: start the same command again."""
EXIT_INTERRUPTED = 130
"""Ctrl-C where nothing could be saved, or a second one."""

EXIT_DOCUMENTS_FAILED = 3
"""The stage is finished, but documents were set aside with their errors."""


class UserError(Exception):
    """A wrong input. `str(error)` is shown as it is, so it names the value, the limit and the fix."""


def run_program(main: Callable[[], int | None]) -> None:
    """Run `main` as a whole program: a `UserError` becomes one line on stderr and exit code 2.

    So does what the file system refuses: a full disk, a missing permission. A reader that closes the pipe, as
    `head` does, ends the program without a traceback.
    """
    # Importing vLLM or transformers makes a million objects that stay; with Python's default of 700 the
    # collections in between take a fifth of the time.
    gc.set_threshold(10_000, 10, 10)
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        code = _refused(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit would raise again
        code = 0
    except OSError as error:
        from lopd_megatron.files import advice

        if (found := advice(error)) is None:
            raise
        code = _refused(found)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    sys.exit(code)


def _refused(line: str) -> int:
    print(f"error: {line}", file=sys.stderr)
    return EXIT_USER_ERROR
