"""Both engines with a real model: the same protocol, seeds that hold, log-probabilities that are the model's, deaths
survived. What is asked of both is asked in the same test."""

import os
import shutil
import signal
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from qrpo.config import keyed
from qrpo.data.chat import encode_prompt, load_tokenizer
from qrpo.engines import EngineConfig, open_engine
from qrpo.engines.decoding import completion_text, stop_token_ids
from qrpo.engines.sampling import SampleRequest, SamplingConfig, sample_seed
from qrpo.errors import ConfigError, DataError, EngineError, ModelError
from qrpo.models import ModelConfig, load_causal_lm
from qrpo.rewards import ModelRewardConfig
from qrpo.tiny import build_tiny_model
from tasks.retries import is_transient
from tests.support.refusals import refuses

SAMPLING = SamplingConfig(max_tokens=24)


def opened(folder, log=None, **settings):
    return open_engine(EngineConfig(**settings), ModelConfig(path=str(folder)), log=log)


@pytest.fixture(scope="module", params=["vllm", "transformers"])
def engine(request, tiny_model, tmp_path_factory):
    log = tmp_path_factory.mktemp("logs") / f"{request.param}.log"
    engine = opened(tiny_model, log, kind=request.param, max_num_seqs=16)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(str(tiny_model))


@pytest.fixture(scope="module")
def logits(tiny_model):
    """The model's own logits after some tokens."""
    model = load_causal_lm(ModelConfig(path=str(tiny_model)), "cpu")

    def compute(token_ids):
        with torch.inference_mode():
            return model(torch.tensor([token_ids])).logits[0].double()

    return compute


