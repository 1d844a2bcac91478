"""Stored dialogues scored again, and how far two judges agree on them."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from tiny_models import tiny_model, tiny_policy, tiny_tokenizer

import ppg_env
from agents import cli
from agents.lm_policy import LMPolicy
from agents.logs import parse_dialogue, read_log, write_log
from agents.policy import ScriptedPolicy
from agents.rollout import collect_rollouts
from agents.runs import RunFolder, read_metrics, read_records, read_transcripts
from agents.train import TrainConfig, train
from ppg_env import Persona, Transcript, Verdict
from ppg_env.chat_judge import ChatJudge
from ppg_env.judges import RuleJudge
from ppg_env.rejudge import LABELS, agreement, label, rejudge, rescored

DOMAINS = ("chatting", "education", "therapy")
LINES = ["I work as a nurse.", "It depends on the day.", "I have a dog.", "I feel angry."]


def played(domain: str, episodes: int = 6) -> list[dict[str, Any]]:
    """Dialogues of an agent that says the same four lines to everybody, as trainers store them."""
    envs = gym.make_vec("PersonaDialogue-v0", num_envs=episodes, domain=domain, max_turns=4)
    agent = ScriptedPolicy(lambda messages: LINES[len(messages) // 2 - 1])
    batch = collect_rollouts(envs, agent, seed=0)
    return json.loads(json.dumps(batch.records(), allow_nan=False))


class KeepsWhatItGets:
    """Scores the number of turns so far, and remembers the transcripts of each call."""

    def __init__(self) -> None:
        self.calls: list[list[Transcript]] = []

    def __call__(self, transcripts: Sequence[Transcript]) -> list[Verdict]:
        self.calls.append(list(transcripts))
        return [Verdict(1 / len(t.turns), {"prompt_to_line": 1.0}, "counted") for t in transcripts]


# --- scoring again --------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_judge_of_the_run_gives_the_rewards_of_the_run_again(domain: str) -> None:
    records = played(domain)
    judge = RuleJudge(ppg_env.get_domain(domain))
    again = list(rejudge(records, judge, domain, ppg_env.bundled_personas(domain)))
    assert [record for record, _ in again] == records
    for record, verdicts in again:
        assert [verdict.reward for verdict in verdicts] == record["rewards"]
        assert rescored(record, verdicts, "rules") == {**record, "judge": "rules"}


def test_every_turn_is_judged_as_it_stood_and_many_dialogues_in_one_call() -> None:
    records, judge = played("therapy", 5), KeepsWhatItGets()
    again = list(rejudge(records, judge, "therapy"))
    assert [[v.reward for v in verdicts] for _, verdicts in again] == [[1, 1 / 2, 1 / 3, 1 / 4]] * 5
    (call,) = judge.calls
    for record, last in zip(records, call[3::4], strict=True):
        assert last.messages() == record["messages"]
        assert last.persona.id == record["persona"]


def test_dialogues_are_read_as_they_are_needed_not_all_at_once() -> None:
    record, read = played("therapy", 1)[0], []

    def endless() -> Any:
        while True:
            read.append(1)
            yield record

    next(rejudge(endless(), KeepsWhatItGets(), "therapy"))
    assert len(read) <= 64


def test_a_persona_that_nobody_knows_is_made_from_what_the_agent_was_told() -> None:
    record = {**played("therapy", 1)[0], "persona": "from elsewhere"}
    judge = KeepsWhatItGets()
    list(rejudge([record, record], judge, "therapy"))
    first, second = judge.calls[0][0].persona, judge.calls[0][-1].persona
    assert first.text == record["messages"][0]["content"].removeprefix(
        ppg_env.get_domain("therapy").setting + " "
    )
    assert not first.facts and first is second
    with pytest.raises(ValueError, match=r"cannot judge persona 'from elsewhere'.*openai"):
        list(rejudge([record], RuleJudge(ppg_env.get_domain("therapy")), "therapy"))


def test_a_known_id_with_another_text_is_not_taken_for_the_known_persona() -> None:
    record = played("therapy", 1)[0]
    namesake = Persona(record["persona"], "therapy", "You are somebody else.")
    judge = KeepsWhatItGets()
    list(rejudge([record], judge, "therapy", [namesake]))
    assert judge.calls[0][0].persona is not namesake


def test_a_dialogue_that_the_partner_closed_has_a_verdict_for_each_of_its_turns() -> None:
    record = played("therapy", 1)[0]
    closed = [*record["messages"], {"role": "user", "content": "Goodbye!"}]
    ((_, verdicts),) = rejudge([{**record, "messages": closed}], KeepsWhatItGets(), "therapy")
    assert len(verdicts) == 4


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "'p' has no messages"),
        ([{"role": "assistant", "content": "Hi."}], r"\['system', 'assistant'\], not system"),
        (
            [
                {"role": "system", "content": "You."},
                {"role": "assistant", "content": "Hi."},
                {"role": "user", "content": "Hi."},
            ],
            "'p' is no dialogue",
        ),
    ],
)
def test_records_that_are_no_dialogues_are_named(messages: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        list(rejudge([{"persona": "p", "messages": messages}], KeepsWhatItGets(), "therapy"))


# --- agreement ------------------------------------------------------------------------------------


def test_labels_come_from_the_part_prompt_to_line() -> None:
    assert [label(part) for part in (1.0, 0.0, None)] == list(LABELS)


def test_accuracy_and_kappa_are_those_of_the_textbook() -> None:
    # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: observed .7, by chance .5, kappa .4
    first = ["consistent"] * 25 + ["contradicts"] * 25 + ["unscorable", "consistent"]
    second = (
        ["consistent"] * 20 + ["contradicts"] * 5 + ["consistent"] * 10 + ["contradicts"] * 15
    ) + ["contradicts", "unscorable"]
    found = agreement(first, second, [f"persona {i % 7}" for i in range(52)])
    assert found.confusion.tolist() == [[20, 5, 1], [10, 15, 0], [0, 1, 0]]
    assert (found.num_lines, found.num_scored) == (52, 50)
    assert found.accuracy.value == pytest.approx(0.7)
    assert found.kappa.value == pytest.approx(0.4)
    assert found.kappa.low < 0.4 < found.kappa.high


def test_judges_that_never_score_the_same_line_have_no_agreement_to_show() -> None:
    found = agreement(["unscorable", "consistent"], ["consistent", "unscorable"], ["a", "b"])
    assert np.isnan([found.accuracy.value, found.accuracy.low, found.kappa.value]).all()
    assert found.num_scored == 0


def test_one_persona_gives_no_interval() -> None:
    found = agreement(["consistent"] * 9, ["consistent"] * 8 + ["contradicts"], ["a"] * 9)
    assert found.accuracy.value == pytest.approx(8 / 9)
    assert np.isnan([found.accuracy.low, found.accuracy.high]).all()


def test_intervals_resample_personas_and_not_lines() -> None:
    # Each persona is all right or all wrong: 200 lines say no more than 20 personas do.
    first = ["consistent"] * 200
    second = [LABELS[i // 10 % 2] for i in range(200)]
    together = agreement(first, second, [f"{i // 10}" for i in range(200)])
    apart = agreement(first, second, [f"{i}" for i in range(200)])
    width, narrow = (a.accuracy.high - a.accuracy.low for a in (together, apart))
    assert width > 2 * narrow


def test_nineteen_of_twenty_intervals_hold_the_truth() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        right_PL = rng.random((40, 6)) < rng.beta(8, 2, size=(40, 1))
        labels = [LABELS[0 if right else 1] for right in right_PL.flat]
        people = [f"{i // 6}" for i in range(240)]
        found = agreement(["consistent"] * 240, labels, people, seed=trial)
        held += found.accuracy.low <= 0.8 <= found.accuracy.high
    assert 0.90 <= held / 200 <= 0.98


# --- run folders and the command line -------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = RunFolder(tmp_path / "run", {"domain": "therapy"})
    folder.write_transcripts(played("therapy"))
    return tmp_path / "run"


def ppg(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["ppg", *map(str, arguments)])
    cli.main()


def test_rejudge_writes_beside_the_old_rewards(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "transcripts.jsonl").read_bytes()
    ppg(monkeypatch, "rejudge", run, "--judge", "rules", "--dialogues", 4)
    records = list(read_records(run / "rejudged" / "rules.jsonl"))
    old = list(read_transcripts(run))[:4]
    assert records == [{**record, "judge": "rules"} for record in old]
    assert (run / "transcripts.jsonl").read_bytes() == before
    mean = np.mean([record["rewards"] for record in old])
    shown = capsys.readouterr().out
    assert shown.count(f"{mean:.3f}") == 2 and "│ 4 " in shown


def test_a_log_that_nobody_scored_becomes_one_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = played("therapy")
    bare = [{"messages": r["messages"], "persona": r["persona"], "ticket": 3} for r in records]
    log, out = tmp_path / "own log.jsonl.gz", tmp_path / "scored.jsonl"
    write_log(log, [parse_dialogue(record, unscored=True) for record in bare])
    with gzip.open(log, "rt") as lines:
        assert json.loads(next(lines))["rewards"] == [None] * 4
    judged = ("rejudge", log, "--judge", "rules", "--domain", "therapy", "--out")
    ppg(monkeypatch, *judged, out)
    found = list(read_log(out))
    assert [list(d.rewards) for d in found] == [r["rewards"] for r in records]
    assert {(d.judge, d.extra["ticket"]) for d in found} == {("rules", 3)}
    assert f"{len(records)} dialogues, mean reward" in capsys.readouterr().out
    for wrong, message in (
        (("rejudge", log, "--judge", "rules"), "name the log to write, --out"),
        (("rejudge", log, "--judge", "rules", "--out", out), "name no domain.*module:NAME"),
        ((*judged, log), "is the log itself"),
        ((*judged[:4], "--domain", "nowhere:X", "--out", out), "There is no domain nowhere:X"),
        ((*judged[:4], "--domain", "own_domain:GUESTS", "--out", out), "is a list, not a Domain"),
        ((*judged[:4], "--domain", "own_domain:CAFE", "--out", out), "it has a text but no facts"),
    ):
        with pytest.raises(SystemExit):
            ppg(monkeypatch, *wrong)
        assert re.search(message, " ".join("".join(capsys.readouterr()).split())), message
    assert list(read_log(out)) == found


def test_dialogues_of_two_domains_are_not_judged_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = played("therapy", 2) + played("chatting", 1)
    write_log(tmp_path / "log.jsonl", map(parse_dialogue, records))
    for command in (
        ("rejudge", tmp_path / "log.jsonl", "--judge", "rules", "--out", tmp_path / "out.jsonl"),
        ("evaluate", "--log", tmp_path / "log.jsonl"),
    ):
        with pytest.raises(SystemExit):
            ppg(monkeypatch, *command)
        shown = " ".join(capsys.readouterr().out.split())
        assert "'therapy' in its first dialogue, 'chatting' in number 3" in shown
    assert not (tmp_path / "out.jsonl").exists()


def test_a_run_without_rewards_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = played("therapy")
    bare = [{k: r[k] for k in ("messages", "persona")} for r in records]
    RunFolder(tmp_path / "run", {"domain": "therapy"}).write_transcripts(bare)
    ppg(monkeypatch, "rejudge", tmp_path / "run", "--judge", "rules")
    again = list(read_records(tmp_path / "run" / "rejudged" / "rules.jsonl"))
    assert [r["rewards"] for r in again] == [r["rewards"] for r in records]
    assert f"{np.mean([r['rewards'] for r in records]):.3f}" in capsys.readouterr().out
    RunFolder(tmp_path / "own", {}).write_transcripts(bare)
    judges = ("--judges", "rules", "rules", "--domain", "therapy")
    ppg(monkeypatch, "calibrate", tmp_path / "own", *judges)
    assert "│ therapy" in capsys.readouterr().out


def test_single_turns_of_an_agent_are_measured_on_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = played("therapy", 2)
    write_log(tmp_path / "log.jsonl", map(parse_dialogue, records))
    tiny_policy().save(tmp_path / "model")
    ppg(monkeypatch, "evaluate", "--agent", tmp_path / "model", "--log", tmp_path / "log.jsonl")
    shown = " ".join(capsys.readouterr().out.split())
    assert "in 8 logged turns" in shown
    assert f"the logged lines there │ {np.mean([r['rewards'] for r in records]):.3f}" in shown


def test_calibrate_compares_two_judges_by_domain(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    RunFolder(run.parent / "other", {}).write_transcripts(played("chatting"))
    ppg(monkeypatch, "calibrate", run.parent, "--judges", "stored", "rules")
    shown = capsys.readouterr().out
    for domain in ("therapy", "chatting"):
        assert f"│ {domain}" in shown and f"{domain}: lines by label" in shown
    assert "1.00 [1.00, 1.00]" in shown and "│ 24 " in shown


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("rejudge", "nowhere", "--judge", "rules"), "There is no run and no log nowhere"),
        (("rejudge", "{run}", "--judge", "rulez"), "got 'rulez'"),
        (("calibrate", "{run}", "--judges", "stored", "openai:m@nowhere"), "m@nowhere"),
    ],
)
def test_what_cannot_be_judged_is_said(
    run: Path,
    arguments: tuple[str, ...],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "nowhere" in arguments[-1]:
        monkeypatch.setattr("ppg_env.chat._UNREACHABLE_PATIENCE", 0.0)
        monkeypatch.setattr("ppg_env.chat.OPENAI_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(SystemExit) as ended:
        ppg(monkeypatch, *(argument.format(run=run) for argument in arguments))
    assert ended.value.code == 2
    assert named in capsys.readouterr().out


# --- what trainers store --------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    tiny_policy().save(tmp_path / "model")
    return TrainConfig(
        model=str(tmp_path / "model"),
        run=str(tmp_path / "run"),
        device="cpu",
        episodes=4,
        group_size=2,
        max_turns=2,
        max_new_tokens=6,
        total_timesteps=3 * 4 * 2,
        checkpoint_every=1,
    )


def with_(config: TrainConfig, **changes: Any) -> TrainConfig:
    return TrainConfig(**{**vars(config), **changes})


def test_training_stores_every_dialogue_with_what_it_earned(config: TrainConfig) -> None:
    agent = train(config, progress_bar=False)
    records = list(read_transcripts(config.run))
    assert [record["update"] for record in records] == [1] * 4 + [2] * 4 + [3] * 4
    assert {record["domain"] for record in records} == {"chatting"}
    assert len({record["group"] for record in records}) == 6
    for update, row in enumerate(agent.history, start=1):
        rewards = [r for record in records if record["update"] == update for r in record["rewards"]]
        assert np.mean(rewards) == pytest.approx(row["rollout/turn_rew_mean"])
    known = {persona.id: persona for persona in ppg_env.bundled_personas("chatting", "train")}
    for record in records:
        assert known[record["persona"]].text in record["messages"][0]["content"]
        assert len(record["rewards"]) == len(record["reasons"]) == 2
        assert {len(parts) for parts in record["reward_parts"].values()} == {2}


def test_a_run_that_goes_on_stores_no_dialogue_twice(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = with_(config, run=str(tmp_path / "whole"))
    train(whole, progress_bar=False)

    def power_cut(folder: RunFolder, records: Any, update: int) -> None:
        keep(folder, records, update)
        if update == 3:
            with (folder.path / "transcripts.jsonl").open("a") as file:
                file.write('{"update": 4, "mess')
            raise KeyboardInterrupt

    keep = RunFolder.add_transcripts
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "add_transcripts", power_cut)
        with pytest.raises(KeyboardInterrupt):
            train(config, progress_bar=False)
    assert len(list(read_transcripts(config.run))) == 12  # the third was played, not checkpointed
    train(config, progress_bar=False)
    texts = [(Path(run) / "transcripts.jsonl").read_text() for run in (config.run, whole.run)]
    assert texts[0] == texts[1] and texts[0].count("\n") == 12


def test_dialogues_are_not_stored_where_nobody_wants_them(config: TrainConfig) -> None:
    train(with_(config, keep_transcripts=False), progress_bar=False)
    assert not (Path(config.run) / "transcripts.jsonl").exists()


def test_a_judge_that_babbles_stops_the_run_and_no_reward_is_made_up(
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # A random model with room for the question; what it answers holds no verdict.
    folder = tmp_path / "judge"
    LMPolicy(tiny_model("llama", max_position_embeddings=8192), tiny_tokenizer()).save(folder)
    monkeypatch.setitem(ChatJudge.__init__.__kwdefaults__, "max_tokens", 8)
    kept = ("model", "run", "device", "episodes", "group_size", "max_turns", "max_new_tokens")
    arguments = [f"--{name}={getattr(config, name)}" for name in kept]
    with pytest.raises(SystemExit) as ended:
        ppg(monkeypatch, "train", *arguments, f"--judge=hf:{folder}", "--total_timesteps=200")
    assert ended.value.code == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"Only 0% of the latest \d\d answers .* end in a verdict", shown)
    rewards = [r for record in read_transcripts(config.run) for r in record["rewards"]]
    assert rewards and all(reward in (None, 0.0) for reward in rewards)
    assert [row["judge/parse_rate"] for row in read_metrics(config.run)] == [0.0, 0.0]
