"""Both engines with a real model: the same protocol, seeds that hold, log-probabilities that are the model's, deaths
survived. What is asked of both is asked in the same test."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qrpo.config import keyed
from qrpo.data.chat import encode_prompt, load_tokenizer
from qrpo.engines import EngineConfig, open_engine
from qrpo.engines.sampling import Engine, Sample, SampleRequest, SamplingConfig, sample_seed
from qrpo.errors import ConfigError, DataError, EngineError, ModelError
from qrpo.models import ModelConfig, load_causal_lm

SAMPLING = SamplingConfig(max_tokens=24)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("vllm", marks=pytest.mark.slow),
        pytest.param("transformers", marks=pytest.mark.slow),
    ],
)
def engine(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    log = tmp_path_factory.mktemp("logs") / f"{request.param}.log"
    engine = open_engine(
        EngineConfig(kind=request.param, max_num_seqs=16), ModelConfig(path=str(tiny_model)), log=log
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(str(tiny_model))


@pytest.fixture(scope="module")
def requests(tokenizer: Any) -> list[SampleRequest]:
    """12 prompts of different lengths, 4 samples each."""
    texts = [f"What is {n} plus {n}? " * (1 + n % 4) for n in range(12)]
    return [
        request(f"p{n}", encode_prompt(tokenizer, [{"role": "user", "content": text}]), range(4))
        for n, text in enumerate(texts)
    ]


def request(key: str, prompt_token_ids: list[int], indices: range) -> SampleRequest:
    return SampleRequest(key, prompt_token_ids, [(index, sample_seed(0, key, index)) for index in indices])


def ids_of(answers: dict[str, list[Sample]]) -> dict[str, list[list[int]]]:
    return {key: [sample.token_ids for sample in samples] for key, samples in answers.items()}


def test_every_request_is_answered_in_full(
    engine: Engine, requests: list[SampleRequest], tokenizer: Any
) -> None:
    answers = list(engine.sample(requests, SAMPLING))
    assert sorted(key for key, _ in answers) == sorted(request.key for request in requests)
    for _, samples in answers:
        assert [sample.index for sample in samples] == [0, 1, 2, 3]
        for sample in samples:
            assert 1 <= len(sample.token_ids) <= 24
            ended = sample.token_ids[-1] == tokenizer.eos_token_id
            assert sample.finish_reason == ("stop" if ended else "length")
            assert ended or len(sample.token_ids) == 24
            decoded = tokenizer.decode(sample.token_ids, skip_special_tokens=True)
            assert sample.text.rstrip("\ufffd") == decoded.rstrip(
                "\ufffd"
            )  # half a character, cut by the length
            assert sample.sampled_logprob < 0
    everything = [tuple(sample.token_ids) for _, samples in answers for sample in samples]
    assert len(set(everything)) == len(everything)


def test_a_sample_depends_on_its_seed_and_prompt_alone(engine: Engine, requests: list[SampleRequest]) -> None:
    together = ids_of(dict(engine.sample(requests, SAMPLING)))
    assert ids_of(dict(engine.sample(requests[::-1], SAMPLING))) == together
    for request_ in requests[:3]:
        assert ids_of(dict(engine.sample([request_], SAMPLING))) == {request_.key: together[request_.key]}
    some = SampleRequest("p5", requests[5].prompt_token_ids, [requests[5].samples[3], requests[5].samples[1]])
    assert ids_of(dict(engine.sample([some], SAMPLING)))["p5"] == [together["p5"][3], together["p5"][1]]


def test_results_come_as_they_end(engine: Engine, requests: list[SampleRequest]) -> None:
    prompt = list(requests[0].prompt_token_ids)
    many = [request(f"m{n}", prompt, range(4)) for n in range(40)]  # ten times what runs at once
    order = [key for key, _ in engine.sample(many, SAMPLING)]
    assert sorted(order) == sorted(request_.key for request_ in many)
    assert {order[0], order[1]} <= {f"m{n}" for n in range(8)}


def test_sampled_logprobs_are_the_models_own(
    engine: Engine, requests: list[SampleRequest], tiny_model: Path
) -> None:
    import torch

    model = load_causal_lm(ModelConfig(path=str(tiny_model)), "cpu")
    hot = SAMPLING.model_copy(update={"temperature": 0.7, "top_p": 0.9})  # raw log-probabilities all the same
    for sampling in (SAMPLING, hot):
        for key, samples in engine.sample(requests[:3], sampling):
            prompt = next(list(r.prompt_token_ids) for r in requests if r.key == key)
            for sample in samples:
                with torch.inference_mode():
                    logits = model(torch.tensor([prompt + sample.token_ids])).logits[0, len(prompt) - 1 : -1]
                logprobs = torch.log_softmax(logits.double(), -1)
                expected = logprobs.gather(1, torch.tensor(sample.token_ids)[:, None]).sum().item()
                assert sample.sampled_logprob == pytest.approx(expected, abs=1e-3)


def test_samples_follow_the_models_distribution(
    engine: Engine, requests: list[SampleRequest], tiny_model: Path
) -> None:
    import torch

    prompt = list(requests[0].prompt_token_ids)
    count = 4000
    draws = [
        sample.token_ids[0]
        for _, samples in engine.sample([request("many", prompt, range(count))], SamplingConfig(max_tokens=1))
        for sample in samples
    ]
    model = load_causal_lm(ModelConfig(path=str(tiny_model)), "cpu")
    with torch.inference_mode():
        probabilities = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double(), -1).numpy()
    seen = np.bincount(draws, minlength=len(probabilities))
    statistic = ((seen - count * probabilities) ** 2 / (count * probabilities)).sum()  # Pearson's chi-squared
    degrees = len(probabilities) - 1
    assert abs(statistic - degrees) < 5 * np.sqrt(2 * degrees)


def test_temperature_zero_takes_the_likeliest_token(
    engine: Engine, requests: list[SampleRequest], tiny_model: Path
) -> None:
    import torch

    greedy = SamplingConfig(temperature=0.0, max_tokens=4)
    ((_, samples),) = engine.sample(requests[:1], greedy)
    assert len({tuple(sample.token_ids) for sample in samples}) == 1
    model = load_causal_lm(ModelConfig(path=str(tiny_model)), "cpu")
    with torch.inference_mode():
        logits = model(torch.tensor([list(requests[0].prompt_token_ids)])).logits[0, -1]
    assert samples[0].token_ids[0] == int(logits.argmax())


def test_top_k_and_min_p_narrow_the_choice(engine: Engine, requests: list[SampleRequest]) -> None:
    prompt = list(requests[0].prompt_token_ids)
    for narrow in ({"top_k": 3}, {"min_p": 0.95}):
        sampling = SamplingConfig(max_tokens=1, **narrow)
        ((_, samples),) = engine.sample([request("narrow", prompt, range(60))], sampling)
        assert 1 <= len({sample.token_ids[0] for sample in samples}) <= 3 + 100 * ("min_p" in narrow)


def test_stop_strings_end_a_completion(engine: Engine, requests: list[SampleRequest]) -> None:
    free = dict(engine.sample(requests[:1], SAMPLING))["p0"][0]
    stop = free.text[3:5]
    stopped = dict(engine.sample(requests[:1], SAMPLING.model_copy(update={"stop": (stop,)})))["p0"][0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(stop)]
    assert free.token_ids[: len(stopped.token_ids)] == stopped.token_ids


def test_requests_that_do_not_fit_are_refused_before_anything_runs(
    engine: Engine, requests: list[SampleRequest], tokenizer: Any
) -> None:
    assert engine.max_model_len == 256
    for bad, message in [
        (
            request("long", [5] * 233, range(1)),
            r"request 'long': the prompt's 233 tokens and 24 .* 256 tokens",
        ),
        (request("empty", [], range(1)), "request 'empty': the prompt has no tokens"),
        (requests[0], "two requests have the key 'p0'"),
        (request("odd", [len(tokenizer) + 1000], range(1)), "request 'odd': a token id is outside"),
    ]:
        with pytest.raises(DataError, match=message):
            list(engine.sample([*requests[:2], bad], SAMPLING))
    longest = request("just fits", [5] * 232, range(1))
    assert len(dict(engine.sample([longest], SAMPLING))["just fits"]) == 1
    assert list(engine.sample([], SAMPLING)) == []


def test_threads_take_turns(engine: Engine, requests: list[SampleRequest]) -> None:
    expected = ids_of(dict(engine.sample(requests, SAMPLING)))
    answers: list[dict[str, list[list[int]]]] = []
    threads = [
        threading.Thread(target=lambda: answers.append(ids_of(dict(engine.sample(requests, SAMPLING)))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [expected] * 3


def test_a_dead_engine_is_an_engine_error_and_the_next_call_starts_it_again(
    engine: Engine, requests: list[SampleRequest]
) -> None:
    expected = ids_of(dict(engine.sample(requests, SAMPLING)))
    prompt = list(requests[0].prompt_token_ids)
    items = engine.sample([request(f"m{n}", prompt, range(4)) for n in range(200)], SAMPLING)
    next(items)
    os.kill(engine.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match=r"engine of .* was killed by SIGKILL.*log"):
        list(items)
    assert ids_of(dict(engine.sample(requests, SAMPLING))) == expected


def test_a_context_beyond_the_models_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.max_model_len: got 512, but .* context of 256"):
        open_engine(EngineConfig(max_model_len=512), ModelConfig(path=str(tiny_model)))
    with pytest.raises(ModelError, match="no model folder"):
        open_engine(EngineConfig(), ModelConfig(path="/nowhere"))


def test_speed_settings_are_not_in_the_fingerprint() -> None:
    fast = EngineConfig(
        max_num_seqs=7, tensor_parallel_size=2, gpu_memory_utilization=0.5, enforce_eager=True
    )
    assert keyed(fast) == keyed(EngineConfig())
    assert keyed(EngineConfig(dtype="float32")) != keyed(EngineConfig())


@pytest.mark.slow
def test_nothing_is_started_before_the_first_sample_and_nothing_is_left_after_close(
    tiny_model: Path, requests: list[SampleRequest]
) -> None:
    engine: Any = open_engine(EngineConfig(kind="transformers"), ModelConfig(path=str(tiny_model)))
    assert engine.pid is None
    dict(engine.sample(requests[:1], SAMPLING))
    assert engine.pid is not None
    engine.close()
    assert engine.pid is None


def test_a_missing_vllm_says_what_to_do(
    tiny_model: Path, requests: list[SampleRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm.py").write_text("raise ImportError('no vLLM here')\n")
    monkeypatch.syspath_prepend(tmp_path)
    engine = open_engine(EngineConfig(kind="vllm"), ModelConfig(path=str(tiny_model)))
    with pytest.raises(
        ConfigError, match=r"vLLM cannot be imported \(no vLLM here\): install it .* transformers"
    ):
        list(engine.sample(requests[:1], SAMPLING))
    engine.close()


@pytest.mark.slow
def test_heads_that_vllm_cannot_take_on_a_cpu_are_told_at_the_start(
    requests: list[SampleRequest], tmp_path: Path
) -> None:
    from qrpo.tiny import build_tiny_model

    folder = build_tiny_model(tmp_path / "small", ["some text"], hidden_size=32, heads=2)
    engine = open_engine(EngineConfig(kind="vllm"), ModelConfig(path=str(folder)))
    with pytest.raises(ModelError, match=r"heads of size 16, but vLLM on a CPU takes only 32, 64"):
        list(engine.sample(requests[:1], SAMPLING))
    engine.close()
