"""The report page: what a file holds, and what a reader meets who opens it in a real browser."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from browser import headless_chromium
from matplotlib.figure import Figure as Drawing
from matplotlib.image import imread

from agents.page import Dialogue, Figure, Line, Page, Table, write_page

DOMAINS, SEEDS, PERSONAS = ("chatting", "therapy"), (0, 1), ("ann", "bob", "eve")
ARMS = (("untrained", 0), ("kstep:3", 64), ("full", 64))
WORDS = "I work as a plumber and spend my free time on birdwatching these days".split()

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "</title></style></pre></bdi><img src=x onerror=alert(3)>",
    "<!-- ]]> -->",
    "<!--<script>",
    "it's \"quoted\" & &amp; 'so' `on`",
    "{{ 7 * 7 }} {% raw %} {# #}",
    "separators \u2028 and \u2029 \x85",
    "\u202eright to left\u202c and \u2067unclosed \u202e",
    "half \ud83d a pair \udc00",
    "zero\u200b-width\u200d \ufeff\u00ad",
    "line\r\nbreaks\rof \n all \t kinds",
    "nul \0 and \x1b[31m",
    "  spaces  around  ",
    "long" * 200,
    "ä 漢字 🙂 e\u0301",
)
ALL_HOSTILE = "\n" + " ".join(HOSTILE)


def dialogue_of(
    domain: str, arm: tuple[str, int], seed: int, persona: str, group: str, reward_T: Sequence[Any]
) -> Dialogue:
    lines: list[Line] = []
    for turn, reward in enumerate(reward_T):
        lines.append(Line("partner", f"What of turn {turn}?"))
        parts = {"prompt_to_line": 1.0, "openness": reward}
        said = f"{persona} answers {arm[0]} in turn {turn}."
        reason = f"because of turn {turn}"
        lines.append(Line("agent", said, reward, reason, parts, 1.25, -0.5))
    return Dialogue(domain, *arm, seed, persona, group, f"You are {persona}.", lines)


def some_dialogues() -> list[Dialogue]:
    """Every persona in two groups, under every arm and seed; the third turn is unscorable."""
    rng = np.random.default_rng(7)
    return [
        dialogue_of(domain, arm, seed, persona, group, [*rng.random(2), None])
        for domain in DOMAINS
        for arm in ARMS
        for seed in SEEDS
        for persona in PERSONAS
        for group in ("g1", "g2")
    ]


@cache
def drawing(ylabel: str = "mean reward") -> str:
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure = Drawing(figsize=(9, 3))
        axis = figure.subplots()
        axis.plot([1, 2, 3], [0.2, 0.4, 0.3], color="#0072B2", label="full")
        axis.fill_between([1, 2, 3], 0, 1, color="#000000", alpha=0.1)
        axis.set_ylabel(ylabel)
        axis.legend()
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    return file.getvalue()


def page_of(**fields: Any) -> Page:
    full = Page(
        title="How far ahead?",
        warnings=["One seed only."],
        failures=[("therapy, ppo", "Traceback:\n  the loss is nan")],
        findings=["kstep:3 leads."],
        tables=[
            Table(
                "Reward",
                "Means.",
                ["domain", "method", "reward"],
                [["chatting", "full", ".281 [.264, .299]"], ["therapy", "full", ".4 [.3, .5]"]],
            )
        ],
        figures=[
            Figure("Drift", "By turn.", drawing(), "A line that rises."),
            Figure("Map", "T x T.", drawing(), "A map.", follows_theme=False),
        ],
        dialogues=some_dialogues(),
        facts=[("command", "ppg compare"), ("torch", "2.13")],
    )
    return replace(full, **fields)


# --- the file -------------------------------------------------------------------------------------


def test_the_file_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    html = write_page(page_of(), tmp_path / "new" / "report.html").read_text(encoding="utf-8")

    assert set(re.findall(r"\b(?:src|href|action|poster|data)\s*=\s*[\"']?(.)", html)) == {"#"}
    assert not re.findall(r"@import|url\((?![\"']?#)", html)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    assert "http" not in policy[1]


def test_the_same_page_is_the_same_file(tmp_path: Path) -> None:
    page = page_of(figures=[])

    one, two = (write_page(page, tmp_path / name).read_bytes() for name in ("a", "b"))

    assert one == two


def test_a_row_of_another_width_than_its_header_is_refused(tmp_path: Path) -> None:
    table = Table("Reward", "", ["domain", "reward"], [["chatting", ".2"], ["therapy"]])

    with pytest.raises(ValueError, match="Row 2 of table 'Reward' has 1 cells, the header 2"):
        write_page(page_of(tables=[table]), tmp_path / "report.html")


@pytest.mark.parametrize(
    ("inside", "told"),
    [
        ("<script>alert(1)</script>", "<script>"),
        ('<path onclick="alert(1)" d=""/>', "onclick="),
        ('<a href="https://example.org"><path d=""/></a>', "<a>"),
        ('<image href="https://example.org/a.png"/>', "links to 'https://example.org/a.png'"),
        ('<path style="fill: url(//example.org/a)" d=""/>', "links to 'fill: url(//example"),
        ("<path", "not SVG"),
    ],
)
def test_a_drawing_with_scripts_or_links_is_refused(tmp_path: Path, inside: str, told: str) -> None:
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9">{inside}</svg>'

    with pytest.raises(ValueError, match=re.escape(told)):
        write_page(page_of(figures=[Figure("F", "", svg, "")]), tmp_path / "report.html")


@pytest.mark.parametrize("field", ["reward", "credited", "advantage", "parts"])
def test_a_number_that_is_not_finite_is_refused(tmp_path: Path, field: str) -> None:
    bad: Any = {"openness": float("nan")} if field == "parts" else float("inf")
    dialogue = some_dialogues()[0]
    lines = [replace(line, **{field: bad}) for line in dialogue.lines]

    with pytest.raises(ValueError, match=r"(nan|inf) in a dialogue of 'ann' under 'untrained'"):
        write_page(page_of(dialogues=[replace(dialogue, lines=lines)]), tmp_path / "report.html")


def test_an_unknown_speaker_is_refused(tmp_path: Path) -> None:
    wrong: Any = "system"
    dialogue = replace(some_dialogues()[0], lines=[Line(wrong, "hello")])

    with pytest.raises(ValueError, match="Speaker 'system'"):
        write_page(page_of(dialogues=[dialogue]), tmp_path / "report.html")


def test_a_page_that_is_too_large_without_dialogues_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"without any dialogue, max_bytes is 5,000"):
        write_page(page_of(), tmp_path / "report.html", max_bytes=5_000)

    assert not (tmp_path / "report.html").exists()


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with headless_chromium() as started:
        yield started


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(page_of(), tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def heard() -> list[tuple[str, str]]:
    """What the pages of a test did besides being read: (kind, text)."""
    return []


@pytest.fixture(scope="module")
def tab(browser: Any, heard: list[tuple[str, str]]) -> Callable[..., Any]:
    """One tab for every set of options; opening a new one for every test costs most of its time."""
    tabs: dict[str, Any] = {}

    def tab_with(**options: Any) -> Any:
        key = json.dumps(options, sort_keys=True)
        if key not in tabs:
            context = browser.new_context(**{"viewport": {"width": 1300, "height": 900}, **options})
            context.set_default_timeout(60_000)
            page = context.new_page()
            page.on("console", lambda message: heard.append(("console", message.text)))
            page.on("pageerror", lambda error: heard.append(("error", str(error))))
            page.on("dialog", lambda dialog: (heard.append(("alert", "")), dialog.dismiss()))
            page.on("request", lambda request: heard.append(("request", request.url)))
            tabs[key] = page
        return tabs[key]

    return tab_with


@pytest.fixture
def read(tab: Callable[..., Any], heard: list[tuple[str, str]]) -> Iterator[Callable[..., Any]]:
    """Open a file; at the end, no page may have complained, or asked for anything but its file."""
    heard.clear()
    expected = set()

    def opened(path: Path, address: str = "", **options: Any) -> Any:
        page = tab(**options)
        page.goto("about:blank")  # or a new address in the same file would not open it anew
        page.emulate_media(media="screen")
        page.mouse.move(0, 0)
        page.goto(path.as_uri() + address)
        expected.add(("request", path.as_uri()))
        if page.locator("#browser").count():
            page.wait_for_selector("#browser:not([hidden])")
        return page

    yield opened
    assert {(kind, text.partition("#")[0]) for kind, text in heard} == expected


def settled(page: Any) -> str:
    """Return where the transcript browser is, once the pair is there."""
    page.wait_for_selector("#pair[aria-busy='false']", state="attached")
    return str(page.locator("#place").text_content())


def texts(page: Any, selector: str) -> list[str]:
    if page.locator("#pair").count():
        settled(page)
    return list(page.locator(selector).all_text_contents())


def options_of(page: Any, label: str) -> list[str]:
    return texts(page, f"#{label} option")


def mean_of(dialogue: Dialogue) -> float:
    return float(np.mean([line.reward for line in dialogue.lines if line.reward is not None]))


def pairs_by_difference(domain: str, left: str, right: str) -> list[tuple[float, str, int]]:
    found = some_dialogues()
    of = {(d.method, d.persona, d.group, d.seed): d for d in found if d.domain == domain}
    pairs = [
        (abs(mean_of(of[right, *key]) - mean_of(of[left, *key])), key[0], key[2])
        for method, *key in of
        if method == left
    ]
    return sorted(pairs, reverse=True)


def test_the_page_opens_with_every_section_and_a_pair_side_by_side(
    read: Callable[..., Any], report: Path
) -> None:
    page = read(report)

    headings = ["Read this first", "Findings", "Tables", "Figures", "Dialogues", "How it was made"]
    assert texts(page, "main h2") == headings
    assert texts(page, ".contents > ol > li > a") == headings
    for target in page.locator(".contents a").evaluate_all("a => a.map(one => one.hash)"):
        assert page.locator(target).count() == 1
    assert page.locator(".failure").inner_text().startswith("failed therapy, ppo")
    assert not page.locator(".failure pre").is_visible()
    page.locator(".failure summary").click()
    assert "the loss is nan" in page.locator(".failure pre").inner_text()
    assert texts(page, "td.number .interval") == [" [.264, .299]", " [.3, .5]"]
    assert settled(page).startswith("1 of 12 · ann")
    assert texts(page, "#pair h3")[0] == "untrained"
    assert page.locator("#pair article").count() == 2
    assert len(texts(page, "#pair .left .agent")) == len(texts(page, "#pair .left .partner")) == 3
    assert texts(page, "#pair .left .text")[1] == "ann answers untrained in turn 0."
    assert page.locator("#system").text_content() == "You are ann."


def test_the_right_side_starts_with_the_method_of_the_highest_mean(
    read: Callable[..., Any], report: Path
) -> None:
    level = {
        method: np.mean(
            [mean_of(d) for d in some_dialogues() if (d.domain, d.method) == ("chatting", method)]
        )
        for method, _ in ARMS[1:]
    }
    page = read(report)

    assert texts(page, "#pair h3")[1] == max(level, key=lambda method: level[method])


def test_the_filters_leave_what_they_name(read: Callable[..., Any], report: Path) -> None:
    page = read(report)

    assert options_of(page, "left") == ["untrained", "kstep:3 @ 64", "full @ 64"]
    page.get_by_label("Domain").select_option("therapy")
    page.get_by_label("Left").select_option("kstep:3@64")
    page.get_by_label("Right").select_option("full@64")
    page.get_by_label("Persona").select_option("bob")
    page.get_by_label("Seed").select_option("1")

    assert settled(page).startswith("1 of 2 · bob · seed 1 · kstep:3 ")
    assert texts(page, "#pair h3") == ["kstep:3", "full"]
    assert texts(page, "#pair .right .agent .text")[2] == "bob answers full in turn 2."
    page.get_by_label("Left").select_option("full@64")  # what is on the right: they change places
    assert texts(page, "#pair h3") == ["full", "kstep:3"]
    page.get_by_label("Right").select_option("")
    assert texts(page, "#pair h3") == ["full"]
    page.get_by_label("Persona").select_option("")
    page.get_by_label("Seed").select_option("")
    assert settled(page).startswith("1 of 12 · ann")


def test_where_they_differ_most_comes_first(read: Callable[..., Any], report: Path) -> None:
    page = read(report)
    page.get_by_label("Right").select_option("full@64")
    expected = pairs_by_difference("chatting", "untrained", "full")

    page.get_by_label("Order").select_option("differ")

    for difference, persona, seed in expected[:4]:
        assert f" · {persona} · seed {seed} · " in settled(page)
        shown = re.search(r"\(([-+−])([\d.]+)\)", settled(page))
        assert shown is not None
        assert float(shown[2]) == pytest.approx(difference, abs=0.0051)
        page.get_by_role("button", name="Next dialogue").click()


@pytest.mark.parametrize(("order", "sign"), [("best", -1), ("worst", 1)])
def test_best_and_worst_go_by_the_mean_of_both_sides(
    read: Callable[..., Any], report: Path, order: str, sign: int
) -> None:
    page = read(report, f"#domain=chatting&left=untrained&right=full%4064&order={order}")
    levels = []
    for _ in range(12):
        means = re.search(r"untrained ([\d.]+), full ([\d.]+)", settled(page))
        assert means is not None
        levels.append(sign * (float(means[1]) + float(means[2])))
        page.keyboard.press("j")

    assert levels == pytest.approx(sorted(levels), abs=0.011)
    assert len(set(levels)) > 6


def test_dialogues_without_a_counterpart_are_counted(
    read: Callable[..., Any], tmp_path: Path
) -> None:
    found = some_dialogues()
    del found[-1]  # of full, in the last domain
    path = write_page(page_of(dialogues=found), tmp_path / "report.html")

    page = read(path, "#domain=therapy&left=untrained&right=full%4064")

    assert settled(page).startswith("1 of 11")
    told = page.locator("#alone")
    assert told.inner_text().startswith("1 dialogue of these two has no counterpart")
    page.get_by_label("Domain").select_option("chatting")
    assert not told.is_visible()


def test_two_dialogues_of_one_group_are_paired_in_turn(
    read: Callable[..., Any], tmp_path: Path
) -> None:
    found = [
        dialogue_of("chatting", arm, 0, "ann", "same", [reward])
        for arm, rewards in ((ARMS[0], (0.1, 0.2)), (ARMS[1], (0.5, 0.7)))
        for reward in rewards
    ]
    page = read(write_page(page_of(dialogues=found), tmp_path / "report.html"))

    assert settled(page) == "1 of 2 · ann · untrained 0.10, kstep:3 0.50 (+0.40)"
    page.keyboard.press("j")
    assert settled(page) == "2 of 2 · ann · untrained 0.20, kstep:3 0.70 (+0.50)"


# --- a line's explanation -------------------------------------------------------------------------


EXPLAINED = "because of turn 0", "prompt_to_line", "credited return1.250", "advantage−0.500"


def test_an_explanation_comes_by_hover_and_goes_by_escape(
    read: Callable[..., Any], report: Path
) -> None:
    page = read(report)
    line = page.locator("#pair .left .agent").first
    details = line.locator(".details")
    assert not details.is_visible()

    line.hover()
    details.wait_for(state="visible")
    for part in EXPLAINED:
        assert part in details.text_content()

    page.keyboard.press("Escape")
    assert not details.is_visible()
    page.locator("h1").hover()
    line.hover()
    details.wait_for(state="visible")


def test_an_explanation_comes_by_focus_and_describes_the_line(
    read: Callable[..., Any], report: Path
) -> None:
    page = read(report)
    page.get_by_role("button", name="Next dialogue").focus()
    page.keyboard.press("Tab")  # the first line of the agent

    button = page.locator("#pair .left .reward").first
    assert button.evaluate("one => one === document.activeElement")
    details = page.locator("#pair .left .details").first
    assert details.is_visible()
    described = page.locator(f"#{button.get_attribute('aria-describedby')}").text_content()
    assert described == details.text_content()
    assert EXPLAINED[0] in described
    page.keyboard.press("Tab")
    assert not details.is_visible()


def test_an_explanation_comes_and_goes_by_tap(read: Callable[..., Any], report: Path) -> None:
    page = read(report, has_touch=True, is_mobile=True, viewport={"width": 360, "height": 740})
    lines = page.locator("#pair .left .agent")

    lines.nth(0).locator(".text").tap()
    assert lines.nth(0).locator(".details").is_visible()
    assert lines.nth(0).locator(".reward").get_attribute("aria-expanded") == "true"
    lines.nth(2).locator(".reward").tap()
    assert not lines.nth(0).locator(".details").is_visible()
    assert "unscorable" in lines.nth(2).locator(".details").text_content()
    lines.nth(2).locator(".reward").tap()
    assert not lines.nth(2).locator(".details").is_visible()


def test_a_reward_is_a_number_and_a_bar_and_none_is_hatched_and_called_unscorable(
    read: Callable[..., Any], report: Path
) -> None:
    page = read(report)
    reward = some_dialogues()[0].lines[1].reward
    assert reward is not None
    first, last = (page.locator("#pair .left .agent").nth(place) for place in (0, 2))

    assert first.locator(".value").inner_text() == f"{reward:.2f}"
    bar = first.locator(".bar").evaluate("bar => getComputedStyle(bar).backgroundImage")
    assert f"{100 * reward:.1f}" in bar or f"{100 * reward:.3f}"[:5] in bar
    assert last.locator(".value").inner_text() == "unscorable"
    hatched = last.evaluate("line => getComputedStyle(line).backgroundImage")
    assert hatched.startswith("repeating-linear-gradient")


def test_rewards_below_zero_widen_the_scale(read: Callable[..., Any], tmp_path: Path) -> None:
    found = [dialogue_of("chatting", ARMS[0], 0, "ann", "g", [-0.5, 0.9])]
    page = read(write_page(page_of(dialogues=found), tmp_path / "report.html"))
    settled(page)

    assert [page.locator(f"#{end}").inner_text() for end in ("lowest", "highest")] == ["−1", "1"]
    shares = page.locator("#pair .agent").evaluate_all(
        "all => all.map(one => Number(one.style.getPropertyValue('--share')))"
    )
    assert shares == pytest.approx([0.25, 0.95])
    assert page.locator("#pair .value").first.inner_text() == "−0.50"


# --- keys, links, screen readers ------------------------------------------------------------------


def test_keys_turn_the_pages_and_can_be_switched_off(
    read: Callable[..., Any], report: Path
) -> None:
    page = read(report)

    def after(key: str) -> str:
        page.keyboard.press(key)
        return settled(page).split(" ")[0]

    assert [after(key) for key in ("j", "ArrowRight", "k", "ArrowLeft", "k")] == list("23211")
    page.get_by_label("Order").focus()
    assert after("j") == "1"  # a select takes letters itself
    page.locator("h1").click()
    page.get_by_label("Keys").uncheck()
    page.get_by_role("button", name="Next dialogue").focus()
    assert after("j") == "1"
    assert after("Enter") == "2"


def test_a_link_leads_to_what_was_shown(read: Callable[..., Any], report: Path) -> None:
    page = read(report)
    page.get_by_label("Domain").select_option("therapy")
    page.get_by_label("Left").select_option("full@64")
    page.get_by_label("Right").select_option("kstep:3@64")
    page.get_by_label("Order").select_option("differ")
    for _ in range(3):
        page.get_by_role("button", name="Next dialogue").click()
    shown, address = settled(page), page.evaluate("location.hash")

    said = texts(page, "#pair .text")

    other = read(report, address)
    assert settled(other) == shown
    assert shown.startswith("4 of 12")
    assert texts(other, "#pair .text") == said

    other.locator(".contents a", has_text="Findings").click()
    assert settled(other) == shown  # a link within the page changes no choice
    other.evaluate("location.hash = 'domain=nowhere&left=nobody&order=none&place=99'")
    other.wait_for_function("document.getElementById('domain').value === 'chatting'")
    assert settled(other).startswith("12 of 12")


def test_the_keyboard_reaches_everything_and_one_sees_where_it_is(
    read: Callable[..., Any], report: Path
) -> None:
    page = read(report)
    met = []
    for _ in range(60):
        page.keyboard.press("Tab")
        met.append(
            page.evaluate(
                """() => {
                  const here = document.activeElement;
                  const style = getComputedStyle(here);
                  return [here.id || here.className || here.tagName, style.outlineStyle,
                          parseFloat(style.outlineWidth)];
                }"""
            )
        )
    names = [name for name, _, _ in met]
    end = names.index("BODY")  # the page is through, the browser's own controls come
    met, names = met[:end], names[:end]

    assert names[0] == "skip"
    for wanted in (
        "theme",
        "domain",
        "left",
        "right",
        "persona",
        "seed",
        "order",
        "previous",
        "next",
    ):
        assert wanted in names
    assert names.count("reward") == 6
    assert all(line != "none" and width >= 2 for _, line, width in met)


def test_a_screen_reader_is_told_names_roles_and_changes(
    read: Callable[..., Any], report: Path
) -> None:
    page = read(report)

    assert page.locator("html").get_attribute("lang") == "en"
    assert page.get_by_role("status").text_content() == settled(page)
    assert page.get_by_role("navigation", name="Contents").count() == 1
    assert page.get_by_role("table", name="Reward").count() == 1
    assert page.get_by_role("img", name="Drift A line that rises.").count() == 1
    assert page.get_by_role("article", name="untrained").count() == 1
    reward = some_dialogues()[0].lines[1].reward
    assert page.get_by_role("button", name=f"agent, reward {reward:.2f}").count() >= 1
    assert page.get_by_role("button", name="agent, reward unscorable").count() == 2
    unnamed = page.locator("button, select, input, a").evaluate_all(
        """all => all.filter(one => one.checkVisibility() && !one.innerText.trim()
             && !one.labels?.length && !one.getAttribute("aria-label")).map(one => one.outerHTML)"""
    )
    assert unnamed == []
    ids = page.locator("[id]").evaluate_all("all => all.map(one => one.id)")
    assert len(ids) == len(set(ids))
    assert page.get_by_role("button", name="Previous dialogue").get_attribute("aria-disabled")


# --- hostile texts --------------------------------------------------------------------------------


def test_nothing_that_a_model_says_runs_or_is_lost(
    read: Callable[..., Any], tmp_path: Path
) -> None:
    line = Line("agent", ALL_HOSTILE, 0.5, ALL_HOSTILE, {ALL_HOSTILE: 0.5}, 1.0, 0.0)
    lines = [Line("partner", ALL_HOSTILE), line, *(Line("partner", text) for text in HOSTILE)]
    names = (ALL_HOSTILE, ALL_HOSTILE, 64, 0, ALL_HOSTILE, ALL_HOSTILE)
    hostile = Dialogue(*names, ALL_HOSTILE, lines)
    path = write_page(
        Page(
            title=ALL_HOSTILE,
            warnings=HOSTILE,
            failures=[(ALL_HOSTILE, text) for text in HOSTILE],
            findings=HOSTILE,
            tables=[Table(ALL_HOSTILE, ALL_HOSTILE, HOSTILE, [HOSTILE])],
            figures=[Figure(ALL_HOSTILE, ALL_HOSTILE, drawing("<script>alert(9)"), ALL_HOSTILE)],
            dialogues=[hostile, replace(hostile, persona="harmless")],
            facts=[(text, text) for text in HOSTILE],
        ),
        tmp_path / "report.html",
    )

    # Without its security policy: the escaping alone has to hold.
    page = read(path, bypass_csp=True)

    def held(selector: str, attribute: str = "textContent") -> list[str]:
        # As JSON, which keeps half a pair on its way here.
        found = page.locator(selector).evaluate_all(
            f"all => JSON.stringify(all.map(one => one.{attribute}))"
        )
        return list(json.loads(found))

    settled(page)
    assert held("h1") == [ALL_HOSTILE]
    for many in (".warnings li", ".failure pre", ".findings li", ".facts dt", ".facts dd"):
        assert held(many) == list(HOSTILE)
    assert held("thead th") == list(HOSTILE)
    assert held("tbody tr > *") == list(HOSTILE)
    for one in ("#table-1 h3", "#table-1 .caption", "#figure-1 h3", "figcaption", "#figure-1-alt"):
        assert held(one) == [ALL_HOSTILE]
    assert held("#failure-1 bdi") == [ALL_HOSTILE]
    assert held("#system") == [ALL_HOSTILE]
    assert held("#pair .partner .text") == [ALL_HOSTILE, *HOSTILE]
    assert held("#pair .agent .text") == [ALL_HOSTILE]
    assert held("#pair .reason") == [ALL_HOSTILE]
    assert held("#pair .part dt") == [ALL_HOSTILE]
    assert held("#pair h3") == [ALL_HOSTILE]
    assert held("#place bdi:first-of-type") == [" · " + ALL_HOSTILE]
    assert held("#domain option") == [ALL_HOSTILE]
    assert held("#persona option")[1] == ALL_HOSTILE
    assert page.locator("script:not([type])").count() == 2
    assert page.locator("img, iframe, object, embed").count() == 0
    assert "<script>alert(9)" in held("#figure-1 svg")[0]
    isolated = "one => getComputedStyle(one).unicodeBidi.startsWith('isolate')"
    for text in ("h1 bdi", "#pair h3 bdi", "tbody bdi", "#place bdi", "#pair .text"):
        assert page.locator(text).first.evaluate(isolated), text
    widest = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert widest <= 0

    # The choice survives its own address, although that cannot hold half a pair.
    page.get_by_label("Persona").select_option(index=1)
    again = read(path, page.evaluate("location.hash"), bypass_csp=True)
    assert settled(again).startswith("1 of 1 ")
    assert again.locator("#persona").evaluate("one => one.selectedIndex") == 1


def test_the_policy_refuses_connections_scripts_and_pictures_from_elsewhere(
    read: Callable[..., Any], report: Path, browser: Any
) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(report.as_uri())

    refused = page.evaluate(
        """async () => {
          const refused = [];
          document.addEventListener("securitypolicyviolation",
            (event) => refused.push(event.effectiveDirective));
          await fetch("http://127.0.0.1:9/").catch(() => {});
          const script = document.createElement("script");
          script.textContent = "window.ran = true";
          const picture = document.createElement("img");
          picture.src = "http://127.0.0.1:9/a.png";
          document.body.append(script, picture);
          await new Promise((done) => setTimeout(done, 300));
          return [refused.sort(), window.ran === true];
        }"""
    )
    context.close()

    assert refused == [["connect-src", "img-src", "script-src-elem"], False]


# --- how it looks ---------------------------------------------------------------------------------

# Colours of every visible text and of what lies under it, as the browser computes them.
TEXT_COLOURS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const paint = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const found = [];
  for (const one of document.querySelectorAll("body *")) {
    const said = [...one.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!said || !one.checkVisibility({visibilityProperty: true})) continue;
    if (one.matches("script, .unseen, .skip, noscript")) continue;
    const under = [];
    for (let here = one; here; here = here.parentElement) {
      under.unshift(getComputedStyle(here).backgroundColor);
    }
    const style = getComputedStyle(one);
    const ink = one.closest("svg") ? style.fill : style.color;
    found.push([one.textContent.slice(0, 40), paint([...under, ink]), paint(under)]);
  }
  return found;
}"""


