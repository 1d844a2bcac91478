"""Partner and judge against a real OpenAI-compatible server with a small model that was taught."""

from __future__ import annotations

from collections.abc import Iterator

import gymnasium as gym
import numpy as np
import pytest
from chat_servers import (
    DOMAIN,
    ChatServer,
    RuleChat,
    agent_line,
    answer,
    play,
    same_transcripts,
    serving,
)
from fault_proxy import FaultProxy, forward_to

from ppg_env import PersonaDialogueEnv, PersonaDialogueVectorEnv
from ppg_env.chat import ChatError, OpenAIChat, open_chat
from ppg_env.chat_judge import ChatJudge, read_verdict
from ppg_env.dialogue import Messages
from ppg_env.partners import ChatPartner

pytestmark = pytest.mark.slow


@pytest.fixture
def server() -> Iterator[ChatServer]:
    yield from serving()


@pytest.fixture
def chat(server: ChatServer) -> OpenAIChat:
    return OpenAIChat(server.model, server.url, concurrency=4)


@pytest.fixture(scope="module")
def prompts() -> list[Messages]:
    """What partner and judge ask for in a few dialogues."""
    rules = RuleChat()
    play(make_env(ChatPartner(rules, DOMAIN), ChatJudge(rules, DOMAIN), num_envs=6), seed=9)
    return [chat for chat, _ in rules.pairs]


def make_env(
    partner: ChatPartner | str, judge: ChatJudge | str, num_envs: int, max_turns: int = 4
) -> PersonaDialogueVectorEnv:
    env = gym.make_vec(
        "PersonaDialogue-v0",
        num_envs=num_envs,
        domain=DOMAIN,
        max_turns=max_turns,
        partner=partner,
        judge=judge,
    )
    assert isinstance(env, PersonaDialogueVectorEnv)
    return env


def test_the_server_answers_each_chat_as_its_model_was_taught(
    chat: OpenAIChat, prompts: list[Messages]
) -> None:
    completions = chat(prompts, [0] * len(prompts), temperature=0.0, max_tokens=32)
    right = [c.text == answer(prompt) for prompt, c in zip(prompts, completions, strict=True)]
    assert np.mean(right) > 0.8
    assert {read_verdict(c.text) for c in completions} == {"consistent", "contradicts", None}
    assert all(c.finished for c, fine in zip(completions, right, strict=True) if fine)


def test_chats_asked_side_by_side_get_their_own_answers(
    chat: OpenAIChat, prompts: list[Messages]
) -> None:
    together = chat(prompts, [0] * len(prompts), temperature=0.0, max_tokens=8)
    alone = [chat([prompt], [0], temperature=0.0, max_tokens=8)[0] for prompt in prompts]
    assert together == alone


def test_an_answer_that_meets_the_token_limit_is_unfinished(
    chat: OpenAIChat, prompts: list[Messages]
) -> None:
    completions = chat(prompts, [0] * len(prompts), temperature=0.0, max_tokens=2)
    assert not any(completion.finished for completion in completions)


def test_the_same_model_says_the_same_behind_a_server_and_in_process(
    chat: OpenAIChat, prompts: list[Messages]
) -> None:
    in_process = open_chat(f"hf:{chat.model}")
    served, own = (
        model(prompts, [0] * len(prompts), temperature=0.0, max_tokens=32)
        for model in (chat, in_process)
    )
    assert served == own


def test_a_wrong_model_name_is_told_with_url_name_and_cause(
    server: ChatServer, prompts: list[Messages]
) -> None:
    chat = OpenAIChat("no-such/model", server.url, budget=10.0)
    with pytest.raises(ChatError) as raised:
        chat(prompts[:1], [0], temperature=0.0, max_tokens=4)
    assert "no-such/model" in str(raised.value)
    assert server.url in str(raised.value)
    assert "pinned" in str(raised.value), "the server's own words"


def test_no_more_requests_are_under_way_than_allowed(
    server: ChatServer, prompts: list[Messages]
) -> None:
    with FaultProxy(forward_to(server.address)) as proxy:
        chat = OpenAIChat(server.model, proxy.url, concurrency=3)
        chat(prompts, [0] * len(prompts), temperature=0.0, max_tokens=4)
    assert 1 < proxy.most_in_flight <= 3


def test_a_partner_and_a_judge_that_share_a_model_share_its_limit(server: ChatServer) -> None:
    with FaultProxy(forward_to(server.address)) as proxy:
        chat = OpenAIChat(server.model, proxy.url, concurrency=3)
        env = make_env(ChatPartner(chat, DOMAIN), ChatJudge(chat, DOMAIN), num_envs=8, max_turns=2)
        play(env)
    assert 1 < proxy.most_in_flight <= 3


def test_an_endpoint_named_by_a_string_speaks_and_judges(server: ChatServer) -> None:
    with FaultProxy(forward_to(server.address)) as proxy:
        name = f"openai:{server.model}@{proxy.url}"
        first = play(make_env(name, name, num_envs=6))
        asked = [request.json for request in proxy.requests]
        again = play(make_env(name, name, num_envs=6))

    transcripts, reward_TN, infos = first
    assert all(len(transcript.turns) == 4 for transcript in transcripts)
    assert {0.0, 1.0} <= set(reward_TN.flat)
    np.testing.assert_array_equal(infos[0]["unscorable"], np.isnan(reward_TN[0]))
    assert {request["model"] for request in asked} == {server.model}
    assert same_transcripts(transcripts, again[0])
    np.testing.assert_array_equal(reward_TN, again[1])


def test_a_single_environment_takes_the_same_strings(server: ChatServer) -> None:
    name = f"openai:{server.model}@{server.url}"
    env = gym.make("PersonaDialogue-v0", domain=DOMAIN, partner=name, judge=name).unwrapped
    assert isinstance(env, PersonaDialogueEnv)
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    line = agent_line(rng)
    messages, reward, _, _, info = env.step(line)
    assert [message["role"] for message in messages[1:]] == ["user", "assistant", "user"]
    assert messages[2]["content"] == line
    assert reward in (0.0, 1.0) or info["unscorable"]
