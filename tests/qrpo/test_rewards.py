"""Rewards: functions of every temper in real child processes, and real reward models against a plain forward."""

import array
import collections
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from qrpo.callables import load_callable
from qrpo.config import keyed
from qrpo.data.chat import encode_conversation, load_tokenizer
from qrpo.errors import ConfigError, ModelError, RewardError
from qrpo.models import ModelConfig, load_model_config, load_reward_model
from qrpo.rewards import (
    FunctionRewardConfig,
    ModelRewardConfig,
    Reward,
    RewardConfig,
    Score,
    combine,
    open_reward,
)
from qrpo.rewards.function import FunctionReward
from qrpo.rewards.model import ModelReward
from tests.support.rewards import HI

FILE = Path(__file__).with_name("reward_functions.py").resolve()


@pytest.fixture
def opened() -> Iterator[Any]:
    rewards: list[Reward] = []

    def open_function(name: str, **settings: Any) -> Reward:
        rewards.append(open_reward(FunctionRewardConfig(function=f"{FILE}:{name}", **settings)))
        return rewards[-1]

    yield open_function
    for reward in rewards:
        reward.close()


def score(
    reward: Reward, completions: Sequence[str], *, plain: bool = True, **columns: list[Any]
) -> list[Score]:
    count = len(completions)
    return reward.score([HI] * count, completions, columns, conversational=[not plain] * count)


def values(scores: Sequence[Score]) -> list[float | None]:
    assert [s.error for s in scores] == [None] * len(scores)
    return [s.reward for s in scores]


# ------------------------------------------------------------------------------------------- functions


@pytest.mark.parametrize(
    ("name", "completions", "columns", "expected"),
    [
        ("length", ["a", "bb", ""], {}, [1.0, 2.0, 0.0]),
        ("matches_answer", ["4", "5"], {"answer": ["4", "4"], "level": [1, 2]}, [1.0, 0.0]),
        # what a function does not take is not sent: this could not be pickled
        ("matches_answer", ["4", "5"], {"answer": ["4", "4"], "other": [lambda: None] * 2}, [1.0, 0.0]),
        ("slowly", ["a", "bb"], {}, [1.0, 2.0]),
        ("as_array", ["a", "bb"], {}, [1.0, 2.0]),
        ("with_helper", ["a"], {}, [7.0]),
        ("with_id", ["a", "b"], {"completion_ids": [[1, 2], [3]]}, [2.0, 1.0]),
    ],
)
def test_a_function_scores_completions_and_the_columns_that_it_takes(
    opened: Any, name: str, completions: list[str], columns: dict[str, Any], expected: list[float]
) -> None:
    assert values(score(opened(name), completions, **columns)) == expected


def test_messages_and_strings_arrive_as_the_dataset_had_them(opened: Any) -> None:
    reward = opened("number_of_messages")
    system = {"role": "system", "content": "Be brief"}
    prompts = [[system, *HI], HI, HI, [system, *HI]]
    scores = reward.score(prompts, ["a"] * 4, {}, conversational=[True, False, True, False])
    assert values(scores) == [2.0, -8.0, 1.0, -8.0]
    assert values(reward.score(prompts[:2], ["a"] * 2, {})) == [2.0, 1.0]  # messages unless told otherwise


def test_large_inputs_are_cut_into_calls_and_keep_their_order(opened: Any) -> None:
    texts = ["x" * (n % 17) for n in range(100)]
    assert values(score(opened("length", batch_size=7), texts)) == [float(len(text)) for text in texts]


def test_none_means_does_not_apply_and_odd_values_are_errors(opened: Any) -> None:
    expected: dict[str, tuple[float | None, str | None]] = {
        "fine": (1.0, None),
        "none": (None, None),
        "nan": (None, "the reward is nan, expected a finite number"),
        "inf": (None, "the reward is inf, expected a finite number"),
        "text": (None, "the reward is of type str, expected a number or None"),
        "true": (1.0, None),
    }
    scores = score(opened("sometimes"), list(expected))
    assert [(s.reward, s.error) for s in scores] == list(expected.values())


