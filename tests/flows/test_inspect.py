"""`qrpo inspect` over stores of every kind: what it reads, what it finds, what it says."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

import storage
from flows.views.inspect.rows import ArtifactRows, Query, find_rows
from flows.views.inspect.summary import column_nulls, summarise
from storage import Store
from tasks.artifact_summary import numbers_of
from tests.support.flows import new_bucket
from tests.support.views import PROMPT, commit, qrpo, qrpo_json, rewards_table, row, table, write_artifacts


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with two runs, `one` and `two`; the rewards of the last four prompts are 1 higher in `two`."""
    folder = tmp_path_factory.mktemp("inspected") / "store"
    for run, shift in (("one", 0.0), ("two", 1.0)):
        write_artifacts(Store(folder), run, reward_shift=shift)
    return str(folder)


def inspect(url: str, *arguments: Any, run: str = "one", stage: str = "rewards") -> Any:
    return qrpo("inspect", run, stage, "--store", url, *arguments)


def asked(url: str, *arguments: Any, run: str = "one", stage: str = "rewards") -> Any:
    return qrpo_json("inspect", run, stage, "--store", url, *arguments)


def test_condition_order_columns_and_limit_choose_the_rows(url: str) -> None:
    where = ("--where", "reward > 3 AND sample_index IN (1, 2)")
    shown = asked(url, *where, "--sort=-reward", "--limit", "3", "--columns", "reward")

    assert [row["reward"] for row in shown["samples"]] == pytest.approx([11.2, 11.1, 10.2])
    assert shown["samples"][0].keys() == {"reward"}
    assert shown["matches"] == 18
    assert shown["numbers"]["reward"]["count"] == 18, "the distribution is of the rows that match"


def test_sample_has_its_size_and_is_the_same_for_a_seed_and_another_for_another(url: str) -> None:
    first, again, other = (asked(url, "--sample", "4", "--seed", seed)["samples"] for seed in ("1", "1", "2"))

    assert first == again != other
    assert len(first) == 4
    rows = asked(url, "--sample", "4", "--where", "reward >= 11")["samples"]
    assert len(rows) == 4
    assert all(row["reward"] >= 11 for row in rows)


def test_every_numeric_column_has_exact_numbers(url: str) -> None:
    shown = asked(url)

    rewards = storage.open(url, "one", "rewards").lazy.collect()["reward"].cast(pl.Float64)
    numbers = shown["numbers"]["reward"]
    assert numbers["quantiles"] == pytest.approx(
        [rewards.quantile(q, "linear") for q in (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)]
    )
    assert numbers["estimated_from"] is None
    assert sum(numbers["histogram"]["counts"]) == len(rewards) == 72
    assert shown["numbers"]["components.right"]["mean"] == pytest.approx(rewards.mean())
    never = ("prompt_id", "sample_index", "origin", "reward", "components")
    assert shown["nulls"] == dict.fromkeys(never, 0) | {"error": 72}


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        ([0, 1, 1, 3], [1, 2, 0, 1]),
        ([k / 50 for k in range(51)], [1] * 51),
        ([0.25, 0.75], [1, 1]),
        ([2.0, 2.0], [2]),
        ([0.0, 1e-9, 1.0], [2, *[0] * 30, 1]),
    ],
)
def test_values_on_a_grid_have_one_bar_each(values: list[float], counts: list[int]) -> None:
    numbers = numbers_of(pl.Series(values, dtype=pl.Float64))
    assert numbers is not None
    assert numbers["histogram"]["counts"] == counts


def test_rows_are_shown_as_conversations_whatever_the_stage(url: str) -> None:
    for stage, where in (("completions", "text = 'I say 10 (5)'"), ("rewards", "reward > 5.45")):
        chat = asked(url, "--where", where, "--limit", 1, stage=stage)
        assert chat["conversations"][0]["messages"][1]["content"] == "How many are 5 and 5?"
        assert chat["conversations"][0]["completion"] == "I say 10 (5)"

    shown = inspect(url, "--where", "reward > 5.45", "--limit", "1").stdout
    assert "[user] How many are 5 and 5?" in shown
    assert "[completion] I say 10 (5)" in shown


def test_prompt_is_followed_into_the_shards_best_completion_first(url: str) -> None:
    followed = asked(url, "--prompt-id", PROMPT[:8])

    rewards = [row["reward"] for row in followed["completions"]]
    assert rewards == sorted(rewards, reverse=True)
    assert followed["completions"][0]["rank"] == 1.0
    assert followed["completions"][0]["became"] == "not trained on"
    last = followed["completions"][-1]
    assert (last["quantile_reward"], last["ref_logprob"]) == (0.0, -3.0)
    assert last["became"].startswith("shard shards-0-4-6")
    assert [row["stage"] for row in followed["rejects"]] == ["rewards"]
    assert {row["origin"] for row in followed["samples"]} == {"policy", "reference"}


