"""How long a step takes when partner and judge are endpoints, against the slowest single call.

    python -m benchmarks.chat_concurrency

A server in a process of its own takes the same time for every answer, however many it is asked for
at once. A step of N dialogues asks it 2 N questions, N for the partner and N for the judge. If they
all wait side by side, the step takes little more than one of them; what is more, is mostly CPU time
of our own process, which builds, sends and reads the requests under one lock (the GIL). It is shown
per request, and as a share of what the step takes longer than one call.

Asked one after the other, the questions of a few dialogues are timed, and more of them computed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import gymnasium as gym

import ppg_env  # registers PersonaDialogue-v0
from ppg_env.chat import OpenAIChat
from ppg_env.chat_judge import ChatJudge
from ppg_env.partners import ChatPartner

DOMAIN = "therapy"
TURNS = 6
"""Steps of a pass; the first one opens the connections and is not timed."""
FEW = 2
"""Dialogues that are asked about one after the other."""


@dataclass(frozen=True)
class Step:
    """What a step cost."""

    seconds: float
    """Wall-clock time."""
    cpu_seconds: float
    """CPU time of our process, all threads."""
    requests: int
    """Questions that were asked."""


class LonelyJudge(ChatJudge):
    """Is not asked while the partner is."""

    remote = False


def measure(url: str, num_envs: int, at_once: bool) -> list[Step]:
    """Return the steps of one dialogue each in `num_envs` slots."""
    partner, judge = (
        OpenAIChat("any", url, concurrency=num_envs if at_once else 1) for _ in range(2)
    )
    env = gym.make_vec(
        "PersonaDialogue-v0",
        num_envs=num_envs,
        domain=DOMAIN,
        max_turns=TURNS + 1,  # in the last turn the partner has nothing more to say
        partner=ChatPartner(partner, DOMAIN),
        judge=(ChatJudge if at_once else LonelyJudge)(judge, DOMAIN),
    )
    assert isinstance(env, ppg_env.PersonaDialogueVectorEnv)
    env.reset(seed=0)
    steps = []
    for turn in range(TURNS):
        lines = [f"I have {10 * turn + i} small {_THINGS[turn]} at home." for i in range(num_envs)]
        wall, cpu = time.perf_counter(), time.process_time()
        env.step(lines)
        steps.append(
            Step(time.perf_counter() - wall, time.process_time() - cpu, requests=2 * num_envs)
        )
    return steps[1:]


_THINGS = ("birds", "books", "cups", "plants", "chairs", "lamps")


# ---- the server ----------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(seconds: float) -> Iterator[str]:
    """Yield the url of a server whose answers take `seconds` each."""
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(seconds, theirs), daemon=True
    )
    server.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}/v1"
    finally:
        server.terminate()
        server.join()


def _serve(seconds: float, announce: Connection) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
                question = await reader.readexactly(int(length))
                await asyncio.sleep(seconds)
                body = _VERDICT if b"VERDICT:" in question else _LINE
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
                    b"content-length: %d\r\n\r\n%s" % (len(body), body)
                )
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def listen() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=512)
        announce.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(listen())


def _completion(text: str) -> bytes:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    answer = {"id": "x", "object": "chat.completion", "created": 1, "model": "any"}
    return json.dumps({**answer, "choices": [choice]}).encode()


_VERDICT = _completion("That agrees with the background.\nVERDICT: CONSISTENT")
_LINE = _completion("That is nice to hear. What else do you have?")


# ---- the table -----------------------------------------------------------------------------------


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Steps with endpoints as partner and judge.")
    parser.add_argument("--num-envs", type=int, nargs="+", default=[1, 8, 64], help="dialogues")
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.05, 0.5], help="of a call")
    parser.add_argument("--repeats", type=int, default=5, help="passes; the median is shown")
    args = parser.parse_args()

    print(
        f"one step of N dialogues, partner and judge at the same server: median of {args.repeats} "
        f"passes of {TURNS - 1} steps (fastest-slowest pass)"
    )
    print(
        f"{'call':>7} {'N':>4} {'step, ms':>22} {'step/call':>10} {'one by one':>11} "
        f"{'speed-up':>9} {'CPU ms/request':>20} {'CPU of excess':>14}"
    )
    for seconds in args.seconds:
        with serving(seconds) as url:
            rows: dict[int, list[list[Step]]] = {num_envs: [] for num_envs in args.num_envs}
            alone: list[float] = []
            for _ in range(args.repeats):
                lonely = measure(url, FEW, at_once=False)
                alone.append(statistics.median(s.seconds / s.requests for s in lonely))
                for num_envs, passes in rows.items():
                    passes.append(measure(url, num_envs, at_once=True))
        for num_envs, passes in rows.items():
            print(_row(seconds, num_envs, passes, alone))


def _row(call: float, num_envs: int, passes: Sequence[Sequence[Step]], alone: list[float]) -> str:
    walls = [statistics.median(step.seconds for step in steps) for steps in passes]
    cpus = [statistics.median(s.cpu_seconds / s.requests for s in steps) for steps in passes]
    wall, requests = statistics.median(walls), passes[0][0].requests
    one_by_one = [each * requests for each in alone]
    ratio = statistics.median(a / b for a, b in zip(one_by_one, walls, strict=True))
    excess = statistics.median(
        min(1.0, cpu * requests / (wall - call)) for cpu, wall in zip(cpus, walls, strict=True)
    )
    return (
        f"{1e3 * call:>4.0f} ms {num_envs:>4} {_spread(walls, 0):>22} {wall / call:>10.2f} "
        f"{1e3 * statistics.median(one_by_one):>8.0f} ms {ratio:>8.1f}x {_spread(cpus, 2):>20} "
        f"{excess:>14.0%}"
    )


def _spread(seconds: Sequence[float], digits: int) -> str:
    low, middle, high = (1e3 * s for s in (min(seconds), statistics.median(seconds), max(seconds)))
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


if __name__ == "__main__":
    main()
