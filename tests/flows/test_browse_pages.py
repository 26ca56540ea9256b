"""The pages of `qrpo browse` in a real browser: every link, hostile text, forms, phone width, dark mode."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from storage import Store
from tests.support.views import CHROMIUM, PROMPT, TOKEN, chromium, serving, write_artifacts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs /usr/bin/chromium: `make system` installs it"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the runs `one` and `two`."""
    path = tmp_path_factory.mktemp("browsed") / "store"
    for run, shift in (("one", 0.0), ("two", 1.0)):
        write_artifacts(Store(path), run, prompts=24, part_size=8, reward_shift=shift)
    return path


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Where the store is served."""
    with serving(Store(folder)) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as launched:
        yield launched


@pytest.fixture
def new_page(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """A page in a context of its own. At the end: nothing on the console, no error, no dialog, no request elsewhere."""
    contexts, complaints = [], []

    def failed(request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # the page was left meanwhile
            complaints.append(f"failed: {request.url} {request.failure}")

    def make(width: int = 1280, height: int = 900, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        context.add_cookies([{"name": "qrpo_browse", "value": TOKEN, "url": address}])
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        page.on("requestfailed", failed)

        def note(request: Any) -> None:
            if not request.url.startswith(address + "/"):
                complaints.append(f"outside: {request.url}")

        page.on("request", note)
        return page

    yield make
    for context in contexts:
        context.close()
    assert complaints == []


def test_hostile_completions_are_shown_as_they_are(new_page: Callable[..., Any], address: str) -> None:
    page = new_page()
    for path in (
        f"/prompt/one/{PROMPT}",
        "/runs/one/completions",
        "/runs/one/completions/row/0",
        "/runs/one/rewards/rejects",
        f"/compare/{PROMPT}?a=one&b=two",
    ):
        page.goto(address + path)
        shown = page.locator("main").inner_text()
        assert "<script>document.title='owned'</script>" in shown, path
        assert "{{ 7*7 }}" in shown
        assert r"\x1b" in shown
        assert r"\u202e" in shown
        assert not re.search(r"[\x00-\x08\x0e-\x1f\u202a-\u202e]", shown)
        assert page.title() != "owned"


def test_even_markup_that_slipped_in_could_not_run(browser: Any, address: str) -> None:
    """The page's policy holds for what is put into it afterwards, too."""
    context = browser.new_context()
    page = context.new_page()
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text))
    page.goto(f"{address}/?token={TOKEN}")

    page.evaluate(
        """async () => {
            const script = document.createElement('script');
            script.textContent = "document.title = 'owned'";
            document.body.append(script);
            const image = document.createElement('img');
            image.setAttribute('onerror', "document.title = 'owned'");
            document.body.append(image);
            image.dispatchEvent(new Event('error'));
            await fetch('/').then(() => { document.title = 'owned'; }, () => {});
        }"""
    )

    assert page.title() == "runs"
    assert len([line for line in refused if "Content Security Policy" in line]) >= 3
    context.close()


def test_forms_and_headings_filter_sort_and_page_by_the_address(
    new_page: Callable[..., Any], address: str
) -> None:
    page = new_page()
    page.goto(address + "/runs/one/rewards")
    page.get_by_label("condition").fill("reward >= 5 AND sample_index < 4")
    page.get_by_label("search").fill("right")
    page.keyboard.press("Enter")
    page.get_by_role("link", name="reward", exact=True).click()
    page.get_by_role("link", name="reward ↑").click()
    page.get_by_role("link", name="next").click()

    asked = parse_qs(urlsplit(page.url).query)
    where = ["reward >= 5 AND sample_index < 4"]
    assert asked == {"where": where, "q": ["right"], "sort": ["-reward"], "page": ["2"]}
    assert "76 rows match" in page.get_by_role("status").inner_text()
    column = page.locator("th").all_inner_texts().index("reward ↓")
    rewards = [float(text) for text in page.locator(f"td:nth-child({column + 1})").all_inner_texts()]
    assert rewards == sorted(rewards, reverse=True)
    assert len(rewards) == 26
    other = new_page()
    other.goto(page.url)
    assert other.locator("table").inner_text() == page.locator("table").inner_text(), (
        "the address alone says it all"
    )


def test_keys_reach_the_filter_turn_pages_and_lead_home(new_page: Callable[..., Any], address: str) -> None:
    page = new_page()
    page.goto(address + "/runs/one/completions")
    press(page, "f")
    page.keyboard.type("sample_index < 4")
    page.keyboard.press("Enter")
    page.wait_for_url("**where=*", timeout=20_000)
    first = page.locator("tbody").inner_text()
    press(page, "n")
    page.wait_for_url("**page=2*")
    assert page.locator("tbody").inner_text() != first
    press(page, "p")
    page.wait_for_url(lambda url: "page=2" not in url)
    assert page.locator("tbody").inner_text() == first
    press(page, "s")
    assert page.locator(":focus").get_attribute("name") == "q"
    press(page, "h")
    page.wait_for_url(address + "/")


def press(page: Any, key: str) -> None:
    """Alt and a key, as a keyboard sends it: Playwright's own leaves out the text by which Chromium knows access keys."""
    code = ord(key.upper())
    told = {"key": key, "code": f"Key{key.upper()}", "windowsVirtualKeyCode": code, "modifiers": 1}
    session = page.context.new_cdp_session(page)
    session.send("Input.dispatchKeyEvent", {"type": "keyDown", "unmodifiedText": key, **told})
    session.send("Input.dispatchKeyEvent", {"type": "keyUp", **told})
    session.detach()


