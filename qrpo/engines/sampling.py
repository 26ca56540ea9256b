"""The protocol of generation engines: requests, samples, sampling settings and seeds. Engines are
in `qrpo.engines`.

Every sample of a prompt is a request with a seed derived from its identity. So sample 7 of a prompt
is the same whether 10 or 50 samples are requested, alone or among others, today or on another
machine. (Engines that derive the seeds of `n` samples by counting up make neighbouring seeds share
all but one sample.)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, runtime_checkable

from pydantic import Field

from qrpo.config import Section
from qrpo.seeds import seeded_hash


class SamplingConfig(Section):
    """How completions are sampled; names and meanings are vLLM's."""

    temperature: float = Field(1.0, ge=0.0, le=10.0)
    """1 samples the model unchanged, as the theory assumes; 0 always takes the likeliest token."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Keep the likeliest tokens that make up this probability; 1 keeps all."""
    top_k: int = Field(0, ge=0)
    """Keep this many of the likeliest tokens; 0 keeps all."""
    min_p: float = Field(0.0, ge=0.0, lt=1.0)
    """Keep tokens at least this probable relative to the likeliest; 0 keeps all."""
    max_tokens: int = Field(1024, ge=1)
    """Maximum length of a completion in tokens, end token included."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end a completion; the text excludes them, the tokens include them. A special
    token ends a completion, too."""
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Token ids that end a completion, in addition to the end tokens of the tokenizer, of the
    generation config and of the chat template's turns."""

    def idle_fields(self) -> frozenset[str]:
        """An empty `stop_token_ids` enters no fingerprint: earlier versions did not have it."""
        return frozenset() if self.stop_token_ids else frozenset({"stop_token_ids"})


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One prompt and the samples requested of it."""

    key: str
    """Identifies the request in the answer; unique within a call."""
    prompt_token_ids: Sequence[int]
    samples: Sequence[tuple[int, int]]
    """(sample index, seed) pairs."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion."""

    index: int
    text: str
    """Without special tokens and without what ended it; the same for every engine."""
    token_ids: list[int]
    """With the end token if one was sampled."""
    finish_reason: Literal["stop", "length"]
    """`stop`: an end token or stop string; `length`: max_tokens were reached."""
    sampled_logprob: float
    """Sum of the tokens' log-probabilities under the model, before temperature and top-p."""


@runtime_checkable
class Engine(Protocol):
    """Samples completions. Calls from several threads are served one after another."""

    @property
    def max_model_len(self) -> int:
        """Maximum tokens of prompt and completion together; known before the engine starts."""
        ...

    def sample(
        self, requests: Sequence[SampleRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[str, list[Sample]]]:
        """Yield (key, samples in the order requested) for every request as it finishes, so in any
        order.

        Raises DataError before anything starts if a request does not fit (see
        `qrpo.models.limits`), EngineError if the engine dies: results already yielded stay valid,
        and the next call starts it again.
        """
        ...

    def close(self) -> None:
        """Free all memory. A later call starts the engine again."""
        ...


def sample_seed(run_seed: int, prompt_id: str, sample_index: int, namespace: str = "reference") -> int:
    """The seed of one sample: 63 bits of a hash, so that no two samples of a run share one."""
    return int.from_bytes(seeded_hash(namespace, run_seed, prompt_id, sample_index)[:8], "big") >> 1
