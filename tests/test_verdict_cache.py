from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import sqlite3
import subprocess
import sys
import textwrap
import threading
from contextlib import closing
from dataclasses import replace

import pytest

from ppg_env import Persona, RuleJudge, Transcript, Turn, Verdict, get_domain
from ppg_env.verdict_cache import CachedJudge

NURSE = Persona("nurse", "chatting", "You are a nurse.", {"job": "nurse", "pet": "cat"}, {"a": "b"})


class LengthJudge:
    """A line earns more the longer it is; it notes what it was asked."""

    remote = True
    nondeterministic = True

    def __init__(self, cache_key="length/1"):
        self.cache_key, self.asked, self.calls = cache_key, [], 0

    def __call__(self, transcripts):
        self.calls += 1
        self.asked += [transcript.turns[-1].agent for transcript in transcripts]
        return [self.judge(transcript) for transcript in transcripts]

    def judge(self, transcript):
        line = transcript.turns[-1].agent
        reward = None if line == "?" else len(line) / 64
        parts = {"z": reward, "a": None, "prompt_to_line": 1.0}
        return Verdict(reward, parts, f"{line!r} 東", "disclose", ("pet=cat", "not pet=dog"))


class FailingJudge(LengthJudge):
    """Breaks down until it is mended."""

    broken = True

    def __call__(self, transcripts):
        if self.broken:
            super().__call__(transcripts)
            raise RuntimeError("no connection")
        return super().__call__(transcripts)


def said(*lines, persona=NURSE, max_turns=8, system="You are a nurse."):
    turns = tuple(Turn("What?", line) for line in lines)
    return Transcript(persona, system, turns, None, max_turns)


def cached(tmp_path, judge=None):
    return CachedJudge(judge or LengthJudge(), tmp_path / "verdicts.sqlite")


def rows(judge):
    with closing(sqlite3.connect(judge.path)) as file:
        return file.execute("SELECT key, judge, verdict FROM verdicts").fetchall()


# ---- what is asked, what comes back --------------------------------------------------------------


def test_a_verdict_is_asked_for_once_even_by_another_object(tmp_path):
    first = cached(tmp_path)
    asked = first([said("one"), said("?")])
    assert (first.hits, first.misses) == (0, 2)
    second = cached(tmp_path)
    known = second([said("?"), said("one")])
    assert second.judge.calls == 0 and (second.hits, second.misses) == (2, 0)
    assert known == asked[::-1]
    assert known[0].reward is None and known[0].parts["a"] is None
    assert list(known[0].parts) == ["z", "a", "prompt_to_line"]
    assert known[0].claims == ("pet=cat", "not pet=dog") and known[0].act == "disclose"


def test_the_misses_of_a_batch_are_asked_in_one_call_in_order_and_once_each(tmp_path):
    judge = cached(tmp_path)
    judge([said("b")])
    judge.judge.calls, judge.judge.asked = 0, []
    verdicts = judge([said(line) for line in ("d", "b", "ccc", "d", "aa", "b")])
    assert judge.judge.calls == 1 and judge.judge.asked == ["d", "ccc", "aa"]
    assert [64 * verdict.reward for verdict in verdicts] == [1, 1, 3, 1, 2, 1]
    assert (judge.hits, judge.misses) == (3, 4)


def test_an_empty_batch_asks_nobody(tmp_path):
    judge = cached(tmp_path)
    assert judge([]) == [] and judge.judge.calls == 0


def test_more_verdicts_than_a_query_can_name_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("ppg_env.verdict_cache._KEYS_A_QUERY", 2)
    judge = cached(tmp_path)
    batch = [said(str(number)) for number in range(5)]
    assert judge(batch) == judge(batch)
    assert judge.judge.calls == 1 and judge.hits == 5


def test_verdicts_of_the_rule_judge_come_back_equal(tmp_path):
    batch = [said("I work as a nurse."), said("I have a dog."), said("Well.", "I have a cat.")]
    plain = RuleJudge(get_domain("chatting"))(batch)
    for misses in (3, 0):
        judge = cached(tmp_path, RuleJudge(get_domain("chatting")))
        assert judge(batch) == plain and judge.misses == misses


def test_a_half_surrogate_in_a_line_is_no_obstacle(tmp_path):
    line = "\ud83d is half a smile"
    assert cached(tmp_path)([said(line)]) == cached(tmp_path)([said(line)])