def test_columns_and_samples_are_chosen_in_the_form(new_page: Callable[..., Any], address: str) -> None:
    page = new_page()
    page.goto(address + "/runs/one/completions")
    assert "token_ids" not in page.locator("thead").inner_text(), "long lists are not read unless asked for"
    page.get_by_text("columns", exact=True).click()
    for name in ("prompt_id", "origin", "finish_reason", "sampled_logprob"):
        page.get_by_label(name).uncheck()
    page.get_by_label("token_ids", exact=True).check()
    page.get_by_label("random").fill("7")
    page.get_by_role("button", name="show").click()

    assert page.locator("th").all_inner_texts() == ["row", "sample_index", "text", "token_ids"]
    first = page.locator("tbody").inner_text()
    page.reload()
    assert page.locator("tbody").inner_text() == first


def test_wrong_condition_is_told_beside_the_form(new_page: Callable[..., Any], address: str) -> None:
    page = new_page()
    for condition, complaint in (
        ("nothing > 1", "the columns are prompt_id"),
        ("reward IN (SELECT a FROM read_csv('/etc/passwd'))", "SELECT is not allowed"),
    ):
        for path in ("/runs/one/rewards", "/runs/one/rewards/numbers"):
            page.goto(address + path)
            page.get_by_label("condition").fill(condition)
            page.keyboard.press("Enter")
            assert complaint in page.get_by_role("alert").inner_text()
            assert page.get_by_label("condition").input_value() == condition


def test_prompt_page_ranks_completions_and_marks_their_quantiles(
    new_page: Callable[..., Any], address: str
) -> None:
    page = new_page()
    page.goto(f"{address}/prompt/one/{PROMPT[:10]}")

    cards = page.locator("article.completion")
    rewards = [float(re.findall(r"reward (\S+)", text)[0]) for text in cards.all_inner_texts()]
    assert rewards[:6] == [0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    assert "quantile 0.2 (0.1 to 0.6)" in cards.nth(4).inner_text()
    assert "shard shards-" in cards.nth(4).inner_text()
    heights = [float(cards.nth(place).locator("circle").get_attribute("cy")) for place in range(6)]
    assert heights == sorted(heights), "a better completion stands higher on the distribution"
    assert "100% of the reference" in cards.nth(0).locator("circle title").text_content()


def test_tokens_are_coloured_where_their_log_probabilities_are_stored(
    new_page: Callable[..., Any], address: str
) -> None:
    page = new_page()
    page.goto(f"{address}/prompt/one/{PROMPT}")

    tokens = page.locator("p.tokens").first.locator("span")
    assert [text.strip() for text in tokens.all_text_contents()] == ["I", "<b>say</b>", "four"]
    assert [tokens.nth(place).get_attribute("class") for place in range(3)] == ["t0", "t-2", "t3"]
    assert tokens.nth(2).get_attribute("title") == "log-ratio 2.1"
    colours = [tokens.nth(place).evaluate("e => getComputedStyle(e).backgroundColor") for place in range(3)]
    assert len(set(colours)) == 3


def test_two_runs_stand_side_by_side(new_page: Callable[..., Any], address: str) -> None:
    page = new_page()
    page.goto(address + "/runs/one")
    page.get_by_role("button", name="compare").click()

    assert "96 rows the same, 48 changed, 0 added, 0 removed" in page.get_by_role("status").inner_text()
    assert page.locator("figure svg polyline.line").count() == 3
    page.locator("h2", has_text="Changed rows").locator("xpath=following::a[1]").click()
    sides = page.locator(".sides section")
    assert sides.count() == 2
    before, after = (re.findall(r"reward (\S+)", sides.nth(place).inner_text())[0] for place in range(2))
    assert float(after) == float(before) + 1


def test_keyboard_alone_gets_around(new_page: Callable[..., Any], address: str) -> None:
    page = new_page()
    page.goto(address + "/runs/one/rewards")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.name") == "where":
            break
    page.keyboard.type("reward > 22")
    page.keyboard.press("Enter")
    page.wait_for_url("**where=*", timeout=20_000)
    assert page.evaluate("getComputedStyle(document.querySelector('main a')).outlineStyle") == "none"
    page.locator("main a").first.focus()
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", (
        "focus can be seen"
    )


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/artifacts",
        "/runs/one",
        "/runs/one/completions",
        "/runs/one/rewards/numbers",
        "/runs/one/rewards/rejects",
        "/runs/one/rewards/origin",
        "/runs/one/policy",
        "/runs/one/completions/row/0",
        f"/prompt/one/{PROMPT}",
        "/compare?a=one&b=two",
        f"/compare/{PROMPT}?a=one&b=two",
    ],
)
def test_every_page_fits_a_phone_and_is_dark_in_the_dark(
    new_page: Callable[..., Any], address: str, path: str
) -> None:
    phone = new_page(width=360, height=740, scheme="dark")
    phone.goto(address + path)

    assert phone.evaluate("document.documentElement.scrollWidth") <= 360
    total = "getComputedStyle(document.body).{}.match(/[0-9]+/g).reduce((a, b) => a + Number(b), 0)"
    back, ink = (phone.evaluate(total.format(name)) for name in ("backgroundColor", "color"))
    assert back < 120 < 600 < ink
