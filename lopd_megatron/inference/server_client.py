"""A live vLLM server whose weights follow the training: rollouts and scores by HTTP, weights in place.

`server.VllmServer` starts the server; every request carries its key. Everything goes in and comes out as
token ids. A server that dies is waited for. Requests that were lost are sent again; because they carry
their seed, they give the same answers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

import httpx
import numpy as np

from lopd_megatron.errors import UserError
from lopd_megatron.inference.requests import (
    Generation,
    GenerationRequest,
    Sampling,
    ScoreRequest,
    TokenScores,
)
from lopd_megatron.inference.server_key import headers
from lopd_megatron.progress import log_line

Answer = TypeVar("Answer")

POLL_S = 1.0
MAX_SERVER_ERRORS = 5
REQUEST_TIMEOUT_S = 3600.0
"""Of one answer. A dead server closes its connections; this only ends a server that hangs."""


class ServerClient:
    """Requests to one server, at most `max_in_flight` at a time.

    `patience_s`: how long the server may be away, counted anew from every answer, before a UserError.
    """

    def __init__(self, url: str, name: str, *, key: str, patience_s: float, max_in_flight: int = 256) -> None:
        self.url = url.rstrip("/")
        self.name = name
        self.key = key
        self.patience_s = patience_s
        self.max_in_flight = max_in_flight
        self.weight_version = "default"
        """vLLM's name of the weights in the server; "default" before the first `reload`."""
        self.weights_folder = ""
        self._said_away = False

    def wait_until_ready(self) -> None:
        """Block until the server answers; UserError after `patience_s`."""
        asyncio.run(self._with_client(self._ready))

    def generate(self, requests: Iterable[GenerationRequest], sampling: Sampling) -> list[Generation]:
        """One response per request, in their order, all from the weights of the last `reload`.

        Log-probs are the model's own at temperature 1, before top-p.
        """

        def body(request: GenerationRequest) -> dict[str, Any]:
            return {
                "token_ids": request.prompt_tokens,
                "sampling_params": {
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    "max_tokens": sampling.max_response_tokens,
                    "stop_token_ids": list(sampling.stop_token_ids),
                    "seed": request.seed,
                    "logprobs": 0,
                    "detokenize": False,
                },
            }

        def read(request: GenerationRequest, answer: dict[str, Any]) -> Generation:
            (choice,) = answer["choices"]
            logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
            assert len(choice["token_ids"]) == len(logprobs) > 0
            return Generation(
                request.key, choice["token_ids"], np.array(logprobs, np.float32), choice["finish_reason"]
            )

        return self._ask(list(requests), body, read)

    def score(self, requests: Iterable[ScoreRequest], *, topk: int) -> list[TokenScores]:
        """Log-probs at temperature 1 of exactly the given ids, in the order of the requests."""

        def body(request: ScoreRequest) -> dict[str, Any]:
            parameters = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": topk, "detokenize": False}
            return {"token_ids": request.tokens, "sampling_params": parameters}

        def read(request: ScoreRequest, answer: dict[str, Any]) -> TokenScores:
            rows = answer["prompt_logprobs"][request.start :]
            return score_from_rows(request, rows, topk)

        return self._ask(list(requests), body, read)

    def reload(self, folder: str, version: str) -> None:
        """Replace the weights by those of a Hugging Face folder that the server can read; cached keys go."""
        self.weights_folder, self.weight_version = folder, version
        asyncio.run(self._with_client(self._reload))

    def _ask(
        self,
        requests: list[Any],
        body: Callable[[Any], dict[str, Any]],
        read: Callable[[Any, dict[str, Any]], Answer],
    ) -> list[Answer]:
        async def ask(client: httpx.AsyncClient) -> list[Answer]:
            room = asyncio.Semaphore(self.max_in_flight)
            repair = asyncio.Lock()

            async def one(request: Any) -> Answer:
                async with room:
                    while True:
                        answer = await self._post(client, "/inference/v1/generate", body(request))
                        if versions_of(answer) == {self.weight_version}:
                            return read(request, answer)
                        # The server was started anew and has the weights it began with.
                        async with repair:
                            if await self._server_version(client) != self.weight_version:
                                await self._reload(client)

            return list(await asyncio.gather(*map(one, requests)))

        return asyncio.run(self._with_client(ask))

    async def _server_version(self, client: httpx.AsyncClient) -> str:
        return (await client.get("/weight_info")).raise_for_status().json()["weight_version"]

    async def _reload(self, client: httpx.AsyncClient) -> None:
        arguments = {"weights_path": self.weights_folder}
        await self._post(client, "/pause?mode=wait", None)
        await self._post(client, "/collective_rpc", {"method": "reload_weights", "kwargs": arguments})
        await self._post(client, "/reset_prefix_cache", None)
        await self._post(client, "/update_weight_version", {"new_version": self.weight_version})
        await self._post(client, "/resume", None)

    async def _post(self, client: httpx.AsyncClient, path: str, body: Any) -> dict[str, Any]:
        """The JSON of the answer. A server that went away is waited for, and asked again."""
        broken = 0
        while True:
            try:
                answer = await client.post(path, json=body)
            except httpx.TransportError:
                await self._ready(client)
                continue
            if answer.status_code == 200:
                return answer.json()
            # A server whose engine has died answers 5xx before it leaves; one that goes on so is broken.
            broken += 1
            if answer.status_code == 401:
                raise UserError(
                    f"{self.name} at {self.url} does not take the key of this run; give both sides one "
                    "online.key_file, or let the training start the server"
                )
            if answer.status_code < 500 or broken > MAX_SERVER_ERRORS:
                raise UserError(
                    f"{self.name} at {self.url} refuses {path} ({answer.status_code}): {answer.text[:300]}; "
                    "it must be vLLM 0.32 with --enable-scale-out and VLLM_SERVER_DEV_MODE=1"
                )
            await asyncio.sleep(POLL_S)
            await self._ready(client)

    async def _ready(self, client: httpx.AsyncClient) -> None:
        start = time.monotonic()
        told = False
        while not await self._is_healthy(client):
            away = time.monotonic() - start
            if away > self.patience_s:
                raise UserError(
                    f"{self.name} at {self.url} has not answered for {away:.0f} s "
                    f"(online.server_patience_s={self.patience_s:.0f}); start it on the same address and "
                    "start the run again: it goes on from its last checkpoint"
                )
            if away > POLL_S and not self._said_away:
                log_line(f"{self.name} at {self.url} does not answer; waiting for it")
                told = self._said_away = True
            await asyncio.sleep(POLL_S)
        if told:  # by this one of perhaps hundreds of requests that wait
            self._said_away = False
            log_line(f"{self.name} at {self.url} is back after {time.monotonic() - start:.0f} s")

    async def _is_healthy(self, client: httpx.AsyncClient) -> bool:
        try:
            # Without the right key it lives all the same; the next request says what is wrong.
            return (await client.get("/health", timeout=10)).status_code in (200, 401)
        except httpx.TransportError:
            return False

    async def _with_client(self, work: Callable[[httpx.AsyncClient], Awaitable[Answer]]) -> Answer:
        limits = httpx.Limits(max_connections=self.max_in_flight + 1)
        timeout = httpx.Timeout(REQUEST_TIMEOUT_S, connect=10)
        # No proxy from the environment: servers stand in the same cluster.
        async with httpx.AsyncClient(
            base_url=self.url,
            limits=limits,
            timeout=timeout,
            trust_env=False,
            headers=headers(self.key),
        ) as client:
            return await work(client)


def versions_of(answer: dict[str, Any]) -> set[str]:
    """The weights that made an answer: several if they changed on the way."""
    return {span["version"] for span in answer["choices"][0]["weight_versions"]}


def score_from_rows(request: ScoreRequest, rows: list[dict[str, Any]], topk: int) -> TokenScores:
    """From vLLM's `prompt_logprobs` in JSON, {token id as text: {logprob, rank}}, of tokens[start:]."""
    sampled = request.tokens[request.start :]
    assert len(rows) == len(sampled), f"{len(rows)} scores for {len(sampled)} tokens"
    logprobs = np.array(
        [row[str(token)]["logprob"] for token, row in zip(sampled, rows, strict=True)], np.float32
    )
    ids = np.empty((len(rows), topk), np.int32)
    values = np.empty((len(rows), topk), np.float32)
    for position, row in enumerate(rows if topk else ()):
        ranked = sorted((entry["rank"], int(token), entry["logprob"]) for token, entry in row.items())
        for column, (_, token, logprob) in enumerate(ranked[:topk]):
            ids[position, column], values[position, column] = token, logprob
    return TokenScores(request.key, logprobs, ids, values)
