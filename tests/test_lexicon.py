"""The rules of reading (module docstring of ppg_env.domains.lexicon), one group of tests a rule."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from speakers import DOMAIN_NAMES

from ppg_env import DOMAINS, Attribute
from ppg_env.domains.domain import AGREEMENTS, CORRECTIONS, OPENERS, prefixed
from ppg_env.domains.lexicon import Lexicon, resolve_claims

CHATTING = DOMAINS["chatting"].lexicon
THERAPY = DOMAINS["therapy"].lexicon
EDUCATION = DOMAINS["education"].lexicon


def claims(line, lexicon=CHATTING):
    return [str(claim) for claim in lexicon.read(line).claims]


def about_listener(line, lexicon=CHATTING):
    return [str(claim) for claim in lexicon.read(line).about_listener]


def understood(partner, agent, lexicon=CHATTING):
    return [str(c) for c in resolve_claims(lexicon.read(agent), lexicon.read(partner))]


# ---- rule 1: whose claim it is -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ("I have a cat.", ["pet=cat"]),
        ("My kittens keep me busy.", ["pet=cat"]),
        ("I HAVE A CAT", ["pet=cat"]),
        ("I’ve got a cat.", ["pet=cat"]),
        ("We have a cat.", ["pet=cat"]),
        ("A cat, what else.", ["pet=cat"]),
        ("I am a nurse in Oslo and love jazz.", ["job=nurse", "city=Oslo", "music=jazz"]),
        ("I have a cat. I have a cat.", ["pet=cat"]),
        ("I do bird watching.", ["hobby=birdwatching"]),
        ("I love my sister and I have a dog.", ["pet=dog"]),
    ],
)
def test_a_value_in_a_statement_is_a_claim_about_its_speaker(line, read):
    assert claims(line) == read


@pytest.mark.parametrize(
    "line",
    [
        "My sister has a cat.",
        "She has a cat.",
        "My neighbour's cat is loud.",
        "People love cats.",
        "Somebody has a dog here.",
        "They say that Oslo is cold.",
        "My mother was a nurse.",
        "My dad, he has a horse.",
    ],
)
def test_a_value_of_a_third_person_is_no_claim(line):
    reading = CHATTING.read(line)
    assert not reading.claims
    assert not reading.about_listener
    assert reading.topics


def test_a_value_of_the_listener_is_no_claim_about_the_speaker():
    assert claims("You have a cat.") == []
    assert about_listener("You have a cat.") == ["pet=cat"]
    assert about_listener("You have no cat.") == ["not pet=cat"]
    assert about_listener("Your cat is loud.") == ["pet=cat"]


def test_the_nearest_subject_decides():
    assert claims("You have a dog and I have a cat.") == ["pet=cat"]
    assert about_listener("I have a cat and you have a dog.") == ["pet=dog"]
    assert claims("My sister has a dog but I have a cat.") == ["pet=cat"]


@pytest.mark.parametrize(
    "line", ["I like catalogues.", "I am in the category.", "Dogma is bad.", "Nursery."]
)
def test_parts_of_words_are_no_values(line):
    assert claims(line) == []


def test_the_longest_form_is_read_first():
    assert claims("I had panic attacks again.", THERAPY) == ["symptom=panic attacks"]
    assert claims("I am a fifth grader.", EDUCATION) == ["grade=five"]


# ---- rule 2: negation ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "I have no cat.",
        "I don't have a cat.",
        "I dont have a cat.",
        "I don’t have a cat.",
        "I do not have a cat.",
        "I never had a cat.",
        "I hate cats.",
        "I am without a cat.",
        "I cannot have a cat.",
        "I couldn't have a cat.",
        "Never a cat.",
    ],
)
def test_a_negator_before_a_value_makes_a_negative_claim(line):
    assert claims(line) == ["not pet=cat"]


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ("I have no dog, I have a cat.", ["not pet=dog", "pet=cat"]),
        ("I have no dog but a cat.", ["not pet=dog", "pet=cat"]),
        ("I am not a nurse because I live in Oslo.", ["not job=nurse", "city=Oslo"]),
        ("I have no dog and I have a cat.", ["not pet=dog", "pet=cat"]),
        ("I have neither a cat nor a dog.", ["not pet=cat", "not pet=dog"]),
        ("Not a dog. A cat.", ["not pet=dog", "pet=cat"]),
        ("No dog - I have a cat.", ["not pet=dog", "pet=cat"]),
        ("It is not that I do not try; I have a cat.", ["pet=cat"]),
    ],
)
def test_a_negator_reaches_to_the_end_of_its_clause(line, read):
    assert claims(line) == read


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ("I never got over the divorce.", ["cause=divorce"]),
        ("I am not over the divorce.", ["cause=divorce"]),
        ("I can't stop thinking of the flood.", ["cause=flood"]),
        ("I can never forget the accident.", ["cause=accident"]),
        ("It is not only the insomnia.", ["symptom=insomnia"]),
        ("I would say it was the bullying.", ["cause=bullying"]),
    ],
)
def test_idioms_that_only_look_like_negations_affirm(line, read):
    if line.startswith("It is"):
        line = line.replace("It is", "For me that is")
    if "it was" in line:
        line = line.replace("it was", "that was")
    assert claims(line, THERAPY) == read


# ---- rule 3: what is no claim --------------------------------------------------------------------


def test_a_question_is_no_claim_but_names_what_it_is_about():
    reading = CHATTING.read("Do you have a cat?")
    assert not reading.claims
    assert [str(c) for c in reading.questioned] == ["pet=cat"]
    assert [str(c) for c in reading.about_listener] == ["pet=cat"]


def test_a_question_about_others_presupposes_nothing():
    assert about_listener("Does your sister have a cat?") == []
    assert about_listener("Do you not have a cat?") == []


def test_only_the_sentence_with_the_question_mark_is_a_question():
    reading = CHATTING.read("I have a cat. And you, a dog?")
    assert [str(c) for c in reading.claims] == ["pet=cat"]
    assert [str(c) for c in reading.questioned] == ["pet=dog"]


@pytest.mark.parametrize(
    "line",
    [
        'You said "I have a cat" to me.',
        "“I have a cat” is what you said.",
        'They shouted "cat! dog! Oslo!" at the door.',
        'Who says "I am a nurse"',
    ],
)
def test_text_in_double_quotes_is_no_claim(line):
    assert claims(line) == []
    assert about_listener(line) == []


def test_after_a_quotation_claims_count_again():
    assert claims('You said "a dog", but I have a cat.') == ["pet=cat"]


@pytest.mark.parametrize(
    "line",
    [
        "I would like a cat.",
        "I'd love a cat.",
        "I wish I had a cat.",
        "If only a cat came along.",
        "I used to have a cat.",
        "Maybe a cat.",
        "I want a cat.",
        "I hope to be a pilot someday.",
        "I dream of a horse.",
    ],
)
def test_wishes_and_hypotheticals_are_no_claims(line):
    if "wish I had" in line:
        line = line.replace("wish I had", "wish for")
    assert claims(line) == []


def test_a_hypothetical_ends_with_its_clause():
    assert claims("I would love a dog, but I have a cat.") == ["pet=cat"]


# ---- rule 4: assent and denial -------------------------------------------------------------------


@pytest.mark.parametrize(
    "agent",
    [
        "Yes.",
        "Yeah!",
        "Exactly, well seen.",
        "Of course.",
        "Absolutely right.",
        "I do.",
        "That's right.",
    ],
)
def test_assent_adopts_what_the_partner_presupposes(agent):
    assert understood("As a fellow dog owner, you must get up early, right?", agent) == ["pet=dog"]


@pytest.mark.parametrize(
    "agent", ["No.", "Nope!", "Not really.", "Not at all, sorry.", "No, never."]
)
def test_denial_denies_what_the_partner_presupposes(agent):
    assert understood("As a fellow dog owner, you must get up early, right?", agent) == [
        "not pet=dog"
    ]


def test_what_the_line_itself_says_goes_before_assent_and_denial():
    partner = "Your dog must keep you busy, no?"
    assert understood(partner, "No, I have a cat.") == ["pet=cat"]
    assert understood(partner, "Yes, my cat does.") == ["pet=cat"]
    assert understood(partner, "Yes, I live in Oslo.") == ["city=Oslo", "pet=dog"]


def test_assent_to_a_negative_presupposition_is_a_negative_claim():
    assert understood("You have no dog.", "Exactly.") == ["not pet=dog"]
    assert understood("You have no dog.", "That's wrong.") == ["pet=dog"]


@pytest.mark.parametrize(
    "agent",
    [
        "Well, yes and no.",
        "No dog is that loud.",
        "I said yes once.",
        "Right now I am tired.",
        "True friends are rare.",
        "Sure things are rare.",
        "Yes?",
    ],
)
def test_words_of_assent_elsewhere_adopt_nothing(agent):
    partner = "You live in Oslo like me, right?"
    if agent == "Yes?":
        assert understood(partner, "Is that so, yes?") == []
    else:
        assert "city=Oslo" not in understood(partner, agent)


def test_assent_to_an_open_question_claims_nothing():
    assert understood("Do you have any pets?", "Yes.") == []


# ---- every template reads as what it says --------------------------------------------------------


def templates(kind):
    for name in DOMAIN_NAMES:
        for attribute in DOMAINS[name].attributes:
            for value in attribute.values:
                for template in getattr(attribute, kind):
                    yield DOMAINS[name], attribute, value, attribute.phrase(template, value)


def test_every_statement_claims_exactly_what_it_says():
    for domain, attribute, value, line in templates("said"):
        reading = domain.lexicon.read(line)
        assert [str(c) for c in reading.claims] == [f"{attribute.name}={value}"], line
        assert not reading.assents and not reading.denies and not reading.marks, line


def test_every_statement_keeps_its_claim_after_every_opener():
    for domain, attribute, value, line in templates("said"):
        for prefix in OPENERS + CORRECTIONS + AGREEMENTS:
            spoken = prefixed(prefix, line)
            reading = domain.lexicon.read(spoken)
            assert [str(c) for c in reading.claims] == [f"{attribute.name}={value}"], spoken
            assert reading.assents == (prefix in AGREEMENTS), spoken
            assert reading.denies == (prefix in CORRECTIONS and prefix != "Actually, "), spoken


def test_every_question_asks_about_exactly_its_attribute():
    for domain, attribute, _, line in templates("asked"):
        reading = domain.lexicon.read(line)
        assert reading.topics == {attribute.name}, line
        assert not reading.about_listener, line


def test_every_leading_question_presupposes_exactly_its_value():
    for domain, attribute, value, line in templates("tempted"):
        reading = domain.lexicon.read(line)
        assert [str(c) for c in reading.about_listener] == [f"{attribute.name}={value}"], line
        assert reading.topics == {attribute.name}, line
        assert domain.attentive(line), line


def test_every_follow_up_is_about_exactly_its_attribute():
    for domain, attribute, value, line in templates("followed"):
        reading = domain.lexicon.read(line)
        assert reading.topics == {attribute.name}, line
        assert domain.attentive(line), line
        false = [c for c in reading.about_listener if c.value != value]
        assert not false, line


def test_every_sentence_of_the_persona_text_is_read_as_its_fact():
    for name in DOMAIN_NAMES:
        for attribute in DOMAINS[name].attributes:
            for value in attribute.values:
                line = attribute.phrase(attribute.told, value)
                assert about_listener(line, DOMAINS[name].lexicon) in (
                    [f"{attribute.name}={value}"],
                    [],  # "It began with the flood."
                ), line


def test_every_surface_form_reads_as_its_value():
    for name in DOMAIN_NAMES:
        for attribute in DOMAINS[name].attributes:
            for value, forms in attribute.values.items():
                for form in forms:
                    assert claims(f"I say {form}.", DOMAINS[name].lexicon) == [
                        f"{attribute.name}={value}"
                    ]


@pytest.mark.parametrize("name", DOMAIN_NAMES)
def test_evasions_and_open_questions_read_as_nothing(name):
    for line in (*DOMAINS[name].evasions, *DOMAINS[name].open_questions):
        reading = DOMAINS[name].lexicon.read(line)
        assert not any((reading.claims, reading.about_listener, reading.topics)), line
        assert not reading.marks & {"confusion", "distracted"}, line
        assert not reading.assents and not reading.denies, line


@pytest.mark.parametrize("name", DOMAIN_NAMES)
def test_openings_presuppose_nothing_and_are_about_what_they_name(name):
    domain = DOMAINS[name]
    for line in domain.openings:
        named = {a.name for a in domain.attributes if f"{{{a.name}}}" in line}
        facts = {a.name: next(iter(a.values.values()))[0] for a in domain.attributes}
        reading = domain.lexicon.read(line.format(**facts))
        assert not reading.about_listener, line
        assert reading.topics == named, line
        assert domain.attentive(line), line


@pytest.mark.parametrize("name", DOMAIN_NAMES)
def test_distractions_are_read_as_such_before_any_question(name):
    domain = DOMAINS[name]
    for line in domain.distractions:
        for question in domain.open_questions or domain.attributes[0].asked:
            reading = domain.lexicon.read(f"{line} {question}")
            assert not domain.attentive(f"{line} {question}")
            assert reading.topics == domain.lexicon.read(question).topics
            assert not reading.about_listener


# ---- the lexicon itself --------------------------------------------------------------------------


def test_one_form_cannot_stand_for_two_values():
    with pytest.raises(ValueError, match=r"'cat' stands for both pet=cat and animal=cat"):
        Lexicon({"pet": {"cat": ("cat",)}, "animal": {"cat": ("cat",)}})


def test_reading_is_remembered_and_can_be_forgotten():
    first = CHATTING.read("I have a cat, and it purrs.")
    assert CHATTING.read("I have a cat, and it purrs.") is first
    CHATTING.forget()
    assert CHATTING.read("I have a cat, and it purrs.") == first


def test_a_lexicon_survives_pickling():
    twin = pickle.loads(pickle.dumps(CHATTING))
    assert twin.read("I have a cat.") == CHATTING.read("I have a cat.")


@given(st.text(max_size=200))
def test_any_text_can_be_read(text):
    reading = CHATTING.read(text)
    assert len(reading.claims) <= reading.mentions


@given(
    st.lists(
        st.sampled_from('I you my " . ? ! , not cat dog she would but yes no Oslo\n'.split(" "))
    )
)
def test_any_order_of_meaningful_words_can_be_read(words):
    reading = CHATTING.read(" ".join(words))
    assert {c.attribute for c in reading.claims} <= reading.topics
    assert len(reading.pairs) <= max(0, len(reading.words) - 1)


def test_a_phrase_takes_the_article_its_word_needs():
    job = Attribute(
        "job", {"engineer": ("engineer",), "nurse": ("nurse",)}, "You are {a}.", ("I am {a}.",)
    )
    assert job.phrase("{a} I am.", "engineer") == "An engineer I am."
    assert job.phrase("i am {a}.", "nurse") == "I am a nurse."
