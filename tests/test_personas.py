import copy
import json
import os
import pickle
from collections import Counter
from pathlib import Path

import gymnasium as gym
import pytest
from speakers import DOMAIN_NAMES

from ppg_env import (
    DOMAINS,
    Persona,
    PersonaFileError,
    Verdict,
    bundled_personas,
    load_personas,
)
from ppg_env.data.make import make_personas
from ppg_env.personas import SPLITS, find_persona, parse_persona, resolve_personas

FOLDER = Path(
    os.environ.get("CONSISTENT_LLMS")
    or Path(__file__).parent.parent.parent / "shared/data/consistent_llms"
)
GOOD = {
    "id": "own-1",
    "domain": "therapy",
    "name": "Ada",
    "split": "test",
    "facts": {"job": "nurse", "pastime": "chess", "symptom": "insomnia", "feeling": "numb"},
    "traits": {"guardedness": "open"},
}


def write(path, *records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_at_least_300_personas_are_bundled_and_split_by_persona(domain):
    everybody = bundled_personas(domain)
    assert len(everybody) >= 300
    assert len({persona.id for persona in everybody}) == len(everybody)
    assert len({tuple(persona.facts.items()) for persona in everybody}) == len(everybody)

    parts = {split: bundled_personas(domain, split) for split in SPLITS}
    assert sum(map(len, parts.values())) == len(everybody)
    assert all(len(part) >= 40 for part in parts.values())
    assert all(persona.split == split for split, part in parts.items() for persona in part)


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_bundled_personas_are_diverse(domain):
    """Every value of every attribute occurs in the training split, none in most personas."""
    people = bundled_personas(domain, "train")
    for attribute in DOMAINS[domain].attributes:
        counts = Counter(persona.facts[attribute.name] for persona in people)
        assert set(counts) == set(attribute.values)
        assert max(counts.values()) < 2.5 * len(people) / len(attribute.values)
    for trait, values in DOMAINS[domain].traits.items():
        assert {persona.traits[trait] for persona in people} == set(values)


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_the_bundled_files_are_what_the_generator_makes(domain):
    made = [parse_persona(record, DOMAINS[domain]) for record in make_personas(DOMAINS[domain])]
    assert [vars_of(p) for p in made] == [vars_of(p) for p in bundled_personas(domain)]


def vars_of(persona):
    return (
        persona.id,
        persona.domain,
        persona.text,
        dict(persona.facts),
        dict(persona.traits),
        persona.split,
    )


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_a_persona_text_tells_every_fact_and_trait(domain):
    world = DOMAINS[domain]
    for persona in bundled_personas(domain, "validation"):
        for name, value in persona.facts.items():
            assert world.by_name[name].values[value][0] in persona.text
        for trait, value in persona.traits.items():
            assert world.traits[trait][value] in persona.text


def test_an_own_file_loads_like_the_bundled_ones(tmp_path):
    (persona,) = load_personas(write(tmp_path / "own.jsonl", GOOD, ""), "therapy")
    assert (persona.id, persona.split, persona.facts["feeling"]) == ("own-1", "test", "numb")
    assert "You are Ada." in persona.text
    assert "open and trust quickly" in persona.text


def test_a_text_of_ones_own_replaces_the_generated_one(tmp_path):
    record = {"id": "free", "text": "You are Zoë and love 東京."}
    (persona,) = load_personas(write(tmp_path / "own.jsonl", record), "therapy")
    assert persona.text == "You are Zoë and love 東京."
    assert not persona.facts
    assert persona.split == "train"


def test_a_record_with_a_text_may_have_further_fields(tmp_path):
    more = {"source": "a friend", "age": 40, "context": None, "uid": "7", "tags": ["x"]}
    record = {"id": "free", "domain": "therapy", "text": "You are Ada.", **more}
    (persona,) = load_personas(write(tmp_path / "own.jsonl", record), "therapy")
    assert vars_of(persona) == ("free", "therapy", "You are Ada.", {}, {}, "train")


@pytest.mark.parametrize(
    ("field", "meant"),
    [("fact", "facts"), ("FACTS", "facts"), ("trait", "traits"), ("spilt", "split")],
)
def test_a_further_field_that_looks_misspelt_is_named(tmp_path, field, meant):
    record = {"id": "free", "text": "You are Ada.", field: {}}
    with pytest.raises(PersonaFileError, match=f"'{field}' is unknown, did you mean '{meant}'"):
        load_personas(write(tmp_path / "own.jsonl", record), "therapy")


def test_two_personas_with_one_text_are_one_too_many(tmp_path):
    text = "You are Ada."
    records = [{"id": name, "text": text} for name in ("a", "b")]
    guarded = {"id": "c", "text": text, "traits": {"guardedness": "guarded"}}
    factual = {"id": "d", "text": text, "facts": GOOD["facts"]}
    path = write(tmp_path / "own.jsonl", *records, guarded, factual)
    with pytest.raises(
        PersonaFileError, match="line 2: field 'text': the same text as 'a'"
    ) as caught:
        load_personas(path, "therapy")
    assert [persona.id for persona in caught.value.personas] == ["a", "c", "d"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"id": ""}, ["'id'"]),
        ({"id": None}, ["'id'"]),
        ({"id": 7}, ["'id'", "7"]),
        ({"domain": "chatting"}, ["'domain'", "therapy", "chatting"]),
        ({"split": "dev"}, ["'split'", "dev", "validation"]),
        ({"facts": ["job"]}, ["'facts'"]),
        ({"facts": {}}, ["'facts'"]),
        ({"facts": {"pet": "dog"}}, ["'facts.pet'", "symptom"]),
        ({"facts": {"job": "nurze"}}, ["'facts.job'", "nurze", "did you mean 'nurse'"]),
        ({"facts": {"job": 3}}, ["'facts.job'", "3"]),
        ({"facts": {"job": ["nurse"]}}, ["'facts.job'", "nurse"]),
        ({"traits": {"guardedness": "shut"}}, ["'traits.guardedness'", "shut", "guarded"]),
        ({"traits": {"mood": "good"}}, ["'traits.mood'"]),
        ({"text": ""}, ["'text'"]),
        ({"text": 5}, ["'text'"]),
        ({"txet": "You are Ada."}, ["'txet'", "text"]),
    ],
)
def test_a_malformed_line_is_named_with_its_field_and_the_others_are_unharmed(
    tmp_path, change, named
):
    other = {**GOOD, "id": "own-2"}
    path = write(tmp_path / "own.jsonl", other, {**GOOD, **change}, {**GOOD, "id": "own-3"})
    with pytest.raises(PersonaFileError) as caught:
        load_personas(path, "therapy")
    (problem,) = caught.value.problems
    assert problem.startswith("line 2: ")
    assert all(word in problem for word in named)
    assert [persona.id for persona in caught.value.personas] == ["own-2", "own-3"]
    assert problem in str(caught.value)
    assert str(path) in str(caught.value)
    assert [p.id for p in load_personas(path, "therapy", on_error="skip")] == ["own-2", "own-3"]


