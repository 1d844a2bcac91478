"""Dialogues with a person in them: what the judge hears is what was said, and nothing is lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import ppg_env
from agents import ScriptedPolicy, load_policy
from agents.live import LiveDialogue, Setting, Stage
from agents.logs import read_log, write_log
from ppg_env.dialogue import Farewell, Transcript, Verdict
from ppg_env.judges import RuleJudge

ANSWERS = ("I work as a nurse.", "I often feel guilty.", "I suffer from headaches.")
QUESTIONS = ("Hello! How was your week?", "How do you feel?", "What is on your mind?")


def settings() -> dict[str, Setting]:
    """The embedded domains as the command line hands them in."""
    return {
        name: Setting(
            domain.agent_role,
            domain.partner_role,
            {p.id: domain.partner_prompt(p) for p in ppg_env.bundled_personas(domain)},
        )
        for name, domain in ppg_env.DOMAINS.items()
    }


SETTINGS = settings()


@pytest.fixture(scope="module")
def nano() -> Any:
    return load_policy("nano")


def stage_of(policy: Any = None, **changes: Any) -> Stage:
    return Stage(SETTINGS, policy or ScriptedPolicy(ANSWERS), **changes)


def what_was_said(dialogue: LiveDialogue) -> list[Any]:
    return [dialogue.turns, dialogue.pending, dialogue.over]


class Hearing:
    """A rule judge that keeps what it was asked about; its next `failures` answers fail."""

    def __init__(self) -> None:
        self.judge = RuleJudge(ppg_env.get_domain("therapy"))
        self.heard: list[Transcript] = []
        self.failures = 0

    def __call__(self, transcripts: Sequence[Transcript]) -> list[Verdict]:
        if self.failures:
            self.failures -= 1
            raise ppg_env.ChatError("judge at http://localhost:1 gave no answer")
        self.heard += transcripts
        return self.judge(transcripts)


class _Speaking:
    """Speaks for a policy that says `line`; "" = it has no room for one."""

    def __init__(self, line: str) -> None:
        self.line = line
        self.spoke_B = np.array([bool(line)])

    def reply(self, observations: object, active_B: object, deterministic: bool) -> list[str]:
        return [self.line]


# --- as the agent ---------------------------------------------------------------------------------


def test_as_the_agent_a_person_has_the_dialogue_that_the_environment_has() -> None:
    env = gym.make("PersonaDialogue-v0", domain="therapy", personas="all")
    observation, start = env.reset(seed=3, options={"persona": "therapy-0007"})
    dialogue = stage_of().begin("agent", "therapy", "therapy-0007", seed=3)
    assert dialogue.messages() == observation

    for answer in ANSWERS:
        observation, reward, over, _, info = env.step(answer)
        turn = dialogue.say(answer)
        assert dialogue.messages() == observation
        assert (turn.reward, turn.reason, turn.act) == (reward, info["reason"], info["act"])
        assert turn.parts == info["reward_parts"]
        assert dialogue.over == over
    assert (dialogue.persona, dialogue.group) == ("therapy-0007", start["group_id"])


def test_a_line_without_an_end_mark_gets_one_as_people_end_lines_with_enter() -> None:
    dialogue = stage_of().begin("agent", "therapy", seed=0)
    assert dialogue.say("  I feel tired ").agent == "I feel tired."
    assert dialogue.say("Really?").agent == "Really?"


def test_a_partner_that_says_goodbye_closes_the_dialogue() -> None:
    def brief(transcripts: Sequence[Transcript], rngs: object) -> list[str]:
        return [Farewell("Goodbye!") if t.turns else "Hello!" for t in transcripts]

    dialogue = stage_of(partner=brief).begin("agent", "therapy")
    dialogue.say("Hello there.")
    assert dialogue.over
    assert dialogue.pending == "Goodbye!"
    assert dialogue.undo() == "Hello there."
    assert not dialogue.over


# --- as the partner -------------------------------------------------------------------------------


def test_as_the_partner_judge_and_agent_hear_what_was_said_and_no_stand_in() -> None:
    hearing, seen = Hearing(), []

    def answer(observation: Any) -> str:
        seen.append(observation)
        return ANSWERS[len(seen) - 1]

    stage = stage_of(ScriptedPolicy(answer), judge=hearing)
    dialogue = stage.begin("partner", "therapy", "therapy-0011", seed=5)
    assert (dialogue.turns, dialogue.pending) == ((), None)
    for question in QUESTIONS:
        dialogue.say(question)

    said = tuple(zip(QUESTIONS, ANSWERS, strict=True))
    assert [transcript.turns for transcript in hearing.heard] == [said[:1], said[:2], said]
    assert {transcript.persona.id for transcript in hearing.heard} == {"therapy-0011"}
    assert all(transcript.pending is None for transcript in hearing.heard)
    assert [[m["content"] for m in observation[1:]] for observation in seen] == [
        list(QUESTIONS[:1]),
        [QUESTIONS[0], ANSWERS[0], QUESTIONS[1]],
        [QUESTIONS[0], ANSWERS[0], QUESTIONS[1], ANSWERS[1], QUESTIONS[2]],
    ]
    assert all(observation[0]["content"] == dialogue.system for observation in seen)
    assert dialogue.messages()[1:] == [*seen[-1][1:], {"role": "assistant", "content": ANSWERS[2]}]
    fresh = RuleJudge(ppg_env.get_domain("therapy"))
    for transcript, turn in zip(hearing.heard, dialogue.turns, strict=True):
        (verdict,) = fresh([transcript])
        assert (verdict.reward, verdict.reason) == (turn.reward, turn.reason)


def test_the_partner_knows_the_setting_and_not_the_persona() -> None:
    dialogue = stage_of().begin("partner", "education", "education-0004")
    persona = next(p for p in ppg_env.bundled_personas("education") if p.id == "education-0004")
    assert persona.facts["topic"] in dialogue.brief
    assert persona.text not in dialogue.brief
    assert persona.text in dialogue.system


def test_an_agent_without_room_says_so_and_the_dialogue_stays() -> None:
    class Full:
        def begin(self, batch_size: int, rngs: object) -> Any:
            return _Speaking("")

    dialogue = stage_of(Full()).begin("partner", "therapy")
    with pytest.raises(ValueError, match="longer than what nano can read"):
        dialogue.say("Hello!")
    assert dialogue.turns == ()


def test_each_turn_of_the_agent_has_randomness_of_its_own_that_comes_again_after_undo() -> None:
    class Diced:
        def begin(self, batch_size: int, rngs: Sequence[np.random.Generator]) -> Any:
            return _Speaking(f"I am {rngs[0].integers(10**9)}.")

        def predict(self, observation: object, deterministic: bool = False) -> tuple[str, None]:
            raise AssertionError("a policy that takes generators is given some")

    dialogue = stage_of(Diced()).begin("partner", "therapy", seed=9)
    first, second = dialogue.say("Hello!"), dialogue.say("Hello!")
    assert first.agent != second.agent
    dialogue.undo()
    assert dialogue.say("Hello!") == second


def test_the_partner_may_be_a_person_where_the_spec_of_a_partner_names_no_server() -> None:
    stage = stage_of(partner="openai:model@http://localhost:1")
    assert stage.begin("partner", "therapy").say("Hello!").agent == ANSWERS[0]


# --- both -----------------------------------------------------------------------------------------

ROLES = pytest.mark.parametrize("role", ["agent", "partner"])
LINES = {"agent": ANSWERS, "partner": QUESTIONS}


@pytest.fixture(params=["agent", "partner"])
def begin(request: pytest.FixtureRequest, nano: Any) -> Iterator[Callable[..., LiveDialogue]]:
    """Begins a dialogue with the tiny model, in each role."""
    stage = Stage(SETTINGS, nano, max_turns=3)
    yield lambda **changes: stage.begin(request.param, "therapy", **changes)


def test_the_same_seed_gives_the_same_dialogue(begin: Callable[..., LiveDialogue]) -> None:
    first, same, other = (begin(seed=seed) for seed in (1, 1, 2))
    for line in LINES[first.role]:
        assert first.say(line) == same.say(line)
        other.say(line)
    assert (first.persona, first.group) == (same.persona, same.group)
    assert (first.group, first.turns) != (other.group, other.turns)


def test_a_seed_that_was_drawn_gives_the_dialogue_again(begin: Callable[..., LiveDialogue]) -> None:
    drawn = begin()
    again = begin(seed=drawn.seed)
    assert drawn.say("Well, hello.") == again.say("Well, hello.")
    assert begin().seed != drawn.seed


def test_dialogues_side_by_side_do_not_mix(begin: Callable[..., LiveDialogue]) -> None:
    alone = [begin(seed=seed) for seed in (1, 2)]
    for dialogue in alone:
        for line in LINES[dialogue.role]:
            dialogue.say(line)

    together = [begin(seed=seed) for seed in (1, 2)]
    for line in LINES[alone[0].role]:
        for dialogue in together:
            dialogue.say(line)

    assert [what_was_said(d) for d in together] == [what_was_said(d) for d in alone]
    assert together[0].system != together[1].system


def test_what_was_undone_can_be_said_again_or_otherwise(
    begin: Callable[..., LiveDialogue],
) -> None:
    dialogue, straight = begin(seed=4), begin(seed=4)
    first, second, third = LINES[dialogue.role]
    dialogue.say(first)
    dialogue.say("Something else.")
    assert dialogue.undo() == "Something else."
    assert dialogue.say(second).reason
    dialogue.say(third)
    assert dialogue.over  # and the last turn of a dialogue can be undone too
    dialogue.undo()
    assert not dialogue.over
    dialogue.say(third)

    for line in (first, second, third):
        straight.say(line)
    assert what_was_said(dialogue) == what_was_said(straight)
    for _ in range(3):
        dialogue.undo()
    assert what_was_said(dialogue) == what_was_said(begin(seed=4))
    with pytest.raises(ValueError, match="Nothing was said yet"):
        dialogue.undo()


def test_a_dialogue_ends_after_its_last_turn(begin: Callable[..., LiveDialogue]) -> None:
    dialogue = begin()
    for line in LINES[dialogue.role]:
        assert not dialogue.over
        dialogue.say(line)
    assert dialogue.over
    assert dialogue.pending is None
    with pytest.raises(ValueError, match="The dialogue is over"):
        dialogue.say("And another thing.")
    assert len(dialogue.turns) == 3


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("", "empty line"),
        (" \n\t ", "empty line"),
        ("x" * 2001, "has 2,001 characters, at most 2,000"),
        ("half \ud83d of an emoji", "no text"),
        ("a \0 in it", "no text"),
    ],
    ids=["empty", "blank", "long", "surrogate", "NUL"],
)
def test_what_cannot_be_said_is_explained_and_changes_nothing(
    begin: Callable[..., LiveDialogue], line: str, why: str
) -> None:
    dialogue, straight = begin(seed=6), begin(seed=6)
    for each in (dialogue, straight):
        each.say("Hello.")
    with pytest.raises(ValueError, match=why):
        dialogue.say(line)
    assert what_was_said(dialogue) == what_was_said(straight)
    assert dialogue.say("Yes, well.") == straight.say("Yes, well.")


@pytest.mark.parametrize("line", ["<script>alert(1)</script>", "שלום \u202eabc!", "🙂", "a\nb."])
def test_any_text_can_be_said(begin: Callable[..., LiveDialogue], line: str) -> None:
    turn = begin().say(line)
    assert line in (turn.agent, turn.partner)


@ROLES
def test_a_line_that_got_no_answer_can_be_said_again(role: Any) -> None:
    hearing = Hearing()
    stage, calm = stage_of(judge=hearing), stage_of()
    dialogue, straight = (s.begin(role, "therapy", seed=7) for s in (stage, calm))
    first, second, _ = LINES[role]
    dialogue.say(first)
    before = what_was_said(dialogue)
    hearing.failures = 2
    for _ in range(2):
        with pytest.raises(RuntimeError, match="gave no answer"):
            dialogue.say(second)
        assert what_was_said(dialogue) == before
    dialogue.say(second)

    straight.say(first)
    straight.say(second)
    assert what_was_said(dialogue) == what_was_said(straight)


def test_a_partner_without_a_first_line_begins_nothing_and_can_be_asked_again() -> None:
    failures = [True]

    def partner(transcripts: Sequence[Transcript], rngs: object) -> list[str]:
        if failures:
            failures.pop()
            raise ppg_env.ChatError("nobody there")
        return ["Hello!"] * len(transcripts)

    stage = stage_of(partner=partner)
    with pytest.raises(RuntimeError, match="nobody there"):
        stage.begin("agent", "therapy")
    assert stage.begin("agent", "therapy").pending == "Hello!"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"role": "judge"}, "role is 'agent' or 'partner', got 'judge'"),
        ({"domain": "cooking"}, "Unknown domain 'cooking'; there are chatting, education, therapy"),
        ({"persona": "therapy-000"}, "Unknown persona id 'therapy-000'. Nearest: therapy-0"),
        ({"persona": "chatting-0001"}, "Unknown persona id"),
        ({"seed": -1}, "at least 0, got -1"),
    ],
)
@ROLES
def test_what_there_is_not_is_refused_by_name(role: str, changes: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        stage_of().begin(**{"role": role, "domain": "therapy"} | changes)


def test_without_a_policy_a_person_plays_the_agent_only() -> None:
    stage = Stage(SETTINGS, None)
    assert stage.begin("agent", "therapy").say("Hello.").reason
    with pytest.raises(ValueError, match="no agent here to talk with"):
        stage.begin("partner", "therapy")


# --- numbers and records --------------------------------------------------------------------------


def scores(rewards: Sequence[float | None]) -> Callable[[Sequence[Transcript]], list[Verdict]]:
    """A judge that gives these rewards, turn by turn."""

    def judge(transcripts: Sequence[Transcript]) -> list[Verdict]:
        turns = [len(transcript.turns) - 1 for transcript in transcripts]
        return [Verdict(rewards[t], {f"part{t}": rewards[t]}, f"reason {t}") for t in turns]

    return judge


def scored(rewards: Sequence[float | None]) -> LiveDialogue:
    dialogue = stage_of(judge=scores(rewards)).begin("agent", "therapy")
    for _ in rewards:
        dialogue.say("Well.")
    return dialogue


def test_mean_and_drift_are_of_the_turns_that_were_scored() -> None:
    dialogue = scored([0.2, None, 0.6, 0.8])
    assert dialogue.rewards == [0.2, None, 0.6, 0.8]
    assert dialogue.mean_reward == pytest.approx(1.6 / 3)
    assert dialogue.drift == pytest.approx(0.2)  # 0.2, 0.6, 0.8 at turns 0, 2, 3 lie on a line


@pytest.mark.parametrize(
    ("rewards", "mean"), [([], None), ([None, None], None), ([None, 0.5], 0.5)]
)
def test_where_nothing_was_scored_there_is_no_mean_and_with_one_turn_no_drift(
    rewards: list[float | None], mean: float | None
) -> None:
    assert (scored(rewards).mean_reward, scored(rewards).drift) == (mean, None)


@ROLES
def test_a_dialogue_is_a_record_that_a_log_holds(role: Any, nano: Any, tmp_path: Path) -> None:
    stage = Stage(SETTINGS, nano, agent="runs/x/agent", max_turns=2)
    dialogue = stage.begin(role, "chatting", "chatting-0003", seed=8)
    with pytest.raises(ValueError, match="needs one line"):
        dialogue.trajectory()
    dialogue.say("I am from a small town, and you?")

    assert write_log(tmp_path / "log.jsonl", [dialogue.trajectory()]) == 1
    (read,) = read_log(tmp_path / "log.jsonl")
    assert list(read.messages) == dialogue.messages()
    assert list(read.rewards) == dialogue.rewards
    assert read.reasons == (dialogue.turns[0].reason,)
    parts = {name: values[0] for name, values in read.reward_parts.items()}
    assert parts == dialogue.turns[0].parts
    assert (read.domain, read.persona, read.group) == ("chatting", "chatting-0003", dialogue.group)
    assert read.judge == "rules"
    speakers = (read.behaviour, read.extra["partner"])
    assert (
        speakers
        == {
            "agent": ("person", "scripted"),
            "partner": ("runs/x/agent", "person"),
        }[role]
    )


def test_an_unscorable_turn_and_a_part_that_another_turn_lacks_are_null_in_the_record() -> None:
    dialogue = scored([0.5, None])
    record = dialogue.trajectory().record()
    assert record["rewards"] == [0.5, None]
    assert record["reward_parts"] == {"part0": [0.5, None], "part1": [None, None]}
    assert not any(isinstance(r, float) and math.isnan(r) for r in record["rewards"])
