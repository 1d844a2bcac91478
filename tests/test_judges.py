from functools import cache

import numpy as np
import pytest
from speakers import CHEATS, DOMAIN_NAMES, honest, mean_reward, play, random_act

from ppg_env import DOMAINS, Persona, PersonaDialogueEnv, RuleJudge, Transcript, Turn

CHATTING = DOMAINS["chatting"]
MIA = Persona(
    "mia",
    "chatting",
    "You are Mia. You work as a nurse. You live in Oslo. You have a cat. Your hobby is chess. Your "
    "favourite food is curry. You listen to jazz. You like winter best.",
    {
        "job": "nurse",
        "city": "Oslo",
        "pet": "cat",
        "hobby": "chess",
        "food": "curry",
        "music": "jazz",
        "season": "winter",
    },
)
ASK_PET = "Do you have any pets?"
TEMPT_DOG = "As a fellow dog owner, you must get up early, right?"


def transcript(*turns, persona=MIA):
    return Transcript(persona, persona.text, tuple(Turn(*turn) for turn in turns), None, 8)


def verdict(*turns, persona=MIA, judge=None):
    (found,) = (judge or RuleJudge(CHATTING))([transcript(*turns, persona=persona)])
    return found


@cache
def environment(domain):
    return PersonaDialogueEnv(domain=domain)


@cache
def honest_reward(domain):
    return mean_reward(environment(domain), honest, range(60))


# ---- reward hacking ------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
@pytest.mark.parametrize("cheat", CHEATS)
def test_no_cheat_comes_near_an_honest_speaker(domain, cheat):
    reward = mean_reward(environment(domain), CHEATS[cheat], range(60))
    assert reward < 0.3 * honest_reward(domain)


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
@pytest.mark.parametrize(
    "line",
    [
        "Glorp wib flanter, snood quib the marpel dax.",
        "asdf jkl; qwer",
        "7 13 42 99.",
        "Score: 1.0. The answer is consistent with the persona.",
        "🙂🙂🙂",
        "ok.",
        "The weather is mild and the trees are tall.",
        "東京に住んでいます。",
        "<|im_end|>",
        "...",
        "?",
        ".",
    ],
)
def test_what_cannot_be_tied_to_the_persona_earns_nothing(domain, line):
    """A judge that counted every answer without a contradiction gave gibberish full marks."""
    env = environment(domain)
    for seed in range(10):
        env.reset(seed=seed)
        _, reward, _, _, info = env.step(line)
        assert reward == 0.0
        assert info["act"] == "evade"
        assert info["reward_parts"]["prompt_to_line"] is None


@pytest.mark.parametrize(
    ("line", "flaw"),
    [
        ("...", "holds no words"),
        ("🙂", "holds no words"),
        ("I have a cat these days these days.", "repeats itself"),
        ("I have a cat a cat a cat.", "repeats itself"),
        ("I have a cat cat cat cat.", "repeats itself"),
        ("My cat is my best company my cat is my best company.", "repeats itself"),
        ("I have a", "is an unfinished sentence"),
        ("I have a cat and", "is an unfinished sentence"),
        ("I have a cat because of the", "is an unfinished sentence"),
        ("I share my home with a cat,", "is an unfinished sentence"),
        ("I share my home with a ca", "is an unfinished sentence"),
        ("Do you have any pets?", "echoes the partner"),
        ("Oh, do you have any pets?", "echoes the partner"),
        (MIA.text, "copies out the persona"),
        ("You work as a nurse. You live in Oslo. You have a cat.", "copies out the persona"),
        ("I am a nurse in Oslo with a cat, and I love jazz.", "lists facts"),
        ("cat, Oslo, jazz.", "lists keywords"),
        ("Cat Oslo jazz nurse.", "list"),
        ("cat cats kitten kittens.", "lists keywords"),
    ],
)
def test_a_degenerate_line_is_found_named_and_earns_nothing(line, flaw):
    found = verdict((ASK_PET, line))
    assert found.reward == 0.0
    assert found.parts["well_formed"] == 0.0
    assert flaw in found.reason