def luminance(colour: Sequence[float]) -> float:
    channels = np.asarray(colour) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    """The ratio of WCAG 2.2: 4.5 is AA for text."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_has_the_contrast_of_wcag_aa(
    read: Callable[..., Any], tmp_path: Path, theme: str
) -> None:
    rewards = [*np.linspace(0, 1, 11), None]
    found = [dialogue_of("chatting", arm, 0, "ann", "g", rewards) for arm in ARMS[:2]]
    page = read(write_page(page_of(dialogues=found), tmp_path / "report.html"), color_scheme=theme)
    settled(page)
    page.add_style_tag(content=".details { display: block !important; }")

    measured = page.evaluate(TEXT_COLOURS)

    assert contrast([0, 0, 0], [255, 255, 255]) == pytest.approx(21)
    assert len(measured) > 100
    low = [(text, contrast(ink, under)) for text, ink, under in measured]
    assert [(text, ratio) for text, ratio in low if ratio < 4.5] == []
    ground = np.mean([under for _, _, under in measured])
    assert (ground > 150) == (theme == "light")


def test_the_theme_is_the_readers_until_he_chooses(read: Callable[..., Any], report: Path) -> None:
    page = read(report, color_scheme="dark")
    ground = "Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"

    def inks(figure: int) -> set[str]:
        return set(
            page.locator(f"#figure-{figure} svg *").evaluate_all(
                """all => all.map(one => getComputedStyle(one))
                        .flatMap(style => [style.stroke, style.fill])"""
            )
        )

    black, white, blue = "rgb(0, 0, 0)", "rgb(255, 255, 255)", "rgb(0, 114, 178)"
    assert page.evaluate(ground) < 60
    dark, dark_own = inks(1), inks(2)
    assert not dark & {black, white}  # black on white drawings turn with the theme
    assert blue in dark
    assert dark_own >= {black, white, blue}  # unless they keep their own ground

    page.get_by_role("button", name="Light theme").click()

    assert page.evaluate(ground) > 200
    assert inks(1) != dark
    assert inks(2) == dark_own
    page.get_by_role("button", name="Dark theme").click()
    assert page.evaluate(ground) < 60


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colour_blind_readers_tell_low_middle_and_high_rewards_apart(
    read: Callable[..., Any], tmp_path: Path, theme: str
) -> None:
    found = [dialogue_of("chatting", ARMS[0], 0, "ann", "g", [0.0, 0.5, 1.0])]
    page = read(write_page(page_of(dialogues=found), tmp_path / "report.html"), color_scheme=theme)
    settled(page)
    corners = page.locator("#pair .agent").evaluate_all(
        """all => (document.getElementById("pair").scrollIntoView({behavior: "instant"}),
                   all.map(one => one.getBoundingClientRect()).map(box => [box.x, box.y]))"""
    )
    session = page.context.new_cdp_session(page)

    for sight in ("none", "protanopia", "deuteranopia", "tritanopia"):
        session.send("Emulation.setEmulatedVisionDeficiency", {"type": sight})
        picture = imread(io.BytesIO(page.screenshot()))
        tints = [picture[round(y) + 2, round(x) + 20, :3] for x, y in corners]
        gaps = [np.abs(a - b).max() for i, a in enumerate(tints) for b in tints[:i]]
        assert min(gaps) > 0.05, sight
    session.send("Emulation.setEmulatedVisionDeficiency", {"type": "none"})


@pytest.mark.parametrize(("width", "theme"), [(360, "light"), (1300, "light"), (1300, "dark")])
def test_the_page_is_drawn_and_no_wider_than_the_screen(
    read: Callable[..., Any], report: Path, width: int, theme: str
) -> None:
    page = read(report, viewport={"width": width, "height": 740}, color_scheme=theme)
    settled(page)
    page.locator("#figure-1").evaluate("one => one.scrollIntoView({behavior: 'instant'})")

    picture = imread(io.BytesIO(page.screenshot()))

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert picture.shape[1] == width
    colours = np.unique((picture[..., :3] * 255).astype(np.uint32) @ [65_536, 256, 1])
    assert len(colours) > 100
    scroll = "one => getComputedStyle(one).overflowX"
    assert page.locator(".table .scroll").first.evaluate(scroll) == "auto"


def test_a_phone_shows_one_side_and_switches(read: Callable[..., Any], report: Path) -> None:
    page = read(report, has_touch=True, is_mobile=True, viewport={"width": 360, "height": 740})
    left, right = page.locator("#pair .left"), page.locator("#pair .right")
    method = page.locator("#pair .right h3").text_content()
    assert left.is_visible()
    assert not right.is_visible()

    page.get_by_role("button", name=re.compile(f"^{method} 0")).tap()

    assert right.is_visible()
    assert not left.is_visible()
    assert page.locator("#show-right").get_attribute("aria-pressed") == "true"
    page.get_by_role("button", name="Next dialogue").tap()
    assert settled(page).startswith("2 of 12")
    assert right.is_visible()


def test_print_shows_both_sides_on_white_without_controls(
    read: Callable[..., Any], report: Path
) -> None:
    page = read(report, color_scheme="dark", viewport={"width": 700, "height": 900})
    page.emulate_media(media="print")

    assert page.locator("#pair .left").is_visible()
    assert page.locator("#pair .right").is_visible()
    for hidden in (".filters", "#next", ".contents", "#theme"):
        assert not page.locator(hidden).is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


# --- little, much, and too much -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"dialogues": ()}, "No dialogue was recorded."),
        ({"figures": (), "tables": (), "findings": (), "facts": ()}, "1 of 12"),
        ({"dialogues": some_dialogues()[:12]}, "1 of 12"),  # one method
        ({"dialogues": [d for d in some_dialogues() if d.domain == "therapy"]}, "1 of 12"),
        ({"dialogues": [dialogue_of("chatting", ARMS[0], 0, "ann", "g", [None])]}, "1 of 1"),
        ({"dialogues": [dialogue_of("chatting", arm, 0, "ann", "g", []) for arm in ARMS]}, "1 of"),
    ],
)
def test_a_page_with_little_on_it_opens(
    read: Callable[..., Any], tmp_path: Path, fields: dict[str, Any], told: str
) -> None:
    page = read(write_page(page_of(**fields), tmp_path / "report.html"))

    assert told in page.locator("#dialogues").text_content()
    for order in ("differ", "best", "worst") if page.locator("#browser").count() else ():
        page.get_by_label("Order").select_option(order)
        assert settled(page).startswith("1 of")
    for target in page.locator(".contents a").evaluate_all("a => a.map(one => one.hash)"):
        assert page.locator(target).count() == 1


def test_a_page_of_failed_cells_only_shows_their_errors(
    read: Callable[..., Any], tmp_path: Path
) -> None:
    failures = [(f"therapy, ppo, seed {seed}", f"RuntimeError: {seed}") for seed in range(3)]
    page = read(write_page(Page("Failed", failures=failures), tmp_path / "report.html"))

    assert texts(page, ".failure pre") == [error for _, error in failures]
    assert texts(page, "main h2") == ["Read this first", "Dialogues"]


def test_dialogues_beyond_the_limit_are_left_out_evenly_and_counted(
    read: Callable[..., Any], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    long = [Line("partner", " ".join(rng.choice(WORDS, 300))) for _ in range(72)]
    found = [
        replace(d, persona=f"{d.persona} of {d.domain}", lines=[*d.lines, line])
        for d, line in zip(some_dialogues(), long, strict=True)
    ]
    whole, none = (
        write_page(page_of(dialogues=all_of), tmp_path / "other.html").stat().st_size
        for all_of in (found, ())
    )
    limit = (whole + none) // 2
    path = write_page(page_of(dialogues=found), tmp_path / "report.html", max_bytes=limit)
    assert 0.8 * limit < path.stat().st_size <= limit

    page = read(path)

    told = re.search(r"holds (\d+) of 72 dialogues", page.locator("#left-out").inner_text())
    assert told is not None
    kept = int(told[1])
    assert 0 < kept < 72
    assert kept % 12 == 0  # of each of 12 cells equally many
    for domain in DOMAINS:
        page.get_by_label("Domain").select_option(domain)
        assert f" of {kept // 6} " in settled(page)  # all still have their counterpart
    assert not page.locator("#alone").is_visible()


@pytest.mark.slow
def test_a_hundred_runs_stay_under_20_megabytes_and_open(
    read: Callable[..., Any], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    sentence_S = [" ".join(rng.choice(WORDS, 12)) for _ in range(4_000)]
    pick_DT, reward_DT = rng.integers(0, 4_000, (12_000, 8)), rng.random((12_000, 8)).round(3)
    domains = ("chatting", "education", "therapy", "tutoring")

    def dialogues() -> Iterator[Dialogue]:
        for number in range(12_000):
            cell, here = divmod(number, 120)
            lines = []
            for pick, reward in zip(pick_DT[number], reward_DT[number], strict=True):
                said, reason = sentence_S[pick], sentence_S[-pick]
                lines.append(Line("partner", sentence_S[pick // 2]))
                parts = {"prompt_to_line": 1.0, "line_to_line": None, "openness": float(reward)}
                lines.append(Line("agent", said, float(reward), reason, parts, 1.5, 0.5))
            domain, method, seed = domains[cell // 25], f"kstep:{cell % 5}", cell // 5 % 5
            yield Dialogue(domain, method, 64, seed, f"p{here // 2}", f"{here}", "You.", lines)

    path = write_page(Page("Much", dialogues=dialogues()), tmp_path / "report.html")

    assert path.stat().st_size < 20_000_000
    page = read(path)
    assert settled(page).startswith("1 of 600 · p0 · seed 0")
    assert page.locator("#left-out").count() == 0
