"""The page behind `ppg play --web`: a person talks, and sees the verdict of every line.

    serve(stage, Start(role="partner", domain="therapy"))    # prints where; Ctrl-C ends it

Plain pages and forms, so that a dialogue has an address of its own, reloading loses nothing and two
tabs never share one by accident; the script only makes it smoother. The page asks nothing of any
other server (its content security policy forbids it), and everything said is escaped by the
template. The server listens on this machine alone unless told otherwise, and answers no other site.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import logging
import secrets
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import uvicorn
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .live import LiveDialogue, Role, Stage

_PAGE = Path(__file__).parent / "web_page"
_MOST_DIALOGUES = 500
"""Dialogues kept in memory; the one longest unused goes first."""
_LONGEST_FORM = 1_000_000
"""Bytes of a form; the longest line that can be said takes some 24,000."""
_PORTS_TRIED = 20
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; img-src data:; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
T = TypeVar("T")
_log = logging.getLogger("uvicorn.error")


@dataclass(frozen=True)
class Start:
    """What the first page proposes."""

    role: Role = "agent"
    domain: str = "therapy"
    persona: str | None = None
    seed: int | None = None


def serve(
    stage: Stage,
    start: Start,
    host: str = "127.0.0.1",
    port: int = 7860,
    announce: Callable[[str], object] = print,
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        stage: where dialogues take place.
        start: what the first page proposes.
        host: address to listen on; any but this machine's own lets others in, which is announced.
        port: the first free one from here on is taken; 0 = any.
        announce: is told the page's address and warnings, one text at a time.

    Raises:
        ValueError: host or port cannot be listened on, or `start` names what there is not.
    """
    stage.environment(start.role, start.domain)  # a wrong name fails here, not in the browser
    known = list(stage.settings[start.domain].briefs)
    if start.persona is not None and start.persona not in known:
        raise ValueError(
            f"Unknown persona id {start.persona!r}; {start.domain} has {len(known)}, from "
            f"{known[0]!r} to {known[-1]!r}."
        )
    listener = listen(host, port)
    found = listener.getsockname()[1]
    is_local = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
    if port not in (0, found):
        announce(f"Port {port} is taken, {found} is free.")
    if not is_local:
        announce(
            f"Warning: everyone who can reach this machine on port {found} can talk here, and so "
            "spend the time and money of partner and judge. --host 127.0.0.1 keeps it to yourself."
        )
    shown = host if is_local else socket.gethostname()
    shown = f"[{shown}]" if ":" in shown else shown
    announce(
        f"Talk at http://{shown}:{found} (Ctrl-C ends; dialogues not downloaded are gone then)"
    )

    app = talk_app(
        stage, start, {host.lower(), "localhost", "127.0.0.1", "::1"} if is_local else None
    )
    settings = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=1
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(settings).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the first free port from `port` on; 0 = any.

    Raises:
        ValueError: for a host or port that cannot be listened on.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port lies between 0 and 65535, got {port}.")
    last = min(port + _PORTS_TRIED, 65536) if port else 1
    for candidate in range(port, last):
        try:
            family, _, _, _, address = socket.getaddrinfo(
                host, candidate, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            return socket.create_server(address[:2], family=family)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ValueError(
                    f"Cannot listen on {host!r}, port {candidate} ({error}). --host 127.0.0.1 is "
                    "this machine; ports below 1024 are often reserved."
                ) from error
    raise ValueError(f"The ports {port} to {last - 1} are all taken; choose another with --port.")


def talk_app(stage: Stage, start: Start, hosts: set[str] | None) -> Starlette:
    """Return the application.

    Args:
        stage: where dialogues take place.
        start: what the first page proposes.
        hosts: names under which the server may be addressed; None = any. A site whose name is made
            to point to this machine is kept out so.
    """

    site = _Site(stage, start)
    routes = [
        Route("/", site.first_page, methods=["GET"]),
        Route("/", site.begin, methods=["POST"]),
        Route("/d/{key}", site.page, methods=["GET"]),
        Route("/d/{key}/say", site.say, methods=["POST"]),
        Route("/d/{key}/undo", site.undo, methods=["POST"]),
        Route("/d/{key}/reveal", site.reveal, methods=["POST"]),
        Route("/d/{key}/record", site.record, methods=["GET"]),
        Route("/{name:str}", _asset, methods=["GET"]),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(_Guard, hosts=hosts)],
        exception_handlers={HTTPException: site.refused},
    )


class _Guard:
    """Answers no other site, and adds the headers to every answer."""

    def __init__(self, app: ASGIApp, hosts: set[str] | None) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        request = Request(scope)
        origin = request.headers.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc != request.headers.get("host")
        unknown = self._hosts is not None and request.url.hostname not in self._hosts

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        app: ASGIApp = self._app
        if foreign or unknown:
            app = Response("This page answers no other site.\n", status_code=403)
        await app(scope, receive, send_guarded)


