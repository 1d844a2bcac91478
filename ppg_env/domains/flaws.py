"""What makes a line degenerate, whatever it says: found before anybody judges what it says.

`find_flaw` knows a domain's words; `find_plain_flaw` works on any text in any language.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from itertools import pairwise

from .lexicon import Reading
from .words import FUNCTION_WORDS, is_known

MAX_ATTRIBUTES = 3
"""A line may speak to this many attributes; more is a list of facts, not a reply."""
ECHO_OVERLAP = 0.7
COPY_OVERLAP = 0.8
_DANGLING = frozenset(
    "a an the and or but because so of to in on at for with from by as is am are was were be been "
    "my your his her their our its this that these those i we it's i'm very".split()
)


def find_flaw(
    line: str,
    reading: Reading,
    partner: Reading,
    persona: Reading,
    known_words: frozenset[str],
) -> str:
    """Return why a line is degenerate by itself, or "" if it is not.

    Args:
        line: the agent's line; `reading` is its reading.
        partner: reading of the line it answers.
        persona: reading of the persona text.
        known_words: the domain's and common words; a line half of whose words are others (more
            than half below five words) is no sentence.
    """
    words, pairs = reading.words, reading.pairs
    if not words:
        return "holds no words"
    if _stutters(words):
        return "repeats itself"
    if _unfinished(line, words):
        return "is an unfinished sentence"
    if len(words) >= 4 and len(pairs & partner.pairs) >= ECHO_OVERLAP * len(pairs):
        return "echoes the partner"
    if len(words) >= 8 and len(pairs & persona.pairs) >= COPY_OVERLAP * len(pairs):
        return "copies out the persona"
    if len({claim.attribute for claim in reading.claims}) > MAX_ATTRIBUTES:
        return "lists facts"
    if reading.mentions >= 3 and 2 * reading.mentions > len(words):
        return "lists keywords"
    if len(words) >= 4 and FUNCTION_WORDS.isdisjoint(words):
        return "is no sentence"
    strange = [word for word in words if word not in known_words]
    if 2 * len(strange) >= len(words) >= 3:
        unknown = sum(not is_known(word, known_words) for word in strange)
        if 2 * unknown >= len(words) + (len(words) < 5):
            return "is no sentence"
    return ""


def _stutters(words: tuple[str, ...]) -> bool:
    """Return whether words follow each other again at once ("these days these days")."""
    if len(set(words)) >= len(words) - 1:
        return False
    for size in (2, 3, 4):
        for i in range(len(words) - 2 * size + 1):
            if words[i : i + size] == words[i + size : i + 2 * size]:
                return True
    if any(words[i] == words[i + 1] == words[i + 2] for i in range(len(words) - 2)):
        return True
    return len(words) >= 8 and 2 * len(set(words)) < len(words)


def _unfinished(line: str, words: tuple[str, ...]) -> bool:
    """Return whether a line breaks off: ends in a letter, digit or comma, or in a dangling word."""
    last = line.rstrip()[-1]
    if last in ".!?…":
        return False
    if words[-1] in _DANGLING:
        return True
    return len(words) > 3 and (last.isalnum() or last in ",;:-–—(")


# ---- any text --------------------------------------------------------------------------------

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_LONG_RUN = re.compile(r"([^\w\s.…]|_)\1{7,}")
MARKUP = re.compile(r"<\|[^<>|]*\|>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]")
_TO_THE_JUDGE = re.compile(r"\b(?:verdict|conflicts)\W{0,3}[:=]", re.IGNORECASE)
_SQUEEZED = 0.22
"""Text that compresses to less than this share says the same again and again."""
SYMBOL_SHARE = 0.5
REPEAT_OVERLAP = 0.8


def find_plain_flaw(line: str, partner: str, persona: str, earlier: Sequence[str]) -> str:
    """Return why a line of any language is degenerate, or "" if it is not.

    Only what no honest line does: it says nothing, stutters, is made of symbols, echoes the
    partner, copies out the persona, says an earlier line again, or speaks to the machinery (chat
    markup, a verdict of its own).

    Args:
        line: the agent's line.
        partner: the line it answers.
        persona: the persona's text.
        earlier: the agent's earlier lines.
    """
    words = _words(line)
    if not words:
        return "holds no words"
    if MARKUP.search(line):
        return "holds chat markup"
    if _TO_THE_JUDGE.search(line):
        return "addresses the judge"
    visible = [c for c in line if not c.isspace()]
    if _LONG_RUN.search(line) or (
        len(visible) >= 8 and sum(c.isalnum() for c in visible) < SYMBOL_SHARE * len(visible)
    ):
        return "is mostly symbols"
    encoded = line.encode("utf-8")
    if _says_again(words) or (
        len(encoded) >= 200 and len(zlib.compress(encoded)) < _SQUEEZED * len(encoded)
    ):
        return "repeats itself"
    pairs = _pairs(words)
    if len(words) >= 4 and len(pairs & _pairs(_words(partner))) >= ECHO_OVERLAP * len(pairs):
        return "echoes the partner"
    if len(words) >= 8 and len(pairs & _pairs(_words(persona))) >= COPY_OVERLAP * len(pairs):
        return "copies out the persona"
    if len(words) >= 4:
        for other in map(_words, earlier):
            past = _pairs(other)
            shared = len(pairs & past)
            if words == other or (
                len(other) >= 4
                and shared >= REPEAT_OVERLAP * len(pairs)
                and shared >= REPEAT_OVERLAP * len(past)
            ):
                return "repeats an earlier line"
    return ""


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _pairs(words: Sequence[str]) -> set[tuple[str, str]]:
    return set(pairwise(words))


def _says_again(words: Sequence[str]) -> bool:
    """Return whether a word comes five times running, or two to six words three times running."""
    for size, times in ((1, 5), (2, 3), (3, 3), (4, 3), (5, 3), (6, 3)):
        same = 0
        for i in range(len(words) - size):
            same = same + 1 if words[i] == words[i + size] else 0
            if same >= size * (times - 1):
                return True
    return False
