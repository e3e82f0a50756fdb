"""The workbench of the study: models that share an engine, used from two threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lopd_megatron.config import EngineConfig
from lopd_megatron.inference.requests import Generation, GenerationRequest, Sampling
from lopd_megatron.study.workbench import LocalModel, Workbench


class FakeEngine:
    """Answers with the number of the folder whose weights it has at that moment."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self._weights = -1

    def reload(self, folder: str) -> bool:
        self._weights = int(Path(folder).name)
        return True

    def generate(self, requests: list[GenerationRequest], sampling: Sampling) -> Iterator[Generation]:
        for request in requests:
            yield Generation(request.key, [self._weights], np.zeros(1, np.float32), "stop")
            self.started.set()
            time.sleep(0.05)  # long enough for another thread to change the weights


def test_a_call_keeps_its_weights_while_another_thread_wants_others(tmp_path: Path) -> None:
    """Rollouts made ahead and the measuring of a curve did this to each other in `standard_overlap`."""
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    bench = Workbench(EngineConfig(), 8)
    engine: Any = FakeEngine()
    bench._engines.append((engine, ("", ())))
    requests = [GenerationRequest((0, place), [5], place) for place in range(3)]
    sampling = Sampling(1.0, 1.0, 8, (2,))
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(LocalModel(bench, str(tmp_path / "0")).generate, requests, sampling)
        assert engine.started.wait(10)
        measured = LocalModel(bench, str(tmp_path / "1")).generate(requests, sampling)
    assert [answer.response_tokens for answer in ahead.result()] == [[0]] * 3
    assert [answer.response_tokens for answer in measured] == [[1]] * 3
