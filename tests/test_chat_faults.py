"""Endpoints that fail: no turn is lost, no reward invented, and nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from chat_servers import DOMAIN, ChatServer, agent_line, answer, play, same_transcripts, serving
from fault_proxy import (
    CUT_ANSWER,
    PASSING,
    SLOW,
    TRICKLE,
    Answer,
    FaultProxy,
    Faults,
    Reply,
    Request,
    always,
    answer_with,
    forward_to,
    outage,
)

from ppg_env import PersonaDialogueVectorEnv
from ppg_env.chat import ChatError, OpenAIChat
from ppg_env.chat_judge import ChatJudge
from ppg_env.partners import ChatPartner


@pytest.fixture
def server() -> Iterator[ChatServer]:
    yield from serving()


def sample(request: dict[str, Any]) -> str:
    """Answer by rules; where sampling is asked for, the seed is heard in the answer."""
    text = answer(request["messages"])
    return f"{text} It is {request['seed']}." if request["temperature"] > 0 else text


def make_env(
    partner: OpenAIChat, judge: OpenAIChat, num_envs: int, max_turns: int = 8, **judging: Any
) -> PersonaDialogueVectorEnv:
    env = gym.make_vec(
        "PersonaDialogue-v0",
        num_envs=num_envs,
        domain=DOMAIN,
        max_turns=max_turns,
        partner=ChatPartner(partner, DOMAIN, max_tokens=24),
        judge=ChatJudge(judge, DOMAIN, max_tokens=24, **judging),
    )
    assert isinstance(env, PersonaDialogueVectorEnv)
    return env


def ask(chat: OpenAIChat, number: int = 1) -> list[str]:
    """Return the answers to some chats."""
    chats = [
        [
            {"role": "system", "content": "You like to talk."},
            {"role": "user", "content": "(Begin.)"},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": f"I always ask {i} questions."},
        ]
        for i in range(number)
    ]
    completions = chat(chats, list(range(number)), temperature=0.0, max_tokens=8)
    return [text for text, _ in completions]


BROKEN_OR_SLOW = 0.3 * (len(PASSING) + 1) / len(PASSING)
"""Rate of faults of which 30 % of the requests are broken; a further kind is slow only."""


# ---- many faults ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_500_turns_with_30_percent_faults_are_the_turns_without_faults(server: ChatServer) -> None:
    straight = OpenAIChat(server.model, server.url, concurrency=4)
    with (
        FaultProxy(forward_to(server.address), Faults(BROKEN_OR_SLOW), delay=4.0) as proxy,
        ThreadPoolExecutor() as pool,
    ):
        without = pool.submit(play, make_env(straight, straight, num_envs=128, max_turns=4))
        chat = OpenAIChat(server.model, proxy.url, concurrency=8, timeout=2.0, budget=120.0)
        transcripts, reward_TN, _ = play(make_env(chat, chat, num_envs=128, max_turns=4))
        expected, expected_reward_TN, _ = without.result()

    assert reward_TN.size >= 500
    assert all(len(transcript.turns) == 4 for transcript in transcripts)
    assert same_transcripts(transcripts, expected)
    np.testing.assert_array_equal(reward_TN, expected_reward_TN)
    assert proxy.share_broken >= 0.25
    assert all(proxy.counts[kind] > 0 for kind in (*PASSING, SLOW)), proxy.counts
    assert {0.0, 1.0} <= set(reward_TN.flat)
    assert np.isnan(reward_TN).any()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_faults_change_nothing_in_a_sampled_run_either(seed: int) -> None:
    with FaultProxy(answer_with(sample)) as fine:
        chat = OpenAIChat("rules", fine.url)
        env = make_env(chat, chat, num_envs=16, max_turns=4, charge_conflicts=True)
        expected, expected_reward_TN, expected_infos = play(env, seed)

    faults = Faults(BROKEN_OR_SLOW, seed=seed)
    with FaultProxy(answer_with(sample), faults, delay=1.5, retry_after=0.5) as proxy:
        chat = OpenAIChat("rules", proxy.url, timeout=0.6, budget=60.0)
        env = make_env(chat, chat, num_envs=16, max_turns=4, charge_conflicts=True)
        transcripts, reward_TN, infos = play(env, seed)

    assert proxy.share_broken >= 0.2
    assert same_transcripts(transcripts, expected)
    np.testing.assert_array_equal(reward_TN, expected_reward_TN)
    for info, expected_info in zip(infos, expected_infos, strict=True):
        assert list(info["reason"]) == list(expected_info["reason"])
        np.testing.assert_equal(info["reward_parts"], expected_info["reward_parts"])


def waver(request: dict[str, Any]) -> str:
    """Answer as `answer` does, but the first half of a bad verdict is a good one."""
    chat = request["messages"]
    text = answer(chat)
    if not text.endswith("CONTRADICTS"):
        return text
    if len(chat) > 2:  # asked for the last line once more
        return "VERDICT: CONTRADICTS"
    first_half = "At first sight it fits.\nVERDICT: CONSISTENT"
    return first_half + "\nVERDICT: CONTRADICTS".rjust(len(first_half), "?")


def test_an_answer_cut_at_the_token_limit_never_makes_a_reward() -> None:
    with FaultProxy(answer_with(waver)) as fine:
        chat = OpenAIChat("rules", fine.url)
        expected, expected_reward_TN, _ = play(make_env(chat, chat, num_envs=16))
        with FaultProxy(answer_with(waver), Faults(0.4, kinds=(CUT_ANSWER,))) as proxy:
            env = make_env(chat, OpenAIChat("rules", proxy.url), num_envs=16, min_parse_rate=0.0)
            transcripts, reward_TN, _ = play(env)

    assert proxy.share_broken >= 0.25
    assert same_transcripts(transcripts, expected)
    scored_TN = ~np.isnan(reward_TN)
    np.testing.assert_array_equal(reward_TN[scored_TN], expected_reward_TN[scored_TN])
    lost = ~scored_TN & ~np.isnan(expected_reward_TN)
    assert 0 < lost.sum() < 0.25 * reward_TN.size  # those cut twice; the others were repaired


def test_a_partner_whose_every_line_is_cut_says_the_sentences_that_are_whole() -> None:
    with (
        FaultProxy(answer_with(sample)) as fine,
        FaultProxy(answer_with(sample), always(CUT_ANSWER)) as proxy,
    ):
        env = make_env(OpenAIChat("r", proxy.url), OpenAIChat("r", fine.url), num_envs=4)
        transcripts, _, _ = play(env)
    lines = [turn.partner for transcript in transcripts for turn in transcript.turns]
    assert len(lines) == 4 * 8
    assert set(lines) == {"Hello!", "That sounds good.", "Why is that?", "You do not sound sure."}


# ---- one fault at a time -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PASSING)
def test_after_a_fault_the_same_question_is_asked_again(kind: str) -> None:
    with FaultProxy(answer_with(sample), outage(kind, 0, 0), delay=2.0, retry_after=0.2) as proxy:
        chat = OpenAIChat("rules", proxy.url, timeout=0.5, budget=30.0)
        assert ask(chat) == ["That sounds good. What do you like about it?"]
    assert [request.fault for request in proxy.requests] == [kind, ""]
    assert proxy.requests[0].body == proxy.requests[1].body
    assert chat.retries.total() == 1


def test_a_slow_answer_is_waited_for() -> None:
    with FaultProxy(answer_with(sample), always(SLOW), slow=0.3) as proxy:
        ask(OpenAIChat("rules", proxy.url, timeout=5.0))
    assert len(proxy.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_request_that_the_server_refuses_is_not_repeated(status: int) -> None:
    async def refuse(request: Request) -> Reply:
        return Reply(status, b'{"error": {"message": "no such luck"}}')

    with FaultProxy(refuse) as proxy:
        with pytest.raises(ChatError, match="no such luck"):
            ask(OpenAIChat("rules", proxy.url, budget=30.0))
        asked = [request for request in proxy.requests if request.path.endswith("/completions")]
    assert len(asked) == 1


# ---- outages -------------------------------------------------------------------------------------


def reference(num_envs: int) -> tuple[Any, np.ndarray, Any]:
    with FaultProxy(answer_with(sample)) as fine:
        chat = OpenAIChat("rules", fine.url)
        return play(make_env(chat, chat, num_envs))


def test_an_endpoint_that_resets_for_a_while_and_comes_back_changes_nothing() -> None:
    expected, expected_reward_TN, _ = reference(8)
    with FaultProxy(answer_with(sample), outage("reset", 50, 65)) as proxy:
        chat = OpenAIChat("rules", proxy.url, budget=60.0)
        transcripts, reward_TN, _ = play(make_env(chat, chat, num_envs=8))
    assert proxy.counts["reset"] == 16
    assert same_transcripts(transcripts, expected)
    np.testing.assert_array_equal(reward_TN, expected_reward_TN)


def test_an_endpoint_that_stops_listening_and_starts_again_changes_nothing() -> None:
    expected, expected_reward_TN, _ = reference(8)
    reached = threading.Event()

    def slow_down(number: int, body: bytes, repeats: int) -> str:
        if number == 60:
            reached.set()
        return SLOW if number >= 60 else ""

    def restart() -> None:
        assert reached.wait(30)
        proxy.go_down()
        threading.Event().wait(0.4)
        proxy.come_up()

    with FaultProxy(answer_with(sample), slow_down) as proxy:
        chat = OpenAIChat("rules", proxy.url, budget=60.0)
        env = make_env(chat, chat, num_envs=8)
        restarting = threading.Thread(target=restart)
        restarting.start()
        transcripts, reward_TN, _ = play(env)
        restarting.join()
    assert chat.retries.total() > 0
    assert same_transcripts(transcripts, expected)
    np.testing.assert_array_equal(reward_TN, expected_reward_TN)


@pytest.mark.parametrize("down", [("partner",), ("judge",), ("partner", "judge")])
def test_a_step_that_failed_for_good_can_be_repeated_as_if_nothing_had_happened(
    down: tuple[str, ...],
) -> None:
    expected, expected_reward_TN, _ = reference(4)
    rng = np.random.default_rng(0)
    with (
        FaultProxy(answer_with(sample)) as partner,
        FaultProxy(answer_with(sample)) as judge,
    ):
        proxies = {"partner": partner, "judge": judge}
        chats = {name: OpenAIChat(name, proxy.url) for name, proxy in proxies.items()}
        env = make_env(chats["partner"], chats["judge"], num_envs=4)
        env.reset(seed=0)
        for turn in range(env.max_turns):
            lines = [agent_line(rng) for _ in range(4)]
            if turn == 3:
                before = env.transcripts
                for name in down:
                    proxies[name].go_down()
                    chats[name].budget = 0.4
                for _ in range(2):
                    with pytest.raises(ChatError) as raised:
                        env.step(lines)
                    assert any(name in str(raised.value) for name in down)
                    assert any(proxies[name].url in str(raised.value) for name in down)
                assert env.transcripts == before
                for name in down:
                    proxies[name].come_up()
                    chats[name].budget = 60.0
            reward_N = env.step(lines)[1]
            np.testing.assert_array_equal(reward_N, expected_reward_TN[turn])
    assert same_transcripts(env.transcripts, expected)


def test_a_reset_that_failed_for_good_can_be_repeated_as_if_nothing_had_happened() -> None:
    with FaultProxy(answer_with(sample)) as proxy:
        chat = OpenAIChat("rules", proxy.url)
        expected = make_env(chat, chat, num_envs=4)
        expected.reset(seed=5)
        env = make_env(chat, chat, num_envs=4)
        env.reset(seed=5)
        proxy.go_down()
        chat.budget = 0.4
        with pytest.raises(ChatError):
            env.reset()
        proxy.come_up()
        chat.budget = 60.0
        assert env.reset()[0] == expected.reset()[0]


# ---- budgets -------------------------------------------------------------------------------------


def test_an_endpoint_that_always_says_429_is_given_up_within_the_budget() -> None:
    with FaultProxy(answer_with(sample), always("429")) as proxy:
        chat = OpenAIChat("some-model", proxy.url, budget=1.0, concurrency=4)
        with pytest.raises(ChatError) as raised:
            ask(chat, number=64)
    attempts_of_one = 4  # pauses of at least 0.18, 0.37 and 0.75 s
    assert 4 < len(proxy.requests) <= 4 * attempts_of_one
    assert "some-model" in str(raised.value)
    assert proxy.url in str(raised.value)
    assert "429" in str(raised.value)


@pytest.mark.parametrize(("retry_after", "attempts"), [(3600, 1), (1, 3)])
def test_retry_after_is_obeyed_but_not_beyond_the_budget(retry_after: int, attempts: int) -> None:
    faults = always("429 with Retry-After")
    with (
        FaultProxy(answer_with(sample), faults, retry_after=retry_after) as proxy,
        pytest.raises(ChatError, match="429"),
    ):
        ask(OpenAIChat("rules", proxy.url, budget=2.7))
    assert 1 <= len(proxy.requests) <= attempts


def raises_in_time(chat: OpenAIChat, patience: float = 20.0) -> BaseException | None:
    """Return what a question raises, None if it is still waiting after `patience` seconds."""
    errors: list[BaseException] = []

    def question() -> None:
        try:
            ask(chat)
        except BaseException as error:
            errors.append(error)

    asking = threading.Thread(target=question, daemon=True)
    asking.start()
    asking.join(patience)
    return errors[0] if errors else None


def test_an_answer_that_trickles_in_for_ever_is_given_up() -> None:
    with FaultProxy(answer_with(sample), always(TRICKLE)) as proxy:
        chat = OpenAIChat("rules", proxy.url, timeout=0.5, budget=1.0)
        assert isinstance(raises_in_time(chat), ChatError)


def test_a_port_where_nobody_listens_is_given_up_with_a_question() -> None:
    with FaultProxy(answer_with(sample)) as proxy:
        url = proxy.url
    with pytest.raises(ChatError, match="is the server running") as raised:
        ask(OpenAIChat("some-model", url, budget=0.5))
    assert "some-model" in str(raised.value)
    assert url in str(raised.value)


# ---- secrets -------------------------------------------------------------------------------------


def echo_secrets() -> Answer:
    async def echo(request: Request) -> Reply:
        key = request.headers["authorization"].removeprefix("Bearer ")
        return Reply(401, f'{{"error": {{"message": "bad key {key}"}}}}'.encode())

    return echo


def test_the_key_travels_in_its_header_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "correct-horse-battery"
    monkeypatch.setenv("SOME_KEY", key)
    with FaultProxy(answer_with(sample)) as proxy:
        chat = OpenAIChat("rules", proxy.url, api_key_env="SOME_KEY")
        ask(chat)
    (request,) = proxy.requests
    assert request.headers["authorization"] == f"Bearer {key}"
    rest = [value for name, value in request.headers.items() if name != "authorization"]
    assert key not in request.path + request.body.decode() + "".join(rest)

    with FaultProxy(echo_secrets()) as proxy:
        chat = OpenAIChat("rules", proxy.url, api_key_env="SOME_KEY")
        with pytest.raises(ChatError, match="SOME_KEY") as raised:
            ask(chat)
    assert key not in str(raised.value) + repr(raised.value) + repr(chat) + chat.name
    assert raised.value.__cause__ is None
    assert raised.value.__context__ is None