RETURNED: list[tuple[Any, list[float | None] | str]] = [
    ([1, 2.5], [1.0, 2.5]),
    ((1, 2), [1.0, 2.0]),
    (range(2), [0.0, 1.0]),
    (collections.deque([1, 2]), [1.0, 2.0]),
    (array.array("d", [1, 2]), [1.0, 2.0]),
    (np.array([1, 2], dtype=np.int64), [1.0, 2.0]),
    (np.array([0.1, 0.2]), [0.1, 0.2]),
    (torch.tensor([1.0, 2.0], dtype=torch.bfloat16), [1.0, 2.0]),
    (pl.Series([0.1, 0.2]), [0.1, 0.2]),
    (pa.array([0.1, 0.2]), [0.1, 0.2]),
    (pa.array([0.1, None]), [0.1, None]),
    (pa.chunked_array([[0.1], [0.2]]), [0.1, 0.2]),
    ([Decimal("0.1"), Fraction(1, 4)], [0.1, 0.25]),
    ([np.float64(0.1), torch.tensor(2.0)], [0.1, 2.0]),
    ({"a": 1, "b": 2}, "returned dict, expected a list or array"),
    ({1: 1, 2: 2}.keys(), "returned dict_keys, expected"),
    ({1: 1, 2: 2}.values(), "returned dict_values, expected"),
    ({1.0, 2.0}, "returned set, expected"),
    (b"ab", "returned bytes, expected"),
    (bytearray(b"ab"), "returned bytearray, expected"),
    (memoryview(b"ab"), "returned memoryview, expected"),
    ("12", "returned str, expected"),
    (iter([1, 2]), "returned list_iterator, expected"),
    (np.ones((2, 1)), "returned ndarray, expected"),
    (np.float64(1.0), "returned float64, expected"),
    (None, "returned NoneType, expected"),
    ([1, "2"], "the reward is of type str, expected a number or None"),
    ([1, b"2"], "the reward is of type bytes"),
    ([1, [2]], "the reward is of type list"),
    ([1, {"reward": 2}], "the reward is of type dict"),
    ([1, 2j], "the reward is of type complex"),
    ([1, np.ones(1)], "the reward is of type ndarray"),
    (np.array([1, 2], dtype="timedelta64[ns]"), "the reward is of type timedelta64"),
    (np.ma.array([1.0, 2.0], mask=[0, 1]), "the reward is of type MaskedConstant"),
    ([1, 10**400], "the reward is 1000"),
    ([1, Decimal("NaN")], "the reward is NaN, expected a finite number"),
]


@pytest.mark.parametrize(("returned", "expected"), RETURNED, ids=lambda value: type(value).__name__)
def test_a_function_returns_numbers_in_an_order_or_is_refused(returned: Any, expected: Any) -> None:
    def found() -> Any:
        try:
            scores = FunctionReward(f"{FILE}:echo").call(
                [HI] * 2, ["a", "b"], {"returned": [returned] * 2}, False
            )
        except RewardError as error:
            return str(error)
        return values(scores) if scores[1].error is None else scores[1].error

    if isinstance(expected, list):
        assert found() == expected
    else:
        assert expected in found()