@pytest.mark.parametrize(
    ("line", "named"),
    [("{not json", "not JSON"), ("[1, 2]", "list"), ("null", "NoneType"), ('"text"', "str")],
)
def test_a_line_that_is_no_json_object_is_named(tmp_path, line, named):
    with pytest.raises(PersonaFileError, match=f"line 2: .*{named}"):
        load_personas(write(tmp_path / "own.jsonl", GOOD, line), "therapy")


def test_an_id_may_be_used_once(tmp_path):
    with pytest.raises(
        PersonaFileError, match=r"line 2: field 'id': 'own-1' is used by an earlier"
    ):
        load_personas(write(tmp_path / "own.jsonl", GOOD, GOOD), "therapy")


def test_all_malformed_lines_are_reported_at_once(tmp_path):
    path = write(tmp_path / "own.jsonl", *(["{"] * 25), GOOD)
    with pytest.raises(
        PersonaFileError, match=r"(?s)25 malformed line.*1 good one.*and 5 more"
    ) as caught:
        load_personas(path, "therapy")
    assert len(caught.value.problems) == 25


def test_a_file_without_personas_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no personas"):
        load_personas(write(tmp_path / "own.jsonl", ""), "therapy")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.jsonl"):
        load_personas(tmp_path / "nowhere.jsonl", "therapy")


