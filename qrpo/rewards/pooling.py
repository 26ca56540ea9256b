"""Reward models under vLLM's pooling runner: the same conversation, tokens and head as under
transformers.

Runs in the child process that `qrpo.rewards.model` starts. vLLM does the batching. It is asked for
the raw logit; by default it applies a sigmoid.
"""

import os
from collections.abc import Sequence
from typing import Any

from qrpo.data.chat import Messages, load_tokenizer
from qrpo.engines.vllm import cpu_kv_cache_bytes, require_cpu_heads, saved_dtype
from qrpo.errors import EngineError, ModelError
from qrpo.models import context_length, is_local, load_model_config, location
from qrpo.rewards.model import ModelRewardConfig, as_score, encode_rows, not_one_score
from qrpo.rewards.protocol import Score

__all__ = ["PoolingReward"]

_CPU_SEQUENCES = 16  # concurrent conversations that fit a CPU's key-value cache


class PoolingReward:
    """A reward model in vLLM, in this process unless it is sharded over several GPUs."""

    def __init__(self, config: ModelRewardConfig):
        model = config.model
        if config.tensor_parallel_size == 1:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        try:
            import vllm
            from vllm.platforms import current_platform
        except ImportError as error:
            raise EngineError(
                f"vLLM cannot be imported ({error}): install it (`make install`, or `pip install vllm`), or set the "
                "reward's engine to transformers"
            ) from error
        hf_config = load_model_config(model)
        if (labels := hf_config.num_labels) != 1:
            raise ModelError(not_one_score(model.path, labels))
        self._tokenizer = load_tokenizer(model)
        self._max_length = config.max_length or context_length(model)
        arguments: dict[str, Any] = {
            "model": location(model),
            "revision": None if is_local(model) else model.revision,
            "trust_remote_code": model.trust_remote_code,
            "runner": "pooling",
            "dtype": saved_dtype(hf_config) if model.dtype == "auto" else model.dtype,
            "max_model_len": self._max_length,
            "max_num_batched_tokens": max(config.batch_tokens, self._max_length),
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "tensor_parallel_size": config.tensor_parallel_size,
            "enable_prefix_caching": True,
        }
        if current_platform.is_cpu():
            require_cpu_heads(hf_config, model)
            arguments |= {
                "enforce_eager": True,
                "enable_chunked_prefill": False,
                "max_num_seqs": _CPU_SEQUENCES,
                "kv_cache_memory_bytes": cpu_kv_cache_bytes(hf_config, self._max_length, _CPU_SEQUENCES),
            }
        self._llm = vllm.LLM(**{**arguments, **config.options})
        self._parameters = vllm.PoolingParams(use_activation=False)

    def score(
        self, prompts: Sequence[Messages], completions: Sequence[str], tools: Sequence[Any] = ()
    ) -> list[Score]:
        """One score per completion; too long rows, and those the template refuses, have an error."""
        encoded, scores = encode_rows(self._tokenizer, prompts, completions, self._max_length, tools)
        if encoded:
            outputs = self._llm.classify(
                [{"prompt_token_ids": ids} for ids in encoded.values()],
                pooling_params=self._parameters,
                use_tqdm=False,
            )
            scores |= {
                row: as_score(float(output.outputs.probs[0]))
                for row, output in zip(encoded, outputs, strict=True)
            }
        return [scores[row] for row in range(len(completions))]
