"""Judges score the latest turn of a transcript, many transcripts at a time.

The rule judge reads acts and claims with the domain's lexicon and prices them with the domain's
dynamics. A line it cannot tie to the persona earns nothing: it never fails open.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from hashlib import sha256
from typing import NamedTuple, Protocol

from .dialogue import Persona, Transcript, Turn, Verdict
from .domains import Claim, Domain
from .domains.flaws import find_flaw
from .process import Dynamics, turn_value

_CACHE_SIZE = 65536


class Judge(Protocol):
    """Scores the latest turn of each transcript."""

    def __call__(self, transcripts: Sequence[Transcript]) -> list[Verdict]:
        """Return one verdict for each transcript; every transcript has at least one turn."""
        ...


class _Memory(NamedTuple):
    """What the first `turns` turns left: the dynamics' state, all own claims with their turn."""

    state: Hashable
    claims: tuple[tuple[int, Claim], ...] = ()
    turns: int = 0

    def after(self, dynamics: Dynamics, act: str, claims: Sequence[Claim]) -> _Memory:
        """Return the memory after one more turn."""
        said = tuple([(self.turns, claim) for claim in claims])
        return _Memory(dynamics.advance(self.state, act), self.claims + said, self.turns + 1)


class RuleJudge:
    """Scores by rules, the same text always the same.

        reward = well_formed * [no false claim] * value(act, earlier acts)      in [0, 1]

    Parts of the verdict:
        prompt_to_line: 1 if the line's claims agree with the persona, 0 if one contradicts it, None
            if it makes none that can be checked.
        line_to_line: 1 if no claim conflicts with an earlier line of one's own, 0 if one does, None
            if there is nothing to compare.
        <domain.value_name>: what the act is worth after the earlier acts.
        well_formed: 0 for degenerate lines (empty, repeated within the line or of an earlier line,
            echo of the partner, persona text copied out, keyword list, unfinished sentence), else
            1.

    line_to_line is shown and not multiplied in by default: a conflict can reach back to any earlier
    turn, and the worlds' dependence length would no longer be theirs. `charge_conflicts=True` adds
    it.

    Args:
        domain: lexicon and dynamics.
        charge_conflicts: a line that conflicts with an earlier own line earns 0.
    """

    def __init__(self, domain: Domain, charge_conflicts: bool = False) -> None:
        self.domain, self.charge_conflicts = domain, charge_conflicts
        self._memories: dict[tuple[Persona, tuple[Turn, ...]], _Memory] = {}

    def __call__(self, transcripts: Sequence[Transcript]) -> list[Verdict]:
        """Return one verdict for each transcript.

        Raises:
            ValueError: for a persona without facts, which rules cannot judge.
        """
        return [self._judge(transcript) for transcript in transcripts]

    @property
    def cache_key(self) -> str:
        """Everything but the transcript that determines a verdict."""
        rules = sha256(repr(self.domain).encode()).hexdigest()[:12]
        charged = self.charge_conflicts
        return f"RuleJudge/domain={self.domain.name}:{rules}/charge_conflicts={charged}"

    def check(self, persona: Persona) -> None:
        """Check that rules can judge this persona.

        Raises:
            ValueError: it has no facts; names the judges that can.
        """
        if not persona.facts:
            raise ValueError(
                f"RuleJudge cannot judge persona {persona.id!r}: it has a text but no facts. "
                "Give it facts of the domain's lexicon, or use a judge that reads free text: "
                "judge='openai:MODEL@URL' or 'hf:FOLDER' (ChatJudge), 'nli:FOLDER' (NLIJudge)."
            )

    def _judge(self, transcript: Transcript) -> Verdict:
        persona, turn = transcript.persona, transcript.turns[-1]
        self.check(persona)
        earlier = transcript.turns[:-1]
        memory = self._recall(persona, earlier)
        flaw, act, claims, false = self._understand(persona, earlier, turn)
        dynamics = self.domain.dynamics(persona)
        self._memories.pop((persona, earlier), None)  # the memory of a dialogue moves on with it
        if len(transcript.turns) < transcript.max_turns:
            self._remember(persona, transcript.turns, memory.after(dynamics, act, claims))

        attentive = self.domain.attentive(turn.partner)
        value = turn_value(dynamics, memory.state, act, attentive)
        conflict = _conflict(claims, memory.claims)
        checkable = [claim for claim in claims if claim.attribute in persona.facts]
        parts: dict[str, float | None] = {
            "prompt_to_line": float(not false) if checkable else None,
            "line_to_line": float(conflict is None) if claims and earlier else None,
            self.domain.value_name: value,
            "well_formed": float(not flaw),
        }
        charged = self.charge_conflicts and conflict is not None
        reward = 0.0 if flaw or false or charged else value
        reason = _reason(act, flaw, false, conflict, persona, attentive)
        return Verdict(reward, parts, reason, act, tuple(map(str, claims)))

    def _understand(
        self, persona: Persona, earlier: Sequence[Turn], turn: Turn
    ) -> tuple[str, str, tuple[Claim, ...], tuple[Claim, ...]]:
        """Return (flaw, act, claims, false claims); a flawed line performs no act of its own."""
        read = self.domain.lexicon.read
        understood = self.domain.interpret(persona, turn.partner, turn.agent)
        reading = read(turn.agent)
        flaw = find_flaw(
            turn.agent, reading, read(turn.partner), read(persona.text), self.domain.known_words
        )
        if not flaw and self.domain.repeats(turn.agent, [past.agent for past in earlier]):
            flaw = "repeats an earlier line"
        act = understood.act
        if flaw and not understood.false_claims:
            act = "evade"
        return flaw, act, understood.claims, understood.false_claims

    def _recall(self, persona: Persona, turns: tuple[Turn, ...]) -> _Memory:
        """Return what `turns` left behind; read again only if this judge never saw them."""
        if not turns:
            return _Memory(self.domain.dynamics(persona).start)
        memory = self._memories.get((persona, turns))
        if memory is None:
            before = self._recall(persona, turns[:-1])
            _, act, claims, _ = self._understand(persona, turns[:-1], turns[-1])
            memory = before.after(self.domain.dynamics(persona), act, claims)
            self._remember(persona, turns, memory)
        return memory

    def _remember(self, persona: Persona, turns: tuple[Turn, ...], memory: _Memory) -> None:
        if len(self._memories) >= _CACHE_SIZE:
            self._memories.clear()
        self._memories[persona, turns] = memory


def _conflict(
    claims: Sequence[Claim], past: Sequence[tuple[int, Claim]]
) -> tuple[int, Claim] | None:
    """Return the first earlier (turn, claim) that one of `claims` cannot be true together with."""
    for claim in claims:
        for turn, other in past:
            if claim.attribute != other.attribute:
                continue
            same = claim.value == other.value
            if claim.positive and other.positive:
                clash = not same
            else:
                clash = same and claim.positive != other.positive
            if clash:
                return turn, other
    return None


def _reason(
    act: str,
    flaw: str,
    false: Sequence[Claim],
    conflict: tuple[int, Claim] | None,
    persona: Persona,
    attentive: bool,
) -> str:
    if flaw:
        reason = f"degenerate: the line {flaw}"
    elif false:
        truth = persona.facts[false[0].attribute]
        reason = f"contradicts the persona: says {false[0]}, true is {truth}"
    else:
        reason = f"in character: {act}" if act != "evade" else "answers nothing that can be checked"
    if conflict is not None:
        reason += f"; conflicts with turn {conflict[0]} ({conflict[1]})"
    return reason if attentive else reason + "; the partner was distracted"
