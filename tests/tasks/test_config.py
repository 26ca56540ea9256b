from pathlib import Path

import pytest
import yaml

from qrpo.config import keyed
from qrpo.errors import ConfigError
from tasks.config import apply_overrides, dump_config, load_config, parse_config
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
    ],
)
def test_bad_keys_are_refused_with_their_path(override, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(apply_overrides(MINIMAL, [override]))
    assert message in str(caught.value)


def test_missing_section_is_named():
    with pytest.raises(ConfigError, match=r"reference: missing"):
        parse_config({key: value for key, value in MINIMAL.items() if key != "reference"})


def test_override_sets_nested_values_and_list_items_without_touching_the_original():
    result = apply_overrides(
        MINIMAL, ["policy.beta=0.25", "rewards.0.weight=2", "prompts.columns.prompt=question"]
    )
    config = parse_config(result)
    assert config.policy.beta == 0.25
    assert config.rewards[0].weight == 2
    assert config.prompts.columns == {"prompt": "question"}
    assert "policy" not in MINIMAL


@pytest.mark.parametrize("override", ["policy.beta", "=1", "rewards.7.weight=1", "name.first=x"])
def test_malformed_overrides_are_refused(override):
    with pytest.raises(ConfigError, match="--set"):
        apply_overrides({**MINIMAL, "name": "run"}, [override])


def test_shown_configuration_reads_back_as_the_same_configuration():
    config = parse_config(apply_overrides(MINIMAL, ["reference.sft={}", "policy.beta=0.02"]))
    shown = dump_config(config)
    assert parse_config(yaml.safe_load(shown)) == config
    assert "# " in shown


def test_unsafe_yaml_tags_are_refused(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("name: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(path)


def test_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


def test_two_rewards_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="names must differ"):
        parse_config({**MINIMAL, "rewards": MINIMAL["rewards"] * 2})


def test_more_training_completions_than_reference_samples_are_refused():
    with pytest.raises(ConfigError, match=r"num_completions is 8 but completions\.num_ref is 4"):
        parse_config(apply_overrides(MINIMAL, ["completions.num_ref=4", "quantiles.num_completions=8"]))


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
