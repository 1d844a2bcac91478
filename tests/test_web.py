"""The page behind `ppg play --web`, over HTTP and in a real headless browser."""

from __future__ import annotations

import http.client
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from browser import headless_chromium

import ppg_env
from agents import ScriptedPolicy
from agents.live import Setting, Stage
from agents.logs import read_log
from ppg_env.judges import RuleJudge

pytest.importorskip("jinja2", reason="the page is made with jinja2")
pytest.importorskip("starlette", reason="the page is served with starlette")
uvicorn = pytest.importorskip("uvicorn", reason="the page is served with uvicorn")
web = importlib.import_module("agents.web")

ROOT = Path(__file__).parent.parent
HOSTS = {"127.0.0.1", "localhost"}
NASTY = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">&amp;"
RIGHT_TO_LEFT = "שלום \u202eevil"


def settings(*names: str) -> dict[str, Setting]:
    found = {}
    for domain in map(ppg_env.get_domain, names):
        personas = ppg_env.bundled_personas(domain)[:20]
        briefs = {persona.id: domain.partner_prompt(persona) for persona in personas}
        found[domain.name] = Setting(domain.agent_role, domain.partner_role, briefs)
    return found


class Flaky:
    """A rule judge that fails while `down`."""

    def __init__(self) -> None:
        self.judge, self.down = RuleJudge(ppg_env.get_domain("therapy")), False

    def __call__(self, transcripts: Sequence[Any]) -> Any:
        if self.down:
            raise ppg_env.ChatError("<b>model</b> at http://localhost:1 gave no answer")
        return self.judge(transcripts)


