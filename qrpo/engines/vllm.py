"""vLLM's offline engine, driven step by step so that completions are available as they finish.

Runs in the child process that `qrpo.engines.open_engine` starts. Decisions and reasons:
- One request per (prompt, sample), each with its own seed. vLLM's `n` counts seeds up and would
  repeat samples.
- All samples of a prompt in a row: the prefix cache then computes each prompt once.
- Requests are added as others finish, so memory does not grow with the number of prompts.
- The core runs in this process, which starts in seconds, unless a model is sharded over GPUs.
- No chunked prefill on a CPU: together with seeds it crashes the engine.
"""

import gc
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from qrpo.data.chat import load_tokenizer
from qrpo.engines import EngineConfig
from qrpo.engines.decoding import completion_text, stop_strings, stop_token_ids
from qrpo.engines.sampling import Sample, SampleRequest, SamplingConfig
from qrpo.errors import ConfigError, EngineError, ModelError
from qrpo.models import ModelConfig, check_weights, is_local, load_model_config, location, saved_dtype
from qrpo.models.limits import Limits


class VLLMEngine:
    """A loaded vLLM model. Created once per child process; `sample` may be called many times."""

    def __init__(self, config: EngineConfig, model: ModelConfig, limits: Limits):
        spread = config.tensor_parallel_size * config.pipeline_parallel_size > 1
        self._multiprocess = spread or config.separate_process
        if not self._multiprocess:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"  # `limits` are checked, contexts of YaRN included
        os.environ.setdefault("VLLM_LOGGING_COLOR", "0")
        try:
            import vllm
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ConfigError(
                f"vLLM cannot be imported ({error}): install it (`make install`, or `pip install vllm`), or set "
                "engine.kind to transformers"
            ) from error
        gc.freeze()  # vLLM collects garbage several times at start: skip all modules loaded so far
        self._model, self._tokenizer = model, load_tokenizer(model, chat_template=False)
        check_weights(model)
        hf_config = load_model_config(model)
        on_cpu = current_platform.is_cpu()
        arguments: dict[str, Any] = {
            "model": location(model),
            "revision": None if is_local(model) else model.revision,
            "trust_remote_code": model.trust_remote_code,
            "dtype": saved_dtype(model),
            "max_model_len": limits.max_length,
            "max_num_seqs": config.max_num_seqs,
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "tensor_parallel_size": config.tensor_parallel_size,
            "pipeline_parallel_size": config.pipeline_parallel_size,
            "enforce_eager": on_cpu if config.enforce_eager is None else config.enforce_eager,
            "enable_prefix_caching": True,
            "logprobs_mode": "raw_logprobs",
            "generation_config": "vllm",  # every request states all sampling settings and end tokens
        }
        if current_platform.is_cuda() and config.kv_cache_gib is None:
            require_gpu_memory(config.gpu_memory_utilization)
        if on_cpu:
            require_cpu_heads(hf_config, model)
            arguments["enable_chunked_prefill"] = False
            arguments["kv_cache_memory_bytes"] = cpu_kv_cache_bytes(
                hf_config, limits.max_length, config.max_num_seqs
            )
        if config.kv_cache_gib is not None:
            arguments["kv_cache_memory_bytes"] = int(config.kv_cache_gib * 2**30)
        if config.max_num_batched_tokens is not None:
            arguments["max_num_batched_tokens"] = config.max_num_batched_tokens
        self._llm = vllm.LLM(**arguments, **config.options)
        if self._multiprocess:
            report_death(self._llm)
        self._ahead = config.max_num_seqs + max(16, config.max_num_seqs // 4)
        self._calls = 0  # makes request names unique across calls

    def sample(
        self, requests: Sequence[SampleRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[str, list[Sample]]]:
        """Yield (key, samples) of each request as its last sample finishes."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        stops = stop_token_ids(self._tokenizer, self._model, sampling)
        strings = stop_strings(self._tokenizer, sampling)
        parameters = {
            **sampling.model_dump(include={"temperature", "top_p", "top_k", "min_p", "max_tokens"}),
            "n": 1,
            "stop": strings or None,
            "stop_token_ids": sorted(stops),
            "detokenize": bool(strings),  # only to find them
            "logprobs": 0,  # the sampled token's own: enough for cumulative_logprob
            "output_kind": RequestOutputKind.FINAL_ONLY,
        }
        self._calls += 1
        todo = (
            (index, number, seed)
            for index, request in enumerate(requests)
            for number, (_, seed) in enumerate(request.samples)
        )
        collected: list[dict[int, Sample]] = [{} for _ in requests]
        running = 0
        while True:
            while running < self._ahead and (task := next(todo, None)) is not None:
                index, number, seed = task
                engine.add_request(
                    f"{self._calls}/{index}/{number}",
                    tokens_input(list(requests[index].prompt_token_ids)),
                    SamplingParams(seed=seed, **parameters),
                )
                running += 1
            if not running:
                return
            for output in engine.step():
                if not output.finished:
                    continue
                running -= 1
                _, index, number = map(int, output.request_id.split("/"))
                request, samples = requests[index], collected[index]
                completion = output.outputs[0]
                if completion.finish_reason not in ("stop", "length"):
                    raise EngineError(
                        f"vLLM ended request {request.key!r} with {completion.finish_reason!r}, expected 'stop' or 'length'",
                        transient=True,
                    )
                prompt, token_ids = request.prompt_token_ids, list(completion.token_ids)
                samples[number] = Sample(
                    index=request.samples[number][0],
                    text=completion_text(self._tokenizer, prompt, token_ids, stops, strings),
                    token_ids=token_ids,
                    finish_reason=completion.finish_reason,
                    sampled_logprob=float(completion.cumulative_logprob),
                )
                if len(samples) == len(request.samples):
                    collected[index] = {}
                    yield request.key, [samples[n] for n in range(len(samples))]

    def close(self) -> None:
        """Stop vLLM's processes, if it started any. This process is about to end."""
        if self._multiprocess and callable(
            shutdown := getattr(self._llm.llm_engine.engine_core, "shutdown", None)
        ):
            shutdown()


def report_death(llm: Any) -> None:
    """Let a step of vLLM raise an error if its core's process ends. (vLLM notices the end, but
    waits for the core's answer without limit.)"""
    from vllm.v1.engine.exceptions import EngineDeadError

    core = llm.llm_engine.engine_core

    def watch() -> None:
        while not core.resources.engine_dead:
            time.sleep(0.5)
        core.outputs_queue.put_nowait(EngineDeadError())

    threading.Thread(target=watch, name="watch-engine-core", daemon=True).start()


def require_gpu_memory(share: float) -> None:
    """Raise EngineError if less than this share of the first GPU's memory is free."""
    import torch

    free, total = torch.cuda.mem_get_info()
    if free < share * total:
        raise EngineError(
            f"gpu_memory_utilization is {share:g} of the GPU's {total / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB are "
            "free: another process uses the GPU (`nvidia-smi` names it). End it, or lower gpu_memory_utilization"
        )


def cpu_kv_cache_bytes(hf_config: Any, max_model_len: int, max_num_seqs: int) -> int:
    """Key-value cache for `max_num_seqs` full sequences: at most 4 GiB, at least one sequence.

    By default vLLM takes half of the machine's memory and fills it with zeros (3.5 s per GiB
    measured).
    """
    text = hf_config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
    head_dim = _head_dim(hf_config)
    if not heads or not head_dim:  # not a pure attention model: no formula
        return 4 << 30
    sequence = (
        2 * text.num_hidden_layers * heads * head_dim * 4 * (max_model_len + 128)
    )  # a block of 128 begun
    return int(max(min(sequence * (max_num_seqs + 1), 4 << 30), 2 * sequence))


def require_cpu_heads(hf_config: Any, model: ModelConfig) -> None:
    """Raise ModelError for head sizes that vLLM would refuse only at the first step."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    supported = CPUAttentionBackend.get_supported_head_sizes()
    if (head_dim := _head_dim(hf_config)) is not None and head_dim not in supported:
        raise ModelError(
            f"{model.path} has attention heads of size {head_dim}, but vLLM on a CPU takes only "
            f"{', '.join(map(str, supported))}: set engine.kind to transformers, or use another model"
        )


def _head_dim(hf_config: Any) -> int | None:
    text = hf_config.get_text_config()
    if head_dim := getattr(text, "head_dim", None):
        return int(head_dim)
    heads = getattr(text, "num_attention_heads", None)
    return int(text.hidden_size) // int(heads) if heads else None
