"""A stand-in for training that takes 45 s and no CPU: `python slow_trainer.py FOLDER`.

The result depends on every step and on their order. Told to stop, it saves and leaves with the requeue code.
"""

import json
import signal
import sys
import time
from pathlib import Path

from lopd_megatron.errors import EXIT_REQUEUE

STEPS = 450


def advance(value: int) -> int:
    return (value * 1103515245 + 12345) % 2**31


def main(folder: Path) -> int:
    stop: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: stop.append(number))
    state = folder / "state.json"
    step, value = json.loads(state.read_text()) if state.exists() else (0, 1)
    while step < STEPS:
        time.sleep(0.1)
        step, value = step + 1, advance(value)
        if stop and step < STEPS:
            state.write_text(json.dumps([step, value]))
            return EXIT_REQUEUE
    (folder / "result.json").write_text(json.dumps(value))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