def test_an_unknown_way_of_handling_errors_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'raise' or 'skip', got 'ignore'"):
        load_personas(write(tmp_path / "own.jsonl", GOOD), "therapy", on_error="ignore")


def test_personas_may_be_a_split_a_file_or_objects(tmp_path):
    therapy = DOMAINS["therapy"]
    path = write(tmp_path / "own.jsonl", GOOD)
    mine = Persona("mine", "therapy", "You are Ada.")
    assert resolve_personas(None, therapy) == bundled_personas("therapy", "train")
    assert resolve_personas("validation", therapy) == bundled_personas("therapy", "validation")
    assert resolve_personas("all", therapy) == bundled_personas("therapy")
    assert [p.id for p in resolve_personas(path, therapy)] == ["own-1"]
    assert [p.id for p in resolve_personas(str(path), therapy)] == ["own-1"]
    assert resolve_personas([mine], therapy) == (mine,)


@pytest.mark.parametrize(
    ("personas", "error", "named"),
    [
        ("tset", ValueError, "Did you mean 'test'"),
        ([], ValueError, "at least one Persona"),
        ([{"id": "x"}], TypeError, "Persona objects"),
        ("nowhere.jsonl", FileNotFoundError, "nowhere.jsonl"),
    ],
)
def test_what_stands_for_no_personas_is_refused(personas, error, named):
    with pytest.raises(error, match=named):
        resolve_personas(personas, DOMAINS["therapy"])


def test_an_unknown_id_suggests_the_nearest():
    people = bundled_personas("therapy")
    assert find_persona("therapy-0007", people) is people[7]
    assert find_persona(people[7], ()) is people[7]
    with pytest.raises(ValueError, match=r"'therapy-9997'.*Nearest: .*therapy-0"):
        find_persona("therapy-9997", people)


def test_a_persona_cannot_be_changed_and_survives_pickling_and_copying():
    persona = bundled_personas("therapy")[0]
    with pytest.raises(TypeError):
        persona.facts["job"] = "pilot"  # type: ignore[index]
    for twin in (pickle.loads(pickle.dumps(persona)), copy.deepcopy(persona)):
        assert vars_of(twin) == vars_of(persona)


# ---- files that are one JSON document ------------------------------------------------------------


def dump(path, document):
    path.write_text(json.dumps(document, indent=4), encoding="utf-8")
    return path


def quoted(text):
    """Return a text as Consistent-LLMs keeps it: in quotes, with literal \\n and \\"."""
    return json.dumps(text)


MIA, BEN = 'Meet "Mia".\nShe bakes.', "Ben, who runs. C:\\new"
PUBLISHED = {
    "chatting": [{"persona": quoted(MIA), "name": "Mia"}, {"persona": quoted(BEN), "name": "Ben"}],
    "education": [
        ["Rivers", {"grade_level": "college", "description": "I learn by drawing."}],
        ["Clouds", {"grade_level": "college", "description": "I learn by asking."}],
    ],
    "therapy": [
        {"description": "I cannot sleep.", "strategy": "I joke."},
        {"description": ' I "worry".', "strategy": None},
    ],
}
TEXTS = {
    "chatting": [MIA, BEN],
    "education": ["I learn by drawing.", "I learn by asking."],
    "therapy": ["I cannot sleep.", ' I "worry".'],
}


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_published_personas_load_as_they_are(tmp_path, domain):
    path = dump(tmp_path / "config.json", PUBLISHED[domain])
    people = load_personas(path, domain)
    assert [persona.text for persona in people] == TEXTS[domain]
    assert [persona.id for persona in people] == ["config-0000", "config-0001"]
    assert all(not p.facts and p.domain == domain and p.split == "train" for p in people)
    assert [vars_of(p) for p in load_personas(path, domain)] == [vars_of(p) for p in people]


