"""The dialogue engine that both environments share: begin dialogues, advance them, many at a time.

One step of a batch is one judge call and one partner call. A dialogue carries its own random
generator, made from its own seed, so it depends on that seed and on what the agent says, never on
its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .chat import is_chat_spec, open_chat, side_by_side
from .chat_judge import ChatJudge, transcript_flaw
from .dialogue import (
    Farewell,
    Message,
    Messages,
    Persona,
    Transcript,
    Turn,
    Verdict,
    turns_from_messages,
)
from .domains import Domain, get_domain
from .judges import Judge, RuleJudge
from .nli_judge import NLIJudge
from .partners import ChatPartner, Partner, ScriptedPartner
from .personas import check_facts, find_persona, resolve_personas
from .spaces import DialogueMessages, Utterance
from .verdict_cache import CachedJudge

T = TypeVar("T")
R = TypeVar("R")


class Dialogue:
    """One running dialogue: its transcript so far, its generator, whether it is over."""

    __slots__ = ("over", "rng", "seed", "transcript")

    def __init__(
        self, transcript: Transcript, rng: np.random.Generator, seed: int, over: bool = False
    ) -> None:
        self.transcript, self.rng, self.seed, self.over = transcript, rng, seed, over


@dataclass(frozen=True)
class Snapshot:
    """A dialogue frozen in time; picklable. `World.thaw` makes it run on, any number of times."""

    transcript: Transcript
    rng_state: Mapping[str, Any]
    seed: int
    over: bool


class World:
    """A domain with its personas, partner and judge.

    Args:
        domain: a name or a Domain.
        personas: None (bundled training split), a split name, "all", a persona file (see
            personas.py), or Persona objects.
        partner: "scripted", "openai:MODEL@URL", "hf:FOLDER", or a Partner.
        judge: "rules", "openai:MODEL@URL", "hf:FOLDER", "nli:FOLDER", or a Judge.
        max_turns: agent turns after which a dialogue ends.
        noise: how often the scripted partner is distracted, a probability.
        max_utterance_length: characters an agent's line may have.
        unscorable_reward: reward of a turn that the judge cannot score; NaN leaves it to the
            learner.
        verdict_cache: SQLite file that keeps the judge's verdicts, for this run and later ones.

    Attributes:
        judge_name: "rules", the judge's text, or the name of its class or function.
        nondeterministic: whether partner or judge declare that the same seed may go otherwise.
    """

    def __init__(
        self,
        domain: str | Domain = "chatting",
        personas: str | Path | Sequence[Persona] | None = None,
        partner: str | Partner = "scripted",
        judge: str | Judge = "rules",
        max_turns: int = 8,
        noise: float = 0.1,
        max_utterance_length: int = 2000,
        unscorable_reward: float = float("nan"),
        verdict_cache: str | Path | None = None,
    ) -> None:
        if not isinstance(max_turns, (int, np.integer)) or max_turns < 1:
            raise ValueError(f"max_turns is a whole number of at least 1, got {max_turns!r}.")
        if not np.isnan(unscorable_reward) and not 0.0 <= unscorable_reward <= 1.0:
            raise ValueError(f"unscorable_reward is NaN or in [0, 1], got {unscorable_reward}.")
        self.domain = get_domain(domain)
        self.personas = resolve_personas(personas, self.domain)
        self.partner = make_partner(partner, self.domain, noise)
        self.judge = make_judge(judge, self.domain, verdict_cache)
        own_name = getattr(judge, "__name__", type(judge).__name__)
        self.judge_name = judge if isinstance(judge, str) else own_name
        if isinstance(self.judge, RuleJudge):
            for persona in self.personas:
                self.judge.check(persona)
        self._can_fail = not (
            isinstance(self.partner, ScriptedPartner) and isinstance(self.judge, RuleJudge)
        )
        self._side_by_side = _declares(self.partner, "remote") and _declares(self.judge, "remote")
        self.max_turns = int(max_turns)
        self.unscorable_reward = float(unscorable_reward)
        self.action_space = Utterance(max_utterance_length)
        self.observation_space = DialogueMessages(max_messages=2 + 2 * self.max_turns)
        self.phase_boundaries = self.domain.phase_boundaries(self.max_turns)
        self._phases = [self.domain.phase_of(t, self.max_turns) for t in range(self.max_turns)]

    @property
    def nondeterministic(self) -> bool:
        """Return whether partner or judge declare that the same seed may go otherwise."""
        return any(_declares(part, "nondeterministic") for part in (self.partner, self.judge))

    def begin(
        self,
        seeds: Sequence[int],
        personas: Sequence[str | Persona | None] | None = None,
        histories: Sequence[Sequence[Message] | None] | None = None,
    ) -> list[Dialogue]:
        """Return new dialogues that wait for the agent's reply, one per seed.

        Args:
            seeds: one whole number a dialogue; persona, opening and partner all follow from it.
            personas: persona or its id per dialogue; None draws one from the world's personas.
            histories: chat messages to continue per dialogue; None lets the partner open.
        """
        personas = personas or [None] * len(seeds)
        histories = histories or [None] * len(seeds)
        dialogues = [
            self._prepare(seed, persona, history)
            for seed, persona, history in zip(seeds, personas, histories, strict=True)
        ]
        silent = [d for d in dialogues if d.transcript.pending is None]
        lines = self._partner_lines([d.transcript for d in silent], [d.rng for d in silent])
        for dialogue, line in zip(silent, lines, strict=True):
            dialogue.transcript = dialogue.transcript.with_partner_line(line)
            dialogue.over = isinstance(line, Farewell)
        return dialogues

    def _prepare(
        self, seed: int, chosen: str | Persona | None, history: Sequence[Message] | None
    ) -> Dialogue:
        given, turns, pending = self.check_start(chosen, history)
        rng = np.random.default_rng(seed)
        drawn = self.personas[int(rng.random() * len(self.personas))]
        persona = given or drawn
        system = self.domain.system_prompt(persona)
        return Dialogue(Transcript(persona, system, turns, pending, self.max_turns), rng, seed)

    def check_start(
        self, chosen: str | Persona | None, history: Sequence[Message] | None
    ) -> tuple[Persona | None, tuple[Turn, ...], str | None]:
        """Return what reset's options say: persona, finished turns, pending line; None = not given.

        Raises:
            ValueError: for an unknown persona or a malformed history; nothing was drawn yet.
        """
        persona = None if chosen is None else find_persona(chosen, self.personas)
        if persona is not None and persona is chosen:
            check_facts(persona, self.domain)
        if history is None:
            return persona, (), None
        turns, pending = turns_from_messages(history)
        for number, line in enumerate([line for turn in turns for line in turn] + [pending]):
            problem = self.action_space.problem(line)
            if problem is not None:
                raise ValueError(f"Line {number} of history: {problem}.")
        if len(turns) >= self.max_turns:
            raise ValueError(
                f"history already has {len(turns)} agent turns, the dialogue ends at max_turns="
                f"{self.max_turns}; shorten it or make the environment with a larger max_turns."
            )
        return persona, turns, pending

    def advance(self, dialogues: Sequence[Dialogue], utterances: Sequence[str]) -> list[Verdict]:
        """Let the agent speak, the judge score and the partner answer; return the verdicts.

        Dialogues are changed in place; `over` is True where the episode has terminated.

        If judge or partner raise, no dialogue has changed, and the step can be tried again.

        Raises:
            ValueError: for an utterance outside the action space.
        """
        for utterance in utterances:
            problem = self.action_space.problem(utterance)
            if problem is not None:
                raise ValueError(f"Invalid action: {problem}.")
        replied = [
            dialogue.transcript.reply(utterance)
            for dialogue, utterance in zip(dialogues, utterances, strict=True)
        ]
        verdicts, going_on, lines = self._hear(replied, [d.rng for d in dialogues])
        for dialogue, transcript in zip(dialogues, replied, strict=True):
            dialogue.transcript, dialogue.over = transcript, True
        for i, line in zip(going_on, lines, strict=True):
            dialogues[i].transcript = replied[i].with_partner_line(line)
            dialogues[i].over = isinstance(line, Farewell)
        return verdicts

    def _hear(
        self, replied: Sequence[Transcript], rngs: Sequence[np.random.Generator]
    ) -> tuple[list[Verdict], list[int], list[str]]:
        """Return the verdicts, which dialogues go on, and what the partner says in these.

        A judge and a partner that both wait for servers are asked side by side. If one of them
        fails, all generators are as they were before.
        """
        going_on = [i for i, t in enumerate(replied) if len(t.turns) < self.max_turns]
        open_ones, their_rngs = [replied[i] for i in going_on], [rngs[i] for i in going_on]
        # Scripts cannot fail, and looking into generators takes a tenth of their time.
        kept = [(rng, rng.bit_generator.state) for rng in their_rngs if self._can_fail]
        try:
            if not self._side_by_side:
                verdicts = self.judge(replied)
                return verdicts, going_on, self._partner_lines(open_ones, their_rngs)
            verdicts, lines = _both(
                lambda: self.judge(replied), lambda: self._partner_lines(open_ones, their_rngs)
            )
            return verdicts, going_on, lines
        except BaseException:
            for rng, state in kept:
                rng.bit_generator.state = state
            raise

    def _partner_lines(
        self, transcripts: Sequence[Transcript], rngs: Sequence[np.random.Generator]
    ) -> list[str]:
        return self.partner(transcripts, rngs) if transcripts else []

    def reward(self, verdict: Verdict) -> float:
        """Return the verdict's reward; an unscorable turn has the world's unscorable_reward."""
        return self.unscorable_reward if verdict.reward is None else verdict.reward

    def observe(self, dialogue: Dialogue) -> Messages:
        """Return the dialogue as the agent sees it."""
        return dialogue.transcript.messages()

    def start_info(self, dialogue: Dialogue) -> dict[str, Any]:
        """Return `info` of a reset."""
        turn = len(dialogue.transcript.turns)
        return {
            "domain": self.domain.name,
            "persona": dialogue.transcript.persona.id,
            "group_id": dialogue.seed,
            "turn": turn,
            "phase": self._phases[turn],
        }

    def step_info(self, dialogue: Dialogue, verdict: Verdict) -> dict[str, Any]:
        """Return `info` of a step; its phase is that of the turn just spoken."""
        turn = len(dialogue.transcript.turns)
        return {
            "domain": self.domain.name,
            "persona": dialogue.transcript.persona.id,
            "group_id": dialogue.seed,
            "turn": turn,
            "phase": self._phases[turn - 1],
            "act": verdict.act,
            "claims": verdict.claims,
            "reason": verdict.reason,
            "unscorable": verdict.reward is None,
            "reward_parts": dict(verdict.parts),
        }

    def phase_index(self, turn: int) -> int:
        """Return the index of the phase that agent turn `turn` belongs to."""
        return self._phases[turn]

    def freeze(self, dialogue: Dialogue) -> Snapshot:
        """Return the dialogue's state, independent of what happens to it later."""
        state = dialogue.rng.bit_generator.state
        return Snapshot(dialogue.transcript, state, dialogue.seed, dialogue.over)

    def thaw(self, snapshot: Snapshot) -> Dialogue:
        """Return a dialogue that goes on where the snapshot was taken.

        Raises:
            TypeError: for anything but a Snapshot.
            ValueError: for a snapshot of another domain or with another number of turns.
        """
        if not isinstance(snapshot, Snapshot):
            raise TypeError(f"restore takes a Snapshot, as state() gives, got {snapshot!r:.80}")
        if snapshot.transcript.persona.domain != self.domain.name:
            raise ValueError(
                f"The snapshot is of the domain {snapshot.transcript.persona.domain!r}, this "
                f"environment of {self.domain.name!r}."
            )
        if snapshot.transcript.max_turns != self.max_turns:
            raise ValueError(
                f"The snapshot's dialogue has max_turns={snapshot.transcript.max_turns}, this "
                f"environment has {self.max_turns}."
            )
        rng = np.random.default_rng(0)
        rng.bit_generator.state = snapshot.rng_state
        return Dialogue(snapshot.transcript, rng, snapshot.seed, snapshot.over)


