"""A small HTTP server in a thread that breaks some of its answers on purpose.

    with FaultProxy(forward_to("http://127.0.0.1:8000"), Faults(0.3, seed=0)) as proxy:
        chat = OpenAIChat(model, proxy.url)

Behind it stands a real server, or a function that answers. Whether and how a request is broken
follows from the seed, the request's text and how often it has come: not from the order in which
requests happen to arrive.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

PASSING = (
    "delay",
    "reset",
    "429",
    "429 with Retry-After",
    "500",
    "502",
    "503",
    "broken JSON",
    "web page",
    "no choices",
    "null content",
    "cut body",
)
"""Faults that a client can tell from an answer, and so can ask again."""
CUT_ANSWER = "cut answer"
"""The answer's first half, said to have hit the token limit: looks like any cut answer."""
SLOW = "slow"
"""Late, but in time and whole: no fault that a client may notice."""
TRICKLE = "trickle"
"""The answer never ends: a byte now and then, for as long as the client listens."""


class Reply(NamedTuple):
    """An HTTP answer."""

    status: int
    body: bytes
    headers: Mapping[str, str] = {}


class Request(NamedTuple):
    """A request as it came in, and the fault that met it ("" for none)."""

    path: str
    headers: Mapping[str, str]
    body: bytes
    fault: str

    @property
    def json(self) -> Any:
        """Return what the request says."""
        return json.loads(self.body)


Answer = Callable[[Request], Awaitable[Reply]]
ChooseFault = Callable[[int, bytes, int], str]
"""(number of the request, its body, how often this body came before) -> a fault or ""."""


@dataclass(frozen=True)
class Faults:
    """Breaks a share of the requests, each kind of fault as often as the others."""

    rate: float
    kinds: tuple[str, ...] = (*PASSING, SLOW)
    seed: int = 0

    def __call__(self, number: int, body: bytes, repeats: int) -> str:
        """Return the fault that meets this request."""
        text = b"%d %d " % (self.seed, repeats) + body
        draw = random.Random(hashlib.sha256(text).digest())
        return draw.choice(self.kinds) if draw.random() < self.rate else ""


def outage(fault: str, first: int, last: int) -> ChooseFault:
    """Return what breaks the requests number first..last, counted from 0, and no other."""
    return lambda number, body, repeats: fault if first <= number <= last else ""


def always(fault: str) -> ChooseFault:
    """Return what breaks every request."""
    return lambda number, body, repeats: fault


def never(number: int, body: bytes, repeats: int) -> str:
    """Break nothing."""
    return ""


def completion(text: str | None, finish_reason: str = "stop") -> Reply:
    """Return the HTTP answer that holds a chat completion."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": finish_reason, "message": message}
    answer = {"id": "x", "object": "chat.completion", "created": 1, "model": "m"}
    return Reply(200, json.dumps({**answer, "choices": [choice]}).encode())


def answer_with(say: Callable[[dict[str, Any]], str]) -> Answer:
    """Return an endpoint that answers a chat completion request with `say(request)`."""

    async def answer(request: Request) -> Reply:
        return completion(say(request.json))

    return answer


def forward_to(url: str) -> Answer:
    """Return what passes requests on to a real server, e.g. http://127.0.0.1:8000."""
    address = urlsplit(url)

    async def answer(request: Request) -> Reply:
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            writer.write(
                b"POST %s HTTP/1.1\r\nhost: %s\r\ncontent-type: application/json\r\n"
                b"connection: close\r\ncontent-length: %d\r\n\r\n"
                % (request.path.encode(), address.netloc.encode(), len(request.body))
                + request.body
            )
            start, headers = await _read_head(reader)
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            return Reply(int(start.split()[1]), body)
        finally:
            writer.close()

    return answer


