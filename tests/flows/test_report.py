"""The report's page, from a store filled by hand with hostile text, loaded in a real browser."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.views.report import render_report
from qrpo.evaluation.summary import summarise
from storage import PartKey, Store, fingerprint, manifest_of, rejects_table
from tasks.config import parse_config
from tests.support.views import CHROMIUM, chromium, qrpo, row, table

HOSTILE = (
    "<script>document.title = 'run'</script>",
    "<img src=x onerror=\"document.title = 'run'\">",
    "</pre></main><style>body { display: none }</style>",
    "{{ 7 * 7 }} {% raw %}",
    "<svg onload=\"document.title = 'run'\">",
    "https://example.org/x.png &amp; <b>bold</b>",
    "long" * 2000,
)
PROMPTS, SAMPLES, NUM_REF = 24, 3, 10


def test_page_shows_every_part_of_the_run(page: str) -> None:
    for heading in (
        "Rewards",
        "Quantile rewards",
        "Win rate against KL",
        "Reward against KL",
        "Reward against length",
        "What num_ref costs",
        "Loss",
        "Best",
        "Worst",
        "Gained most",
        "Lost most",
        "Rejects",
        "Lineage and timings",
        "optimum, beta 0.2",
        "the row is broken &lt;b&gt;",
        "step-7",
    ):
        assert heading in page, heading
    assert page.count("<svg") == 10 - 2  # of the curves, this run logged the loss and the gradient norm


def test_page_holds_no_script_no_address_and_only_escaped_text(page: str) -> None:
    body = page[page.index("</style>") :]

    assert "<script" not in page
    assert "onerror=&#34;" in page
    assert "<img" not in page
    assert 'href="http' not in page
    assert "src=" not in body.replace("src=x onerror=&#34;", "")
    assert "{{ 7 * 7 }}" in page
    assert "characters more)" in page
    assert "NaN" not in page


def test_identifiers_of_the_pictures_do_not_collide(page: str) -> None:
    names = re.findall(r'\bid="([^"]+)"', page)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', page))

    assert len(names) == len(set(names))
    assert used <= set(names)


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_loads_the_page_alone_and_without_a_complaint(
    visit: Callable[..., "Visit"], width: int, height: int, scheme: str
) -> None:
    visit = visit(width, height, scheme)

    assert visit.requests == [visit.url]
    assert visit.complaints == []
    assert visit.title == "hostile – QRPO report"  # noqa: RUF001
    assert visit.facts["wide"] <= width, "the page scrolls sideways"
    assert visit.facts["figures"] == 8
    assert visit.facts["narrowest"] > 0.6 * min(width, 420)
    assert visit.facts["shown"] > 3000
    dark = sum(visit.facts["background"]) < 3 * 100
    assert dark == (scheme == "dark")
    assert (sum(visit.facts["ink"]) > 3 * 150) == dark, "text is as dark as the page, or as light"


def test_command_writes_the_page_of_a_run_that_has_no_evaluation_too(store: Store, tmp_path: Path) -> None:
    noted = store.run("hostile")
    assert noted is not None
    early = {name: noted["stages"][name] for name in ("prompts", "quantiles")}
    store.write_run("early", {**noted, "stages": early})

    done = qrpo("report", "early", "--store", store.url, "--out", tmp_path / "sub" / "page.html")

    assert done.exit_code == 0, done.stderr
    assert str(tmp_path / "sub" / "page.html") in done.stdout
    page = (tmp_path / "sub" / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "Lineage and timings" in page
    assert "<h2>Result</h2>" not in page
    assert page.count("<svg") == 2  # the reference's rewards, and what num_ref costs

    unknown = qrpo("report", "nothing", "--store", store.url)
    assert unknown.exit_code == 2
    assert "no run named 'nothing'" in unknown.stderr
    assert "hostile" in unknown.stderr


def test_pairwise_losses_are_not_held_against_the_theory_of_qrpo(store: Store) -> None:
    noted = store.run("hostile")
    assert noted is not None
    noted["config"]["policy"]["loss"] = "dpo"
    store.write_run("pairwise", noted)

    page = render_report(store, "pairwise")

    assert "optimum, beta" not in page
    assert "Win rate against KL" not in page
    assert "Reward against length" in page


@dataclass
class Visit:
    """What a browser saw of the page."""

    url: str
    title: str = ""
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


FACTS = """() => {
    const colour = (name) => getComputedStyle(document.body)[name].match(/\\d+/g).slice(0, 3).map(Number);
    const figures = [...document.querySelectorAll("figure svg")].map((one) => one.getBoundingClientRect().width);
    return {
        wide: document.documentElement.scrollWidth,
        figures: figures.length,
        narrowest: Math.min(...figures),
        shown: document.body.innerText.length,
        background: colour("backgroundColor"),
        ink: colour("color"),
    };
}"""


@pytest.fixture(scope="module")
def visit(page: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Visit]]:
    """Load the page in headless Chromium at a size and colour scheme."""
    if not CHROMIUM.exists():
        pytest.skip("no chromium on this machine: `make system` installs it")
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page, encoding="utf-8")
    with chromium() as browser:

        def load(width: int, height: int, scheme: Any) -> Visit:
            seen = Visit(path.as_uri())
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            tab = context.new_page()
            tab.on("request", lambda request: seen.requests.append(request.url))
            tab.on("console", lambda message: seen.complaints.append(message.text))
            tab.on("pageerror", lambda error: seen.complaints.append(str(error)))
            tab.goto(seen.url)
            seen.title, seen.facts = tab.title(), tab.evaluate(FACTS)
            context.close()
            return seen

        yield load


@pytest.fixture(scope="module")
def page(store: Store) -> str:
    return render_report(store, "hostile")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with one run, as the stages would have left it, whose texts would like to run."""
    folder = tmp_path_factory.mktemp("hostile")
    store = Store(folder / "store")
    config = parse_config(
        {
            "name": "hostile",
            "prompts": {"source": "prompts.jsonl"},
            "reference": {"model": {"path": str(folder)}},
            "completions": {"num_ref": NUM_REF},
            "rewards": [{"kind": "function", "function": "reward.py:reward"}],
            "policy": {"beta": 0.2},
        }
    )
    rng = np.random.default_rng(0)
    ids = [f"p{number:02d}" for number in range(PROMPTS)]
    stages: dict[str, str] = {}

    def commit(stage: str, rows: list[dict[str, Any]], **more: Any) -> None:
        scored = table(stage, rows)
        record = store.commit_part(PartKey(stage, "family", fingerprint(stage)), scored, seconds=1.5, **more)
        summary = (
            {"summary": summarise(scored, config.policy, num_ref=NUM_REF)} if stage == "evaluation" else {}
        )
        made = {"inputs": {"sources": {"source": ["<b>digest</b>"]}}, "parents": dict(stages), "seconds": 2.0}
        manifest = manifest_of(stage, "family", [record], metadata=summary, **made)
        stages[stage] = store.commit_manifest(manifest).fingerprint

    texts = [HOSTILE[number % len(HOSTILE)] for number in range(PROMPTS)]
    said = {
        name: [{"role": "user", "content": f"{name} {text}"}] for name, text in zip(ids, texts, strict=True)
    }
    commit(
        "prompts",
        [row("prompts", name, messages=messages, split="eval") for name, messages in said.items()],
        rejects=rejects_table([{"stage": "prompts", "key": "line 3", "reason": "the row is broken <b>"}]),
    )
    refs = {name: np.sort(rng.normal(0, 1, NUM_REF)).tolist() for name in ids}
    commit("quantiles", [row("quantiles", name, ref_rewards=refs[name], num_ref=NUM_REF) for name in ids])
    model = folder / "policy"
    model.mkdir()
    (model / "config.json").write_text("{}")
    steps = np.arange(40)
    metrics = {"step": steps, "loss": 1 / (1 + steps), "grad_norm": np.where(steps % 2, 1.0, np.nan)}
    pq.write_table(pa.table(metrics), model / "metrics.parquet")
    record = store.commit_folder(PartKey("policy", "family", fingerprint("policy")), model, rows=PROMPTS)
    stages["policy"] = store.commit_manifest(
        manifest_of("policy", "family", [record], parents=dict(stages))
    ).fingerprint
    rows = []
    for name, text in zip(ids, texts, strict=True):
        for model_name, shift in (("policy", 1.0), ("reference", 0.0), ("step-7", 0.5)):
            for index, reward in enumerate(rng.normal(shift, 1, SAMPLES).astype(np.float32).tolist()):
                values = {
                    "model": model_name,
                    "sample_index": index,
                    "text": f"{model_name} {text}",
                    "token_ids": rng.integers(0, 9, int(rng.integers(1, 12))).tolist(),
                    "reward": reward,
                    "quantile_reward": float(np.mean(np.array(refs[name]) < reward)),
                    "model_logprob": -1.0,
                    "ref_logprob": -1.0 - shift**2 / 2,
                }
                rows.append(row("evaluation", name, **values))
    commit("evaluation", rows)
    counts = {"parts_computed": 1, "parts_cached": 0}
    noted = {name: {"fingerprint": value, **counts} for name, value in stages.items()}
    store.write_run("hostile", {"name": "hostile", "config": config.model_dump(mode="json"), "stages": noted})
    return store