def make_partner(partner: str | Partner, domain: Domain, noise: float = 0.1) -> Partner:
    """Return the partner that `partner` names, or `partner` itself if it is one already.

    Args:
        partner: "scripted", "openai:MODEL@URL", "hf:FOLDER", or a Partner.
        domain: what is spoken about.
        noise: of the scripted partner.

    Raises:
        ValueError: for anything else.
    """
    if partner == "scripted":
        return ScriptedPartner(domain, noise)
    if is_chat_spec(partner):
        return ChatPartner(open_chat(str(partner)), domain)
    if callable(partner):
        return partner
    raise ValueError(
        f"partner is 'scripted', 'openai:MODEL@URL', 'hf:FOLDER' or a callable, got {partner!r}."
    )


def make_judge(
    judge: str | Judge, domain: Domain, verdict_cache: str | Path | None = None
) -> Judge:
    """Return the judge that `judge` names, or `judge` itself if it is one already.

    Args:
        judge: "rules", "openai:MODEL@URL", "hf:FOLDER", "nli:FOLDER", or a Judge.
        domain: what is judged.
        verdict_cache: SQLite file that keeps the verdicts; None = none.

    Raises:
        ValueError: for anything else, or a judge without `cache_key` where there is a cache.
    """
    made: Judge
    if judge == "rules":
        made = RuleJudge(domain)
    elif is_chat_spec(judge):
        made = ChatJudge(open_chat(str(judge)), domain)
    elif isinstance(judge, str) and judge.startswith("nli:"):
        made = NLIJudge(judge.removeprefix("nli:"), flaw=transcript_flaw)
    elif callable(judge):
        made = judge
    else:
        raise ValueError(
            "judge is 'rules', 'openai:MODEL@URL', 'hf:FOLDER', 'nli:FOLDER' or a callable, got "
            f"{judge!r}."
        )
    if verdict_cache is None:
        return made
    return CachedJudge(made, verdict_cache)


def _declares(part: object, name: str) -> bool:
    return bool(getattr(part, name, False))


def _both(first: Callable[[], T], second: Callable[[], R]) -> tuple[T, R]:
    """Return (first(), second()), called side by side."""
    results = side_by_side(lambda call: call(), [first, second], 2)
    return results[0], results[1]  # type: ignore[return-value]


def draw_dialogue_seed(np_random: np.random.Generator) -> int:
    """Return the seed of the next dialogue from an environment's generator."""
    return int(np_random.integers(2**62))


def check_options(options: dict[str, Any] | None, known: Sequence[str]) -> dict[str, Any]:
    """Return the reset options as a dict.

    Raises:
        ValueError: names an option that does not exist.
    """
    options = dict(options or {})
    for name in options:
        if name not in known:
            raise ValueError(f"Unknown reset option {name!r}; there are {', '.join(known)}.")
    return options
