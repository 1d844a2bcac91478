"""Published judge answers, read as Consistent-LLMs counts them and strictly, side by side.

    python -m ppg_env.published_verdicts FOLDER            # a Markdown table, a row for each file
    python -m ppg_env.published_verdicts FOLDER --json

The published prompt asks for one sentence, then a word: YES = the line CONTRADICTS its speaker's
background, NO = it agrees. The published score counts every answer without YES as consistent, also
one that says there was nothing to judge. `strict` knows a third outcome: no verdict, no label.

FOLDER holds dialogue files of Consistent-LLMs (`<domain>/exp/.../*.json`, at any depth), the
`dev.jsonl.gz` of a converted copy, or both. Neither is part of this project.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_TAIL = r"[^\w?\[\]\n]*"  # punctuation and Markdown may follow; a question is no verdict
_VERDICT = re.compile(rf"\b(YES|NO)\b\]?{_TAIL}$", re.IGNORECASE)
_LIST = re.compile(rf"\[([\d, ]*)\]{_TAIL}$")
_FIRST_LIST = re.compile(r"\[([^\[\]]*)\]")
_JOINED = re.compile(r"(?:\b(?:or|and|nor|not|than)|/)$", re.IGNORECASE)
_MARGINS = " \t\r\n\"'*_([`#>-"

# ---- one answer ----------------------------------------------------------------------------------


def strict(answer: str) -> bool | None:
    """Return True for consistent (NO), False for contradicts (YES), None without a clear verdict.

    1. A verdict ends a line; only punctuation, brackets and Markdown may follow it. In the middle
       of a line ("NO, it does not ...", "YES (partly)") it is part of the explanation.
    2. It is written in capitals, or is a sentence of its own ("Answer: no"). A word joined to
       another ("YES or NO", "not YES") is none.
    3. The verdict of the last line counts, unless another one stands right before it. If words
       follow in further lines, all verdicts that end lines must agree.

    The explanation is not weighed: an answer that argues for one side and ends with the other has
    the verdict it ends with.
    """
    word = _final(answer, _VERDICT)
    return None if word is None else word == "NO"


def consistent_llms(answer: str) -> bool:
    """Return whether the published score counts the line as consistent: no YES in the answer."""
    return "YES" not in answer


def strict_conflicts(answer: str, own_lines: Collection[int]) -> list[int] | None:
    """Return the earlier own lines that the answer lists as conflicting, None without a clear list.

    A list of whole numbers counts where a verdict would: at the end of a line, the last line's
    first. Lines of the other speaker are left out; a list of nothing else is unscorable.

    Args:
        answer: what the judge was heard to say.
        own_lines: numbers of the speaker's earlier lines.
    """
    listed = _final(answer, _LIST)
    numbers = None if listed is None else _whole_numbers(listed)
    if numbers is None:
        return None
    own = sorted(set(numbers).intersection(own_lines))
    return None if numbers and not own else own


def consistent_llms_conflicts(answer: str, speaker: int) -> list[int]:
    """Return what the published score counts as conflicts: the first list's lines of the speaker.

    No list, or one with anything but whole numbers in it, counts as no conflict.

    Args:
        answer: what the judge was heard to say.
        speaker: 0 for P1, who speaks the even lines, 1 for P2.
    """
    first = _FIRST_LIST.search(answer)
    numbers = _whole_numbers(first[1]) if first else None
    return [number for number in numbers or () if number % 2 == speaker]


def _whole_numbers(inside: str) -> list[int] | None:
    """Return the numbers between the brackets of a list, None if anything else is there."""
    parts = [part.strip() for part in inside.split(",")] if inside.strip() else []
    if all(part.isascii() and part.isdigit() and len(part) <= 6 for part in parts):
        return [int(part) for part in parts]
    return None


def _final(answer: str, pattern: re.Pattern[str]) -> str | None:
    """Return what the last line ends with; failing that, what all lines that end so agree on."""
    last = _at_end(answer.rstrip(), pattern)
    if last is not None:
        found, start = last
        before = _at_end(answer[:start].rstrip(_MARGINS), pattern)
        return found if before is None or before[0] == found else None
    ended = {end[0] for line in answer.splitlines() if (end := _at_end(line, pattern))}
    return ended.pop() if len(ended) == 1 else None


def _at_end(text: str, pattern: re.Pattern[str]) -> tuple[str, int] | None:
    """Return the verdict or list that ends `text`, and where it starts; None if none does."""
    found = pattern.search(text)
    if found is None:
        return None
    word, start = found[1], found.start()
    before = text[:start].rstrip(_MARGINS)
    if _JOINED.search(before):
        return None
    own_sentence = not before or before[-1] in ".!?:;"
    if word.isalpha() and not word.isupper() and not own_sentence:
        return None
    return word.upper(), start


# ---- one speaker of one dialogue -----------------------------------------------------------------


def prompt_score(consistent: Sequence[bool]) -> float:
    """Return the published prompt score of a speaker: the share of consistent lines, 0 of none."""
    return sum(consistent) / len(consistent) if consistent else 0.0


def index_score(answers: Sequence[tuple[int, str]], speaker: int) -> float:
    """Return the published line-to-line score of a speaker.

        1 - (conflicts listed) / (pairs of a judged line and an earlier own line)

    Args:
        answers: (line, answer) of the judged lines from 2 on.
        speaker: 0 for P1, 1 for P2; the others' lines are left out.
    """
    own = [(line, answer) for line, answer in answers if line % 2 == speaker]
    pairs = sum(line // 2 for line, _ in own)
    listed = sum(len(consistent_llms_conflicts(answer, speaker)) for _, answer in own)
    return 1 - listed / pairs if pairs else 0.0


# ---- files ---------------------------------------------------------------------------------------


@dataclass
class Row:
    """What the judged lines of one file come to.

    Attributes:
        file: its path without the suffix, from the domain's folder on.
        read: "answers", or "words" where only the verdict words are at hand.
        judged: lines with an answer.
        published: lines that the published score counts as consistent.
        consistent, contradicts, unscorable: what `strict` makes of them.
        inverted: the stored scores of this file count every answer without NO as consistent.
    """

    file: str
    read: str
    judged: int = 0
    published: int = 0
    consistent: int = 0
    contradicts: int = 0
    unscorable: int = 0
    inverted: bool = False

    def add(self, published: bool, verdict: bool | None) -> None:
        """Count one judged line."""
        self.judged += 1
        self.published += published
        self.consistent += verdict is True
        self.contradicts += verdict is False
        self.unscorable += verdict is None

    @property
    def difference(self) -> float:
        """Return consistent by the published score minus strictly consistent, in points."""
        return 100 * (self.published - self.consistent) / max(1, self.judged)


def table(folder: str | Path) -> list[Row]:
    """Return one row for each file with judged lines, in order of their names.

    Raises:
        ValueError: if there is none, or a file is not what it should be; names the file.
    """
    folder, rows = Path(folder), {}
    for path in sorted(folder.glob("**/exp/**/*.json")):
        name = _name(path.relative_to(folder))
        with _naming(path):
            rows[name] = _row_of_answers(name, json.loads(path.read_text(encoding="utf-8")))
    copy = folder / "dev.jsonl.gz"
    with _naming(copy):
        for name, dialogues in (_converted(copy) if copy.exists() else {}).items():
            if name not in rows:
                rows[name] = _row_of_words(name, dialogues)
    judged = [rows[name] for name in sorted(rows) if rows[name].judged]
    if not judged:
        raise ValueError(
            f"{folder} holds no judged dialogues; expected <domain>/exp/**/*.json as in "
            "Consistent-LLMs, or a dev.jsonl.gz."
        )
    return judged


def _name(path: Path) -> str:
    """Return "therapy/long_dialogues/x" for "raw/therapy/exp/long_dialogues/x.json"."""
    parts = path.with_suffix("").parts
    at = parts.index("exp")
    return "/".join((*parts[max(0, at - 1) : at], *parts[at + 1 :]))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, AttributeError, KeyError, EOFError, RecursionError) as error:
        raise ValueError(f"{path} is no dialogue file of Consistent-LLMs: {error!r}") from error


def _row_of_answers(name: str, dialogues: Sequence[dict[str, Any]]) -> Row:
    row, scores = Row(name, "answers"), _Scores()
    for dialogue in dialogues:
        judged = list(judged_lines(dialogue, "eval_prompt_consistency"))
        for _, answer in judged:
            row.add(consistent_llms(answer), strict(answer))
        for speaker in (0, 1):
            own = [answer for line, answer in judged if line % 2 == speaker]
            stored = dialogue.get(f"P{speaker + 1}_prompt_consistency_score")
            scores.compare(
                stored, [consistent_llms(answer) for answer in own], ["NO" not in a for a in own]
            )
    row.inverted = scores.inverted
    return row


def judged_lines(dialogue: dict[str, Any], key: str) -> Iterator[tuple[int, str]]:
    """Yield (line, answer) of a dialogue as Consistent-LLMs stores them; none without the key."""
    for position, entry in enumerate(dialogue.get(key, [])):
        match entry:
            case [int(line), str(answer)]:
                yield line, answer
            case _:
                raise ValueError(f"{key}[{position}]: expected [line, answer], got {entry!r:.80}")


def _converted(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the dialogues of a converted copy by file."""
    dialogues: dict[str, list[dict[str, Any]]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for dialogue in map(json.loads, lines):
            dialogues.setdefault(_name(Path(dialogue["source_file"])), []).append(dialogue)
    return dialogues


def _row_of_words(name: str, dialogues: Sequence[dict[str, Any]]) -> Row:
    row, scores = Row(name, "words"), _Scores()
    for dialogue in dialogues:
        for speaker in ("P1", "P2"):
            words = [
                turn["prompt_verdict"]
                for turn in dialogue["turns"]
                if turn["speaker"] == speaker and "prompt_verdict" in turn
            ]
            without_yes = [word in ("NO", "NONE") for word in words]
            for word, published in zip(words, without_yes, strict=True):
                row.add(published, {"NO": True, "YES": False}.get(word))
            stored = (dialogue["aggregate"] or {}).get(f"{speaker}_prompt_consistency_score")
            scores.compare(stored, without_yes, [word in ("YES", "NONE") for word in words])
    row.inverted = scores.inverted
    return row


class _Scores:
    """Finds out whether a file's stored scores are shares of answers without YES or without NO."""

    def __init__(self) -> None:
        self.differ = 0
        self.differ_inverted = 0

    def compare(
        self, stored: float | None, without_yes: Sequence[bool], without_no: Sequence[bool]
    ) -> None:
        """Compare the stored score of one speaker with both."""
        if stored is not None:
            self.differ += stored != prompt_score(without_yes)
            self.differ_inverted += stored != prompt_score(without_no)

    @property
    def inverted(self) -> bool:
        """Return whether all scores are shares without NO, and not all are shares without YES."""
        return self.differ > 0 and self.differ_inverted == 0


def total(rows: Sequence[Row]) -> Row:
    """Return the sum of the rows whose YES means contradiction."""
    result = Row("total", "sum")
    for row in rows:
        if not row.inverted:
            for field in ("judged", "published", "consistent", "contradicts", "unscorable"):
                setattr(result, field, getattr(result, field) + getattr(row, field))
    return result


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table, with notes below."""
    lines = [
        "| file | judged lines | consistent by consistent-llms | strict: consistent | contradicts "
        "| unscorable | difference in points |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in (*rows, total(rows)):
        mark = " †" * (row.read == "words") + " ‡" * row.inverted
        counts = (row.published, row.consistent, row.contradicts, row.unscorable)
        shares = " | ".join(f"{100 * n / max(1, row.judged):.1f} %" for n in counts)
        lines.append(f"| {row.file}{mark} | {row.judged} | {shares} | {row.difference:.1f} |")
    if any(row.read == "words" for row in rows):
        lines += ["", "† read from the verdict words (YES, NO, none, both); no texts at hand"]
    if any(row.inverted for row in rows):
        lines += [
            "",
            "‡ stored scores count every answer without NO as consistent; not in the total",
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="a folder with dialogue files of Consistent-LLMs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    options = parser.parse_args(arguments)
    try:
        rows = table(options.folder)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.json:
        shown = [asdict(row) | {"difference": row.difference} for row in (*rows, total(rows))]
        print(json.dumps(shown, indent=2))
    else:
        print(markdown(rows))


if __name__ == "__main__":
    main()