OTHERS = {
    "turn": said("Hello", "I am a nurse."),
    "partner": Transcript(NURSE, "You are a nurse.", (Turn("Who?", "I am a nurse."),), None, 8),
    "max_turns": said("I am a nurse.", max_turns=9),
    "system": said("I am a nurse.", system="Talk."),
    "text": said("I am a nurse.", persona=replace(NURSE, text="You are a cook.")),
    "domain": said("I am a nurse.", persona=replace(NURSE, domain="therapy")),
    "facts": said("I am a nurse.", persona=replace(NURSE, facts={"job": "nurse", "pet": "dog"})),
    "traits": said("I am a nurse.", persona=replace(NURSE, traits={"a": "c"})),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_a_judge_may_see_tells_transcripts_apart(tmp_path, other):
    judge = cached(tmp_path)
    judge([said("I am a nurse.")])
    judge([OTHERS[other]])
    assert judge.misses == 2


def test_another_judge_never_gets_the_verdicts(tmp_path):
    cached(tmp_path)([said("one")])
    other = cached(tmp_path, LengthJudge("length/2"))
    other([said("one")])
    assert other.misses == 1
    assert sorted(judge for _, judge, _ in rows(other)) == ["length/1", "length/2"]


def test_a_persona_of_another_name_and_order_of_facts_is_the_same(tmp_path):
    judge = cached(tmp_path)
    judge([said("one")])
    twin = Persona("twin", NURSE.domain, NURSE.text, {"pet": "cat", "job": "nurse"}, {"a": "b"})
    judge([said("one", persona=replace(twin, split="test"))])
    assert judge.hits == 1


def test_the_file_holds_no_dialogue(tmp_path):
    judge = cached(tmp_path)
    judge.judge.judge = lambda transcript: Verdict(1.0, {}, "fits")
    judge([said("my secret", persona=replace(NURSE, text="You hide a secret."), system="secret")])
    content = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"length/1" in content and b"secret" not in content


def test_the_judges_own_attributes_stay_reachable(tmp_path):
    judge = cached(tmp_path)
    assert judge.cache_key == "length/1" and judge.remote and judge.nondeterministic
    judge([said("one")])
    assert judge.calls == 1
    assert getattr(judge, "parse_rate", None) is None
    rules = cached(tmp_path, RuleJudge(get_domain("chatting")))
    assert rules.domain.name == "chatting" and not rules.remote and not rules.nondeterministic


# ---- nothing wrong is kept, nothing is lost ------------------------------------------------------


def test_a_judge_that_breaks_down_leaves_nothing_behind(tmp_path):
    judge = cached(tmp_path, FailingJudge())
    with pytest.raises(RuntimeError, match="no connection"):
        judge([said("one"), said("two")])
    assert rows(judge) == [] and (judge.hits, judge.misses) == (0, 0)
    judge.judge.broken = False
    assert [verdict.reward for verdict in judge([said("one")])] == [3 / 64]


def test_a_judge_that_returns_too_few_verdicts_is_told_and_leaves_nothing_behind(tmp_path):
    judge = cached(tmp_path)
    judge.judge = type("Short", (LengthJudge,), {"__call__": lambda self, t: []})()
    with pytest.raises(ValueError, match="Short returned 0 verdicts for 1 transcripts"):
        judge([said("one")])
    assert rows(judge) == []


def test_verdicts_that_cannot_be_stored_are_returned_with_one_warning(tmp_path):
    """Verdicts were paid for when the disk was found to be full."""
    judge = cached(tmp_path)
    judge([said("known")])
    with closing(sqlite3.connect(judge.path)) as file:
        file.execute(
            "CREATE TRIGGER full BEFORE INSERT ON verdicts BEGIN SELECT RAISE(ABORT, 'full'); END"
        )
    with pytest.warns(RuntimeWarning, match=r"no longer kept.*verdicts\.sqlite.*full.*disk") as all:
        assert judge([said("one")])[0].reward == 3 / 64
        assert judge([said("seven"), said("known")])[0].reward == 5 / 64
    assert len(all) == 1 and len(rows(judge)) == 1
    assert judge.judge.asked == ["known", "one", "seven"]


def test_a_file_that_another_process_keeps_locked_costs_no_verdict(tmp_path, monkeypatch):
    monkeypatch.setattr("ppg_env.verdict_cache._PATIENCE", 0.0)
    judge = cached(tmp_path)
    with closing(sqlite3.connect(judge.path, isolation_level=None)) as file:
        file.execute("BEGIN IMMEDIATE")
        with pytest.warns(RuntimeWarning, match="locked"):
            assert judge([said("one")])[0].reward == 3 / 64


def test_a_verdict_that_json_cannot_hold_is_returned_all_the_same(tmp_path):
    judge = cached(tmp_path)
    odd = Verdict(1.0, {}, "fits", claims=(object(),))
    judge.judge.judge = lambda transcript: odd
    with pytest.warns(RuntimeWarning, match="no longer kept"):
        assert judge([said("one")]) == [odd]


@pytest.mark.skipif(sys.platform != "linux", reason="limits file sizes as Linux does")
def test_a_disk_that_is_really_full_costs_no_verdict(tmp_path):
    script = """
        import resource, sys, warnings
        from test_verdict_cache import LengthJudge, said
        from ppg_env.verdict_cache import CachedJudge
        judge = CachedJudge(LengthJudge(), sys.argv[1])
        judge([said("known")])
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for start in range(0, 400, 100):
                batch = [said(str(start + i)) for i in range(100)] + [said("known")]
                assert all(verdict.reward for verdict in judge(batch))
        assert len(told) == 1 and "no longer kept" in str(told[0].message), told
        assert judge.hits == 4, judge.hits
    """
    run_python(script, tmp_path / "verdicts.sqlite")
    judge = cached(tmp_path)
    assert judge([said("known")])[0].reward == 5 / 64 and judge.hits == 1


def test_a_killed_process_leaves_a_file_that_others_go_on_with(tmp_path):
    script = """
        import os, signal, sqlite3, sys
        from test_verdict_cache import LengthJudge, said
        from ppg_env.verdict_cache import CachedJudge
        judge = CachedJudge(LengthJudge(), sys.argv[1])
        judge([said("known")])
        with judge._opened() as file:
            file.execute("BEGIN IMMEDIATE")
            file.execute("INSERT INTO verdicts VALUES ('half', 'done', '{}')")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    run_python(script, tmp_path / "verdicts.sqlite", returncode=-9)
    judge = cached(tmp_path)
    judge([said("known"), said("new")])
    assert judge.judge.asked == ["new"] and len(rows(judge)) == 2


def run_python(script, *arguments, returncode=0):
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == returncode, done.stderr


# ---- errors that say what to do ------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "", 3])
def test_a_judge_without_a_cache_key_is_refused(tmp_path, key):
    with pytest.raises(ValueError, match="Give it an attribute cache_key: a text"):
        CachedJudge(LengthJudge(key), tmp_path / "verdicts.sqlite")


def test_a_judge_whose_cache_key_is_missing_is_told_why(tmp_path):
    class Unkeyed(LengthJudge):
        def __init__(self):
            pass

        @property
        def cache_key(self):
            raise AttributeError("part 'rules' has none")

    with pytest.raises(ValueError, match=r"part 'rules' has none.*Give it an attribute cache_key"):
        CachedJudge(Unkeyed(), tmp_path / "verdicts.sqlite")
    assert not list(tmp_path.iterdir())


def write_other_version(path):
    CachedJudge(LengthJudge(), path)
    with closing(sqlite3.connect(path)) as file:
        file.execute("PRAGMA user_version = 99")


def write_other_database(path):
    with closing(sqlite3.connect(path)) as file:
        file.execute("CREATE TABLE photos (name TEXT)")


WRONG_FILES = {
    "not a database": (lambda path: path.write_text("reward\n" * 999), ValueError, "another path"),
    "short text": (lambda path: path.write_text("reward"), ValueError, "another path"),
    "other version": (write_other_version, ValueError, "format 99.*reads format 1.*delete"),
    "other program": (write_other_database, ValueError, "another program.*another path"),
    "folder": (lambda path: path.mkdir(), OSError, "cannot be used.*hand in a path"),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_a_file_that_is_no_verdict_cache_is_refused_and_left_alone(tmp_path, kind):
    make, error, message = WRONG_FILES[kind]
    path = tmp_path / "verdicts.sqlite"
    make(path)
    before = path.is_file() and path.read_bytes()
    with pytest.raises(error, match=rf"verdicts\.sqlite.*{message}"):
        CachedJudge(LengthJudge(), path)
    assert before == (path.is_file() and path.read_bytes())


def test_a_file_where_a_folder_is_needed_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/verdicts\.sqlite cannot be used.*folder that you may"):
        CachedJudge(LengthJudge(), tmp_path / "file" / "verdicts.sqlite")


def test_a_folder_that_may_not_be_written_is_named(tmp_path):
    closed, existing = tmp_path / "closed", tmp_path / "closed" / "existing.sqlite"
    CachedJudge(LengthJudge(), existing)([said("one")])
    script = """
        import os, sys
        from test_verdict_cache import LengthJudge
        from ppg_env.verdict_cache import CachedJudge
        if os.geteuid() == 0:
            os.setuid(65534)  # root may write anywhere
        for path in sys.argv[1:]:
            try:
                CachedJudge(LengthJudge(), path)
            except OSError as error:
                assert path in str(error) and "folder that you may write to" in str(error), error
            else:
                raise AssertionError(path)
    """
    closed.chmod(0o555)
    try:
        run_python(script, closed / "new.sqlite", closed / "new" / "new.sqlite", existing)
    finally:
        closed.chmod(0o755)


def test_a_damaged_verdict_is_no_verdict(tmp_path):
    judge = cached(tmp_path)
    judge([said("one")])
    with closing(sqlite3.connect(judge.path)) as file, file:
        file.execute("UPDATE verdicts SET verdict = '{'")
    with pytest.raises(ValueError, match=r"verdicts\.sqlite holds a verdict that cannot be read"):
        judge([said("one")])
    assert judge.judge.calls == 1


def test_missing_folders_are_made_and_the_path_does_not_move(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    judge = CachedJudge(LengthJudge(), "new/folder/verdicts.sqlite")
    monkeypatch.chdir("/")
    judge([said("one")])
    assert [file.name for file in (tmp_path / "new" / "folder").iterdir()] == ["verdicts.sqlite"]


# ---- processes and threads -----------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda j: pickle.loads(pickle.dumps(j))])
def test_a_copy_uses_the_same_file(tmp_path, duplicate):
    judge = cached(tmp_path)
    judge([said("one")])
    twin = duplicate(judge)
    twin([said("one"), said("two")])
    assert twin.judge.asked == ["one", "two"] and judge([said("two")]) == twin([said("two")])


def test_a_copy_stays_a_cache_where_the_judge_copies_itself_in_its_own_way(tmp_path):
    """deepcopy found the judge's own method through the cache and returned the bare judge."""

    class Shared(LengthJudge):
        def __deepcopy__(self, memo):
            return self

    judge = cached(tmp_path, Shared())
    twin = copy.deepcopy(judge)
    assert type(twin) is CachedJudge and twin is not judge and twin.judge is judge.judge


def test_threads_may_share_one_judge(tmp_path):
    judge, found = cached(tmp_path), {}

    def ask(number):
        found[number] = [judge([said(str(i)), said(f"{number} {i}")]) for i in range(20)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert judge.hits + judge.misses == 4 * 20 * 2
    assert len(rows(judge)) == 20 + 4 * 20
    again = cached(tmp_path)
    for number, calls in found.items():
        assert calls == [again([said(str(i)), said(f"{number} {i}")]) for i in range(20)]
    assert again.misses == 0


def use_the_file(path, number, start):
    start.wait()
    for i in range(25):
        judge = CachedJudge(LengthJudge(), path)
        shared, own = said(f"shared {i}"), said(f"own {number} {i}")
        for batch in ([shared, own], [own, shared]):
            for transcript, verdict in zip(batch, judge(batch), strict=True):
                assert verdict == LengthJudge().judge(transcript)
        assert judge.hits >= 2 and judge.calls == 1


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_processes_may_share_one_file(tmp_path, method):
    context, path = multiprocessing.get_context(method), tmp_path / "verdicts.sqlite"
    start = context.Barrier(4)
    processes = [
        context.Process(target=use_the_file, args=(path, number, start)) for number in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    with closing(sqlite3.connect(path)) as file:
        assert file.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert len(rows(cached(tmp_path))) == 25 + 4 * 25


def make_files(folder, start):
    for i in range(60):
        start.wait()
        CachedJudge(LengthJudge(), folder / f"{i}.sqlite")


def test_a_file_that_another_process_is_just_making_is_waited_for(tmp_path):
    """One process in some hundred took it for the database of another program."""
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    processes = [context.Process(target=make_files, args=(tmp_path, start)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]


def test_a_judge_that_was_used_goes_on_in_a_forked_process(tmp_path):
    judge = cached(tmp_path)
    judge([said("one")])
    process = multiprocessing.get_context("fork").Process(
        target=judge, args=([said("one"), said("two")],)
    )
    process.start()
    process.join(120)
    assert process.exitcode == 0
    judge([said("one"), said("two"), said("three")])
    assert judge.judge.asked == ["one", "three"]
    assert {text for _, text, _ in rows(judge)} == {"length/1"} and len(rows(judge)) == 3