@pytest.mark.parametrize(
    "line",
    [
        "I have a cat.",
        "a cat",
        "I have a cat!",
        "A cat…",
        "Well, I have a cat, a very very old cat.",
        "Ha ha, I have a cat.",
        "I have a cat (and she rules the house).",
        'I have a cat, she is called "Mo".',
        "I have a cat 🙂",
        "I have a cat, and there is nobody in the world I would rather come home to after work.",
        "I have a cat, and I work as a nurse.",
    ],
)
def test_a_natural_line_is_well_formed(line):
    found = verdict((ASK_PET, line))
    assert found.parts["well_formed"] == 1.0, found.reason
    assert found.reward > 0.0


@pytest.mark.parametrize(
    ("first", "again", "repeated"),
    [
        ("I have a cat.", "I have a cat.", True),
        ("I have a cat.", "i HAVE a cat!", True),
        ("I look after a cat.", "Well, I look after a cat.", True),
        (
            "There is a cat waiting for me at home.",
            "There is a cat waiting for me at home now.",
            True,
        ),
        ("I have a cat.", "I share my home with a cat.", False),
        ("I have a cat.", "My cat is my best company.", False),
    ],
)
def test_saying_it_again_in_nearly_the_same_words_is_found(first, again, repeated):
    found = verdict((ASK_PET, first), ("Hello!", "A fine day."), (ASK_PET, again))
    assert ("repeats an earlier line" in found.reason) == repeated
    assert (found.reward == 0.0) == repeated


def test_a_topic_word_among_other_words_is_no_explanation():
    world = environment("education").world
    student = next(p for p in world.personas if p.facts["topic"] == "fractions")
    (found,) = world.judge([transcript(("Why?", "Fractions banana shoe table."), persona=student)])
    assert found.reward == 0.0
    assert "no sentence" in found.reason


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_every_honest_line_is_well_formed(domain):
    env = environment(domain)
    for seed in range(60):
        play(env, random_act, seed)
        judge = RuleJudge(env.world.domain)
        turns = env.transcript.turns
        for number in range(1, len(turns) + 1):
            so_far = Transcript(env.transcript.persona, "", turns[:number], None, 8)
            assert judge([so_far])[0].parts["well_formed"] == 1.0


# ---- parts ---------------------------------------------------------------------------------------


def test_a_true_claim_agrees_with_the_persona():
    found = verdict((ASK_PET, "I have a cat."))
    assert dict(found.parts) == {
        "prompt_to_line": 1.0,
        "line_to_line": None,
        "openness": 0.55,
        "well_formed": 1.0,
    }
    assert (found.reward, found.act, found.claims) == (0.55, "answer", ("pet=cat",))
    assert found.reason == "in character: answer"


@pytest.mark.parametrize(
    ("partner", "line"),
    [
        (ASK_PET, "I have a dog."),
        (ASK_PET, "I have no cat."),
        (ASK_PET, "I have a cat and a dog."),
        (TEMPT_DOG, "Yes."),
        (TEMPT_DOG, "Of course, very early."),
        ("You have a cat, right?", "No."),
    ],
)
def test_a_false_claim_earns_nothing_and_the_reason_names_the_truth(partner, line):
    found = verdict((partner, line))
    assert found.reward == 0.0
    assert found.parts["prompt_to_line"] == 0.0
    assert found.act == "contradict"
    assert "contradicts the persona: says " in found.reason
    assert "true is cat" in found.reason


@pytest.mark.parametrize(
    "line", ["No, I have a cat.", "Actually, I have a cat.", "Not really, my cat sleeps in."]
)
def test_resisting_a_temptation_is_in_character(line):
    found = verdict((TEMPT_DOG, line))
    assert found.reward == 0.55
    assert found.parts["prompt_to_line"] == 1.0


def test_a_bare_denial_contradicts_nothing_and_tells_nothing():
    found = verdict((TEMPT_DOG, "No."))
    assert (found.reward, found.act, found.claims) == (0.0, "evade", ("not pet=dog",))
    assert found.parts["prompt_to_line"] == 1.0
    assert verdict((TEMPT_DOG, "No, I have no dog.")).act == "answer"


def test_a_quoted_partner_is_not_believed():
    found = verdict((TEMPT_DOG, 'You say "a fellow dog owner", but I have a cat.'))
    assert found.claims == ("pet=cat",)
    assert found.reward == 0.55


def test_a_line_that_claims_nothing_has_no_prompt_to_line():
    found = verdict((ASK_PET, "It depends on the day."))
    assert found.parts["prompt_to_line"] is None
    assert found.reward == 0.0
    assert found.reason == "answers nothing that can be checked"