@pytest.fixture(scope="module")
def requests(tokenizer):
    """12 prompts of different lengths, 4 samples each."""
    texts = [f"What is {n} plus {n}? " * (1 + n % 4) for n in range(12)]
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    return [request(f"p{n}", prompt, range(4)) for n, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def prompt(requests):
    return list(requests[0].prompt_token_ids)


def request(key, prompt_token_ids, indices):
    return SampleRequest(key, prompt_token_ids, [(index, sample_seed(0, key, index)) for index in indices])


def drawn(engine, requests, **settings):
    """The samples of each request."""
    return dict(engine.sample(requests, SAMPLING.model_copy(update=settings)))


def ids_of(engine, requests, **settings):
    answers = drawn(engine, requests, **settings).items()
    return {key: [sample.token_ids for sample in samples] for key, samples in answers}


@pytest.mark.slow
def test_every_request_is_answered_in_full_with_the_models_own_logprobs(engine, requests, tokenizer, logits):
    answers = drawn(engine, requests)
    assert sorted(answers) == sorted(request.key for request in requests)
    everything = {tuple(sample.token_ids) for samples in answers.values() for sample in samples}
    assert len(everything) == 48
    for samples in answers.values():
        assert [sample.index for sample in samples] == [0, 1, 2, 3]
        for sample in samples:
            ended = sample.token_ids[-1] == tokenizer.eos_token_id
            assert sample.finish_reason == ("stop" if ended else "length")
            assert len(sample.token_ids) == 24 or (ended and 1 <= len(sample.token_ids) < 24)
            decoded = tokenizer.decode(sample.token_ids, skip_special_tokens=True)
            # half a character, cut by the length
            assert sample.text.rstrip("\ufffd") == decoded.rstrip("\ufffd")
    # raw log-probabilities under every setting
    for settings in ({}, {"temperature": 0.7, "top_p": 0.9}):
        for one in requests[:3]:
            before = list(one.prompt_token_ids)
            for sample in drawn(engine, [one], **settings)[one.key]:
                logprobs = logits(before + sample.token_ids)[len(before) - 1 : -1].log_softmax(-1)
                expected = logprobs.gather(1, torch.tensor(sample.token_ids)[:, None]).sum().item()
                assert sample.sampled_logprob == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_a_sample_depends_on_its_seed_and_prompt_alone(engine, requests):
    together = ids_of(engine, requests)
    assert ids_of(engine, requests[::-1]) == together
    for one in requests[:3]:
        assert ids_of(engine, [one]) == {one.key: together[one.key]}
    some = SampleRequest("p5", requests[5].prompt_token_ids, [requests[5].samples[3], requests[5].samples[1]])
    assert ids_of(engine, [some])["p5"] == [together["p5"][3], together["p5"][1]]
    # threads take turns
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(ids_of(engine, requests[:4]))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [{one.key: together[one.key] for one in requests[:4]}] * 3


@pytest.mark.slow
def test_results_come_as_they_end(engine, prompt):
    many = [request(f"m{n}", prompt, range(4)) for n in range(40)]  # ten times what runs at once
    order = [key for key, _ in engine.sample(many, SAMPLING)]
    assert sorted(order) == sorted(one.key for one in many)
    assert {order[0], order[1]} <= {f"m{n}" for n in range(8)}


@pytest.mark.slow
def test_samples_follow_the_models_distribution(engine, prompt, logits):
    count, probabilities = 4000, logits(prompt)[-1].softmax(-1).numpy()
    draws = [ids[0] for ids in ids_of(engine, [request("many", prompt, range(count))], max_tokens=1)["many"]]
    seen = np.bincount(draws, minlength=len(probabilities))
    statistic = ((seen - count * probabilities) ** 2 / (count * probabilities)).sum()  # Pearson's chi-squared
    degrees = len(probabilities) - 1
    assert abs(statistic - degrees) < 5 * np.sqrt(2 * degrees)


@pytest.mark.slow
def test_temperature_zero_top_k_and_min_p_narrow_the_choice(engine, prompt, logits):
    greedy = ids_of(engine, [request("p0", prompt, range(4))], temperature=0.0, max_tokens=4)["p0"]
    assert len({tuple(ids) for ids in greedy}) == 1
    assert greedy[0][0] == int(logits(prompt)[-1].argmax())
    probabilities = logits(prompt)[-1].softmax(-1)
    likely = int((probabilities >= 0.95 * probabilities.max()).sum())
    for narrow, most in (({"top_k": 3}, 3), ({"min_p": 0.95}, likely)):
        found = ids_of(engine, [request("narrow", prompt, range(60))], max_tokens=1, **narrow)["narrow"]
        assert 1 <= len({ids[0] for ids in found}) <= most


@pytest.mark.slow
def test_stop_strings_and_stop_tokens_end_a_completion(engine, requests, tokenizer):
    free = drawn(engine, requests)
    first = free["p0"][0]
    string = first.text[3:5]
    stopped = drawn(engine, requests[:1], stop=(string,))["p0"][0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == first.text[: first.text.index(string)]
    assert first.token_ids[: len(stopped.token_ids)] == stopped.token_ids
    at = next(i for i, token in enumerate(first.token_ids) if i and token not in first.token_ids[:i])
    stopped = drawn(engine, requests[:1], stop_token_ids=(first.token_ids[at],))["p0"][0]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == first.token_ids[: at + 1]
    assert stopped.text == tokenizer.decode(stopped.token_ids[:-1], skip_special_tokens=True)
    # a stop string that is a special token
    key, sample, place = next(
        (key, sample, i)
        for key, samples in free.items()
        for sample in samples
        for i, token in enumerate(sample.token_ids[:-1])
        if token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder
    )
    special = tokenizer.convert_ids_to_tokens(sample.token_ids[place])
    again = drawn(engine, requests, stop=(special,))[key][sample.index]
    assert (again.finish_reason, again.token_ids) == ("stop", sample.token_ids[: place + 1])
    for match, settings in (
        (r"stop: .* contains the special token .* stop at", {"stop": (f"{special} and",)}),
        (r"stop_token_ids: got 999999, but", {"stop_token_ids": (999999,)}),
    ):
        refuses(ConfigError, match, drawn, engine, requests[:1], **settings)


@pytest.mark.slow
def test_requests_that_do_not_fit_are_refused_before_anything_runs(engine, requests, tokenizer):
    assert engine.max_model_len == 256
    too_long = r"request 'long': the prompt's 233 tokens and 24 .* 256 tokens"
    for bad, message in (
        (request("long", [5] * 233, range(1)), too_long),
        (request("empty", [], range(1)), "request 'empty': the prompt has no tokens"),
        (requests[0], "two requests have the key 'p0'"),
        (request("odd", [len(tokenizer) + 1000], range(1)), "request 'odd': a token id is outside"),
    ):
        refuses(DataError, message, drawn, engine, [*requests[:2], bad])
    assert len(drawn(engine, [request("just fits", [5] * 232, range(1))])["just fits"]) == 1
    assert list(engine.sample([], SAMPLING)) == []


@pytest.mark.slow
def test_a_dead_engine_is_an_engine_error_and_the_next_call_starts_it_again(engine, requests, prompt):
    expected = ids_of(engine, requests[:2])
    items = engine.sample([request(f"m{n}", prompt, range(4)) for n in range(200)], SAMPLING)
    next(items)
    os.kill(engine.pid, signal.SIGKILL)
    refuses(EngineError, r"engine of .* was killed by SIGKILL.*log", list, items)
    assert ids_of(engine, requests[:2]) == expected


@pytest.mark.slow
def test_a_killed_engine_core_is_an_error_and_work_to_try_again(tiny_model, prompt, tmp_path):
    engine = opened(tiny_model, tmp_path / "log", separate_process=True, max_num_seqs=4)
    items = engine.sample([request(f"m{n}", prompt, range(4)) for n in range(2000)], SAMPLING)
    next(items)
    children = Path(f"/proc/{engine.pid}/task/{engine.pid}/children").read_text().split()
    names = ("comm", "cmdline")
    (core,) = [
        int(pid)
        for pid in children
        if any("EngineCore" in Path(f"/proc/{pid}/{name}").read_text() for name in names)
    ]
    os.kill(core, signal.SIGKILL)
    assert is_transient(refuses(EngineError, "EngineDeadError", list, items))
    engine.close()


@pytest.mark.slow
def test_an_engine_starts_with_the_first_sample_and_is_killed_without_progress(tiny_model, requests, prompt):
    engine = opened(tiny_model, kind="transformers", timeout=0.2)
    assert engine.pid is None
    many = request("many", prompt, range(5000))
    message = r"finished no prompt in 0\.2 s \(engine\.timeout\)"
    assert is_transient(refuses(EngineError, message, drawn, engine, [many]))
    assert engine.pid is None
    engine = opened(tiny_model, kind="transformers")
    drawn(engine, requests[:1])
    assert engine.pid is not None
    engine.close()
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
def test_options_that_vllm_lacks_or_results_rely_on_are_refused(options, message):
    reward = partial(ModelRewardConfig, model=ModelConfig(path="org/rm"), engine="vllm")
    for section in (EngineConfig, reward):
        refuses(ValidationError, message, section, options=options)


def test_other_options_are_passed_on():
    options = {"quantization": "fp8", "cpu_offload_gb": 4, "compilation_config": {"level": 0}}
    assert EngineConfig(options=options).options == options


def test_speed_settings_are_not_in_the_fingerprint():
    fast = {"max_num_seqs": 7, "tensor_parallel_size": 2, "gpu_memory_utilization": 0.5}
    assert keyed(EngineConfig(**fast, enforce_eager=True)) == keyed(EngineConfig())
    assert keyed(EngineConfig(dtype="float32")) != keyed(EngineConfig())


def test_what_cannot_start_says_what_to_do(tiny_model, requests, tmp_path, monkeypatch):
    too_long = r"engine\.max_model_len: got 512, but .* context of 256"
    refuses(ConfigError, too_long, opened, tiny_model, max_model_len=512)
    refuses(ModelError, "no model folder", opened, "/nowhere")
    (tmp_path / "vllm.py").write_text("raise ImportError('no vLLM here')\n")
    monkeypatch.syspath_prepend(tmp_path)
    engine = opened(tiny_model)
    missing = r"vLLM cannot be imported \(no vLLM here\): install it .* transformers"
    refuses(ConfigError, missing, drawn, engine, requests[:1])
    engine.close()


@pytest.mark.slow
def test_heads_that_vllm_cannot_take_on_a_cpu_are_told_at_the_start(tmp_path):
    engine = opened(build_tiny_model(tmp_path / "small", ["some text"], hidden_size=32, heads=2))
    message = r"heads of size 16, but vLLM on a CPU takes only 32, 64"
    refuses(ModelError, message, drawn, engine, [request("p", [5], range(1))])
    engine.close()


def test_the_end_of_a_turn_is_read_from_the_template(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    model, tokenizer = ModelConfig(path=str(folder)), load_tokenizer(str(folder))
    turn, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|system|>", "<|end|>"))
    assert stop_token_ids(tokenizer, model, SAMPLING) == {end}
    template = (folder / "chat_template.jinja").read_text().replace("eos_token", "'<|system|>'")
    (folder / "chat_template.jinja").write_text(template)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    named = SAMPLING.model_copy(update={"stop_token_ids": (9,)})
    assert stop_token_ids(load_tokenizer(str(folder)), model, named) == {turn, end, 7, 8, 9}


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
def test_the_text_of_a_completion(prompt, completion, stops, strings, text):
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