def test_published_students_are_one_for_each_topic(tmp_path):
    """The form repeats a description where it belongs to several topics."""
    same = {"grade_level": "college", "description": "I learn by drawing."}
    path = dump(tmp_path / "config.json", [["Rivers", same], ["Clouds", same]])
    assert [p.id for p in load_personas(path, "education")] == ["config-0000", "config-0001"]


def test_a_quoted_text_may_hold_line_breaks_as_they_are(tmp_path):
    document = [
        {"persona": '"Mia.\nShe bakes."', "name": "Mia"},
        {"persona": "Ben.", "name": "Ben"},
    ]
    people = load_personas(dump(tmp_path / "config.json", document), "chatting")
    assert [persona.text for persona in people] == ["Mia.\nShe bakes.", "Ben."]


def test_numbered_texts_load_in_any_domain(tmp_path):
    path = dump(
        tmp_path / "sampled.json", {"persona_7": "I cannot sleep.", "persona_3": '"I run."'}
    )
    people = load_personas(path, "therapy")
    assert [(p.id, p.text) for p in people] == [
        ("sampled-0000", "I cannot sleep."),
        ("sampled-0001", '"I run."'),
    ]
    assert len(load_personas(path, "chatting")) == 2


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_personas_sorted_by_domain_load_for_one_of_them(tmp_path, domain):
    texts = {"therapy": ["You are Ada."], "chatting": [quoted(MIA)], "education": ["I learn."]}
    document = {name: [{"text": t, "source": "x"} for t in ts] for name, ts in texts.items()}
    (persona,) = load_personas(dump(tmp_path / "all.json", document), domain)
    assert persona.id == f"all-{domain}-0000"
    assert persona.text == {"chatting": MIA}.get(domain, texts[domain][0])


def test_a_dialogue_file_gives_each_persona_once(tmp_path):
    spoken = {"conversation": [[0, "Mia: Hi!\n"]], "task_name": "Chatting"}
    pairs = [(quoted(MIA), quoted(BEN)), (quoted(BEN), quoted(MIA)), (quoted("Ada."), quoted(MIA))]
    path = dump(tmp_path / "run.json", [{**spoken, "P1": a, "P2": b} for a, b in pairs])
    assert [(p.id, p.text) for p in load_personas(path, "chatting")] == [
        ("run-0000-P1", MIA),
        ("run-0000-P2", BEN),
        ("run-0002-P1", "Ada."),
    ]

    lesson = {"conversation": [], "task_name": "Education", "P1": "", "P2": "I learn."}
    (persona,) = load_personas(dump(tmp_path / "lesson.json", [lesson, lesson]), "education")
    assert (persona.id, persona.text) == ("lesson-0000-P2", "I learn.")


def test_a_list_of_ordinary_records_loads_like_their_lines(tmp_path):
    records = [GOOD, {"id": "free", "text": "You are Ada.", "persona": "x", "description": "y"}]
    listed = load_personas(dump(tmp_path / "own.json", records), "therapy")
    lines = load_personas(write(tmp_path / "own.jsonl", *records), "therapy")
    assert [vars_of(p) for p in listed] == [vars_of(p) for p in lines]
    assert [p.id for p in load_personas(write(tmp_path / "l.json", *records), "therapy")] == [
        "own-1",
        "free",
    ]
    assert [p.id for p in load_personas(dump(tmp_path / "one.json", GOOD), "therapy")] == ["own-1"]


CHATTING, EDUCATION, THERAPY = (PUBLISHED[name] for name in DOMAIN_NAMES)
DIALOGUE = {"conversation": [], "task_name": "Therapy", "P1": "", "P2": "I run."}


