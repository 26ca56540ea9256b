"""Reward models under vLLM's pooling runner: the same conversation, tokens and head as under
transformers.

Runs in the child process that `qrpo.rewards.model` starts. vLLM does the batching. It is asked for
the raw logit; by default it applies a sigmoid.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any

from qrpo.data.chat import Messages, load_tokenizer
from qrpo.engines.vllm import cpu_kv_cache_bytes, report_death, require_cpu_heads, require_gpu_memory
from qrpo.errors import ConfigError, ModelError
from qrpo.models import (
    check_weights,
    is_local,
    load_model_config,
    location,
    require_reward_model,
    saved_dtype,
    weight_count,
)
from qrpo.models.limits import model_limits
from qrpo.rewards.model import ModelReward, ModelRewardConfig, not_one_score, score_conversations
from qrpo.rewards.protocol import Score

logger = logging.getLogger(__name__)

_CPU_SEQUENCES = 16  # concurrent conversations that fit a CPU's key-value cache
_PROBED_WEIGHTS = 2_000_000_000  # more would take a CPU too long


class PoolingReward:
    """A reward model in vLLM, in this process unless it is sharded over several GPUs."""

    def __init__(self, config: ModelRewardConfig):
        model = config.model
        require_reward_model(model)
        hf_config = load_model_config(model)
        if (labels := hf_config.num_labels) != 1:
            raise ModelError(not_one_score(model.path, labels))
        if config.tensor_parallel_size == 1:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"  # checked by `model_limits`
        try:
            import vllm
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ConfigError(
                f"vLLM cannot be imported ({error}): install it (`make install`, or `pip install vllm`), or set the "
                "reward's engine to transformers"
            ) from error
        self._path, self._tokenizer = model.path, load_tokenizer(model)
        self._limits = model_limits(model, config.max_length, "max_length")
        probes = self._probe(config)
        arguments: dict[str, Any] = {
            "model": location(model),
            "revision": None if is_local(model) else model.revision,
            "trust_remote_code": model.trust_remote_code,
            "runner": "pooling",
            "dtype": saved_dtype(model),
            "max_model_len": self._limits.max_length,
            "max_num_batched_tokens": max(config.batch_tokens, self._limits.max_length),
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "tensor_parallel_size": config.tensor_parallel_size,
            "enable_prefix_caching": True,
        }
        if current_platform.is_cuda():
            require_gpu_memory(config.gpu_memory_utilization)
        if current_platform.is_cpu():
            require_cpu_heads(hf_config, model)
            arguments |= {
                "enforce_eager": True,
                "enable_chunked_prefill": False,
                "max_num_seqs": _CPU_SEQUENCES,
                "kv_cache_memory_bytes": cpu_kv_cache_bytes(
                    hf_config, self._limits.max_length, _CPU_SEQUENCES
                ),
            }
        self._llm = vllm.LLM(**arguments, **config.options)
        if config.tensor_parallel_size > 1:
            report_death(self._llm)
        self._parameters = vllm.PoolingParams(use_activation=False)
        self._compare(probes, saved_dtype(model))

    def score(
        self, prompts: Sequence[Messages], completions: Sequence[str], tools: Sequence[Any] = ()
    ) -> list[Score]:
        """One score per completion; too long rows, and those the template refuses, have an
        error."""
        given = (prompts, completions, tools)
        return score_conversations(self._tokenizer, self._limits, *given, self._classify)

    def _classify(self, ids: list[list[int]]) -> list[float]:
        if not ids:
            return []
        outputs = self._llm.classify(
            [{"prompt_token_ids": row} for row in ids], pooling_params=self._parameters, use_tqdm=False
        )
        return [float(output.outputs.probs[0]) for output in outputs]

    def _probe(self, config: ModelRewardConfig) -> list[tuple[list[int], float]]:
        """A few short conversations with their scores by transformers on the CPU; none for a large
        model, of which only the names and shapes of the weights are checked."""
        check_weights(config.model, reward=True)
        if weight_count(config.model) > _PROBED_WEIGHTS:
            logger.info("the reward model is large: its scores are not compared with transformers'")
            return []
        reward = ModelReward(
            config.model_copy(update={"device": "cpu", "engine": "transformers", "options": {}})
        )
        prompts = [[{"role": "user", "content": text}] for text in ("What is 2 + 2?", "Name a colour.", "Hi")]
        probes: list[tuple[list[int], float]] = []

        def score_ids(ids: list[list[int]]) -> list[float]:
            scores = reward.score_ids(ids)
            probes.extend(zip(ids, scores, strict=True))
            return scores

        completions = ["4", "Blue, like the sky.", ""]
        score_conversations(self._tokenizer, self._limits, prompts, completions, (), score_ids)
        return probes

    def _compare(self, probes: list[tuple[list[int], float]], dtype: str) -> None:
        """Raise ModelError unless vLLM gives the scores that transformers gives."""
        found, expected = self._classify([ids for ids, _ in probes]), [score for _, score in probes]
        rounding = 0.01 if dtype == "float32" else 0.25
        allowed = rounding * max([1.0, *map(abs, expected)])
        if any(abs(a - b) > allowed for a, b in zip(found, expected, strict=True)):
            raise ModelError(
                f"vLLM scores {len(found)} conversations {_shown(found)} with {self._path}, transformers {_shown(expected)}: "
                "set the reward's engine to transformers"
            )


def _shown(scores: list[float]) -> str:
    return ", ".join(f"{score:.4g}" for score in scores)
