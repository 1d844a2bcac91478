"""Does the AGENT still know who it is after a dialogue? Questions put to it, one at a time.

    found = evaluate_quiz(policy, dialogues, persona_ids, quiz)
    found["qa"].mean(), found["qa_before"].mean()

Every question follows the finished dialogue by itself, so that no answer helps or harms another.
The same questions put before the dialogue show what was there to lose. E dialogues.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from .policy import Messages, Policy
from .rollout import speaker_for

# Keeps the answers' randomness apart from that of the dialogues with the same seed.
_QUIZ_STREAM = 0x9A


class Question(Protocol):
    """Something to ask; all else about it is the quiz's own affair."""

    @property
    def text(self) -> str:
        """The question, as the partner's next line."""
        ...


Q = TypeVar("Q", bound=Question)


class Quiz(Protocol[Q]):
    """Writes questions about a persona and grades replies to them.

    One that writes many personas' questions faster at once has `prepare(persona_ids)` too.
    """

    def questions(self, persona_id: str, /) -> Sequence[Q]:
        """Return the persona's questions, always the same; none if there is nothing to ask."""
        ...

    def grade_all(self, questions: Sequence[Q], replies: Sequence[str], /) -> list[bool | None]:
        """Return for each reply True (right), False (wrong) or None (not answered)."""
        ...


def evaluate_quiz(
    policy: Policy,
    dialogues: Sequence[Messages],
    personas: Sequence[str],
    quiz: Quiz[Q],
    *,
    seed: int = 0,
    deterministic: bool = True,
    before: bool = True,
    batch_size: int = 32,
) -> dict[str, np.ndarray]:
    """Ask the agent about its persona and return the shares of each dialogue's questions.

    The policy's conversation (`begin`) answers where it has one, with generators of this call's
    seed; other policies are asked through `predict` and draw on what randomness they have.

    Args:
        policy: who is asked.
        dialogues: finished ones, such as `Evaluation.transcripts`. A partner's last line that was
            never answered gives way to the question.
        personas: the persona's id of each dialogue.
        quiz: who asks and grades.
        seed: of sampled answers.
        deterministic: the most likely answer instead of a sampled one.
        before: also ask with nothing said but the system message.
        batch_size: questions that the policy answers side by side.

    Returns:
        float64 (E,) each, NaN where the persona has no questions:
        "qa": share answered right;
        "qa_contradicted": share answered wrong;
        "qa_unanswered": the rest: evasions, unreadable grades, no room left in the context;
        "qa_before", "qa_contradicted_before": the first two before the dialogue;
        "qa_change": qa - qa_before, for an interval of the difference.

    Raises:
        ValueError: if the numbers of dialogues and personas differ, and what the quiz raises.
    """
    if len(dialogues) != len(personas):
        raise ValueError(f"Got {len(dialogues)} dialogues and {len(personas)} persona ids.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    prepare: Callable[[Sequence[str]], None] | None = getattr(quiz, "prepare", None)
    if prepare is not None:
        prepare(personas)
    asked = [(e, question) for e, name in enumerate(personas) for question in quiz.questions(name)]

    def ask(histories: Sequence[Messages]) -> list[str | None]:
        put = [[*histories[e], {"role": "user", "content": q.text}] for e, q in asked]
        return _answers(policy, put, _quiz_seed(seed), deterministic, batch_size)

    replies = ask([_finished(dialogue) for dialogue in dialogues])
    questions = [question for _, question in asked]
    if before:
        replies += ask([_untouched(dialogue) for dialogue in dialogues])
        questions = questions * 2
    grades = _grades(quiz, questions, replies)

    def share(grade: bool | None, of: Sequence[bool | None]) -> np.ndarray:
        got = [given is grade for given in of]
        return _shares([e for e, _ in asked], got, len(dialogues))

    after = grades[: len(asked)]
    found = {
        "qa": share(True, after),
        "qa_contradicted": share(False, after),
        "qa_unanswered": share(None, after),
    }
    if before:
        earlier = grades[len(asked) :]
        found["qa_before"] = share(True, earlier)
        found["qa_contradicted_before"] = share(False, earlier)
        found["qa_change"] = found["qa"] - found["qa_before"]
    return found


def _finished(dialogue: Messages) -> Messages:
    """Return the dialogue up to the agent's last line."""
    waiting = bool(dialogue) and dialogue[-1]["role"] == "user"
    return dialogue[:-1] if waiting else dialogue


def _untouched(dialogue: Messages) -> Messages:
    """Return the dialogue before anybody spoke: its system message."""
    return [message for message in dialogue[:1] if message["role"] == "system"]


def _answers(
    policy: Policy,
    observations: Sequence[Messages],
    seed: int,
    deterministic: bool,
    batch_size: int,
) -> list[str | None]:
    """Return the reply to each observation, None where the context leaves no room for one."""
    replies: list[str | None] = []
    for start in range(0, len(observations), batch_size):
        part = observations[start : start + batch_size]
        speaker = speaker_for(policy, len(part), seed, start)
        texts = speaker.reply(part, np.ones(len(part), dtype=bool), deterministic)
        spoke = speaker.spoke_B
        replies += [text if said else None for text, said in zip(texts, spoke, strict=True)]
    return replies


def _grades(
    quiz: Quiz[Q], questions: Sequence[Q], replies: Sequence[str | None]
) -> list[bool | None]:
    """Return the grade of each reply; one that was never given is none."""
    given = [(q, reply) for q, reply in zip(questions, replies, strict=True) if reply is not None]
    graded = quiz.grade_all([q for q, _ in given], [reply for _, reply in given])
    if len(graded) != len(given):
        raise ValueError(f"The quiz gave {len(graded)} grades for {len(given)} replies.")
    grades = iter(graded)
    return [None if reply is None else next(grades) for reply in replies]


def _shares(dialogue_Q: Sequence[int], got_Q: Sequence[bool], size: int) -> np.ndarray:
    """Return the share of True among each dialogue's questions, NaN where it has none."""
    total_E = np.bincount(np.array(dialogue_Q, dtype=int), minlength=size)
    true_E = np.bincount(np.array(dialogue_Q, dtype=int), np.array(got_Q, float), minlength=size)
    return np.divide(true_E, total_E, out=np.full(size, np.nan), where=total_E > 0)


def _quiz_seed(seed: int) -> int:
    return int(np.random.SeedSequence([seed, _QUIZ_STREAM]).generate_state(1)[0])