@pytest.mark.parametrize(
    ("domain", "bad", "named"),
    [
        ("chatting", {"persona": ""}, ["'persona'", "empty"]),
        ("chatting", {"persona": '""'}, ["'persona'", "empty"]),
        ("chatting", {"persona": '"a" and "b"'}, ["'persona'", "no JSON string"]),
        ("chatting", {"persona": quoted("a\0b")}, ["'persona'", "NUL"]),
        ("chatting", {"persona": 7}, ["'persona'", "7"]),
        ("chatting", {"name": "Mia"}, ["'persona' is missing"]),
        ("chatting", {"persona": quoted(MIA)}, ["'persona'", "the same text as 'config-0000'"]),
        ("chatting", "Mia", ["JSON object", "str"]),
        ("education", ["Rivers"], ["[topic, description and grade]", "Rivers"]),
        ("education", [7, {"description": "I learn."}], ["[topic, description and grade]"]),
        ("education", ["Rivers", {"grade_level": "x"}], ["'description' is missing"]),
        ("education", ["Rivers", {"description": " "}], ["'description'", "empty"]),
        ("education", ["Rivers", "I learn."], ["JSON object", "str"]),
        ("therapy", {"strategy": "I joke."}, ["'description' is missing"]),
        ("therapy", {"description": None}, ["'description'", "None"]),
        ("therapy", {"description": "I cannot sleep."}, ["'description'", "the same text as"]),
        ("therapy", {"description": "\ud800"}, ["'description'", "surrogate"]),
        ("therapy", None, ["JSON object", "NoneType"]),
    ],
)
def test_a_bad_published_record_is_named_with_its_field_and_the_others_are_unharmed(
    tmp_path, domain, bad, named
):
    path = dump(tmp_path / "config.json", [*PUBLISHED[domain], bad])
    with pytest.raises(PersonaFileError) as caught:
        load_personas(path, domain)
    (problem,) = caught.value.problems
    assert problem.startswith("record 2: ")
    assert all(word in problem for word in named)
    assert "1 malformed record(s), 2 good one(s)" in str(caught.value)
    assert [p.text for p in caught.value.personas] == TEXTS[domain]
    assert len(load_personas(path, domain, on_error="skip")) == 2


