"""vLLM servers as child processes: started on a free port, known by process id, ended by it."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import httpx
import torch

from lopd_megatron.config import EngineConfig
from lopd_megatron.errors import UserError
from lopd_megatron.inference.engine_settings import (
    CPU_ENVIRONMENT,
    QUIET_ENVIRONMENT,
    Task,
    as_flags,
    engine_arguments,
)
from lopd_megatron.inference.server_key import KEY_VARIABLE, KeyMiddleware, headers, own_key
from lopd_megatron.inference.sizes import read_shape
from lopd_megatron.progress import log_line

START_S = 1800.0
STOP_S = 30.0
PARENT_DEATH_SIGNAL = 1  # prctl(2)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def server_command(
    model: str, engine: EngineConfig, task: Task, *, host: str, port: int, max_topk: int, gpu_bytes: int
) -> list[str]:
    """vLLM's server for token ids in and out. `vllm serve` does the same but fails with the CPU build."""
    arguments = engine_arguments(read_shape(model), engine, task, gpu_bytes=gpu_bytes, max_topk=max_topk)
    # Scores of prompts are wrong where a prefix came from the cache.
    arguments |= {"enable_prefix_caching": False}
    if not gpu_bytes and engine.kv_cache_memory_bytes is None:
        arguments["kv_cache_memory_bytes"] = None  # the server takes it from its environment
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", model, "--served-model-name", "model", "--host", host, "--port", str(port)),
        *as_flags(arguments),
        *("--generation-config", "vllm", "--enable-scale-out", "--disable-uvicorn-access-log"),
        *("--middleware", f"{KeyMiddleware.__module__}.{KeyMiddleware.__name__}"),
    ]


def gpu_memory(devices: str) -> int:
    """Bytes of the first of the named GPUs, 0 where there is none; asked in a process that ends with CUDA."""
    if not torch.cuda.is_available():
        return 0
    code = "import torch; print(torch.cuda.get_device_properties(0).total_memory)"
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": devices} if devices else {})
    return int(subprocess.check_output([sys.executable, "-c", code], env=environment))


class VllmServer:
    """One server. `start` returns at once, `wait` when it answers; leaving the context ends it."""

    def __init__(
        self,
        name: str,
        model: str,
        engine: EngineConfig,
        log: Path,
        *,
        task: Task,
        max_topk: int = 0,
        devices: str = "",
        host: str = "127.0.0.1",
        port: int | None = None,
        key: str = "",
    ) -> None:
        """`devices`: its CUDA_VISIBLE_DEVICES; only a host without GPUs goes without. No `key`: a new one."""
        read_shape(model)  # a folder that is no model is refused before any process starts
        self.name, self.log, self.devices = name, log, devices
        self.port = port if port is not None else free_port()
        self.key = key or own_key()
        self.url = f"http://{host}:{self.port}"
        self.command = server_command(
            model, engine, task, host=host, port=self.port, max_topk=max_topk, gpu_bytes=gpu_memory(devices)
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> VllmServer:
        if torch.cuda.is_available() and not self.devices:
            raise UserError(
                f"{self.name}: no GPUs are named for it; set online.student_devices and "
                "online.teacher_devices (as in 4,5) to some that CUDA_VISIBLE_DEVICES does not hold"
            )
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # The routes of the development mode load weights; the middleware asks for the key before them.
        environment = os.environ | QUIET_ENVIRONMENT | {"VLLM_SERVER_DEV_MODE": "1", KEY_VARIABLE: self.key}
        if not torch.cuda.is_available():
            # Without a size vLLM takes most of the memory of the host, in GiB.
            # VLLM_ENABLE_V1_MULTIPROCESSING=0 keeps its one worker in the process of the engine's core.
            environment |= CPU_ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1"}
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # its engine processes then share a group, which `stop` ends
                preexec_fn=_end_with_parent,
            )
        log_line(f"{self.name}: starting vLLM on {self.url} (process {self.process.pid}), log {self.log}")
        return self

    def wait(self) -> None:
        """Until the server answers; UserError when it ends instead, with the last line of its log."""
        assert self.process is not None
        begin = time.monotonic()
        while True:
            if self.process.poll() is not None:
                raise UserError(
                    f"{self.name}: the vLLM server ended with code {self.process.returncode} before it was "
                    f"ready; see {self.log}: {_last_line(self.log)}"
                )
            try:
                answer = httpx.get(
                    f"{self.url}/health", timeout=5, trust_env=False, headers=headers(self.key)
                )
                if answer.status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if time.monotonic() - begin > START_S:
                raise UserError(
                    f"{self.name}: the vLLM server is not ready after {START_S:.0f} s; see {self.log}"
                )
            time.sleep(0.5)
        log_line(f"{self.name}: ready after {time.monotonic() - begin:.0f} s")

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """End the server and its engine processes; nothing happens where it has ended."""
        if not self.is_running:
            return
        assert self.process is not None
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End all of its processes at once, as a crash would."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> VllmServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _end_with_parent() -> None:
    """In the child: SIGTERM when the launcher dies, even of a SIGKILL, so that no server is left behind."""
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "(empty)"