class Site:
    """The page, served in a thread of this process."""

    def __init__(self, stage: Stage) -> None:
        listener = web.listen("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        app = web.talk_app(stage, web.Start(persona="therapy-0003", seed=1), HOSTS)
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self.thread.start()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)

    def ask(
        self, method: str, path: str, fields: dict[str, str] | None = None, **headers: str
    ) -> tuple[int, http.client.HTTPMessage, str]:
        """Return status, headers and body of one request; redirects are not followed."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        body = None if fields is None else urlencode(fields, errors="surrogatepass")
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, answer.headers, text

    def begin(self, role: str = "agent", **fields: str) -> str:
        """Return the path of a new dialogue."""
        fields = {"role": role, "domain": "therapy", "seed": "1"} | fields
        status, headers, text = self.ask("POST", "/", fields)
        assert status == 303, text
        return str(headers["location"])

    def say(self, path: str, line: str, turn: int) -> str:
        """Say a line; return the page that comes back."""
        status, headers, _ = self.ask("POST", f"{path}/say", {"turn": str(turn), "line": line})
        assert (status, headers["location"]) == (303, f"{path}#now")
        return self.ask("GET", path)[2]


@pytest.fixture(scope="module")
def judge() -> Flaky:
    return Flaky()


@pytest.fixture(scope="module")
def site(judge: Flaky) -> Iterator[Site]:
    policy = ScriptedPolicy([NASTY, "I often feel guilty.", RIGHT_TO_LEFT])
    made = Site(Stage(settings("therapy", "chatting"), policy, judge=judge, max_turns=3))
    yield made
    made.stop()


def verdicts(page: str) -> list[str]:
    return re.findall(r'class="verdict (\w+)"', page)


def notice(page: str) -> str:
    """The notice that a page shows, "" if it shows none."""
    (hidden, text) = re.findall(r'role="alert"( hidden)?>\s*<p>(.*?)</p>', page, re.DOTALL)[0]
    return "" if hidden else text


# --- over HTTP ------------------------------------------------------------------------------------


def test_the_first_page_proposes_what_was_asked_for(site: Site) -> None:
    status, headers, page = site.ask("GET", "/")
    assert status == 200
    assert headers["content-type"].startswith("text/html")
    assert re.search(r'value="agent" checked', page)
    assert re.search(r'value="therapy" checked', page)
    assert "<option selected>therapy-0003</option>" in page
    assert 'value="1"' in page
    other = site.ask("GET", "/?role=partner&domain=chatting")[2]
    assert re.search(r'value="partner" checked', other)
    assert re.search(r'value="chatting" checked', other)


def test_a_line_is_followed_by_its_verdict_and_the_next_question(site: Site) -> None:
    path = site.begin(**{"persona-therapy": "therapy-0003"})
    page = site.ask("GET", path)[2]
    assert verdicts(page) == []
    assert "You are a patient talking to a therapist." in page
    page = site.say(path, "I often feel jealous.", turn=0)
    assert len(verdicts(page)) == 1
    assert "prompt to line" in page
    assert "I often feel jealous." in page
    assert page.count('<li class="line theirs">') == 2


def test_the_persona_of_the_agent_is_not_in_the_page_before_it_is_revealed(site: Site) -> None:
    persona = next(p for p in ppg_env.bundled_personas("therapy") if p.id == "therapy-0005")
    path = site.begin("partner", **{"persona-therapy": persona.id})
    for page in (site.ask("GET", path)[2], site.say(path, "Hello!", turn=0)):
        assert persona.text not in page
        assert persona.id not in page
    assert site.ask("POST", f"{path}/reveal", {})[0] == 303
    assert persona.text in site.ask("GET", path)[2]


def test_what_people_and_models_say_is_escaped(site: Site) -> None:
    path = site.begin("partner")
    page = site.say(path, NASTY, turn=0)
    assert page.count("&lt;script&gt;") == 2  # the person's line, and the agent's
    assert "<script>" not in page
    assert "<img" not in page
    site.say(path, "How?", turn=1)
    page = site.say(path, RIGHT_TO_LEFT, turn=2)
    assert page.count(f'dir="auto">{RIGHT_TO_LEFT}</p>') == 2


@pytest.mark.parametrize("role", ["agent", "partner"])
@pytest.mark.parametrize(
    ("line", "why"), [(" \n ", "An empty line says nothing"), ("y" * 2001, "has 2,001 characters")]
)
def test_a_line_that_cannot_be_said_stays_in_its_field(
    site: Site, role: str, line: str, why: str
) -> None:
    path = site.begin(role)
    page = site.say(path, line, turn=0)
    assert why in notice(page)
    assert verdicts(page) == []
    assert f">\n{line}</textarea>".replace("\r\n", "\n") in page
    page = site.say(path, "Hello there.", turn=0)
    assert (notice(page), len(verdicts(page))) == ("", 1)


def test_half_an_emoji_harms_nothing(site: Site) -> None:
    page = site.say(site.begin(), "half \ud83d of one", turn=0)
    assert len(verdicts(page)) == 1
    assert "half \ufffd" in page


def test_line_breaks_are_heard_as_they_were_typed(site: Site) -> None:
    path = site.begin()
    site.say(path, "One\r\ntwo.", turn=0)  # as browsers send them
    assert r"One\ntwo." in site.ask("GET", f"{path}/record")[2]


def test_a_partner_that_says_half_an_emoji_is_shown_all_the_same() -> None:
    def partner(transcripts: Sequence[Any], rngs: object) -> list[str]:
        return ["half \ud83d of one"] * len(transcripts)

    site = Site(Stage(settings("therapy"), None, partner=partner))
    try:
        path = site.begin()
        assert "half ? of one" in site.say(path, "Hello.", turn=0)
        assert r"half \ud83d of one" in site.ask("GET", f"{path}/record")[2]
    finally:
        site.stop()


def test_a_judge_that_fails_is_explained_and_the_line_can_be_sent_again(
    site: Site, judge: Flaky
) -> None:
    path = site.begin()
    site.say(path, "I often feel jealous.", turn=0)
    judge.down = True
    try:
        page = site.say(path, "My line.", turn=1)
    finally:
        judge.down = False
    assert "Nothing is lost: try again." in notice(page)
    assert "--judge" in notice(page)
    assert "&lt;b&gt;model&lt;/b&gt; at http://localhost:1 gave no answer" in page
    assert ">\nMy line.</textarea>" in page
    assert len(verdicts(page)) == 1
    page = site.say(path, "My line.", turn=1)
    assert (notice(page), len(verdicts(page))) == ("", 2)


def test_a_dialogue_that_cannot_begin_says_why_and_keeps_the_choices(site: Site) -> None:
    for wrong, why in (
        ({"seed": "one"}, "A seed is a whole number of at least 0, got &#39;one&#39;"),
        ({"seed": "-1"}, "at least 0, got -1"),
        ({"domain": "cooking"}, "Unknown domain &#39;cooking&#39;"),
        ({"persona-therapy": "nobody"}, "Unknown persona id &#39;nobody&#39;"),
        ({"role": "judge"}, "role is &#39;agent&#39; or &#39;partner&#39;"),
    ):
        fields = {"role": "partner", "domain": "therapy", "seed": "7"} | wrong
        status, _, page = site.ask("POST", "/", fields)
        assert status == 400
        assert why in notice(page)
        assert f'value="{fields["seed"]}"' in page


def test_undo_brings_back_the_line_and_the_dialogue_before_it(site: Site) -> None:
    path = site.begin()
    before = site.say(path, "One.", turn=0)
    site.say(path, "Two.", turn=1)
    site.ask("POST", f"{path}/undo", {"turn": "2"})
    page = site.ask("GET", path)[2]
    assert ">\nTwo.</textarea>" in page
    assert page.replace("\nTwo.</textarea>", "\n</textarea>") == before


def test_a_line_from_an_older_view_is_not_said_but_kept(site: Site) -> None:
    path = site.begin()
    site.say(path, "One.", turn=0)
    page = site.say(path, "One.", turn=0)  # the button was pressed twice
    assert "older state of the dialogue" in notice(page)
    assert len(verdicts(page)) == 1
    assert ">\nOne.</textarea>" in page
    site.ask("POST", f"{path}/undo", {"turn": "0"})
    assert len(verdicts(site.ask("GET", path)[2])) == 1


def test_the_end_shows_mean_and_drift_and_no_field_to_write_in(site: Site) -> None:
    path = site.begin("partner")
    for turn in range(3):
        page = site.say(path, "How are you?", turn)
    assert "The dialogue is over." in page
    assert "<textarea" not in page
    assert "mean reward of 3 turns" in page
    assert re.search(r"Drift <b>[+-]0\.\d{3}</b> per turn", page)
    assert page.count("<rect") == 3


def test_a_download_is_a_log_that_can_be_read(site: Site, tmp_path: Path) -> None:
    path = site.begin("partner")
    assert site.ask("GET", f"{path}/record")[0] == 404
    site.say(path, RIGHT_TO_LEFT, turn=0)
    status, headers, text = site.ask("GET", f"{path}/record")
    assert status == 200
    assert headers["content-disposition"] == 'attachment; filename="dialogue-therapy-1.jsonl"'
    (tmp_path / "log.jsonl").write_text(text, encoding="utf-8")
    (trajectory,) = read_log(tmp_path / "log.jsonl")
    assert [m["content"] for m in trajectory.messages[1:]] == [RIGHT_TO_LEFT, NASTY]
    assert trajectory.num_turns == len(json.loads(text)["rewards"]) == 1


def test_dialogues_have_addresses_that_nobody_guesses_and_do_not_mix(site: Site) -> None:
    first, second = site.begin(), site.begin()
    assert first != second
    assert len(first) > len("/d/") + 12
    site.say(first, "Only here.", turn=0)
    assert "Only here." not in site.ask("GET", second)[2]


def test_what_is_not_there_is_a_page_that_leads_on(site: Site) -> None:
    for path, status in (("/d/none", 404), ("/etc/passwd", 404), ("/web.py", 404)):
        found, _, page = site.ask("GET", path)
        assert (found, 'href="/"' in page) == (status, True)
    assert "not there any more" in notice(site.ask("GET", "/d/none")[2])
    assert site.ask("GET", f"{site.begin()}/say")[0] == 405
    status, _, page = site.ask("POST", f"{site.begin()}/say", {"line": "z" * 1_100_000})
    assert (status, notice(page)) == (413, "That is far too long for a line. Shorten it.")


def test_the_oldest_dialogue_goes_when_there_are_too_many(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "_MOST_DIALOGUES", 1)
    first, second = site.begin(), site.begin()
    assert (site.ask("GET", first)[0], site.ask("GET", second)[0]) == (404, 200)


def test_a_site_that_points_its_own_name_here_is_refused(site: Site) -> None:
    assert site.ask("GET", "/", Host="evil.example")[0] == 403
    assert site.ask("GET", "/", Host=f"localhost:{site.port}")[0] == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
def test_a_form_on_another_site_is_refused(site: Site, origin: str) -> None:
    fields = {"role": "agent", "domain": "therapy"}
    assert site.ask("POST", "/", fields, Origin=origin)[0] == 403
    assert site.ask("POST", "/", fields, Origin=site.url)[0] == 303


def test_every_answer_forbids_other_sources(site: Site) -> None:
    for path in ("/", "/style.css", "/web.js", "/d/none", site.begin()):
        headers = site.ask("GET", path)[1]
        assert headers["content-security-policy"].startswith("default-src 'none'; ")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    for file in (ROOT / "agents" / "web_page").iterdir():
        assert "//" not in re.sub(r"^//.*$", "", file.read_text(encoding="utf-8"), flags=re.M)


# --- the chart ------------------------------------------------------------------------------------


def test_bars_stand_on_zero_and_the_trend_is_the_least_squares_line() -> None:
    chart = web.RewardChart([0.0, None, 1.0], turns=4, drift=0.5)
    assert chart.x(0) - chart.left == pytest.approx(chart.width / 8, abs=0.1)
    assert (chart.y(1.0), chart.y(0.0)) == (chart.top, chart.top + chart.height)
    assert chart.trend == (chart.x(0), chart.y(0.0), chart.x(2), chart.y(1.0))
    assert web.RewardChart([0.5], turns=4, drift=None).trend is None


def test_colours_tell_low_from_high_and_unscored_from_both() -> None:
    assert [web.band(r) for r in (0.0, 0.3, 0.5, 0.7, 1.0, None)] == [
        *("low", "low", "middle", "high", "high", "none"),
    ]


# --- where it listens -----------------------------------------------------------------------------


def test_a_taken_port_is_followed_by_the_next_free_one() -> None:
    with web.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with web.listen("127.0.0.1", port) as other:
            assert port < other.getsockname()[1] < port + 20


@pytest.mark.parametrize(
    ("host", "port", "why"),
    [
        ("127.0.0.1", 70000, "port lies between 0 and 65535, got 70000"),
        ("no.such.host.invalid", 0, "Cannot listen on 'no.such.host.invalid', port 0"),
    ],
)
def test_where_it_cannot_listen_it_says_so(host: str, port: int, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        web.listen(host, port)


def test_ports_that_are_all_taken_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_PORTS_TRIED", 1)
    with web.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"The ports {port} to {port} are all taken"):
            web.listen("127.0.0.1", port)


@pytest.mark.parametrize(("host", "warns"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_only_a_host_that_lets_others_in_is_warned_of(
    host: str, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: sockets[0].close())
    stage = Stage(settings("therapy"), ScriptedPolicy(["Well."]))
    web.serve(stage, web.Start(), host, 0, said.append)
    assert any("everyone who can reach this machine" in text for text in said) == warns
    assert any("Talk at http://127.0.0.1:" in text for text in said) != warns


def test_a_wrong_start_is_refused_before_anything_is_served() -> None:
    stage = Stage(settings("therapy"), ScriptedPolicy(["Well."]))
    for start, why in (
        (web.Start(domain="cooking"), "Unknown domain 'cooking'"),
        (
            web.Start(persona="nobody"),
            "Unknown persona id 'nobody'; therapy has 20, from 'therapy-",
        ),
    ):
        with pytest.raises(ValueError, match=why):
            web.serve(stage, start)


SERVER = """
import sys, time
from agents import ScriptedPolicy
from agents.live import Stage
from agents.web import Start, serve
sys.path.insert(0, "tests")
from test_web import settings

