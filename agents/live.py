"""Dialogues in which a person speaks: in place of the agent, or in place of the partner.

    stage = Stage({"therapy": Setting("patient", "therapist", briefs)}, load_policy("nano"))
    dialogue = stage.begin("agent", "therapy", persona="therapy-0042", seed=1)
    turn = dialogue.say("I have had headaches again.")
    print(turn.reward, turn.reason, dialogue.pending)

As the agent a person plays the persona and answers the environment's partner. As the partner a
person leads the dialogue and a policy answers; persona and judge are the environment's. In both the
judge hears what was said and nothing else. Knows neither terminal nor browser.
"""

from __future__ import annotations

import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from .logs import LoggedDialogue
from .policy import Messages, Policy
from .rollout import speaker_for
from .statistics import drift_slopes

Role = Literal["agent", "partner"]


@dataclass(frozen=True)
class Setting:
    """What people have to know of a domain: what the two speakers are, and the partner's part.

    `briefs` tells, for each persona by id, what one who plays the partner should know.
    """

    agent_role: str
    partner_role: str
    briefs: Mapping[str, str]


@dataclass(frozen=True)
class LiveTurn:
    """What the partner and then the agent said, and the verdict on the latter.

    `reward` is None where the judge could not score the line, and so is a part of it.
    """

    partner: str
    agent: str
    reward: float | None
    parts: Mapping[str, float | None]
    reason: str
    act: str


@dataclass(frozen=True)
class _Moment:
    """A dialogue between two turns; `snapshot` is the environment's, if it has to be kept."""

    turns: tuple[LiveTurn, ...] = ()
    pending: str | None = None
    over: bool = False
    snapshot: Any = None


class Stage:
    """Begins live dialogues. They may be spoken from several threads; one line at a time is heard.

    Args:
        settings: one for each domain, by name; they name all personas.
        policy: answers where a person plays the partner; without one a person plays the agent.
        agent: its name in records.
        partner: who answers where a person plays the agent; as in `gym.make`, and so are the rest.
        judge: who scores.
        max_turns: lines of the agent in a dialogue.

    Attributes:
        names: of "agent", "partner" and "judge" in records.
    """

    def __init__(
        self,
        settings: Mapping[str, Setting],
        policy: Policy | None,
        *,
        agent: str = "nano",
        partner: str | Callable[..., Any] = "scripted",
        judge: str | Callable[..., Any] = "rules",
        max_turns: int = 8,
    ) -> None:
        self.settings, self.policy = dict(settings), policy
        self.partner, self.judge, self.max_turns = partner, judge, max_turns
        self.names = {"agent": agent, "partner": _name_of(partner), "judge": _name_of(judge)}
        self.lock = threading.RLock()
        self._environments: dict[tuple[Role, str], gym.Env[Messages, str]] = {}

    def begin(
        self, role: Role, domain: str, persona: str | None = None, seed: int | None = None
    ) -> LiveDialogue:
        """Return a new dialogue in which a person has the role `role`.

        Args:
            role: "agent" or "partner".
            domain: one of `settings`.
            persona: id; None draws one by the seed.
            seed: of persona, partner and policy; None draws one.

        Raises:
            ValueError: for a role, domain, persona or seed that there is not.
            RuntimeError: the partner gave no first line; nothing was begun.
        """
        if role not in ("agent", "partner"):
            raise ValueError(f"role is 'agent' or 'partner', got {role!r}.")
        if role == "partner" and self.policy is None:
            raise ValueError("There is no agent here to talk with; give the stage a policy.")
        if seed is not None and seed < 0:
            raise ValueError(f"seed is a whole number of at least 0, got {seed}.")
        seed = secrets.randbelow(2**31) if seed is None else seed
        kind = PlayedAgent if role == "agent" else PlayedPartner
        with self.lock:
            return kind(self, domain, persona, seed)

    def environment(self, role: Role, domain: str) -> gym.Env[Messages, str]:
        """Return the environment of all dialogues with this role and domain; it is made once.

        Models that judge or speak in this process are held by it, so dialogues share it.
        """
        if domain not in self.settings:
            raise ValueError(f"Unknown domain {domain!r}; there are {', '.join(self.settings)}.")
        if (role, domain) not in self._environments:
            self._environments[role, domain] = gym.make(
                "ppg_env:PersonaDialogue-v0",
                domain=domain,
                personas="all",
                partner=self.partner if role == "agent" else _not_yet_said,
                judge=self.judge,
                max_turns=self.max_turns,
                disable_env_checker=True,  # it warns of every turn that could not be scored
            )
        return self._environments[role, domain]


