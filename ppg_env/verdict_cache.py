"""A judge that keeps its verdicts in a file, so that no verdict is paid for twice.

    judge = CachedJudge(ChatJudge(open_chat("openai:MODEL@URL"), "therapy"), "verdicts.sqlite")

The file is an SQLite database that many processes and threads may use at a time; keep it on a local
disk. It holds a hash of what was judged, which judge it was, and the verdict: no dialogue, except
for what a judge's reason quotes. To see and to drop what a judge left there:

    sqlite3 verdicts.sqlite "SELECT judge, count(*) FROM verdicts GROUP BY judge"
    sqlite3 verdicts.sqlite "DELETE FROM verdicts WHERE judge LIKE 'ChatJudge/openai:old-model%'"
"""

from __future__ import annotations

import json
import sqlite3
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from .dialogue import Transcript, Verdict

FORMAT = 1
"""Version of the file and of what a hash is made of; a file of another version is refused."""

_APPLICATION_ID = 0x50504756
_PATIENCE = 60.0
"""Seconds to wait for other processes that write to the file."""
_KEYS_A_QUERY = 500

_Judge = Callable[[Sequence[Transcript]], list[Verdict]]


class CachedJudge:
    """Asks a judge only about what it has not judged before; the rest comes from a file.

    The misses of a call are asked in one call of the judge, in order and each once, and stored
    together when it has answered. If it raises, nothing is stored. If they cannot be stored (disk
    full, file locked for a minute), the verdicts are returned all the same, one warning tells so,
    and this object stores no more; what the file holds stays in use.

    What a verdict depends on: the judge's `cache_key`, and all of the transcript but the persona's
    id and split and an open partner line.

    Args:
        judge: the judge; its `cache_key` is a text with everything that determines its verdicts
            besides the transcript.
        path: the file; it and its folder are made if they do not exist.

    Attributes:
        judge: the judge itself. Its other attributes are this object's too.
        hits: transcripts answered without asking, from the file or by a twin in the same call.
        misses: transcripts that the judge was asked about.

    Raises:
        ValueError: the judge has no `cache_key`, or the file is something else or of another
            version.
        OSError: the file cannot be opened or written.
    """

    def __init__(self, judge: _Judge, path: str | Path) -> None:
        self.judge = judge
        self.path = Path(path).expanduser().absolute()
        self.hits = self.misses = 0
        self._stores = True
        self._lock = threading.Lock()
        _ = self._checked_key()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _explained(self.path, error) from error
        with self._opened() as file:
            file.execute("BEGIN IMMEDIATE")  # fails where the file cannot be written
            file.execute("ROLLBACK")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "judge":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.judge, name)

    @property
    def cache_key(self) -> str:
        """The judge's own."""
        key: str = getattr(self.judge, "cache_key")  # noqa: B009 - a callable may have one
        return key

    @property
    def remote(self) -> bool:
        """Whether the judge mostly waits for somebody else's computer."""
        return bool(getattr(self.judge, "remote", False))

    @property
    def nondeterministic(self) -> bool:
        """Whether the judge may give equal transcripts different verdicts."""
        return bool(getattr(self.judge, "nondeterministic", False))

    def __call__(self, transcripts: Sequence[Transcript]) -> list[Verdict]:
        """Return one verdict for each transcript.

        Raises:
            ValueError: the judge returned another number of verdicts than it was asked for.
            OSError: the file cannot be read; nothing was asked.
        """
        if not transcripts:
            return []
        judge_key = self._checked_key()
        keys = [verdict_hash(judge_key, transcript) for transcript in transcripts]
        known = self._look_up(list(dict.fromkeys(keys)))
        missed = {
            key: transcript
            for key, transcript in zip(keys, transcripts, strict=True)
            if key not in known
        }
        if missed:
            verdicts = self.judge(list(missed.values()))
            if len(verdicts) != len(missed):
                raise ValueError(
                    f"{type(self.judge).__name__} returned {len(verdicts)} verdicts for "
                    f"{len(missed)} transcripts; a judge returns one for each."
                )
            new = dict(zip(missed, verdicts, strict=True))
            self._store(judge_key, new)
            known.update(new)
        with self._lock:
            self.hits += len(keys) - len(missed)
            self.misses += len(missed)
        return [known[key] for key in keys]

    def _checked_key(self) -> str:
        """Return the judge's cache_key.

        Raises:
            ValueError: it has none; says what to add.
        """
        cause: AttributeError | None = None
        try:
            key = self.cache_key
        except AttributeError as error:
            key, cause = "", error
        if isinstance(key, str) and key:
            return key
        reason = f"has no cache_key ({cause})" if cause else f"has cache_key={key!r}"
        raise ValueError(
            f"Verdicts of {self.judge!r:.200} cannot be kept in a file: it {reason}. Give it an "
            "attribute cache_key: a text with all that determines its verdicts besides the "
            "transcript (class, version, model, settings), so that another judge never gets them."
        )

    def _look_up(self, keys: Sequence[str]) -> dict[str, Verdict]:
        """Return the verdicts that the file holds, by key."""
        rows: list[tuple[str, str]] = []
        with self._opened() as file:
            for start in range(0, len(keys), _KEYS_A_QUERY):
                asked = keys[start : start + _KEYS_A_QUERY]
                marks = ", ".join("?" * len(asked))
                query = f"SELECT key, verdict FROM verdicts WHERE key IN ({marks})"
                rows += file.execute(query, asked)
        try:
            return {key: _verdict_of(text) for key, text in rows}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path} holds a verdict that cannot be read ({error!r}); delete the file, or "
                "hand in another path."
            ) from error

    def _store(self, judge_key: str, verdicts: Mapping[str, Verdict]) -> None:
        """Write verdicts in one transaction; where that fails, warn and write no more."""
        if not self._stores:
            return
        try:
            rows = [(key, judge_key, _text_of(verdict)) for key, verdict in verdicts.items()]
            with self._opened() as file:
                file.execute("BEGIN IMMEDIATE")
                file.executemany("INSERT OR IGNORE INTO verdicts VALUES (?, ?, ?)", rows)
                file.execute("COMMIT")
        except (OSError, ValueError, TypeError) as error:
            self._stores = False
            warnings.warn(
                f"New verdicts are no longer kept, the run goes on without: {error}",
                RuntimeWarning,
                stacklevel=3,
            )

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """Open the file, checked to be a verdict cache, for one look-up or one transaction.

        A connection is never kept: SQLite's own notes about open files and locks must not get into
        a forked process. Opening takes a fraction of a millisecond.
        """
        try:
            with closing(
                sqlite3.connect(self.path, timeout=_PATIENCE, isolation_level=None)
            ) as file:
                # With the log (WAL) this loses at most the last verdicts in a power cut.
                file.execute("PRAGMA synchronous = NORMAL")
                if not _is_verdict_cache(file, self.path):
                    _make_verdict_cache(file)
                yield file
        except sqlite3.Error as error:
            raise _explained(self.path, error) from error