def test_only_the_parts_of_the_prompt_are_read(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from storage import read as module

    opened: list[str] = []
    real = module.open_checked

    def watched(files: Any, entry: Any, record: Any) -> Any:
        opened.append(record.fingerprint)
        return real(files, entry, record)

    monkeypatch.setattr(module, "open_checked", watched)
    asked(url, "--prompt-id", PROMPT)

    assert {name for name in opened if not name.startswith("prompts")} == {
        f"{stage}-0-4-6-0.0" for stage in ("completions", "rewards", "quantiles", "shards", "evaluation")
    }


def test_diff_counts_rows_and_says_what_moved(url: str) -> None:
    shown = asked(url, "--diff", "one", run="two")

    assert (shown["same"], shown["changed"], shown["added"], shown["removed"]) == (48, 24, 0, 0)
    assert shown["changed_columns"] == {"reward": 24, "components": 24}
    before, after = shown["examples"]["changed"][0]["changes"]["reward"]
    assert after == pytest.approx(before + 1)
    means = [side["reward"]["mean"] for side in shown["numbers"]]
    assert means[1] - means[0] == pytest.approx(24 / 72)


def test_diff_of_more_prompts_says_which_rows_came_and_went(tmp_path: Path) -> None:
    for run, prompts in (("few", 5), ("many", 8)):
        write_artifacts(Store(tmp_path), run, prompts=prompts, num_ref=prompts)

    grown = asked(tmp_path, "--diff", "few", run="many", stage="prompts")
    shrunk = asked(tmp_path, "--diff", "many", run="few", stage="prompts")

    assert (grown["same"], grown["added"], grown["removed"]) == (5, 3, 0)
    assert (shrunk["same"], shrunk["added"], shrunk["removed"]) == (5, 0, 3)
    assert grown["examples"]["added"][0]["messages"][1]["content"] == "How many are 5 and 5?"
    assert "3 added" in inspect(tmp_path, "--diff", "few", run="many", stage="prompts").stdout


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_export_holds_the_rows_of_the_condition_in_their_order(url: str, tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"best.{ending}"

    done = asked(url, "--where", "reward > 9", "--sort=-reward", "--export", file)

    read = {"parquet": pl.read_parquet, "jsonl": pl.read_ndjson, "csv": pl.read_csv}[ending](file)
    assert done["rows"] == read.height == 17
    assert read["reward"].to_list() == sorted(read["reward"].to_list(), reverse=True)
    first = read["components"][0]
    value = json.loads(first) if ending == "csv" else first.to_list()
    assert value == [{"name": "right", "value": pytest.approx(11.5)}]


def test_a_spreadsheet_runs_no_text_of_an_export(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    texts = ["=1+1", "+1", "-1", "@SUM(A1)", "plain"]
    rows = [row("completions", f"p{number}", text=text) for number, text in enumerate(texts)]
    commit(store, "completions", [table("completions", rows)])

    asked(store.url, "--export", tmp_path / "all.csv", "--columns", "text", stage="completions")

    texts = pl.read_csv(tmp_path / "all.csv")["text"].to_list()
    assert texts == ["'=1+1", "'+1", "'-1", "'@SUM(A1)", "plain"]


def test_export_of_everything_is_everything(url: str, tmp_path: Path) -> None:
    asked(url, "--export", tmp_path / "all.parquet", stage="completions")

    everything = storage.open(url, "one", "completions").lazy.collect()
    assert pl.read_parquet(tmp_path / "all.parquet").equals(everything)
    assert [path.name for path in tmp_path.iterdir()] == ["all.parquet"]


def test_export_replaces_no_file_and_knows_its_endings(url: str, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("precious")

    for name, complaint in (
        ("mine.csv", "this file exists"),
        ("rows.xlsx", "ending must be one of"),
        ("no/a.csv", "no folder"),
    ):
        result = inspect(url, "--export", tmp_path / name)
        assert result.exit_code == 2
        assert complaint in result.stderr
    assert (tmp_path / "mine.csv").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--columns", "reward,nothing"), "no column nothing; the columns are prompt_id"),
        (("--sort", "nothing"), "no column nothing"),
        (("--sort", "components"), "cannot be sorted by components"),
        (("--diff", "one", "--prompt-id", "5f"), "ask for different things"),
        (("--diff", "one", "--where", "reward > 1"), "--where has no meaning with --diff"),
        (("--diff", "nowhere"), "no run named 'nowhere'"),
        (("--prompt-id", "zz"), "no prompt of run 'one'"),
        (("--prompt-id", ""), "give more of it"),
    ],
)
def test_what_cannot_be_answered_is_told_in_one_line(
    url: str, arguments: tuple[str, ...], complaint: str
) -> None:
    result = inspect(url, *arguments)

    assert result.exit_code in (1, 2)
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1


def test_nothing_that_a_model_wrote_commands_the_terminal(url: str) -> None:
    for arguments, stage in (
        ((), "prompts"),
        (("--limit", "1"), "completions"),
        (("--prompt-id", PROMPT), "prompts"),
        (("--diff", "two"), "rewards"),
    ):
        shown = inspect(url, *arguments, stage=stage).stdout
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", shown)
    shown = unfolded(inspect(url, "--limit", "1", stage="completions").stdout)
    assert "<script>" in shown
    assert r"\x1b[31mred" in shown
    assert r"\u202e" in shown
    assert "[bold]b[/bold]" in shown


def test_huge_completion_is_cut_and_its_length_said(tmp_path: Path) -> None:
    commit(Store(tmp_path), "completions", [table("completions", [row("completions", text="x" * 5_000_000)])])

    shown = unfolded(inspect(tmp_path, stage="completions").stdout)

    assert "(5,000,000characters)" in shown
    assert len(shown) < 20_000


def test_works_on_other_stores(url: str) -> None:
    memory = "memory://inspected/store"
    write_artifacts(Store(memory), "one")

    for arguments in (("--where", "reward > 3", "--sort=-reward"), ("--prompt-id", PROMPT), ("--sample", 1)):
        assert asked(memory, *arguments) == asked(url, *arguments)


@pytest.mark.slow
def test_little_is_read_of_a_big_part_in_a_bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    noise = pa.array([rng.bytes(2000).hex() for _ in range(5000)])
    rewards = rewards_table(rng.normal(size=5000)).append_column("noise", noise)
    with new_bucket(s3_endpoint, "inspected") as bucket:
        store = Store(f"{bucket}/store")
        size = commit(store, "rewards", [rewards]).bytes
        read = count_bytes(store, monkeypatch)
        shown = asked(store.url, "--where", "reward > 1", "--columns", "reward,prompt_id", "--sort=-reward")

    assert shown["samples"][0]["reward"] == pytest.approx(max(rewards["reward"].to_pylist()))
    assert sum(read) < size / 10, (sum(read), size)


def test_numbers_of_a_big_artifact_are_estimates_that_say_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tables = [rewards_table(rng.normal(size=40_000), first=40_000 * part) for part in range(6)]
    store = Store(tmp_path)
    rows = ArtifactRows(store, commit(store, "rewards", tables).parts)
    everything = pa.concat_tables(tables)["reward"].to_numpy()

    known = summarise(rows)["reward"]

    assert known["estimated_from"] == known["count"] == 80_000
    assert (known["min"], known["max"]) == (everything.min(), everything.max()), "footers are exact"
    assert known["quantiles"][3] == pytest.approx(np.median(everything), abs=0.02)
    assert column_nulls(rows)["error"] == 240_000
    assert "min and max are exact, the rest is estimated from 80,000 rows" in inspect(tmp_path).stdout
    exact = summarise(rows, exact=True)["reward"]
    assert exact["estimated_from"] is None
    assert exact["quantiles"][3] == pytest.approx(np.median(everything))


def test_looking_ends_when_time_is_up_and_says_how_far_it_came(tmp_path: Path) -> None:
    store = Store(tmp_path)
    size = 140_000  # more than is looked at together
    tables = [rewards_table(np.full(size, part, dtype=float), first=size * part) for part in range(2)]
    rows = ArtifactRows(store, commit(store, "rewards", tables).parts)
    query = Query(where="reward >= 1", limit=3)

    cut = find_rows(rows, query, seconds=0.0)
    whole = find_rows(rows, query)

    assert (cut.positions, cut.matches) == ([], None)
    assert 0 < cut.searched <= size
    assert (whole.positions, whole.matches) == ([size, size + 1, size + 2], size)
    assert find_rows(rows, query, offset=3).positions == [size + 3, size + 4, size + 5]


def test_search_looks_into_conversations_and_lists(url: str) -> None:
    store = Store(url)
    found = {}
    for stage, text in (("prompts", "MANY ARE 7 AND"), ("completions", "say 14 ("), ("rewards", "RIGHT")):
        rows = ArtifactRows(store, storage.open(store, "one", stage).manifest.parts)
        found[stage] = find_rows(rows, Query(search=text)).matches

    assert found == {"prompts": 1, "completions": 6, "rewards": 72}


def unfolded(shown: str) -> str:
    """The output without spaces, folds and the borders of panels."""
    return re.sub(r"[\s│]+", "", shown)


def count_bytes(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of every answer that the store's connection gives from now on."""
    read: list[int] = []
    filesystem = type(store.files.filesystem)  # type: ignore[attr-defined]
    real = filesystem._cat_file

    async def counted(self: Any, *arguments: Any, **options: Any) -> bytes:
        data = await real(self, *arguments, **options)
        read.append(len(data))
        return data

    monkeypatch.setattr(filesystem, "_cat_file", counted)
    return read