class LiveDialogue(ABC):
    """A dialogue with a person in it; made by `Stage.begin`.

    Attributes:
        role: whom the person plays, "agent" or "partner".
        domain, persona, seed, group: of what, about whom (an id), with which luck.
        system: what the agent is told about who it is.
        brief: what the partner is told about its part.
    """

    role: Role

    def __init__(self, stage: Stage, domain: str, persona: str | None, seed: int) -> None:
        self._stage, self._env = stage, stage.environment(self.role, domain)
        self.domain, self.seed = domain, seed
        self.max_turns = stage.max_turns
        self.setting = stage.settings[domain]
        options = {} if persona is None else {"persona": persona}
        observation, info = self._env.reset(seed=seed, options=options | self._first_options())
        self.persona, self.group = str(info["persona"]), int(info["group_id"])
        self.system = observation[0]["content"]
        self.brief = self.setting.briefs.get(self.persona, "")
        self._moments = [self._first_moment(observation)]

    @property
    def turns(self) -> tuple[LiveTurn, ...]:
        """What has been said, oldest first."""
        return self._moments[-1].turns

    @property
    def pending(self) -> str | None:
        """The partner's line that waits for the agent, or its last one in a dialogue it closed."""
        return self._moments[-1].pending

    @property
    def over(self) -> bool:
        """Whether it has come to its end."""
        return self._moments[-1].over

    @property
    def can_undo(self) -> bool:
        """Whether there is a turn to take back."""
        return len(self._moments) > 1

    def say(self, line: str) -> LiveTurn:
        """Say a line in the person's role; return the turn that it is part of.

        Raises:
            ValueError: the dialogue is over, the line cannot be said, or the agent has no room for
                an answer.
            RuntimeError: partner or judge gave no answer.
        After any error the dialogue is as it was, and the line can be said again.
        """
        with self._stage.lock:
            if self.over:
                raise ValueError("The dialogue is over. Begin a new one, or undo the last turn.")
            self._moments.append(self._after(self._sayable(line)))
            return self.turns[-1]

    def undo(self) -> str:
        """Take the last turn back; return what the person had said in it.

        Said again, the same line gets the same answer, unless partner or judge are models that
        answer differently each time.

        Raises:
            ValueError: nothing was said yet.
        """
        with self._stage.lock:
            if not self.can_undo:
                raise ValueError("Nothing was said yet that could be taken back.")
            undone = self._moments.pop().turns[-1]
            return undone.agent if self.role == "agent" else undone.partner

    @property
    def rewards(self) -> list[float | None]:
        """The agent's reward of each turn."""
        return [turn.reward for turn in self.turns]

    @property
    def mean_reward(self) -> float | None:
        """Mean over the turns that were scored; None if none was."""
        scored = [reward for reward in self.rewards if reward is not None]
        return sum(scored) / len(scored) if scored else None

    @property
    def drift(self) -> float | None:
        """Least-squares change of the reward per turn; None with fewer than two scored turns."""
        reward_T = np.array([np.nan if r is None else r for r in self.rewards], dtype=np.float64)
        slope = float(drift_slopes(reward_T[None])[0]) if len(reward_T) else np.nan
        return None if np.isnan(slope) else slope

    def messages(self) -> list[dict[str, str]]:
        """Return the dialogue as chat messages, as the agent sees it."""
        spoken = [{"role": "system", "content": self.system}]
        for turn in self.turns:
            spoken.append({"role": "user", "content": turn.partner})
            spoken.append({"role": "assistant", "content": turn.agent})
        if self.pending is not None:
            spoken.append({"role": "user", "content": self.pending})
        return spoken

    def trajectory(self) -> LoggedDialogue:
        """Return the dialogue as a record of a log, see logs.py.

        Raises:
            ValueError: nothing was said yet.
        """
        if not self.turns:
            raise ValueError("Nothing was said yet; a record needs one line of the agent.")
        names = dict.fromkeys(name for turn in self.turns for name in turn.parts)
        is_agent = self.role == "agent"
        return LoggedDialogue(
            messages=self.messages(),
            rewards=tuple(self.rewards),
            domain=self.domain,
            persona=self.persona,
            group=self.group,
            behaviour="person" if is_agent else self._stage.names["agent"],
            judge=self._stage.names["judge"],
            reward_parts={n: tuple(turn.parts.get(n) for turn in self.turns) for n in names},
            reasons=tuple(turn.reason for turn in self.turns),
            extra={"partner": self._stage.names["partner"] if is_agent else "person"},
        )

    @abstractmethod
    def _first_options(self) -> dict[str, Any]:
        """Return the options of the reset that begins the dialogue, besides the persona."""

    @abstractmethod
    def _first_moment(self, observation: Messages) -> _Moment:
        """Return the moment before the first line."""

    @abstractmethod
    def _after(self, line: str) -> _Moment:
        """Return the moment after the person has said `line`, which can be said."""

    def _sayable(self, line: str) -> str:
        """Return the line without blanks around it.

        Raises:
            ValueError: it cannot be said; says why, to the person who typed it.
        """
        line, space = line.strip(), self._env.action_space
        if not line:
            raise ValueError("An empty line says nothing. Write what you want to say.")
        longest = getattr(space, "max_length", len(line))
        if len(line) > longest:
            raise ValueError(
                f"The line has {len(line):,} characters, at most {longest:,} are heard. Shorten it."
            )
        if not space.contains(line):
            raise ValueError(
                "The line holds what is no text (a NUL, or half a character). Write it again "
                "without."
            )
        return line

    def _scored(
        self, partner: str, agent: str, reward: float, info: Mapping[str, Any]
    ) -> tuple[LiveTurn, ...]:
        """Return all turns, with the one that was just stepped as the last."""
        scored = None if info["unscorable"] or np.isnan(reward) else float(reward)
        parts = dict(info["reward_parts"])
        return (*self.turns, LiveTurn(partner, agent, scored, parts, info["reason"], info["act"]))


