"""Both engines with a real model: the same protocol, seeds that hold, log-probabilities that are the model's, deaths
survived. What is asked of both is asked in the same test."""

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from qrpo.config import keyed
from qrpo.data.chat import encode_prompt, load_tokenizer
from qrpo.engines import EngineConfig, open_engine
from qrpo.engines.decoding import completion_text, stop_token_ids
from qrpo.engines.sampling import Engine, Sample, SampleRequest, SamplingConfig, sample_seed
from qrpo.errors import ConfigError, DataError, EngineError, ModelError
from qrpo.models import ModelConfig, load_causal_lm
from qrpo.rewards import ModelRewardConfig
from tasks.retries import is_transient

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


def test_stop_tokens_end_a_completion(engine: Engine, requests: list[SampleRequest], tokenizer: Any) -> None:
    free = dict(engine.sample(requests[:1], SAMPLING))["p0"]
    at = next(i for i, token in enumerate(free[0].token_ids) if i and token not in free[0].token_ids[:i])
    stop = free[0].token_ids[at]
    special = next(
        (sample, i)
        for _, samples in engine.sample(requests, SAMPLING)
        for sample in samples
        for i, token in enumerate(sample.token_ids[:-1])
        if token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder
    )
    stopped = dict(engine.sample(requests[:1], SAMPLING.model_copy(update={"stop_token_ids": (stop,)})))[
        "p0"
    ][0]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free[0].token_ids[: at + 1]
    assert stopped.text == tokenizer.decode(stopped.token_ids[:-1], skip_special_tokens=True)
    # a stop string that is a special token
    sample, place = special
    string = tokenizer.convert_ids_to_tokens(sample.token_ids[place])
    sampling = SAMPLING.model_copy(update={"stop": (string,)})
    again = next(
        one
        for _, samples in engine.sample(requests, sampling)
        for one in samples
        if one.token_ids == sample.token_ids[: place + 1]
    )
    assert again.finish_reason == "stop"
    with pytest.raises(ConfigError, match=r"stop: .* contains the special token .* stop at"):
        list(engine.sample(requests[:1], SAMPLING.model_copy(update={"stop": (f"{string} and",)})))
    with pytest.raises(ConfigError, match=r"stop_token_ids: got 999999, but"):
        list(engine.sample(requests[:1], SAMPLING.model_copy(update={"stop_token_ids": (999999,)})))


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


@pytest.mark.slow
def test_a_killed_engine_core_is_an_error_and_the_next_call_starts_it_again(
    tiny_model: Path, requests: list[SampleRequest], tmp_path: Path
) -> None:
    config = EngineConfig(separate_process=True, max_num_seqs=4)
    engine: Any = open_engine(config, ModelConfig(path=str(tiny_model)), log=tmp_path / "log")
    prompt = list(requests[0].prompt_token_ids)
    items = engine.sample([request(f"m{n}", prompt, range(4)) for n in range(2000)], SAMPLING)
    next(items)
    (core,) = [
        int(pid)
        for pid in Path(f"/proc/{engine.pid}/task/{engine.pid}/children").read_text().split()
        if "EngineCore" in Path(f"/proc/{pid}/comm").read_text()
        or "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    os.kill(core, signal.SIGKILL)
    with pytest.raises(EngineError, match="EngineDeadError") as raised:
        list(items)
    assert is_transient(raised.value)
    assert len(dict(engine.sample(requests[:1], SAMPLING))) == 1
    engine.close()


@pytest.mark.slow
def test_an_engine_without_progress_is_killed(tiny_model: Path, requests: list[SampleRequest]) -> None:
    config = EngineConfig(kind="transformers", timeout=0.2)
    engine: Any = open_engine(config, ModelConfig(path=str(tiny_model)))
    many = request("many", list(requests[0].prompt_token_ids), range(5000))
    with pytest.raises(EngineError, match=r"finished no prompt in 0\.2 s \(engine\.timeout\)") as raised:
        list(engine.sample([many], SAMPLING))
    assert is_transient(raised.value)
    assert engine.pid is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 64}, "max_model_len cannot be set here: set it in the section itself"),
        ({"logprobs_mode": "raw_logits"}, "logprobs_mode cannot be set here: results rely"),
        ({"skip_tokenizer_init": True}, "skip_tokenizer_init cannot be set here"),
        ({"dtype": "bfloat16"}, "dtype cannot be set here: set the model's"),
        ({"load_format": "dummy"}, "load_format cannot be set here"),
        ({"max_modellen": 64}, "vLLM has no argument max_modellen"),
        ({"swap_spaces": 1}, "vLLM has no argument"),
        ({"cpu_offload_gb": "four"}, "cpu_offload_gb is 'four', expected int or float"),
        ({"block_size": True}, "block_size is True, expected int or NoneType"),
        ({"disable_custom_all_reduce": 1}, "disable_custom_all_reduce is 1, expected bool"),
    ],
)
def test_options_that_vllm_lacks_or_results_rely_on_are_refused(
    options: dict[str, Any], message: str
) -> None:
    for section in (
        EngineConfig,
        partial(ModelRewardConfig, model=ModelConfig(path="org/rm"), engine="vllm"),
    ):
        with pytest.raises(ValidationError, match=message):
            section(options=options)


