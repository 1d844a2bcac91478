import copy
import json
import pickle
from collections import Counter

import pytest
from speakers import DOMAIN_NAMES

from ppg_env import DOMAINS, Persona, PersonaFileError, bundled_personas, load_personas
from ppg_env.data.make import make_personas
from ppg_env.personas import SPLITS, find_persona, parse_persona, resolve_personas

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