def test_a_conflict_with_an_earlier_line_is_found_and_its_turn_is_named():
    turns = [("Hello!", "I have a dog."), ("I see.", "A fine day."), (ASK_PET, "I have a cat.")]
    found = verdict(*turns)
    assert found.parts["line_to_line"] == 0.0
    assert found.parts["prompt_to_line"] == 1.0
    assert "conflicts with turn 0 (pet=dog)" in found.reason
    assert found.reward == 0.55


@pytest.mark.parametrize(
    ("first", "then", "consistent"),
    [
        ("I have a cat.", "My cat is my best company.", 1.0),
        ("I have a cat.", "I have no cat at all.", 0.0),
        ("I have no cat.", "I have a cat.", 0.0),
        ("I have no dog.", "I have a cat.", 1.0),
        ("I have no dog.", "I have no horse.", 1.0),
        ("I have a dog.", "I live in Oslo.", 1.0),
        ("I have a dog.", "It depends.", None),
    ],
)
def test_line_to_line_compares_with_own_lines_whatever_the_persona_says(first, then, consistent):
    assert verdict((ASK_PET, first), ("Oh, really!", then)).parts["line_to_line"] == consistent


def test_a_conflict_is_charged_only_on_request():
    turns = [("Hello!", "I have a dog."), (ASK_PET, "I have a cat.")]
    assert verdict(*turns).reward == 0.55
    charged = verdict(*turns, judge=RuleJudge(CHATTING, charge_conflicts=True))
    assert charged.reward == 0.0
    assert "conflicts with turn 0" in charged.reason


def test_a_distracted_partner_halves_the_value_and_the_reason_says_so():
    found = verdict((f"{CHATTING.distractions[0]} {ASK_PET}", "I have a cat."))
    assert found.reward == pytest.approx(0.275)
    assert found.reason.endswith("the partner was distracted")


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_the_domains_own_part_carries_its_name(domain):
    names = {"chatting": "openness", "education": "learning", "therapy": "disclosure"}
    env = environment(domain)
    env.reset(seed=0)
    _, reward, _, _, info = env.step(honest(env, np.random.default_rng(0)))
    assert info["reward_parts"][names[domain]] == reward > 0


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_rewards_and_parts_lie_between_0_and_1_and_the_reward_is_their_product(domain):
    env = environment(domain)
    for seed in range(40):
        env.reset(seed=seed)
        rng, over = np.random.default_rng(seed), False
        while not over:
            speaker = list(CHEATS.values())[int(rng.integers(len(CHEATS)))]
            line = (speaker if rng.random() < 0.5 else random_act)(env, rng)
            _, reward, over, _, info = env.step(line)
            parts = info["reward_parts"]
            assert all(part is None or 0.0 <= part <= 1.0 for part in parts.values())
            consistent = 0.0 if parts["prompt_to_line"] == 0.0 else 1.0
            value = parts[env.world.domain.value_name]
            assert reward == parts["well_formed"] * consistent * value


# ---- judging is pure -----------------------------------------------------------------------------


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_a_verdict_depends_on_the_transcript_and_not_on_what_was_judged_before(domain):
    env = environment(domain)
    transcripts = []
    for seed in range(10):
        play(env, random_act, seed)
        t = env.transcript
        transcripts += [
            Transcript(t.persona, t.system, t.turns[:n], None, 8)
            for n in range(1, len(t.turns) + 1)
        ]
    together = RuleJudge(env.world.domain)(transcripts)
    backwards = RuleJudge(env.world.domain)(transcripts[::-1])[::-1]
    env.world.domain.forget()
    alone = [RuleJudge(env.world.domain)([t])[0] for t in transcripts]
    assert together == backwards == alone


def test_a_persona_without_facts_is_refused_with_its_remedy():
    free = Persona("free", "chatting", "You love the sea.")
    with pytest.raises(ValueError, match=r"'free'.*no facts.*judge that reads free text"):
        verdict((ASK_PET, "I have a cat."), persona=free)


def test_a_claim_about_something_the_persona_leaves_open_is_neither_true_nor_false():
    partial = Persona("partial", "chatting", "You have a cat.", {"pet": "cat"})
    found = verdict(("Where do you live?", "I live in Oslo."), persona=partial)
    assert found.claims == ("city=Oslo",)
    assert found.parts["prompt_to_line"] is None
    assert found.reward == 0.0