@pytest.mark.parametrize(
    ("name", "settings", "completions", "errors"),
    [
        ("raises_on_bad", {}, ["a", "bad", "c"], {1: "ValueError: cannot judge this (reward_functions.py:"}),
        ("skips_empty", {}, ["a", "", "c"], {1: "returned 0 rewards for 1 completions, expected as many"}),
        ("hangs_on_bad", {"timeout": 0.5}, ["a", "bad", "c"], {1: "no answer within 0.5 s (timeout)"}),
        ("dies_on_bad", {}, ["a", "bad", "quit", "d"], {1: "exited with code 1", 2: "SystemExit: I quit"}),
    ],
)
def test_a_call_that_raises_miscounts_hangs_or_dies_costs_only_its_row(
    opened: Any, name: str, settings: dict[str, Any], completions: list[str], errors: dict[int, str]
) -> None:
    started = time.monotonic()
    scores = score(opened(name, **settings), completions)
    assert [s.reward for s in scores] == [None if row in errors else 1.0 for row in range(len(scores))]
    for row, error in errors.items():
        assert error in str(scores[row].error)
    assert time.monotonic() - started < 60  # one hangs for 1000 s


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("always_raises", "failed on each of the first 3 completions: .*raised RuntimeError: out of order"),
        ("one_number", "returned float, expected a list or array with one number per completion"),
        ("matches_answer", "it wants answer, which the data does not have"),
    ],
)
def test_a_function_that_fails_on_every_row_is_one_error(opened: Any, name: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score(opened(name), ["a", "b", "c"])


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("hangs", {"timeout": 0.2}, r"no answer within 0\.2 s \(timeout\)"),
        ("exits", {}, "reward .*:exits exited with code 3"),
    ],
)
def test_a_function_that_always_hangs_or_ends_its_process_is_given_up_soon(
    opened: Any, name: str, settings: dict[str, Any], reason: str
) -> None:
    started = time.monotonic()
    with pytest.raises(RewardError, match=f"on each of 3 completions in a row, at last: {reason}"):
        score(opened(name, **settings), ["a"] * 2000)
    assert time.monotonic() - started < 60  # not 2000 times


def test_a_single_row_that_fails_is_only_a_row(opened: Any) -> None:
    (only,) = score(opened("always_raises"), ["a"])
    assert "out of order" in str(only.error)


def test_no_rows_need_no_function(opened: Any) -> None:
    assert score(opened("always_raises"), []) == []


def test_workers_share_the_rows_and_one_bad_row_still_costs_no_other(opened: Any) -> None:
    reward = opened("slow_process_id", workers=2, batch_size=8, timeout=120.0)
    scores = score(reward, [f"{n}" if n != 5 else "bad" for n in range(16)])
    assert [n for n, s in enumerate(scores) if s.error is not None] == [5]
    processes = {s.reward for s in scores if s.error is None}
    assert len(processes) == 2  # it gives its process's id