def verdict_hash(judge_key: str, transcript: Transcript) -> str:
    """Return the hash of all that a verdict about the latest turn depends on."""
    persona = transcript.persona
    judged = [
        FORMAT,
        judge_key,
        persona.domain,
        persona.text,
        sorted(persona.facts.items()),
        sorted(persona.traits.items()),
        transcript.system,
        transcript.max_turns,
        transcript.turns,
    ]
    return sha256(json.dumps(judged).encode()).hexdigest()


def _is_verdict_cache(file: sqlite3.Connection, path: Path) -> bool:
    """Return whether the database is one of this format, False if there is nothing in it yet.

    Raises:
        ValueError: it is something else.
    """
    file.execute("BEGIN")  # one moment for all three: another process may be making the table
    ((application,),) = file.execute("PRAGMA application_id")
    ((version,),) = file.execute("PRAGMA user_version")
    ((tables,),) = file.execute("SELECT count(*) FROM sqlite_master")
    file.execute("COMMIT")
    if application == _APPLICATION_ID and version == FORMAT:
        return True
    if application == _APPLICATION_ID:
        raise ValueError(
            f"{path} is a verdict cache of format {version}, this version of the package reads "
            f"format {FORMAT}: hand in another path, or delete the file."
        )
    if application or version or tables:
        raise ValueError(
            f"{path} is a database of another program, not a verdict cache: hand in another path."
        )
    return False


def _make_verdict_cache(file: sqlite3.Connection) -> None:
    """Write the empty table; several processes may come here at once."""
    with suppress(sqlite3.OperationalError):  # another process may be doing just that
        file.execute("PRAGMA journal_mode = WAL")
    file.execute("BEGIN IMMEDIATE")
    file.execute(
        "CREATE TABLE IF NOT EXISTS verdicts "
        "(key TEXT PRIMARY KEY, judge TEXT NOT NULL, verdict TEXT NOT NULL) WITHOUT ROWID"
    )
    file.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
    file.execute(f"PRAGMA user_version = {FORMAT}")
    file.execute("COMMIT")


def _explained(path: Path, error: Exception) -> Exception:
    """Return the error to raise instead, which names the file and what to do."""
    if getattr(error, "sqlite_errorname", "") in ("SQLITE_NOTADB", "SQLITE_CORRUPT"):
        return ValueError(
            f"{path} is not a verdict cache, or a damaged one ({error}): hand in another path, or "
            "delete the file."
        )
    return OSError(
        f"The verdict cache {path} cannot be used ({error}): hand in a path on a local disk with "
        "space left, in a folder that you may write to."
    )


def _text_of(verdict: Verdict) -> str:
    """Return a verdict as JSON."""
    parts = {name: _number(value) for name, value in verdict.parts.items()}
    return json.dumps(
        {
            "reward": _number(verdict.reward),
            "parts": parts,
            "reason": verdict.reason,
            "act": verdict.act,
            "claims": list(verdict.claims),
        }
    )


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)


def _verdict_of(text: str) -> Verdict:
    """Return the verdict that `_text_of` wrote."""
    kept = json.loads(text)
    return Verdict(
        kept["reward"], kept["parts"], kept["reason"], kept["act"], tuple(kept["claims"])
    )
