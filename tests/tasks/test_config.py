from pathlib import Path

import pytest

from qrpo.config import keyed
from qrpo.errors import ConfigError
from tasks.config import apply_overrides, dump_config, load_config, parse_config
from tasks.config_yaml import read_yaml, write_yaml
from tasks.rounds import round_configs

MINIMAL = {
    "prompts": {"source": "prompts.jsonl"},
    "reference": {"model": {"path": "org/model"}},
    "completions": {},
    "rewards": [{"kind": "function", "name": "reward", "function": "reward.py:reward"}],
}


def test_minimal_configuration_is_complete():
    config = parse_config(MINIMAL)
    assert config.completions.num_ref >= 1
    assert config.reference.sft is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy.betta=0.1", "policy.betta: unknown key; did you mean `beta`?"),
        (
            "completions.sampling.temprature=1",
            "completions.sampling.temprature: unknown key; did you mean `temperature`?",
        ),
        ("rewards.0.wieght=2", "rewards.0.wieght: unknown key; did you mean `weight`?"),
        ("nonsense=1", "nonsense: unknown key"),
        ("policy.beta=-1", "policy.beta: "),
        ("name=../escape", "name: "),
        ("quantiles.ties=often", "quantiles.ties: "),
        ("policy.beta=on", "policy.beta: Input should be a valid number, got 'on'"),
        ("policy.beta=1:30", "policy.beta: Input should be a valid number, got '1:30'"),
        ("policy.bf16=yes", "policy.bf16: Input should be a valid boolean, got 'yes'"),
        ("completions.num_ref=true", "completions.num_ref: Input should be a valid integer, got True"),
        ("completions.num_ref=1e1", "completions.num_ref: Input should be a valid integer, got 10.0"),
        ("name=5", "name: Input should be a valid string, got 5; write it in quotes"),
        ("policy.beta={a: 1, a: 2}", "the key `a` is given twice"),
        ("completions.sampling.stop=['']", "completions.sampling.stop.0: String should have at least 1"),
        ("compare.seeds=[0, 1, 0]", "compare.seeds: a seed is given twice in [0, 1, 0]"),
        ("rewards.0.weight=0", "rewards: every weight is 0"),
        ("rewards=[{function: 'a.py:f'}]", "rewards.0: `kind` is missing"),
        ("policy.max_grad_norm=.inf", "policy.max_grad_norm: Input should be a finite number"),
        ("rewards.0.weight=.nan", "rewards.0.weight: Input should be a finite number"),
        ("seed=-1", "seed: Input should be greater than or equal to 0"),
        ("seed=20261127133800", "seed: Input should be less than 4294967296"),
        ("policy.seed=4294967296", "policy.seed: Input should be less than 4294967296"),
        ("compare.seeds=[0, -1]", "compare.seeds.1: Input should be greater than or equal to 0"),
        ("policy.processes=3", "prompts_per_step is 128, expected a multiple of the 3 processes"),
        (
            "policy.adam_beta1=2.0",
            "policy: transformers or torch refuses these settings together: Invalid beta",
        ),
        ("reference.sft={adam_beta1: 2.0}", "reference.sft: transformers or torch refuses these settings"),
        ("policy.warmup_steps=1.5", "warmup_steps: got 1.5, expected a fraction below 1 or whole steps"),
        ("quantiles.num_completions=11", "num_completions is 11 but completions.num_ref is 10"),
        ("rewards.0.api_key=sk-secret", "rewards.0.api_key: unknown key"),
        ("prompts.eval_source=[sk-secret]", "prompts.eval_source: "),
        ("policy.beta", "--set"),
        ("=1", "--set"),
        ("rewards.7.weight=1", "--set"),
        ("seed.first=x", "--set"),
    ],
)
def test_bad_keys_are_refused_with_their_path(override, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(apply_overrides({**MINIMAL, "seed": 1}, [override]))
    assert message in str(caught.value)
    assert "sk-secret" not in str(caught.value), "a refused value may be a secret"


def test_what_is_missing_or_doubled_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="names must differ"):
        parse_config({**MINIMAL, "rewards": MINIMAL["rewards"] * 2})
    with pytest.raises(ConfigError, match="reference: missing"):
        parse_config({key: value for key, value in MINIMAL.items() if key != "reference"})
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


def test_override_sets_nested_values_and_list_items_without_touching_the_original():
    result = apply_overrides(
        MINIMAL, ["policy.beta=0.25", "rewards.0.weight=2", "prompts.columns.prompt=question"]
    )
    config = parse_config(result)
    assert config.policy.beta == 0.25
    assert config.rewards[0].weight == 2
    assert config.prompts.columns == {"prompt": "question"}
    assert "policy" not in MINIMAL


