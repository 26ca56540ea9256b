"""Generation engines.

    sampling        the `Engine` protocol, requests, samples, `SamplingConfig`, seeds
    decoding        stop tokens and the text of a completion, the same for every engine
    options         further arguments for vLLM
    vllm            vLLM's offline engine
    transformers    plain transformers, where vLLM is not installed and for quick tests

`open_engine` returns an `Engine` in a child process. The process starts with the first sample,
closing it frees all memory, and the next call restarts an engine that died.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from qrpo.config import Section, execution_option
from qrpo.engines.options import VLLMOptions
from qrpo.engines.sampling import Engine, Sample, SampleRequest, SamplingConfig
from qrpo.errors import DataError, EngineError
from qrpo.models import Dtype, ModelConfig
from qrpo.models.limits import Limits, model_limits
from qrpo.processes.child import Child


class EngineConfig(Section):
    """The engine that samples completions, and the resources that it uses."""

    kind: Literal["vllm", "transformers"] = "vllm"
    """`vllm`, or `transformers` where vLLM is not installed."""
    dtype: Dtype = "auto"
    """Precision to sample in; `auto` uses the model's setting."""
    max_model_len: int | None = Field(None, ge=2)
    """Maximum tokens of prompt and completion together; by default the model's context length."""
    options: VLLMOptions = Field(default_factory=dict)
    """More arguments for `vllm.LLM` (`quantization`, `kv_cache_dtype`, ...)."""
    max_num_seqs: int = execution_option(256, ge=1)
    """Completions that are generated at the same time."""
    max_num_batched_tokens: int | None = execution_option(None, ge=1)
    """Tokens in one step of vLLM; by default its own choice."""
    gpu_memory_utilization: float = execution_option(0.9, gt=0.0, le=1.0)
    """Share of the GPU's memory that vLLM uses."""
    kv_cache_gib: float | None = execution_option(None, gt=0.0)
    """Size of the key-value cache in GiB; by default what gpu_memory_utilization leaves; on a CPU
    enough for max_num_seqs, at most 4 GiB."""
    tensor_parallel_size: int = execution_option(1, ge=1)
    """GPUs that share each layer."""
    pipeline_parallel_size: int = execution_option(1, ge=1)
    """Groups of GPUs, each with a part of the layers."""
    enforce_eager: bool | None = execution_option(None)
    """Start faster, without compiling or capturing graphs; by default on a CPU only."""
    separate_process: bool = execution_option(False)
    """Let vLLM run its core in another process: slower to start, somewhat faster on a fast GPU."""
    device: str | None = execution_option(None)
    """Device of the transformers engine (`cpu`, `cuda:1`); by default the first GPU, if any."""
    timeout: float = execution_option(3600.0, gt=0.0)
    """Seconds without a finished prompt after which the engine is killed and started again."""

    @property
    def gpus(self) -> int:
        """GPUs of one engine."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


def open_engine(config: EngineConfig, model: ModelConfig, *, log: Path | None = None) -> Engine:
    """The configured engine on this model, not started yet; its output is appended to `log`.

    Raises ModelError if the model's folder is unusable, ConfigError if max_model_len exceeds the
    model's context.
    """
    limits = model_limits(model, config.max_model_len, "engine.max_model_len")
    if config.dtype != "auto":
        model = model.model_copy(update={"dtype": config.dtype})
    target = {
        "vllm": "qrpo.engines.vllm:VLLMEngine",
        "transformers": "qrpo.engines.transformers:TransformersEngine",
    }[config.kind]
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
    name = f"the {config.kind} engine of {model.path}"
    child = Child(target, config, model, limits, name=name, log=log, env=quiet)
    return _ChildEngine(child, limits, config.timeout)


class _ChildEngine:
    """An `Engine` in a child process."""

    def __init__(self, child: Child, limits: Limits, timeout: float):
        self._child = child
        self._timeout = timeout
        self._limits = limits

    @property
    def max_model_len(self) -> int:
        return self._limits.max_length

    @property
    def pid(self) -> int | None:
        return self._child.pid

    def sample(
        self, requests: Sequence[SampleRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[str, list[Sample]]]:
        requests = list(requests)
        keys: set[str] = set()
        for request in requests:
            if request.key in keys:
                raise DataError(f"two requests have the key {request.key!r}: make keys unique within a call")
            keys.add(request.key)
            if reason := self._limits.problem(request.prompt_token_ids, sampling.max_tokens):
                raise DataError(f"request {request.key!r}: {reason}")
        return self._answers(requests, sampling) if requests else iter(())

    def _answers(
        self, requests: list[SampleRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[str, list[Sample]]]:
        try:
            yield from self._child.stream("sample", requests, sampling, timeout=self._timeout)
        except TimeoutError:
            raise EngineError(
                f"{self._child.name} finished no prompt in {self._timeout:g} s (engine.timeout) and was killed. The next "
                "call starts it again",
                transient=True,
            ) from None

    def close(self) -> None:
        self._child.close()
