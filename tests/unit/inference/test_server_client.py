"""The client of a vLLM server: what it does when the server goes away, comes back or refuses."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from lopd_megatron.errors import UserError
from lopd_megatron.inference import server_client
from lopd_megatron.inference.requests import GenerationRequest, Sampling, ScoreRequest
from lopd_megatron.inference.server_client import ServerClient, score_from_rows

KEY = "a key of this test"
SAMPLING = Sampling(1.0, 1.0, 4, (2,))
REQUESTS = [GenerationRequest((0, i), [1, 5 + i], seed=i) for i in range(3)]


class FakeVllm(ThreadingHTTPServer):
    """Answers a generation with the seed as its token; `faults` are status codes of the next answers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.version = "default"
        self.faults: list[int] = []
        self.paths: list[str] = []
        self.back_at = 0.0
        """Not healthy before this `time.monotonic()`."""
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeVllm

    def do_GET(self) -> None:
        away = self.path == "/health" and time.monotonic() < self.server.back_at
        self._answer(503 if away else 200, {"weight_version": self.server.version})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        self.server.paths.append(self.path)
        if self.headers["Authorization"] != f"Bearer {KEY}":
            return self._answer(401, {"error": "no key"})
        if self.server.faults:
            return self._answer(self.server.faults.pop(0), {"error": "engine dead"})
        if self.path == "/update_weight_version":
            self.server.version = body["new_version"]
        self._answer(200, self._generated(body) if self.path.endswith("generate") else {})

    def _generated(self, body: dict[str, Any]) -> dict[str, Any]:
        token = body["sampling_params"]["seed"]
        choice = {
            "token_ids": [token],
            "finish_reason": "stop",
            "logprobs": {"content": [{"logprob": -1.5}]},
            "weight_versions": [{"version": self.server.version}],
        }
        return {"choices": [choice]}

    def _answer(self, code: int, value: dict[str, Any]) -> None:
        text = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVllm]:
    monkeypatch.setattr(server_client, "POLL_S", 0.02)
    fake = FakeVllm()
    threading.Thread(target=fake.serve_forever, args=(0.02,), daemon=True).start()
    yield fake
    fake.shutdown()
    fake.server_close()


def client(server: FakeVllm, patience_s: float = 20.0) -> ServerClient:
    return ServerClient(server.url, "student server", key=KEY, patience_s=patience_s)


def test_answers_come_in_the_order_of_the_requests(server: FakeVllm) -> None:
    rollouts = client(server).generate(REQUESTS, SAMPLING)
    assert [r.response_tokens for r in rollouts] == [[0], [1], [2]]
    assert rollouts[0].logprobs.tolist() == [-1.5]


def test_a_dying_engine_is_asked_again(server: FakeVllm) -> None:
    server.faults = [500, 503]
    assert len(client(server).generate(REQUESTS, SAMPLING)) == 3


def test_a_server_that_came_back_gets_the_weights_again(server: FakeVllm) -> None:
    student = client(server)
    student.reload("/weights", "7")
    server.version = "default"  # as after a restart
    server.paths.clear()
    student.generate(REQUESTS, SAMPLING)
    assert server.version == "7"
    assert server.paths.count("/collective_rpc") == 1


def test_an_outage_is_told_once_however_many_requests_wait(
    server: FakeVllm, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults, server.back_at = [500] * len(REQUESTS), time.monotonic() + 0.3
    assert len(client(server).generate(REQUESTS, SAMPLING)) == len(REQUESTS)
    output = "".join(capsys.readouterr())
    assert output.count("does not answer") == output.count("is back after") == 1


def test_an_absent_server_is_waited_for_until_patience_ends(server: FakeVllm) -> None:
    late = ServerClient("http://127.0.0.1:9", "teacher server", key=KEY, patience_s=0.1)
    with pytest.raises(UserError, match=r"teacher server at .* has not answered"):
        late.wait_until_ready()


@pytest.mark.parametrize("code", [400, 403])
def test_a_refusal_is_one_line_with_its_reason(server: FakeVllm, code: int) -> None:
    server.faults = [code] * 9
    with pytest.raises(UserError, match=rf"refuses /inference/v1/generate \({code}\): .*engine dead"):
        client(server).generate(REQUESTS, SAMPLING)


def test_another_key_is_one_line(server: FakeVllm) -> None:
    stranger = ServerClient(server.url, "student server", key="another key", patience_s=1)
    with pytest.raises(UserError, match=r"student server at .* does not take the key of this run"):
        stranger.generate(REQUESTS, SAMPLING)


def test_scores_name_the_given_token_and_the_most_likely_ones() -> None:
    def entry(logprob: float, rank: int) -> dict[str, float]:
        return {"logprob": logprob, "rank": rank}

    rows = [
        {"7": entry(-3.0, 9), "4": entry(-0.1, 1), "5": entry(-2.5, 2)},
        {"4": entry(-0.2, 1), "8": entry(-1.9, 2)},
    ]
    score = score_from_rows(ScoreRequest((0, 0), [1, 7, 4], 1), rows, topk=2)
    assert score.logprobs == pytest.approx(np.array([-3.0, -0.2]))
    assert score.topk_ids.tolist() == [[4, 5], [4, 8]]
    assert score.topk_logprobs == pytest.approx(np.array([[-0.1, -2.5], [-0.2, -1.9]]))
