"""What makes a line degenerate, whatever it says: found before anybody judges what it says.

`find_flaw` knows a domain's words; `find_plain_flaw` works on any text in any language.
"""

from __future__ import annotations

import re
import unicodedata
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

# Scripts without blanks between words: a character each.
_SINGLE = r"[\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
_WORD = re.compile(rf"{_SINGLE}|(?:(?!{_SINGLE})[^\W_])+(?:['’](?:(?!{_SINGLE})[^\W_])+)*")
_IS_SINGLE = re.compile(_SINGLE)
_FORM = r"|`*#=<>~+\\/_-"
"""Characters of forms and tables; other symbols may come many times running, for emphasis."""
_LONG_RUN = re.compile(rf"([{_FORM}])(?:\s*\1){{7,}}|_{{5,}}|([^\w\s])\2{{29,}}")
_EMPHASIS = re.compile(rf"([^\w\s{_FORM}])\1{{3,}}")
MARKUP = re.compile(r"<[|｜][^<>|｜]*[|｜]>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>")
_OWN_VERDICT = re.compile(
    r"\bverdict\W*[:=]\W*(?:consistent|contradicts|unscorable)\b"
    r"|\bconflicts\W*[:=]\W*(?:none\b|\d)",
    re.IGNORECASE,
)
_SQUEEZED = 0.22
"""Text that compresses to less than this share says the same again and again."""
SYMBOL_SHARE = 0.35
"""Letters and digits are at least this share of a line's characters."""
PLAIN_ECHO_OVERLAP, SHORT_ECHO_OVERLAP = 0.8, 0.9
"""The second below eight words: "It is nice to meet you too." """
REPEAT_OVERLAP = 0.8
_YOU = re.compile(r"\byou(?:r|rs|rself)?\b", re.IGNORECASE)
_SENTENCE_MARKS = re.compile(r"([.!?…。！？؟]+)")
_ASKS = re.compile(r"[?？؟]")
_RUNS = ((1, 6), (2, 4), (3, 4), (4, 4), *((size, 3) for size in range(5, 13)))
"""(words, how often running): more than anybody says for emphasis."""


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
    addressed = machine_address(line)
    if addressed:
        return addressed
    if _is_symbols(line):
        return "is mostly symbols"
    encoded = line.encode("utf-8", "replace")
    if _says_again(words) or (
        len(encoded) >= 200 and len(zlib.compress(encoded)) < _SQUEEZED * len(encoded)
    ):
        return "repeats itself"
    size, pairs = _size(words), _pairs(words)
    if size >= 5 and _parrots(line, size, pairs, partner):
        return "echoes the partner"
    # Who says "you" of oneself reads out; a persona told as "I" may be quoted, up to a point.
    copied = size >= (8 if _YOU.search(line) else 20)
    if copied and len(pairs & _pairs(_words(persona))) >= COPY_OVERLAP * len(pairs):
        return "copies out the persona"
    past = [_words(other) for other in earlier]
    if any(_says_the_same(words, pairs, other) for other in past if size >= 4):
        return "repeats an earlier line"
    if size >= 2 and past.count(words) >= 2:  # short ones may come twice: "I don't know."
        return "repeats an earlier line"
    return ""


def machine_address(line: str) -> str:
    """Return how a line speaks to the machinery instead of the partner, or "" if it does not."""
    # Invisible characters and wide letters must not hide what a model reads all the same.
    plain = unicodedata.normalize("NFKC", line) if not line.isascii() else line
    plain = "".join(c for c in plain if unicodedata.category(c) != "Cf")
    if MARKUP.search(plain):
        return "holds chat markup"
    return "addresses the judge" if _OWN_VERDICT.search(plain) else ""


def _is_symbols(line: str) -> bool:
    if _LONG_RUN.search(line):
        return True
    visible = [c for c in _EMPHASIS.sub(r"\1\1\1", line) if not c.isspace()]
    # Vowel signs are marks, not letters, in many scripts.
    sayable = sum(c.isalnum() or unicodedata.category(c)[0] == "M" for c in visible)
    return len(visible) >= 8 and sayable < SYMBOL_SHARE * len(visible)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _size(words: Sequence[str]) -> float:
    """Return the number of words; a character of a script without blanks is half a word."""
    return sum(0.5 if _IS_SINGLE.match(word) else 1.0 for word in words)


def _pairs(words: Sequence[str]) -> set[tuple[str, str]]:
    return set(pairwise(words))


def _parrots(line: str, size: float, pairs: set[tuple[str, str]], partner: str) -> bool:
    """Return whether a line gives back what the partner said.

    A full answer holds nearly all of the question ("Do you like to read?" "I like to read."), so
    that questions count only where all of the line is in them, or the line is a question too.
    """
    heard = _words(partner)
    if pairs <= _pairs(heard):
        return True
    if not _ASKS.search(line):
        *parts, rest = _SENTENCE_MARKS.split(partner)
        told = [s for s, end in zip(parts[::2], parts[1::2], strict=True) if not _ASKS.search(end)]
        heard = _words(" ".join([*told, rest]))
    overlap = SHORT_ECHO_OVERLAP if size < 8 else PLAIN_ECHO_OVERLAP
    return len(pairs & _pairs(heard)) >= overlap * len(pairs)


def _says_the_same(words: list[str], pairs: set[tuple[str, str]], other: list[str]) -> bool:
    past = _pairs(other)
    shared = len(pairs & past)
    return words == other or (
        _size(other) >= 4
        and shared >= REPEAT_OVERLAP * len(pairs)
        and shared >= REPEAT_OVERLAP * len(past)
    )


def _says_again(words: Sequence[str]) -> bool:
    """Return whether words follow each other again at once, more often than for emphasis."""
    for size, times in _RUNS:
        same = 0
        for i in range(len(words) - size):
            same = same + 1 if words[i] == words[i + size] else 0
            # A single letter or character may come more often: "哈哈哈哈哈哈" laughs.
            needed = times if size > 1 or len(words[i]) > 1 else 15
            if same >= size * (needed - 1):
                return True
    return False
