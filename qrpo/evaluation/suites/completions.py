"""A model's completions of a suite's prompts, sampled with the pipeline's engines and seeds."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qrpo.data.chat import Messages, encode_prompt, load_tokenizer
from qrpo.engines import EngineConfig, open_engine
from qrpo.engines.sampling import Sample, SampleRequest, SamplingConfig, sample_seed
from qrpo.errors import DataError
from qrpo.models import ModelConfig
from qrpo.models.limits import model_limits


@dataclass(frozen=True)
class Completions:
    """Samples by prompt key, and the reasons for prompts that do not fit."""

    samples: dict[str, list[Sample]]
    refused: dict[str, str]


def draw_completions(
    model: ModelConfig,
    prompts: Mapping[str, Messages],
    *,
    engine: EngineConfig,
    sampling: SamplingConfig,
    num_samples: int = 1,
    seed: int = 0,
    namespace: str = "suite",
    log: Path | None = None,
) -> Completions:
    """Sample `num_samples` completions of every prompt; the engine's process ends before this
    returns.

    A sample's seed is a hash of `namespace`, `seed`, the prompt's key and the sample's index.
    Raises DataError if no prompt fits the engine's context.
    """
    opened = open_engine(engine, model, log=log)
    tokenizer, limits = load_tokenizer(model), model_limits(model, opened.max_model_len)
    requests, refused = [], {}
    for key, messages in prompts.items():
        token_ids = encode_prompt(tokenizer, messages)
        if reason := limits.problem(token_ids, sampling.max_tokens):
            refused[key] = reason
            continue
        seeds = tuple((index, sample_seed(seed, key, index, namespace)) for index in range(num_samples))
        requests.append(SampleRequest(key, token_ids, seeds))
    if not requests:
        raise DataError(f"no prompt fits the engine: {next(iter(refused.values()), 'there is none')}")
    try:
        samples = dict(opened.sample(requests, sampling))
    finally:
        opened.close()
    return Completions({key: samples[key] for key in prompts if key in samples}, refused)