@dataclass
class _Seat:
    """A dialogue in a browser, with what the page shows besides it."""

    dialogue: LiveDialogue
    notice: str = ""
    """What went wrong last."""
    detail: str = ""
    """In the words of what raised it."""
    draft: str = ""
    """What stands in the field in which the person writes."""
    revealed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def hear(self, line: str, turn: str) -> None:
        """Say the line if the page that it was typed on shows the dialogue as it is now."""
        with self.lock:
            if turn != str(len(self.dialogue.turns)):
                self.notice, self.detail, self.draft = _STALE, "", line
                return
            self.notice, self.detail, self.draft = "", "", line
            try:
                self.dialogue.say(line)
                self.draft = ""
            except Exception as error:
                self.notice, self.detail = _explained(error)

    def undo(self, turn: str) -> None:
        """Take the last turn back, if the page showed it; what was said can be changed."""
        with self.lock:
            if turn != str(len(self.dialogue.turns)) or not self.dialogue.can_undo:
                self.notice, self.detail = _STALE, ""
                return
            self.notice, self.detail, self.draft = "", "", self.dialogue.undo()


_STALE = (
    "This page showed an older state of the dialogue (is it open twice, or was the button pressed "
    "twice?). Here is the present one; nothing was said."
)


def _explained(error: Exception) -> tuple[str, str]:
    """Return what a person should know about the error and do, and the error's own words."""
    if isinstance(error, ValueError):
        return str(error), ""
    if not isinstance(error, RuntimeError):
        _log.error("A line got no answer.", exc_info=error)
    return (
        "Partner, agent or judge gave no answer. Nothing is lost: try again. If that does not "
        "help, see whether the endpoint is running, or start ppg play anew with another --partner, "
        "--judge or --agent.",
        str(error) or type(error).__name__,
    )