class FaultProxy:
    """Answers POST requests, some of them badly. Use it in a `with` statement.

    Args:
        answer: who really answers.
        choose_fault: which requests are broken, and how.
        delay: seconds that a delayed answer comes late; longer than the client's patience.
        slow: seconds that a slow answer takes; within the client's patience.
        retry_after: seconds that "429 with Retry-After" asks for.

    Attributes:
        counts: number of requests that met each fault; "" = none.
        requests: all requests, in the order they came in.
        in_flight, most_in_flight: requests being answered now, and the most at one time.
    """

    def __init__(
        self,
        answer: Answer,
        choose_fault: ChooseFault = never,
        delay: float = 2.0,
        slow: float = 0.1,
        retry_after: float = 1,
    ) -> None:
        self.answer, self.choose_fault = answer, choose_fault
        self.delay, self.slow, self.retry_after = delay, slow, retry_after
        self.counts: Counter[str] = Counter()
        self.requests: list[Request] = []
        self.in_flight = self.most_in_flight = 0
        self._seen: Counter[bytes] = Counter()
        self._port = 0
        self._handlers: set[asyncio.Task[None]] = set()  # keeps them from being collected
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def url(self) -> str:
        """Return the endpoint's root, as clients want it."""
        return f"http://127.0.0.1:{self._port}/v1"

    @property
    def share_broken(self) -> float:
        """Return the share of requests that met a fault, slow answers not counted."""
        fine = self.counts[""] + self.counts[SLOW]
        return 1 - fine / max(1, self.counts.total())

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self.come_up()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.go_down()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def come_up(self) -> None:
        """Listen, again at the same address if it did before."""

        async def listen() -> None:
            self._server = await asyncio.start_server(
                self._accept, "127.0.0.1", self._port, backlog=512
            )
            self._port = self._server.sockets[0].getsockname()[1]

        asyncio.run_coroutine_threadsafe(listen(), self._loop).result()

    def go_down(self) -> None:
        """Refuse connections, and end those that there are."""

        async def close() -> None:
            self._server.close()
            while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks, timeout=0.1)

        asyncio.run_coroutine_threadsafe(close(), self._loop).result()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handler = self._loop.create_task(self._serve(reader, writer))
        self._handlers.add(handler)
        handler.add_done_callback(self._handlers.discard)
        handler.add_done_callback(lambda _: writer.close())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The client may go at any time, and so may the endpoint.
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._answer_one(reader, writer):
                pass

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer a request; return whether the connection can be used again."""
        start, headers = await _read_head(reader)
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        fault = self.choose_fault(len(self.requests), body, self._seen[body])
        self._seen[body] += 1
        self.counts[fault] += 1
        request = Request(start.split()[1], headers, body, fault)
        self.requests.append(request)

        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            reply = await _unless_gone(self._reply(request), reader)
        finally:
            self.in_flight -= 1  # before the client can know, and ask the next question
        return await _send(reply, fault, reader, writer)

    async def _reply(self, request: Request) -> Reply:
        fault = request.fault
        if fault in ("delay", "slow"):
            await asyncio.sleep(self.delay if fault == "delay" else self.slow)
        if fault == "reset":
            return Reply(0, b"")
        if fault == "429 with Retry-After":
            return Reply(429, b'{"error": "slow down"}', {"retry-after": f"{self.retry_after}"})
        if fault.isdigit():
            return Reply(int(fault), b'{"error": {"message": "broken on purpose"}}')
        if fault == "broken JSON":
            return Reply(200, b'{"choices": [{"message": {"role": "assistant", "conte')
        if fault == "web page":
            return Reply(200, b"<html>Please log in.</html>", {"content-type": "text/html"})
        if fault == "no choices":
            return Reply(200, b'{"id": "x", "object": "chat.completion", "choices": []}')
        if fault == "null content":
            return completion(None)
        reply = await self.answer(request)
        if fault == CUT_ANSWER and reply.status == 200:
            whole = json.loads(reply.body)["choices"][0]["message"]["content"]
            return completion(whole[: len(whole) // 2], "length")
        return reply


async def _read_head(reader: asyncio.StreamReader) -> tuple[str, dict[str, str]]:
    """Return the first line and the headers of an HTTP message."""
    start, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
    pairs = [line.partition(":") for line in lines]
    return start, {name.strip().lower(): value.strip() for name, _, value in pairs}


async def _unless_gone(reply: Awaitable[Reply], reader: asyncio.StreamReader) -> Reply:
    """Return the reply, or raise as soon as the client hangs up."""
    working = asyncio.ensure_future(reply)
    hearing = asyncio.ensure_future(reader.read(1))  # a client that waits says nothing
    try:
        await asyncio.wait({working, hearing}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ConnectionResetError("the client has hung up")
        return working.result()
    finally:
        working.cancel()
        hearing.cancel()
        await asyncio.wait({hearing})  # two may not read at a time
        if not hearing.cancelled():
            hearing.exception()


async def _send(
    reply: Reply, fault: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> bool:
    """Send the reply, whole or broken; return whether the connection can be used again."""
    if fault == "reset":
        handle: socket.socket = writer.get_extra_info("socket")
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        return False
    headers = {"content-type": "application/json", **reply.headers}
    head = f"HTTP/1.1 {reply.status} -\r\ncontent-length: {len(reply.body)}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    if fault == "cut body":
        writer.write(head.encode() + b"\r\n" + reply.body[: len(reply.body) // 2])
        await writer.drain()
        return False
    if fault == TRICKLE:
        writer.write(head.replace(str(len(reply.body)), "1000000", 1).encode() + b"\r\n")
        while not reader.at_eof():
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.02)
        return False
    writer.write(head.encode() + b"\r\n" + reply.body)
    await writer.drain()
    return True