def test_other_options_are_passed_on() -> None:
    options = {
        "quantization": "fp8",
        "kv_cache_dtype": "fp8",
        "cpu_offload_gb": 4,
        "compilation_config": {"level": 0},
    }
    assert EngineConfig(options=options).options == options


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
def test_heads_that_vllm_cannot_take_on_a_cpu_are_told_at_the_start(tmp_path: Path) -> None:
    from qrpo.tiny import build_tiny_model

    folder = build_tiny_model(tmp_path / "small", ["some text"], hidden_size=32, heads=2)
    engine = open_engine(EngineConfig(kind="vllm"), ModelConfig(path=str(folder)))
    with pytest.raises(ModelError, match=r"heads of size 16, but vLLM on a CPU takes only 32, 64"):
        list(engine.sample([request("p", [5], range(1))], SAMPLING))
    engine.close()


def test_the_end_of_a_turn_is_read_from_the_template(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    tokenizer = load_tokenizer(str(folder))
    turn, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|system|>", "<|end|>"))
    assert stop_token_ids(tokenizer, ModelConfig(path=str(folder)), SAMPLING) == {end}
    template = (folder / "chat_template.jinja").read_text().replace("eos_token", "'<|system|>'")
    (folder / "chat_template.jinja").write_text(template)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    tokenizer = load_tokenizer(str(folder))
    named = SAMPLING.model_copy(update={"stop_token_ids": (9,)})
    assert stop_token_ids(tokenizer, ModelConfig(path=str(folder)), named) == {turn, end, 7, 8, 9}


@pytest.mark.parametrize(
    ("prompt", "completion", "stops", "strings", "text"),
    [
        ("[user]", "▁Hello ▁you", {0}, [], " Hello you"),  # the space after the prompt stays
        ("", "▁Hello ▁you", {0}, [], "Hello you"),
        ("[user]", "▁Hello <stop>", {10}, [], " Hello"),  # a plain token that ended it
        ("[user]", "▁Hello <stop>", {0}, [], " Hello<stop>"),
        ("[user]", "▁Hello <0xE2> <0x82>", {0}, [], " Hello"),  # a character cut by the limit
        ("[user]", "▁Hello <0xE2> <0x82> <0xAC>", {0}, [], " Hello\u20ac"),
        ("[user]", "▁Hello <s> ▁you", {0}, [" y", "lo"], " Hel"),
    ],
)
def test_the_text_of_a_completion(
    prompt: str, completion: str, stops: set[int], strings: list[str], text: str
) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "▁Hello", "▁you", "[user]", "<0xE2>", "<0x82>", "<0xAC>", "a", "b"]
    plain = Tokenizer(models.BPE(dict(zip(words, range(10), strict=True)), [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    plain.decoder = decoders.Sequence(steps)
    plain.add_tokens([AddedToken("<stop>", special=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", unk_token="<unk>")
    before, ids = (tokenizer.convert_tokens_to_ids(tokens.split()) for tokens in (prompt, completion))
    assert completion_text(tokenizer, before, ids, stops, strings) == text