@pytest.mark.parametrize(
    ("domain", "document", "named"),
    [
        ("therapy", CHATTING, "record 0: field 'persona': a persona for 'chatting'"),
        ("chatting", THERAPY, "record 1: field 'description': a persona for 'therapy'"),
        ("therapy", EDUCATION, "record 0: field 'description': a persona for 'education'"),
        ("chatting", [DIALOGUE], "record 0: field 'P2': a persona for 'therapy'"),
        ("therapy", [{**DIALOGUE, "task_name": 7}], "record 0: field 'task_name'"),
        ("therapy", [{**DIALOGUE, "P2": None}], "record 0: field 'P2': expected a text, got None"),
        ("therapy", [DIALOGUE, {"P1": "I sing."}], "record 1: field 'task_name' is missing"),
        ("therapy", [DIALOGUE, 7], "record 1: expected a JSON object, got int"),
        ("therapy", {"chatting": [], "education": []}, "no personas for 'therapy'.*chatting"),
        ("therapy", {"therapy": [{"source": "x"}]}, "therapy record 0: field 'text' is missing"),
        ("therapy", {"persona_1": 7}, "record 'persona_1': field 'persona_1'.*got 7"),
        ("therapy", {"persona_1": "I run.", "persona_2": "I run."}, "'persona_2': the same text"),
        ("therapy", {"agent1_role": "Therapist", "scenario": "x"}, "'agent1_role' is unknown"),
        ("therapy", {"id": "x", "txet": "I run."}, "'txet' is unknown, did you mean 'text'"),
        ("therapy", 7, "record 0: expected a JSON object, got int"),
        ("therapy", [7], "record 0: expected a JSON object, got int"),
        ("therapy", [{"text": "I run."}], "record 0: field 'id'"),
    ],
)
def test_a_document_that_is_none_of_the_forms_or_of_another_domain_is_refused(
    tmp_path, domain, document, named
):
    path = dump(tmp_path / "config.json", document)
    with pytest.raises(PersonaFileError, match=named):
        load_personas(path, domain)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'[\n{"persona": \n', r"not JSON \(.* at line 3, column 1\)"),
        (b'{\n"persona_1": }', "not JSON .* line 2"),
        (b"Mia bakes.", "not JSON"),
        (b'[{"persona": "\xff"}]', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_document_that_is_no_json_is_refused(tmp_path, content, named):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(PersonaFileError, match=named):
        load_personas(tmp_path / "config.json", "therapy")


@pytest.mark.parametrize("document", [[], {"therapy": []}])
def test_a_document_without_personas_is_refused(tmp_path, document):
    with pytest.raises(ValueError, match="holds no personas"):
        load_personas(dump(tmp_path / "config.json", document), "therapy")


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_an_environment_plays_published_personas(tmp_path, domain):
    path = dump(tmp_path / "config.json", PUBLISHED[domain])

    def judge(transcripts):
        return [Verdict(1.0, {}, "fine") for _ in transcripts]

    env = gym.make("PersonaDialogue-v0", domain=domain, personas=str(path), judge=judge)
    observation, _ = env.reset(seed=1)
    assert any(observation[0]["content"].endswith(text) for text in TEXTS[domain])
    for line in ("I see.", "That is how it is.", "I bake on Sundays."):
        assert env.step(line)[1] == 1.0


@pytest.mark.skipif(not (FOLDER / "raw").is_dir(), reason="needs the Consistent-LLMs data set")
@pytest.mark.parametrize(
    ("domain", "name", "people", "texts"),
    [
        ("chatting", "raw/chatting/config_chatting_personas.json", 100, 100),
        ("education", "raw/education/config_education_personas.json", 49, 13),
        ("therapy", "raw/therapy/config_therapy_personas.json", 50, 50),
        ("therapy", "raw/therapy/MentalChat16K_sampled_personas.json", 50, 50),
        ("chatting", "personas_dev.json", 100, 100),
        ("education", "personas_dev.json", 13, 13),
        ("therapy", "personas_dev.json", 100, 100),
        ("chatting", "raw/chatting/exp/dialogues/gemma-2-2b-it_0_10_89.json", 100, 100),
        ("education", "raw/education/exp/dialogues/mistral-instruct_0_615.json", 10, 10),
        ("therapy", "raw/therapy/exp/dialogues/mistral-instruct_0_261.json", 4, 4),
    ],
)
def test_the_published_files_load_whole(domain, name, people, texts):
    loaded = load_personas(FOLDER / name, domain)
    assert len(loaded) == len({persona.id for persona in loaded}) == people
    assert len({persona.text for persona in loaded}) == texts
    if domain == "chatting":
        assert not any(p.text.startswith('"') or "\\n" in p.text for p in loaded)
        assert all("\n" in p.text for p in loaded)


@pytest.mark.parametrize(
    "text", ["You are Ada.", "you like tea", "Your name is Ada.", '"You are Ada."']
)
def test_a_text_that_addresses_the_agent_is_its_system_message_as_it_is(text: str) -> None:
    domain = DOMAINS["chatting"]
    assert domain.system_prompt(Persona("a", "chatting", text)) == f"{domain.setting} {text}"


@pytest.mark.parametrize("text", ["I am Ada.", "Meet Ada, a nurse.", "Young Ada likes tea."])
def test_a_text_that_does_not_is_introduced_as_a_description_of_the_agent(text: str) -> None:
    domain = DOMAINS["chatting"]
    told = domain.system_prompt(Persona("a", "chatting", text))
    assert told.startswith(domain.setting) and "describes you" in told and told.endswith(text)
