"""The line of the log."""

import pytest

from lopd_megatron.config import RunConfig
from lopd_megatron.train import log


def test_the_time_left_goes_by_the_iterations_of_this_start(monkeypatch: pytest.MonkeyPatch) -> None:
    hook = log.LogHook(RunConfig())
    hook.first, hook.started = 100, 50.0
    monkeypatch.setattr(log.time, "monotonic", lambda: 50.0 + 80.0)
    assert hook._left(120, 200) == "0:05:20 left"
    assert hook._left(200, 200) == "0:00:00 left"