def test_functions_that_cannot_be_loaded_say_why(tmp_path: Path) -> None:
    for function, message in [
        (f"{tmp_path}/nowhere.py:f", r"no file .*nowhere\.py"),
        ("no_such_package.rewards:f", "no module 'no_such_package'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            open_reward(FunctionRewardConfig(function=function))
    with pytest.raises(ValidationError, match=r"expected 'path/to/file\.py:function'"):
        FunctionRewardConfig(function="reward.py")
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_thing\ndef f(completions): return []\n")
    reward = open_reward(FunctionRewardConfig(function=f"{broken}:f"))
    with pytest.raises(
        RewardError, match=r"cannot import .*ModuleNotFoundError: No module named 'no_such_thing'"
    ):
        score(reward, ["a"])
    reward.close()
    broken.write_text("def f(:\n")
    with pytest.raises(ConfigError, match=r"broken\.py:1 is not valid Python"):
        open_reward(FunctionRewardConfig(function=f"{broken}:f"))
    reward = open_reward(FunctionRewardConfig(function=f"{FILE}:lenght"))
    with pytest.raises(ConfigError, match=r"no function 'lenght' \(it has .*length"):
        score(reward, ["a"])
    reward.close()


def test_functions_of_installed_modules_are_found() -> None:
    found = FunctionRewardConfig(function="qrpo.engines.sampling:length_problem").identity()
    assert found["function"] == "length_problem"
    assert {"qrpo/__init__.py", "qrpo/engines/sampling.py", "qrpo/config.py"} <= set(found["sources"])


# ------------------------------------------------------------------------------------------- identity


def test_a_functions_identity_is_its_source_and_that_of_the_files_it_imports(tmp_path: Path) -> None:
    config = FunctionRewardConfig(function=f"{FILE}:length")
    assert set(config.identity()["sources"]) == {"reward_functions.py", "reward_helper.py"}
    for name in ("reward_functions.py", "reward_helper.py"):
        shutil.copy(FILE.with_name(name), tmp_path / name)
    (tmp_path / "unrelated.py").write_text("x = 1")
    moved = FunctionRewardConfig(function=f"{tmp_path}/reward_functions.py:length")
    assert moved.identity() == config.identity()
    assert keyed(moved) == keyed(config)
    with (tmp_path / "reward_helper.py").open("a") as file:
        file.write("\n# changed\n")
    assert moved.identity() != config.identity()
    other = FunctionRewardConfig(function=f"{FILE}:slowly")
    assert other.identity() != config.identity()


def test_a_models_identity_is_its_files(tiny_reward_model: Path) -> None:
    config = ModelRewardConfig(model=ModelConfig(path=str(tiny_reward_model)))
    assert list(config.identity()) == ["model"]
    assert keyed(config.model_copy(update={"batch_tokens": 1})) == keyed(config)


def test_the_kind_in_the_configuration_chooses_the_reward() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(RewardConfig)
    assert isinstance(
        adapter.validate_python({"kind": "function", "function": "r.py:f"}), FunctionRewardConfig
    )
    assert isinstance(
        adapter.validate_python({"kind": "model", "model": {"path": "org/rm"}}), ModelRewardConfig
    )
    with pytest.raises(ValidationError, match="kind"):
        adapter.validate_python({"kind": "oracle"})


# ------------------------------------------------------------------------------------------- several rewards


def test_several_rewards_become_a_weighted_sum_of_those_that_apply() -> None:
    good, none, bad = Score(2.0), Score(None), Score(None, "broken")
    combined = combine([("a", 1.0, [good, none, none, good]), ("b", 0.5, [good, good, none, bad])])
    assert combined[0] == Score(3.0, None, (("a", 2.0), ("b", 2.0)))
    assert combined[1] == Score(1.0, None, (("b", 2.0),))
    assert combined[2] == Score(None, "no reward applies: a, b returned None")
    assert combined[3] == Score(None, "b: broken")
    # a reward of weight 0 decides nothing
    watched = combine([("a", 1.0, [good, good, good, none]), ("w", 0.0, [good, none, bad, good])])
    assert [score.reward for score in watched] == [2.0, 2.0, 2.0, None]
    assert [score.components[1:] for score in watched[:3]] == [(("w", 2.0),), (), (("w", None),)]
    assert watched[3].error == "no reward applies: a returned None"


# ------------------------------------------------------------------------------------------- models


CONVERSATIONS = [
    ([{"role": "user", "content": f"What is {n}? " * (1 + 5 * (n % 3))}], "Seven. " * (n % 7) + str(n))
    for n in range(23)
]


def ids_of_conversations(folder: Path) -> list[Any]:
    """Each conversation's token ids as a batch of one, from transformers alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    said = [[*prompt, {"role": "assistant", "content": text}] for prompt, text in CONVERSATIONS]
    return [torch.tensor([tokenizer.apply_chat_template(one, return_dict=False)]) for one in said]


def plain_forward(folder: Path) -> list[float]:
    """The textbook way: one conversation at a time, no padding, the score at its last token."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto", pad_token_id=None).eval()
    with torch.inference_mode():
        return [model(ids).logits[0, 0].item() for ids in ids_of_conversations(folder)]


def model_scores(folder: Path, conversations: Sequence[Any] = CONVERSATIONS, **settings: Any) -> list[Score]:
    reward = ModelReward(ModelRewardConfig(model=ModelConfig(path=str(folder)), device="cpu", **settings))
    prompts, completions = zip(*conversations, strict=True)
    return reward.score(prompts, completions)


@pytest.mark.parametrize("batch_tokens", [1, 100, 400, 100_000])
def test_a_models_reward_is_a_plain_forwards_whatever_the_batch(
    tiny_reward_model: Path, batch_tokens: int
) -> None:
    order = sorted(range(len(CONVERSATIONS)), key=lambda row: (row * 7) % 23)
    said = [CONVERSATIONS[row] for row in order]
    expected = plain_forward(tiny_reward_model)
    found = values(model_scores(tiny_reward_model, said, batch_tokens=batch_tokens))
    assert found == pytest.approx([expected[row] for row in order], abs=1e-4)


@pytest.fixture
def end_padded_model(tiny_reward_model: Path, tmp_path: Path) -> Path:
    """A reward model whose padding token is the end token, with which its conversations end."""
    folder = tmp_path / "end-padded"
    shutil.copytree(tiny_reward_model, folder)
    edit_json(folder / "config.json", pad_token_id=load_tokenizer(str(folder)).eos_token_id)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_score_is_read_at_the_last_token_also_if_that_is_the_padding(
    end_padded_model: Path, tiny_reward_model: Path
) -> None:
    expected = plain_forward(tiny_reward_model)
    assert values(model_scores(end_padded_model)) == pytest.approx(expected, abs=1e-4)
    # earlier versions read it one token before: those scores do not count
    config = ModelRewardConfig(model=ModelConfig(path=str(end_padded_model)))
    assert config.identity()["pooled"] == "last token"
    edit_json(end_padded_model / "config.json", pad_token_id=None)
    assert values(model_scores(end_padded_model)) == pytest.approx(expected, abs=1e-4)


def test_rows_that_use_every_token_are_scored_alone(tiny_reward_model: Path) -> None:
    reward = ModelReward(ModelRewardConfig(model=ModelConfig(path=str(tiny_reward_model)), device="cpu"))
    used = reward.model.config.vocab_size
    rows = [[*range(token, used), *range(token)][:250] for token in range(0, used, 100)]
    assert reward.score_ids(rows) == pytest.approx([reward.score_ids([row])[0] for row in rows], abs=1e-4)


def test_a_row_longer_than_positions_after_the_padding_fails_alone(
    tiny_reward_model: Path, tmp_path: Path
) -> None:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    tokenizer = load_tokenizer(str(tiny_reward_model))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": len(tokenizer) - 1, "max_position_embeddings": 66, "pad_token_id": 1}
    RobertaForSequenceClassification(RobertaConfig(**sizes, **tokens, num_labels=1)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = next(t for n in range(200) if len(t := "a b " * n) and length_of(tokenizer, t) in (64, 63))
    unknown = tokenizer.decode([len(tokenizer) - 1])
    said = [([{"role": "user", "content": "Hi"}], one) for one in ("yes", text, text + " b b", "a" + unknown)]
    scores = model_scores(tmp_path, said)
    assert [score.error is None for score in scores] == [True, True, False, False]
    assert "tokens, but the reward model reads 64" in str(scores[2].error)
    assert f"outside the model's vocabulary of {len(tokenizer) - 1}" in str(scores[3].error)
    with pytest.raises(ConfigError, match=r"max_length: got 66, but .* has a context of 64 tokens"):
        model_scores(tmp_path, said, max_length=66)


def length_of(tokenizer: Any, text: str) -> int:
    return len(
        encode_conversation(
            tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]
        )
    )


def test_conversations_that_are_too_long_fail_alone(tiny_reward_model: Path) -> None:
    scores = model_scores(tiny_reward_model, max_length=60)
    expected = plain_forward(tiny_reward_model)
    long = [s.error is not None for s in scores]
    assert 0 < sum(long) < len(scores)
    assert [s.reward for s in scores if s.error is None] == pytest.approx(
        [reward for reward, too_long in zip(expected, long, strict=True) if not too_long], abs=1e-4
    )
    assert "tokens, but the reward model reads 60" in next(s.error for s in scores if s.error)


def test_models_with_several_labels_are_refused(tiny_reward_model: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, LlamaForSequenceClassification

    config = AutoConfig.from_pretrained(tiny_reward_model, num_labels=3)
    folder = tmp_path / "classifier"
    shutil.copytree(tiny_reward_model, folder)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    with pytest.raises(ModelError, match="gives 3 scores, expected a reward model with one"):
        model_scores(folder)


@pytest.mark.slow
def test_a_reward_model_runs_in_a_child_and_gives_its_memory_back(
    tiny_reward_model: Path, tmp_path: Path
) -> None:
    log = tmp_path / "reward.log"
    reward = open_reward(ModelRewardConfig(model=ModelConfig(path=str(tiny_reward_model))), log=log)
    prompts, completions = zip(*CONVERSATIONS, strict=True)
    assert values(reward.score(prompts, completions, {})) == pytest.approx(
        plain_forward(tiny_reward_model), abs=1e-4
    )
    reward.close()
    assert log.exists()
    with pytest.raises(ModelError, match="no model folder"):
        open_reward(ModelRewardConfig(model=ModelConfig(path=str(tmp_path / "nowhere"))))


def test_bfloat16_scores_do_not_depend_on_the_batch_beyond_its_rounding(
    tiny_reward_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bfloat16"
    shutil.copytree(tiny_reward_model, folder)
    model = load_reward_model(ModelConfig(path=str(tiny_reward_model)), "cpu")
    model.to(torch.bfloat16).save_pretrained(folder)
    expected = plain_forward(folder)
    for batch_tokens in (1, 400, 100_000):
        found = values(model_scores(folder, batch_tokens=batch_tokens))
        assert found == pytest.approx(expected, abs=2**-8 * 4 * max(map(abs, expected)))
    assert max(expected) - min(expected) > 0.1


MULTI_OBJECTIVE = '''
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel
from transformers.utils import ModelOutput


@dataclass
class Output(ModelOutput):
    rewards: torch.Tensor | None = None
    gating: torch.Tensor | None = None
    score: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class GatedRewardModel(LlamaPreTrainedModel):
    """Several objectives read at the last token, weighed by a gate that reads the first: one score."""

    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.objectives = torch.nn.Linear(config.hidden_size, config.num_objectives, bias=False)
        self.gate = torch.nn.Linear(config.hidden_size, config.num_objectives, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **_):
        hidden_BTD = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        last_B = attention_mask.sum(-1) - 1
        rewards = self.objectives(hidden_BTD[torch.arange(len(input_ids)), last_B])
        gating = torch.softmax(self.gate(hidden_BTD[:, 0]), dim=-1)
        return Output(rewards=rewards, gating=gating, score=(rewards * gating).sum(-1), logits=rewards)
'''


AS_ARMORM = "from transformers.models.llama.modeling_llama import LLAMA_INPUTS_DOCSTRING\n"


@pytest.fixture
def multi_objective_model(tiny_reward_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ArmoRM's shape: code of its own, 19 objectives, a gate, and the combined `score` in the output."""
    folder = tmp_path / "gated"
    folder.mkdir()
    (folder / "modeling_gated.py").write_text(MULTI_OBJECTIVE)
    monkeypatch.setattr("sys.path", [*sys.path])
    tokenizer = load_tokenizer(str(tiny_reward_model))
    config = load_model_config(ModelConfig(path=str(tiny_reward_model)))
    config.num_objectives, config.num_labels = 19, 2
    config.auto_map = {"AutoModelForSequenceClassification": "modeling_gated.GatedRewardModel"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = load_callable(f"{folder}/modeling_gated.py:GatedRewardModel")(config)
        torch.nn.init.normal_(model.objectives.weight)
        torch.nn.init.normal_(model.gate.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "modeling_gated.py").write_text(AS_ARMORM + MULTI_OBJECTIVE)
    return folder


@pytest.mark.slow
def test_a_multi_objective_model_gives_its_score_but_only_where_its_code_is_trusted(
    multi_objective_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))  # read by the child when it starts
    prompts, completions = zip(*CONVERSATIONS, strict=True)
    trusted = ModelConfig(path=str(multi_objective_model), trust_remote_code=True)
    reward = open_reward(ModelRewardConfig(model=trusted, batch_tokens=400), log=tmp_path / "log")
    found = values(reward.score(prompts, completions, {}))
    reward.close()
    assert found == pytest.approx(gated_scores(multi_objective_model), abs=1e-4)
    assert len({round(value or 0.0, 3) for value in found}) > 15
    with pytest.raises(ModelError, match=r"comes with Python code: .* trust_remote_code"):
        load_reward_model(ModelConfig(path=str(multi_objective_model)))


def gated_scores(folder: Path) -> list[float]:
    """The score from the weights themselves: objectives at the last token, gate at the first."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaModel

    weights = load_file(folder / "model.safetensors")
    body = LlamaModel(LlamaConfig.from_pretrained(folder)).eval()
    body.load_state_dict(
        {name.removeprefix("model."): w for name, w in weights.items() if name.startswith("model.")}
    )
    scores = []
    for ids in ids_of_conversations(folder):
        with torch.inference_mode():
            hidden_TD = body(ids).last_hidden_state[0]
            gate = (weights["gate.weight"] @ hidden_TD[0]).softmax(-1)
            scores.append(float(gate @ (weights["objectives.weight"] @ hidden_TD[-1])))
    return scores


OUT_OF_MEMORY = """
import json, resource, sys
from qrpo.models import ModelConfig
from qrpo.rewards.model import ModelReward, ModelRewardConfig

folder, rows = sys.argv[1], json.load(sys.stdin)
reward = ModelReward(ModelRewardConfig(model=ModelConfig(path=folder), device="cpu", batch_tokens=1_000_000))
prompts, completions = zip(*rows)
reward.score(prompts[:2], completions[:2])  # what is loaded lazily is loaded now
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), -1))
scores = reward.score(prompts, completions)
print(json.dumps({"budget": reward.batch_tokens, "rewards": [s.reward for s in scores]}))
"""


@pytest.mark.slow
def test_when_memory_runs_out_the_budget_is_halved_and_scoring_goes_on(tiny_reward_model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, str(tiny_reward_model)],
        input=json.dumps(CONVERSATIONS * 60),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["budget"] < 100_000
    assert "reward model out of memory: batch_tokens is now" in done.stderr
    assert result["rewards"] == pytest.approx(plain_forward(tiny_reward_model) * 60, abs=1e-4)


@pytest.mark.slow
def test_vllm_gives_the_scores_that_transformers_gives(end_padded_model: Path, tmp_path: Path) -> None:
    tiny_reward_model = end_padded_model
    tokenizer = load_tokenizer(str(tiny_reward_model))
    said = [[*prompt, {"role": "assistant", "content": completion}] for prompt, completion in CONVERSATIONS]
    longest = max(len(encode_conversation(tokenizer, messages)) for messages in said)
    model = ModelConfig(path=str(tiny_reward_model))
    config = ModelRewardConfig(model=model, engine="vllm", max_length=longest)
    reward = open_reward(config, log=tmp_path / "vllm.log")
    prompts, completions = zip(*CONVERSATIONS, strict=True)
    scores = reward.score([*prompts, prompts[0]], [*completions, "long " * longest], {})
    again = reward.score(prompts[::-1], completions[::-1], {})
    reward.close()
    assert f"tokens, but the reward model reads {longest}" in str(scores.pop().error)
    assert values(scores) == pytest.approx(plain_forward(tiny_reward_model), abs=1e-3)
    assert values(again[::-1]) == pytest.approx(values(scores), abs=1e-3)
