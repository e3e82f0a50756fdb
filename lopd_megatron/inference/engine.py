"""The vLLM engine, and the only file that imports vllm.

One engine per process and tensor-parallel group serves all the work of a stage. Facts used here were measured
with vLLM 0.32: a CPU engine in this process without torch.compile starts in seconds instead of a minute; its
KV cache must be given a size, or it takes most of the memory; a seeded request whose prefill is cut in chunks
fails on CPU.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from lopd_megatron.config import EngineConfig
from lopd_megatron.imports import quick_imports
from lopd_megatron.inference.engine_settings import (
    CPU_ENVIRONMENT,
    QUIET_ENVIRONMENT,
    Task,
    engine_arguments,
    engine_dtype,
)
from lopd_megatron.inference.outputs import BadAnswer, read_generation, read_native, read_stock, read_tensors
from lopd_megatron.inference.requests import (
    EngineLost,
    Failure,
    Generation,
    GenerationRequest,
    Sampling,
    Score,
    ScoreRequest,
    ScoringPath,
)
from lopd_megatron.inference.sizes import check_fits, read_shape

_closed_in_process: list[Any] = []
"""Engines on the CPU that were closed and not yet taken apart."""


class VllmEngine:
    """An engine for one Hugging Face folder. See `requests.Engine` for the contract of the streams.

    Starts in about 11 CPU-seconds on a CPU, most of them imports. UserError where the model does not fit.
    `engine_settings` says what `task` decides.
    """

    def __init__(
        self,
        model: str,
        config: EngineConfig,
        *,
        task: Task,
        max_topk: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        self.model = model
        self.shape = read_shape(model)
        self.on_step: Callable[[], None] = lambda: None
        on_cpu = not torch.cuda.is_available()
        _set_environment(on_cpu)
        check_fits(self.shape, config, model, on_cpu=on_cpu)
        if config.max_model_len == self.shape.max_position_embeddings:
            # One position more than the model has: never run, see engine_arguments.
            os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
        take_apart_closed()
        self.dtype = engine_dtype(config, on_cpu=on_cpu)
        with warnings.catch_warnings():  # of torch, about vLLM's scan of all modules
            warnings.simplefilter("ignore", FutureWarning)
            with quick_imports():
                from vllm import EngineArgs, LLMEngine
                from vllm.platforms import current_platform

            # Not from torch, which would start CUDA in this process.
            gpu_bytes = 0 if on_cpu else current_platform.get_device_total_memory()
            arguments = engine_arguments(self.shape, config, task, gpu_bytes=gpu_bytes, max_topk=max_topk)
            self._engine = LLMEngine.from_engine_args(
                EngineArgs(
                    model=model,
                    trust_remote_code=trust_remote_code,
                    use_tqdm_on_load=False,
                    **arguments,
                )
            )
        self._in_flight_limit = 2 * config.max_num_seqs
        self._serial = 0

    @property
    def has_native_scoring(self) -> bool:
        """Whether the model runner takes `prompt_logprob_token_ids` (vLLM's V2 runner)."""
        from vllm import SamplingParams

        known = "prompt_logprob_token_ids" in getattr(SamplingParams, "__struct_fields__", ())
        return known and bool(getattr(self._engine.vllm_config, "use_v2_model_runner", False))

    @property
    def vocab_size(self) -> int:
        return int(self._engine.model_config.get_vocab_size())

    def describe(self) -> dict[str, Any]:
        """What an artifact records of the engine that made it."""
        import vllm

        return {
            "engine": "vllm",
            "version": vllm.__version__,
            "dtype": self.dtype,
            "head_dtype": "float32",
            "model_runner": "v2" if self._engine.vllm_config.use_v2_model_runner else "v1",
            "logprobs_mode": str(self._engine.model_config.logprobs_mode),
        }

    def generate(
        self, requests: Iterable[GenerationRequest], sampling: Sampling
    ) -> Iterator[Generation | Failure]:
        """Sample one response per request.

        The log-probs are those of the model itself (temperature 1, before top-p): what a later forward pass
        of the same weights gives again, and equal to the sampling policy's at temperature 1 and top-p 1.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        def parameters(request: GenerationRequest) -> Any:
            return SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p if sampling.temperature > 0 else 1.0,
                max_tokens=sampling.max_response_tokens,
                stop_token_ids=list(sampling.stop_token_ids),
                seed=request.seed,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )

        yield from self._stream(requests, lambda r: r.prompt_tokens, parameters, read_generation)

    def score(
        self, requests: Iterable[ScoreRequest], *, topk: int, path: ScoringPath
    ) -> Iterator[Score | Failure]:
        """Log-probs at temperature 1 of exactly the given ids, float32; `scoring` describes the paths."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        native = path == "native" and topk == 0

        def parameters(request: ScoreRequest) -> Any:
            common = {
                "max_tokens": 1,
                "temperature": 0.0,
                "detokenize": False,
                "output_kind": RequestOutputKind.FINAL_ONLY,
            }
            if native:
                ids = np.asarray(request.tokens[request.start :], np.int32)[:, None]
                return SamplingParams(
                    **common, prompt_logprob_token_ids=ids, prompt_logprob_start=request.start - 1
                )
            return SamplingParams(**common, prompt_logprobs=topk)

        if native:
            read: Callable[..., Score] = read_native
        else:
            read = partial(read_stock if path == "stock" else read_tensors, topk=topk)
        keep = contextlib.nullcontext() if native or path == "stock" else _prompt_logprobs_as_tensors()
        with keep:
            yield from self._stream(requests, lambda r: r.tokens, parameters, read)

    def reload(self, model: str) -> bool:
        """Load the weights of another folder of the same architecture in place; False where it differs."""
        if read_shape(model) != self.shape:
            return False
        self._engine.collective_rpc("reload_weights", kwargs={"weights_path": model})
        self._engine.reset_prefix_cache()
        self.model = model
        return True

    def close(self) -> None:
        """End the engine. One in this process gives its memory back when the process ends or opens another.

        Taking it apart costs 3 CPU-seconds, as much as starting it, and mostly nothing comes after it.
        """
        if not hasattr(self, "_engine"):
            return
        if torch.cuda.is_available():
            self._engine.engine_core.shutdown()
        else:
            _closed_in_process.append(self._engine)
            gc.freeze()  # the collections at exit would look at every object of vLLM
        del self._engine

    def _stream(
        self,
        requests: Iterable[Any],
        prompt_of: Callable[[Any], list[int]],
        parameters: Callable[[Any], Any],
        answer: Callable[[Any, Any], Any],
    ) -> Iterator[Any]:
        """Keep a bounded number of requests in flight; yield answers as they finish."""
        from vllm.exceptions import VLLMValidationError

        pending = iter(requests)
        in_flight: dict[str, Any] = {}
        exhausted = False
        try:
            while in_flight or not exhausted:
                while not exhausted and len(in_flight) < self._in_flight_limit:
                    request = next(pending, None)
                    if request is None:
                        exhausted = True
                        break
                    name = str(self._serial)
                    self._serial += 1
                    try:
                        self._add(name, prompt_of(request), parameters(request))
                    except (VLLMValidationError, ValueError) as error:
                        yield Failure(request.key, str(error))
                        continue
                    in_flight[name] = request
                for output in self._step() if in_flight else ():
                    if not output.finished:
                        continue
                    request = in_flight.pop(output.request_id)
                    try:
                        yield answer(request, output)
                    except BadAnswer as error:
                        yield Failure(request.key, str(error))
        finally:
            if in_flight:  # the reader went away: do not leave its work to the next one
                with contextlib.suppress(Exception):
                    self._engine.abort_request(list(in_flight))

    def _add(self, name: str, tokens: list[int], parameters: Any) -> None:
        # vLLM checks ids only where it has a tokenizer; a wrong one is an index error that ends the engine.
        if not tokens or min(tokens) < 0 or max(tokens) >= self.vocab_size:
            raise ValueError(
                f"token ids must be between 0 and {self.vocab_size - 1} and at least one: "
                f"{len(tokens)} tokens, {min(tokens, default=None)} to {max(tokens, default=None)}"
            )
        with _lost_engines():
            self._engine.add_request(name, {"prompt_token_ids": tokens}, parameters)

    def _step(self) -> list[Any]:
        self.on_step()
        with _lost_engines():
            return self._engine.step()


@contextlib.contextmanager
def _lost_engines() -> Iterator[None]:
    """Whatever says that the engine died or ran out of memory, as `EngineLost`."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except (EngineDeadError, MemoryError, torch.OutOfMemoryError) as error:
        raise EngineLost(f"{type(error).__name__}: {error}") from error
    except RuntimeError as error:
        if "memory" in str(error).lower():  # the CPU allocator has no exception of its own
            raise EngineLost(str(error)) from error
        raise


def take_apart_closed() -> None:
    """Give the memory and the process group of closed engines back: vLLM allows one engine per process."""
    if not _closed_in_process:
        return
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    while _closed_in_process:
        _closed_in_process.pop().engine_core.shutdown()
    cleanup_dist_env_and_memory()
    gc.collect()


def _set_environment(on_cpu: bool) -> None:
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not on_cpu:
        return
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    for name, value in CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # "Triton not available" on a CPU
    if "torch._dynamo" in sys.modules:  # it read its environment when it was imported
        torch._dynamo.config.disable = os.environ["TORCHDYNAMO_DISABLE"] == "1"


@contextlib.contextmanager
def _prompt_logprobs_as_tensors() -> Iterator[None]:
    """While open, `RequestOutput.prompt_logprobs` is vLLM's LogprobsTensors instead of a dict per token.

    Building the dictionaries costs 123 µs of Python per token at k = 64. The engine sends the tensors of a
    whole prompt at once, [L − 1, 1 + k], the given token first. A private function of vLLM: the self-test in
    `scoring` compares with the stock path before any work, and falls back to it.
    """
    from vllm.v1.engine.logprobs import LogprobsProcessor

    original = LogprobsProcessor._update_prompt_logprobs

    def keep(self: Any, tensors: Any) -> None:
        self.prompt_logprobs = tensors

    LogprobsProcessor._update_prompt_logprobs = keep
    try:
        yield
    finally:
        LogprobsProcessor._update_prompt_logprobs = original