def test_shown_configuration_reads_back_as_the_same_configuration():
    config = parse_config(apply_overrides(MINIMAL, ["reference.sft={}", "policy.beta=0.02"]))
    shown = dump_config(config)
    assert parse_config(read_yaml(shown)) == config
    assert "# " in shown


def test_numbers_are_those_of_yaml_1_2():
    text = "{a: 010, b: 1e-6, c: 0o17, d: 0x1F, e: .inf, f: 1:30, g: on, h: 1_000, i: 2026-01-01, j: ~}"
    values = [10, 1e-6, 15, 31, float("inf"), "1:30", "on", "1_000", "2026-01-01", None]
    assert list(read_yaml(text).values()) == values
    for value in [*values, "010", "1e5", "0o17", "null", "true", "~", "", "<<"]:
        assert read_yaml(write_yaml({"key": value})) == {"key": value}
    keys = read_yaml("{2.50: 1, 010: 2, True: 3, null: 4}")
    assert keys == {"2.50": 1, "010": 2, "True": 3, "null": 4}, "keys are text as written"
    merged = read_yaml("base: &base {x: 1, y: 2}\nused: {<<: *base, x: 3}\n")
    assert merged["used"] == {"x": 3, "y": 2}, "a key of a merged mapping may be set again"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nseed: 1\nname: b\n", "line 3: the key `name` is given twice, first in line 1"),
        (
            "policy: {beta: 0.1}\nprompts:\n  source: x\npolicy: {}\n",
            "line 4: the key `policy` is given twice",
        ),
        (
            "completions:\n  sampling:\n    top_k: 1\n    'top_k': 2\n",
            "line 4: the key `top_k` is given twice",
        ),
        ("a: &a [*a]\n", "a value contains itself"),
        (f"seed: {'1' * 5000}\n", "not valid YAML: Exceeds the limit"),
        ("a: " + "{a: " * 2000, "not valid YAML: maximum recursion depth"),
        ("name: !!python/object/apply:os.system ['true']\n", "not valid YAML"),  # an unsafe tag
    ],
)
def test_yaml_that_means_two_things_is_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


@pytest.mark.parametrize(
    "source",
    [
        "s3://AKIA1234:sk-secret@bucket/x.jsonl",
        "s3://AKIA1234:se/sk-secret@bucket/x.jsonl",
        "https://sk-secret@host/x.jsonl",
        "https://host/x.jsonl?X-Amz-Signature=sk-secret",
        "https://host/x.jsonl?download=1&token=sk-secret",
        "simplecache::https://me:sk-secret@host/x.jsonl",
    ],
)
def test_sources_with_credentials_are_refused_without_repeating_them(source: str):
    for key in ("source", "eval_source"):
        with pytest.raises(ConfigError, match=f"prompts.{key}: a URL with credentials") as caught:
            parse_config({**MINIMAL, "prompts": {"source": "x.jsonl", key: source}})
        assert "sk-secret" not in str(caught.value)


def test_other_urls_are_sources():
    for source in (
        "hf://org/name@main:train",
        "github://org:repo@main/x.jsonl",
        "abfs://box@account.dfs.core.windows.net/x.jsonl",
        "https://host:8080/x.jsonl?download=true",
        "s3://bucket/a@b/x.jsonl",
        "sftp://me@host/x.jsonl",
    ):
        assert parse_config({**MINIMAL, "prompts": {"source": source}}).prompts.source == source


def test_execution_options_stay_out_of_fingerprints():
    slow = parse_config(
        apply_overrides(MINIMAL, ["completions.engine.max_num_seqs=1", "policy.token_budget=1000"])
    )
    fast = parse_config(
        apply_overrides(MINIMAL, ["completions.engine.max_num_seqs=999", "policy.token_budget=9000"])
    )
    assert keyed(slow.completions) == keyed(fast.completions)
    assert keyed(slow.policy) == keyed(fast.policy)
    other = parse_config(apply_overrides(MINIMAL, ["completions.sampling.temperature=0.5"]))
    assert keyed(other.completions) != keyed(fast.completions)


def test_example_configurations_are_valid():
    folder = Path(__file__).parents[2] / "examples"
    paths = sorted(folder.rglob("*.yaml"))
    assert len(paths) >= 2
    for path in paths:
        load_config(path)


def test_later_rounds_have_a_learning_rate_of_their_own():
    config = parse_config({**MINIMAL, "rounds": {"count": 3, "learning_rate": 1e-4}})
    rates = [one.policy.learning_rate for one in round_configs(config)]
    assert rates == [config.policy.learning_rate, 1e-4, 1e-4]