class _Site:
    """The pages: reads forms, finds dialogues, fills templates."""

    def __init__(self, stage: Stage, start: Start) -> None:
        self._stage, self._start = stage, start
        self._seats: OrderedDict[str, _Seat] = OrderedDict()
        self._templates = Environment(
            loader=FileSystemLoader(_PAGE),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters["band"] = band

    async def first_page(self, request: Request) -> Response:
        """Show what can be talked about; the address may propose other than the start."""
        return self._proposal(dict(request.query_params))

    async def begin(self, request: Request) -> Response:
        """Begin a dialogue and go there."""
        wanted = await _form(request)
        domain = wanted.get("domain", "")
        persona = wanted.get(f"persona-{domain}") or None
        try:
            seed = _seed(wanted.get("seed", ""))
            role: Any = wanted.get("role", "")
            dialogue = await _in_a_thread(lambda: self._stage.begin(role, domain, persona, seed))
        except HTTPException:
            raise
        except Exception as error:
            return self._proposal({**wanted, "persona": persona or ""}, *_explained(error))
        key = secrets.token_urlsafe(12)
        self._seats[key] = _Seat(dialogue)
        while len(self._seats) > _MOST_DIALOGUES:
            self._seats.popitem(last=False)
        return RedirectResponse(f"/d/{key}", 303)

    async def page(self, request: Request) -> Response:
        """Show a dialogue."""
        seat = self._seat(request)
        dialogue = seat.dialogue
        return self._filled(
            "dialogue.html.jinja",
            stage=self._stage,
            seat=seat,
            dialogue=dialogue,
            address=f"/d/{request.path_params['key']}",
            is_agent=dialogue.role == "agent",
            chart=RewardChart(dialogue.rewards, dialogue.max_turns, dialogue.drift),
        )

    async def say(self, request: Request) -> Response:
        """Hear a line."""
        form = await _form(request)
        return await self._changed(
            request, lambda seat: seat.hear(form.get("line", ""), form.get("turn", ""))
        )

    async def undo(self, request: Request) -> Response:
        """Take the last turn back."""
        form = await _form(request)
        return await self._changed(request, lambda seat: seat.undo(form.get("turn", "")))

    async def reveal(self, request: Request) -> Response:
        """Show who the agent plays."""
        return await self._changed(request, lambda seat: setattr(seat, "revealed", True))

    async def record(self, request: Request) -> Response:
        """Send the dialogue as a log of one line, see logs.py."""
        dialogue = self._seat(request).dialogue
        try:
            record = dialogue.trajectory().record()
        except ValueError as error:
            raise HTTPException(404, str(error)) from error
        name = f"dialogue-{dialogue.domain}-{dialogue.seed}.jsonl"
        return Response(
            json.dumps(record) + "\n",
            media_type="application/jsonl",
            headers={"Content-Disposition": f'attachment; filename="{name}"'},
        )

    async def _changed(self, request: Request, change: Callable[[_Seat], object]) -> Response:
        """Change a dialogue, which may take as long as a model takes, and go back to its page."""
        seat = self._seat(request)
        await _in_a_thread(lambda: change(seat))
        return RedirectResponse(f"/d/{request.path_params['key']}#now", 303)

    def _seat(self, request: Request) -> _Seat:
        key = request.path_params["key"]
        if key not in self._seats:
            raise HTTPException(
                404,
                "This dialogue is not there any more: the server was started anew since, or too "
                "many others have begun.",
            )
        self._seats.move_to_end(key)
        return self._seats[key]

    def _proposal(self, wanted: Mapping[str, str], notice: str = "", detail: str = "") -> Response:
        start = self._start
        return self._filled(
            "start.html.jinja",
            400 if notice else 200,
            stage=self._stage,
            role=wanted.get("role", start.role),
            domain=wanted.get("domain", start.domain),
            persona=wanted.get("persona", start.persona or ""),
            seed=wanted.get("seed", "" if start.seed is None else str(start.seed)),
            notice=notice,
            detail=detail,
        )

    async def refused(self, request: Request, error: Exception) -> Response:
        """Show why there is no such page."""
        assert isinstance(error, HTTPException)
        return self._filled("problem.html.jinja", error.status_code, notice=error.detail)

    def _filled(self, template: str, status: int = 200, **values: Any) -> Response:
        html = self._templates.get_template(template).render(values)
        return Response(html.encode("utf-8", "replace"), status, media_type="text/html")


@dataclass(frozen=True)
class RewardChart:
    """The reward of each turn as bars and its drift as a line, in the units of an SVG.

    `turns` is the number of turns that there is room for; `drift` the change of the reward per
    turn.
    """

    rewards: Sequence[float | None]
    turns: int
    drift: float | None
    left: float = 28.0
    top: float = 8.0
    width: float = 284.0
    height: float = 88.0

    def x(self, turn: float) -> float:
        """Return the middle of a turn, counted from 0."""
        return round(self.left + self.width * (turn + 0.5) / self.turns, 1)

    def y(self, reward: float) -> float:
        """Return the height of a reward in [0, 1]."""
        return round(self.top + self.height * (1.0 - reward), 1)

    @property
    def bar(self) -> float:
        """The width of a bar."""
        return round(min(self.width / self.turns * 0.7, 26.0), 1)

    @property
    def trend(self) -> tuple[float, float, float, float] | None:
        """(x, y) of both ends of the least-squares line, which may leave [0, 1]; None if none."""
        if self.drift is None:
            return None
        scored = [(t, reward) for t, reward in enumerate(self.rewards) if reward is not None]
        middle = sum(t for t, _ in scored) / len(scored)
        mean = sum(reward for _, reward in scored) / len(scored)
        first, last = (
            (self.x(t), self.y(mean + self.drift * (t - middle)))
            for t in (scored[0][0], scored[-1][0])
        )
        return (*first, *last)


def band(reward: float | None) -> str:
    """Return how a reward is coloured: low, middle, high, or none where nobody could score."""
    if reward is None:
        return "none"
    return "low" if reward < 1 / 3 else "middle" if reward < 2 / 3 else "high"


async def _in_a_thread(call: Callable[[], T]) -> T:
    """Return what `call` returns, which may take long.

    Its thread does not keep a server alive that is told to stop, as one of a pool would.

    Raises:
        HTTPException: the server stops before.
    """
    loop, future = asyncio.get_running_loop(), Future[T]()

    def work() -> None:
        try:
            result = call()
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=work, daemon=True).start()
    try:
        return await asyncio.wrap_future(future, loop=loop)
    except asyncio.CancelledError:
        raise HTTPException(503, "The server was stopped.") from None


async def _form(request: Request) -> dict[str, str]:
    """Return the fields of a form.

    Raises:
        HTTPException: it is longer than any line could be.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk[: _LONGEST_FORM + 1 - len(body)]
    if len(body) > _LONGEST_FORM:
        raise HTTPException(413, "That is far too long for a line. Shorten it.")
    fields = parse_qs(body.decode("utf-8", "replace"), errors="replace")
    return {name: values[0].replace("\r\n", "\n") for name, values in fields.items()}


def _seed(text: str) -> int | None:
    """Return the seed that a person typed, None for nothing.

    Raises:
        ValueError: it is no whole number.
    """
    if not text.strip():
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"A seed is a whole number of at least 0, got {text[:40]!r}.") from None


async def _asset(request: Request) -> Response:
    """Send the style sheet or the script."""
    kind = _ASSETS.get(request.path_params["name"])
    if kind is None:
        raise HTTPException(404, "There is no such page.")
    return Response((_PAGE / request.path_params["name"]).read_bytes(), media_type=kind)


_ASSETS = {"style.css": "text/css", "web.js": "text/javascript"}
