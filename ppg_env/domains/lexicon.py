"""Reading a line: which claims it makes about its speaker, what it asks, whether it agrees.

A lexicon is the surface forms of a domain's attribute values ("cat", "cats", "kitten" -> pet=cat),
the cue words by which a question about an attribute is recognised, and a few named marks
("confusion", "request", "distracted"). Reading is one pass over the words, by these rules:

1. A value that is mentioned in a statement is a claim about the speaker, unless the nearest subject
   word before it in the clause is the listener (you, your) or a third person (she, my sister,
   people).
2. A negator earlier in the clause (not, n't, never, no, hate ...) makes it a negative claim. A
   clause ends at punctuation and at but/because/so/...; a new "I" also ends the reach of a negator.
3. No claim: questions, text in double quotes, wishes, hypotheticals and what is over (would, wish,
   used to, if, until ...). A tag question ("I have a cat, right?") is a statement; a value that is
   asked back and then denied ("A dog? No, never") is a negative claim.
4. A line that opens with assent (yes, exactly, of course ...) adopts what the partner's line
   presupposes about the listener; one that opens with denial (no, not really ...) denies it. What
   the line itself says about the attribute goes before both, save that a denying line denies what
   it names again.

These rules are precise on plain sentences and blind to irony, metaphor and long-range reference;
tests/test_lexicon_accuracy.py reports precision and recall on lines not used to write them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

_TOKEN = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[.!?…,;:\"“”()\n–—]")
_SENTENCE_END = frozenset(".!?…\n")
_CLAUSE_END = frozenset(".!?…\n,;:()–—")
_QUOTES = frozenset('"“”')
_TAGS = frozenset("right no yes correct yeah huh eh".split())
_NEGATED_VERBS = frozenset("isn't aren't wasn't weren't doesn't don't didn't won't never".split())
_PAST = frozenset("until till formerly former ex anymore".split())
_PUNCTUATION = _CLAUSE_END | _QUOTES
_CLAUSE_WORDS = frozenset(
    "but because so although though while whereas since unless however".split()
)
_FIRST = frozenset("i i'm i've i'd i'll my me mine myself we we're we've our us".split())
_SECOND = frozenset("you you're you've you'd you'll your yours yourself".split())
_THIRD = frozenset(
    "he he's she she's they they're they've his her their someone somebody everyone "
    "everybody people others nobody one's who whose "
    "sister sisters brother brothers mother father mom mum dad parents friend friends neighbour "
    "neighbours neighbor neighbors wife husband boyfriend girlfriend boss colleague colleagues "
    "cousin uncle aunt grandmother grandfather grandma grandpa son daughter kids roommate flatmate "
    "classmate classmates sister's brother's mother's father's mom's dad's friend's neighbour's "
    "neighbor's wife's husband's boss's cousin's uncle's aunt's roommate's".split()
)
_NEGATORS = frozenset(
    "not never no none neither nor without cannot hate dislike detest avoid instead hardly except "
    "isn't aren't ain't wasn't weren't don't doesn't didn't haven't hasn't hadn't can't couldn't "
    "won't wouldn't shouldn't mustn't mightn't needn't "
    "isnt arent aint wasnt werent dont doesnt didnt havent hasnt hadnt cant couldnt wont "
    "wouldnt".split()
)
_HYPOTHETICAL = frozenset(
    "would i'd wish wished if used someday could might maybe want wanted hope dream dreamed "
    "imagine pretend almost wonder".split()
)
_GRAMMAR = _PUNCTUATION | _CLAUSE_WORDS | _FIRST | _SECOND | _THIRD | _NEGATORS | _HYPOTHETICAL
"""Words that matter in any domain; all others matter only if they begin a phrase of the lexicon."""
_ASSENT = "yes|yeah|yep|yup|exactly|absolutely|indeed|definitely|totally|certainly|of course"
_ASSENT_ALONE = (
    "right|sure|correct|true|that's right|that's true|you're right|you are right|i do|i am|i have|"
    "i guess so|i suppose so|quite so|it is|it is true|that is true|it's true|i did|i was|so i am|"
    "you bet|you got me|guilty|spot on|i sure do|true enough"
)
_AFFIRMING = (
    "never got over|not over|can't stop|cannot stop|can't forget|cannot forget|never forget|"
    "not only|can't help|can't wait|no doubt|can't get enough|can't live without|"
    "cannot live without|never tire of|would say|i'd say|not just"
)
"""Negators and hypotheticals in form only: skipped as a whole."""
_FILLERS = frozenset("well honestly oh hm so no yes actually exactly and but yeah".split())
_DENIAL = "no|nope|nah|not really|not at all|not quite|not exactly|that's not|that's wrong|wrong"


class Claim(NamedTuple):
    """A statement about its speaker: attribute has (`positive`) or has not the value."""

    attribute: str
    value: str
    positive: bool = True

    def __str__(self) -> str:
        """Return "pet=cat" or "not pet=cat"."""
        return f"{'' if self.positive else 'not '}{self.attribute}={self.value}"


class Reading(NamedTuple):
    """What a line says, seen from its speaker.

    Attributes:
        claims: statements about the speaker.
        about_listener: values attributed to the listener, in questions too; what an assent adopts.
        questioned: values named in the speaker's questions.
        topics: attributes that are asked about or mentioned.
        marks: names of the lexicon's marks that occur.
        mentions: number of value mentions of any kind.
        assents, denies: how the line opens.
        words: the line's words, lower case.
        core: the words without a leading filler ("well", "no", "honestly").
        pairs: the set of neighbouring words, for comparing lines.
    """

    claims: tuple[Claim, ...]
    about_listener: tuple[Claim, ...]
    questioned: tuple[Claim, ...]
    topics: frozenset[str]
    marks: frozenset[str]
    mentions: int
    assents: bool
    denies: bool
    words: tuple[str, ...]
    core: tuple[str, ...]
    pairs: frozenset[str]


@dataclass(frozen=True, eq=False)
class Lexicon:
    """The words of a domain.

    Args:
        forms: attribute -> value -> surface forms (one to four words each).
        cues: attribute -> words or phrases by which a question about it is recognised.
        marks: name -> words or phrases; a phrase may hold commas, which then belong to it.

    Raises:
        ValueError: if one surface form stands for two values.
    """

    forms: Mapping[str, Mapping[str, Sequence[str]]]
    cues: Mapping[str, Sequence[str]] = field(default_factory=dict)
    marks: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        phrases: dict[str, list[tuple[tuple[str, ...], str, object]]] = {}
        values: dict[tuple[str, ...], Claim] = {}

        def add(phrase: str, kind: str, payload: object) -> None:
            words = tuple(_tokens(phrase))
            phrases.setdefault(words[0], []).append((words, kind, payload))

        for attribute, by_value in self.forms.items():
            for value, forms in by_value.items():
                claim = Claim(attribute, value)
                for form in forms:
                    other = values.setdefault(tuple(_tokens(form)), claim)
                    if other != claim:
                        raise ValueError(f"The form {form!r} stands for both {other} and {claim}.")
                    add(form, "value", claim)
        for attribute, cues in self.cues.items():
            for cue in cues:
                add(cue, "cue", attribute)
        for name, words in self.marks.items():
            for phrase in words:
                add(phrase, "mark", name)
        for phrase in _ASSENT.split("|"):
            add(phrase, "assent", None)
        for phrase in _ASSENT_ALONE.split("|"):
            add(phrase, "assent alone", None)
        for phrase in _DENIAL.split("|"):
            add(phrase, "denial", None)
        for phrase in _AFFIRMING.split("|"):
            add(phrase, "affirming", None)
        for entries in phrases.values():
            entries.sort(key=lambda entry: -len(entry[0]))
        object.__setattr__(self, "_phrases", phrases)
        object.__setattr__(self, "_known", _GRAMMAR | phrases.keys())
        object.__setattr__(self, "read", lru_cache(maxsize=65536)(self._read))

    def read(self, line: str) -> Reading:
        """Return what `line` says. Pure, and remembered per line."""
        raise AssertionError("replaced in __post_init__")  # pragma: no cover

    def forget(self) -> None:
        """Drop the remembered readings."""
        self.read.cache_clear()  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[object, ...]:
        return Lexicon, (self.forms, self.cues, self.marks)

    def _read(self, line: str) -> Reading:
        tokens = _tokens(line)
        words = tuple([token for token in tokens if token not in _PUNCTUATION])
        scan = _Scan()
        start = 0
        for end, token in enumerate(tokens):
            if token in _SENTENCE_END:
                asked = len(scan.questioned)
                self._read_sentence(tokens, start, end, token == "?", scan)
                if end - start <= 3 and not _NEGATORS.isdisjoint(tokens[end + 1 : end + 4]):
                    scan.claims += [_negative(claim) for claim in scan.questioned[asked:]]
                start = end + 1
        if start < len(tokens):
            self._read_sentence(tokens, start, len(tokens), False, scan)
        return Reading(
            claims=_unique(scan.claims),
            about_listener=_unique(scan.about_listener),
            questioned=_unique(scan.questioned),
            topics=frozenset(scan.topics),
            marks=frozenset(scan.marks),
            mentions=scan.mentions,
            assents=scan.assents,
            denies=scan.denies,
            words=words,
            core=words[1:] if len(words) > 1 and words[0] in _FILLERS else words,
            pairs=frozenset([f"{a} {b}" for a, b in pairwise(words)]),
        )

    def _read_sentence(
        self, tokens: list[str], start: int, end: int, question: bool, scan: _Scan
    ) -> None:
        phrases: dict[str, list[tuple[tuple[str, ...], str, object]]] = self._phrases  # type: ignore[attr-defined]
        known: frozenset[str] = self._known  # type: ignore[attr-defined]
        subject, negated, hypothetical = "", False, False
        tagged = (
            question and end - start > 2 and tokens[end - 2] == "," and tokens[end - 1] in _TAGS
        )
        i = start
        while i < end:
            token = tokens[i]
            if token not in known:
                if not token.endswith("'s") or token[:-2] not in phrases:
                    i += 1
                    continue
                token = tokens[i] = token[:-2]
            if token in _QUOTES:
                scan.quoted = not scan.quoted
                i += 1
                continue
            if token in _CLAUSE_END or token in _CLAUSE_WORDS:
                subject, negated, hypothetical = "", False, False
                i += 1
                continue
            if scan.quoted:
                i += 1
                continue

            step = 1
            following = tokens[i + 1] if i + 1 < len(tokens) else ""
            for phrase, kind, payload in phrases.get(token, ()):
                length = len(phrase)
                if length > 1 and (
                    phrase[1] != following or tuple(tokens[i : i + length]) != phrase
                ):
                    continue
                if kind == "value":
                    assert isinstance(payload, Claim)
                    who, denied, over = _afterwards(tokens, i + length, end, subject)
                    scan.mention(
                        payload, who, negated or denied, hypothetical or over, question, tagged
                    )
                    step = max(step, length)
                elif kind == "cue":
                    scan.topics.add(str(payload))
                    step = max(step, length)
                elif kind == "mark":
                    scan.marks.add(str(payload))
                elif kind == "affirming":
                    step = max(step, length)
                elif i == 0:
                    closed = i + length >= len(tokens) or tokens[i + length] in _CLAUSE_END
                    if kind == "denial":
                        scan.denies |= closed or length > 1
                    else:
                        scan.assents |= closed or (kind == "assent" and not question)

            if token in _FIRST:
                if token[0] == "i" and step == 1:
                    negated = False
                    hypothetical |= token == "i'd"
                subject = "first"
            elif token in _SECOND:
                subject = "second"
            elif token in _THIRD:
                subject = "third"
            elif step == 1 and token in _NEGATORS:
                negated = True
            elif step == 1 and token in _HYPOTHETICAL:
                hypothetical = True
            i += step


def _afterwards(tokens: list[str], i: int, end: int, subject: str) -> tuple[str, bool, bool]:
    """Return (subject, denied, over) as the words after a mention, which ends before i, show them.

    "a friend betrayed me" is about me; "stories don't help" denies; "I had a dog until ..." is
    over.
    """
    if i >= end:
        return subject, False, False
    if subject == "third" and tokens[i] in ("me", "us"):
        subject = "first"
    verb_denied = tokens[i] in ("is", "are", "was", "were") and tokens[i + 1 : i + 2] == ["not"]
    denied = subject == "" and (tokens[i] in _NEGATED_VERBS or verb_denied)
    over = False
    while i < end and tokens[i] not in _CLAUSE_END and not over:
        over = tokens[i] in _PAST
        i += 1
    return subject, denied, over


def _tokens(text: str) -> list[str]:
    """Return words and punctuation marks, lower case."""
    return _TOKEN.findall(text.replace("’", "'").lower())


class _Scan:
    """What reading a line has found so far."""

    __slots__ = (
        "about_listener",
        "assents",
        "claims",
        "denies",
        "marks",
        "mentions",
        "questioned",
        "quoted",
        "topics",
    )

    def __init__(self) -> None:
        self.claims: list[Claim] = []
        self.about_listener: list[Claim] = []
        self.questioned: list[Claim] = []
        self.topics: set[str] = set()
        self.marks: set[str] = set()
        self.mentions = 0
        self.assents = self.denies = self.quoted = False

    def mention(
        self,
        claim: Claim,
        subject: str,
        negated: bool,
        hypothetical: bool,
        question: bool,
        tagged: bool,
    ) -> None:
        """File one mention of a value under what it is in its clause."""
        self.mentions += 1
        self.topics.add(claim.attribute)
        if question:
            self.questioned.append(claim)
            if subject != "third" and not negated:
                self.about_listener.append(claim)
            if tagged and subject in ("first", "") and not hypothetical:
                self.claims.append(claim if not negated else _negative(claim))
        elif subject == "second":
            if not hypothetical:
                self.about_listener.append(claim if not negated else _negative(claim))
        elif subject == "third" or hypothetical:
            return
        else:
            self.claims.append(claim if not negated else _negative(claim))


def _unique(claims: list[Claim]) -> tuple[Claim, ...]:
    return tuple(claims) if len(claims) < 2 else tuple(dict.fromkeys(claims))


def _negative(claim: Claim) -> Claim:
    return Claim(claim.attribute, claim.value, False)


def resolve_claims(agent: Reading, partner: Reading) -> tuple[Claim, ...]:
    """Return the agent's claims, with what it adopts or denies of the partner's line (rule 4)."""
    if not (agent.assents or agent.denies) or not partner.about_listener:
        return agent.claims
    claims = agent.claims
    if not agent.assents:  # "No, jazz is so dull" after "You like jazz, right?" denies jazz
        claims = tuple(_negative(c) if c in partner.about_listener else c for c in claims)
    spoken = {claim.attribute for claim in claims}
    taken = [
        Claim(said.attribute, said.value, said.positive == agent.assents)
        for said in partner.about_listener
        if said.attribute not in spoken
    ]
    return claims + tuple(taken)