def slow(observation):
    time.sleep(60)

serve(Stage(settings("therapy"), ScriptedPolicy(slow)), Start(), port=0,
      announce=lambda text: print(text, flush=True))
"""


def test_it_listens_on_this_machine_alone_and_ends_with_ctrl_c() -> None:
    psutil = pytest.importorskip("psutil")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        **{"cwd": ROOT, "env": environment, "text": True},  # type: ignore[arg-type]
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        port = int(re.findall(r":(\d+)", process.stdout.readline())[0])
        listening = [
            connection.laddr
            for connection in psutil.Process(process.pid).net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert [(address.ip, address.port) for address in listening] == [("127.0.0.1", port)]

        fields = {"role": "partner", "domain": "therapy"}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("POST", "/", urlencode(fields))
        path = connection.getresponse().headers["location"]
        with socket.create_connection(("127.0.0.1", port)) as waiting:  # for a slow agent
            body = "turn=0&line=Hello"
            head = f"POST {path}/say HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
            waiting.sendall(f"{head}\r\n\r\n{body}".encode())
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "Traceback" not in errors, errors


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with headless_chromium() as made:
        yield made


class Tab:
    """A page of the browser; what goes wrong in it, and what it asks of others, is kept."""

    def __init__(self, browser: Any, site: Site, **settings: Any) -> None:
        self.site, self.errors, self.outside = site, [], []  # type: ignore[var-annotated]
        self.scripted = settings.get("java_script_enabled", True)
        self.context = browser.new_context(**settings)
        self.context.set_default_timeout(15_000)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._keep)
        self.page.goto(site.url)

    def _keep(self, request: Any) -> None:
        if not request.url.startswith((f"{self.site.url}/", "data:")):
            self.outside.append(request.url)

    def begin(self, role: str = "agent") -> None:
        self.page.check(f"input[value={role}]")
        self.page.get_by_role("button", name="Begin").click()
        scripted = "html.with-script " if self.scripted else ""
        self.page.locator(f"{scripted}main.dialogue").wait_for()

    def say(self, line: str) -> None:
        """Say a line and wait for its verdict."""
        before = self.page.locator(".verdict").count()
        self.page.fill("#line", line)
        self.page.press("#line", "Enter")
        self.page.locator(".verdict").nth(before).wait_for()

    @property
    def texts(self) -> list[str]:
        found: list[str] = self.page.locator(".line .text").all_inner_texts()
        return found


@pytest.fixture
def tab(browser: Any, site: Site) -> Iterator[Tab]:
    made = Tab(browser, site)
    yield made
    made.context.close()
    assert made.outside == []


def test_a_person_speaks_and_sees_the_verdict(tab: Tab) -> None:
    tab.begin()
    tab.say("I often feel jealous.")
    assert tab.texts[1] == "I often feel jealous."
    assert len(tab.texts) == 3
    assert re.match(r"[01]\.\d\d$", tab.page.locator(".reward").inner_text())
    assert tab.page.locator(".reason").is_visible()
    assert tab.page.locator(".parts li").count() >= 4
    assert tab.page.locator("#line").input_value() == ""
    assert tab.page.evaluate("document.activeElement.id") == "line"
    assert tab.errors == []


def test_only_the_personas_of_the_chosen_setting_are_offered(tab: Tab) -> None:
    assert tab.page.locator("select:visible").evaluate("e => e.name") == "persona-therapy"
    tab.page.check("input[value=chatting]")
    assert tab.page.locator("select:visible").evaluate("e => e.name") == "persona-chatting"


def test_script_text_is_shown_and_not_run_and_directions_stay_inside(tab: Tab) -> None:
    tab.begin("partner")
    title = tab.page.title()
    for line in (NASTY, "How?", RIGHT_TO_LEFT):
        tab.say(line)
    assert tab.texts[:2] == [NASTY, NASTY]
    assert tab.page.title() == title
    assert tab.page.locator("main img, main script").count() == 0
    direction = "e => getComputedStyle(e).direction"
    assert tab.page.locator(".text").nth(5).evaluate(direction) == "rtl"
    assert tab.page.locator(".verdict").nth(2).evaluate(direction) == "ltr"
    assert tab.errors == []


def test_the_partner_may_look_who_it_was_and_loses_nothing_by_it(tab: Tab) -> None:
    tab.begin("partner")
    tab.say("Hello!")
    assert tab.page.get_by_text("You are a patient talking to").count() == 0
    tab.page.fill("#line", "half a")
    tab.page.get_by_role("button", name="Reveal who it is").click()
    tab.page.locator(".revealed").wait_for()
    assert "You are a patient talking to" in tab.page.locator(".revealed").inner_text()
    assert tab.page.locator("#line").input_value() == "half a"
    assert tab.errors == []


def test_undo_gives_the_line_back_and_keeps_what_was_typed_since(tab: Tab) -> None:
    tab.begin()
    tab.say("Not so.")
    tab.page.fill("#line", "Or rather")
    tab.page.get_by_role("button", name="Undo last turn").click()
    tab.page.locator(".verdict").wait_for(state="detached")
    assert tab.page.locator("#line").input_value() == "Not so.\nOr rather"


def test_two_tabs_have_two_dialogues_and_reloading_keeps_one(browser: Any, tab: Tab) -> None:
    other = Tab(browser, tab.site)
    for each in (tab, other):
        each.begin()
    tab.say("Only here.")
    other.say("Only there.")
    assert "Only there." not in tab.texts
    tab.page.reload()
    assert "Only here." in tab.texts
    assert len(tab.texts) == len(other.texts) == 3
    other.context.close()


def test_while_the_other_thinks_the_line_is_there_and_cannot_be_sent_twice(tab: Tab) -> None:
    tab.begin()
    held: list[Any] = []
    tab.page.route("**/say", lambda route: held.append(route))
    tab.page.fill("#line", NASTY)
    tab.page.press("#line", "Enter")
    tab.page.locator(".waiting").wait_for()
    assert tab.texts[1:] == [NASTY, "…"]
    assert tab.page.locator("main img").count() == 0
    assert tab.page.get_by_role("button", name="Say it").is_disabled()
    tab.page.fill("#line", "Again.")
    tab.page.press("#line", "Enter")
    assert len(tab.texts) == 3
    tab.page.wait_for_timeout(100)
    (once,) = held
    once.continue_()
    tab.page.locator(".verdict").wait_for()
    assert tab.texts[1] == NASTY
    assert tab.page.locator("#line").input_value() == "Again."
    assert tab.page.title() == "Therapy · Persona dialogue"


def test_when_the_server_is_gone_the_line_stays(tab: Tab) -> None:
    tab.begin()
    tab.page.route("**/say", lambda route: route.abort())
    tab.page.fill("#line", "Are you there?")
    tab.page.get_by_role("button", name="Say it").click()
    tab.page.get_by_text("The server does not answer").wait_for()
    assert tab.page.locator("#line").input_value() == "Are you there?"
    assert len(tab.texts) == 1
    tab.page.unroute("**/say")
    tab.say("Are you there?")
    assert tab.page.locator(".notice").is_hidden()


def test_a_dialogue_that_is_gone_keeps_the_line_in_its_field(tab: Tab) -> None:
    tab.begin()
    tab.page.locator("form.say").evaluate("form => form.action = '/d/none/say'")
    tab.page.fill("#line", "Long thought about.")
    tab.page.press("#line", "Enter")
    tab.page.get_by_text("not there any more").wait_for()
    assert tab.page.locator("#line").input_value() == "Long thought about."


def test_shift_enter_begins_a_new_line(tab: Tab) -> None:
    tab.begin()
    tab.page.fill("#line", "One")
    tab.page.press("#line", "Shift+Enter")
    tab.page.keyboard.type("two.")
    tab.page.press("#line", "Enter")
    tab.page.locator(".verdict").wait_for()
    assert tab.texts[1] == "One\ntwo."


def test_without_script_everything_works_too(browser: Any, site: Site) -> None:
    tab = Tab(browser, site, java_script_enabled=False)
    tab.begin("partner")
    tab.page.fill("#line", "Hello!")
    tab.page.get_by_role("button", name="Say it").click()
    tab.page.locator(".verdict").wait_for()
    tab.page.get_by_role("button", name="Undo last turn").click()
    assert tab.page.locator(".verdict").count() == 0
    assert tab.page.locator("#line").input_value() == "Hello!"
    tab.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_without_scrolling_sideways(
    browser: Any, site: Site, scheme: str
) -> None:
    size = {"width": 360, "height": 700}
    tab = Tab(browser, site, viewport=size, color_scheme=scheme)
    tab.begin()
    tab.say("word" * 100 + ".")
    tab.page.locator("main.dialogue").wait_for()
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 360
    assert tab.page.locator("#line").evaluate("e => e.getBoundingClientRect().bottom <= 700")
    shade = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", shade))) < 60) == (scheme == "dark")
    tab.context.close()


def test_the_download_button_gives_the_log(tab: Tab, tmp_path: Path) -> None:
    tab.begin()
    tab.say("I often feel jealous.")
    with tab.page.expect_download() as started:
        tab.page.get_by_role("link", name="Download").click()
    file = tmp_path / started.value.suggested_filename
    started.value.save_as(file)
    (trajectory,) = read_log(file)
    assert trajectory.lines == ["I often feel jealous."]