class PlayedAgent(LiveDialogue):
    """A person plays the persona; the environment's partner asks."""

    role: Role = "agent"

    def _first_options(self) -> dict[str, Any]:
        return {}

    def _first_moment(self, observation: Messages) -> _Moment:
        snapshot = self._env.unwrapped.state()  # type: ignore[attr-defined]
        return _Moment((), observation[-1]["content"], snapshot.over, snapshot)

    def _after(self, line: str) -> _Moment:
        if line[-1].isalnum():
            line += "."  # people end lines with Enter
        before = self._moments[-1]
        assert before.pending is not None
        self._env.unwrapped.restore(before.snapshot)  # type: ignore[attr-defined]
        observation, reward, terminated, truncated, info = self._env.step(line)
        last = observation[-1]
        return _Moment(
            self._scored(before.pending, line, float(reward), info),
            last["content"] if last["role"] == "user" else None,
            terminated or truncated,
            self._env.unwrapped.state(),  # type: ignore[attr-defined]
        )


class PlayedPartner(LiveDialogue):
    """A person leads the dialogue; the stage's policy answers as the persona.

    The environment asks its partner for the next line in the very step that judges the agent's, and
    the person has not typed it yet. So each turn is a reset to what was really said, and one step;
    what `_not_yet_said` puts after it is seen by nobody.
    """

    role: Role = "partner"

    def _first_options(self) -> dict[str, Any]:
        return {"history": [{"role": "user", "content": _PLACEHOLDER}]}

    def _first_moment(self, observation: Messages) -> _Moment:
        return _Moment()

    def _after(self, line: str) -> _Moment:
        history = [*self.messages()[1:], {"role": "user", "content": line}]
        observation, _ = self._env.reset(options={"persona": self.persona, "history": history})
        answer = self._answer(observation)
        _, reward, terminated, truncated, info = self._env.step(answer)
        turns = self._scored(line, answer, float(reward), info)
        return _Moment(turns, over=terminated or truncated)

    def _answer(self, observation: Messages) -> str:
        """Return the policy's line; the seed and the turn determine it."""
        assert self._stage.policy is not None
        speaker = speaker_for(self._stage.policy, 1, self.seed, first_slot=len(self.turns))
        (answer,) = speaker.reply([observation], np.ones(1, dtype=bool), False)
        if not speaker.spoke_B[0]:
            raise ValueError(
                f"The dialogue is longer than what {self._stage.names['agent']} can read; it "
                "cannot answer any more. Say something shorter, or end the dialogue here."
            )
        return answer


def _name_of(part: str | Callable[..., Any]) -> str:
    return part if isinstance(part, str) else getattr(part, "__name__", type(part).__name__)


_PLACEHOLDER = "..."


def _not_yet_said(transcripts: Sequence[object], rngs: Sequence[np.random.Generator]) -> list[str]:
    """Stand in for a person who has not typed the next line yet, see `PlayedPartner`."""
    return [_PLACEHOLDER] * len(transcripts)
