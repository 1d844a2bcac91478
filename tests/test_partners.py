from collections import Counter

import numpy as np
import pytest
from speakers import DOMAIN_NAMES, evade, honest, perform, play, random_act

from ppg_env import DOMAINS, Farewell, PersonaDialogueEnv, ScriptedPartner


def dialogues(domain, speaker, seeds, **kwargs):
    """Yield the finished transcripts of the dialogues with these seeds."""
    env = PersonaDialogueEnv(domain=domain, **kwargs)
    for seed in seeds:
        play(env, speaker, seed)
        yield env.transcript


def presuppositions(domain, transcript):
    """Yield (claim, whether it is true of the persona) of every value the partner attributes."""
    for turn in transcript.turns:
        for claim in DOMAINS[domain].lexicon.read(turn.partner).about_listener:
            yield claim, transcript.persona.facts[claim.attribute] == claim.value


def distraction_rate(domain, noise):
    lines = [
        turn.partner
        for transcript in dialogues(domain, random_act, range(60), noise=noise)
        for turn in transcript.turns
    ]
    return np.mean([not DOMAINS[domain].attentive(line) for line in lines]), len(lines)


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_the_partner_tempts_at_its_rate_with_things_that_are_false(domain):
    partner = ScriptedPartner(DOMAINS[domain], noise=0.0, tempt_rate=1.0)
    for transcript in dialogues(domain, evade, range(20), partner=partner):
        found = list(presuppositions(domain, transcript))
        assert len(found) == len(transcript.turns)
        assert not any(true for _, true in found)


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_a_partner_that_does_not_tempt_presupposes_nothing(domain):
    partner = ScriptedPartner(DOMAINS[domain], noise=0.0, tempt_rate=0.0)
    for transcript in dialogues(domain, evade, range(20), partner=partner):
        assert not list(presuppositions(domain, transcript))


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_tempting_happens_in_about_the_share_of_turns_the_domain_says(domain):
    transcripts = list(dialogues(domain, evade, range(150), noise=0.0))
    tempted = sum(len(list(presuppositions(domain, t))) for t in transcripts)
    turns = sum(len(t.turns) for t in transcripts)
    rate = DOMAINS[domain].tempt_rate
    assert tempted / turns == pytest.approx(rate, abs=4 * np.sqrt(rate * (1 - rate) / turns))


def test_a_volunteered_detail_is_picked_up_in_the_next_line():
    partner = ScriptedPartner(DOMAINS["chatting"], noise=0.0)
    for transcript in dialogues("chatting", perform("volunteer"), range(20), partner=partner):
        world = DOMAINS["chatting"]
        for now, after in zip(transcript.turns, transcript.turns[1:], strict=False):
            understood = world.interpret(transcript.persona, now.partner, now.agent)
            asked = world.lexicon.read(now.partner).topics
            unasked = [c for c in understood.true_claims if c.attribute not in asked]
            assert unasked[0].attribute in world.lexicon.read(after.partner).topics


def test_a_distracted_partner_picks_nothing_up():
    partner = ScriptedPartner(DOMAINS["chatting"], noise=1.0, tempt_rate=0.0)
    questions = [q for a in DOMAINS["chatting"].attributes for q in a.asked]
    for transcript in dialogues("chatting", perform("volunteer"), range(10), partner=partner):
        for turn in transcript.turns:
            assert any(turn.partner.endswith(question) for question in questions)


@pytest.mark.parametrize("domain", ["education", "therapy"])
def test_the_partner_follows_up_on_what_was_said(domain):
    followed = 0
    for transcript in dialogues(domain, honest, range(30), noise=0.0):
        world = DOMAINS[domain]
        for now, after in zip(transcript.turns, transcript.turns[1:], strict=False):
            claims = world.interpret(transcript.persona, now.partner, now.agent).claims
            followed += any(
                world.by_name[c.attribute].phrase(template, c.value) == after.partner
                for c in claims
                for template in world.by_name[c.attribute].followed
            )
    assert followed / (30 * 7) == pytest.approx(DOMAINS[domain].follow_rate, abs=0.13)


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_the_partner_is_distracted_in_the_share_of_turns_that_noise_says(domain, noise):
    """The first turn included: distraction is a coin of its own in every turn."""
    rate, number = distraction_rate(domain, noise)
    assert rate == pytest.approx(noise, abs=4 * np.sqrt(noise * (1 - noise) / number))


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_a_distracted_first_line_occurs(domain):
    first = [t.turns[0].partner for t in dialogues(domain, evade, range(40), noise=0.5)]
    attentive = [DOMAINS[domain].attentive(line) for line in first]
    assert 8 < sum(attentive) < 32


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_everything_has_several_phrasings(domain):
    transcripts = list(dialogues(domain, random_act, range(60)))
    lines = Counter(turn.partner for t in transcripts for turn in t.turns)
    assert len({t.turns[0].partner for t in transcripts}) > 20
    assert lines.most_common(1)[0][1] < 0.15 * lines.total()
    world = DOMAINS[domain]
    assert len(world.openings) >= 3 and len(world.distractions) >= 3 and len(world.evasions) >= 8
    for attribute in world.attributes:
        assert len(attribute.said) >= 3 and len(attribute.tempted) >= 3
        assert len(world.open_questions or attribute.asked) >= 4


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_no_question_is_asked_twice_while_there_are_others(domain):
    partner = ScriptedPartner(DOMAINS[domain], noise=0.0, tempt_rate=0.0)
    for transcript in dialogues(domain, evade, range(20), partner=partner, max_turns=6):
        lines = [turn.partner for turn in transcript.turns]
        assert len(set(lines)) == len(lines)


def test_questions_keep_to_the_phase_of_the_dialogue():
    partner = ScriptedPartner(DOMAINS["chatting"], noise=0.0, tempt_rate=0.0)
    world = DOMAINS["chatting"]
    for transcript in dialogues("chatting", evade, range(20), partner=partner):
        for number, turn in enumerate(transcript.turns):
            phase = world.phases[world.phase_of(number, 8)]
            (topic,) = world.lexicon.read(turn.partner).topics
            assert not phase.attributes or topic in phase.attributes


def test_a_patient_partner_never_closes_the_dialogue():
    for transcript in dialogues("therapy", evade, range(10)):
        assert len(transcript.turns) == 8


@pytest.mark.parametrize("patience", [1, 3])
def test_a_partner_out_of_patience_says_farewell(patience):
    partner = ScriptedPartner(DOMAINS["therapy"], patience=patience)
    for transcript in dialogues("therapy", evade, range(5), partner=partner):
        assert len(transcript.turns) == patience
        assert isinstance(transcript.pending, Farewell)


def test_an_answer_in_between_restores_patience():
    def evade_evade_answer(env, rng):
        return (honest if len(env.transcript.turns) % 3 == 2 else evade)(env, rng)

    partner = ScriptedPartner(DOMAINS["therapy"], patience=3)
    for transcript in dialogues("therapy", evade_evade_answer, range(5), partner=partner):
        assert len(transcript.turns) == 8


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"noise": 1.5}, "noise is a probability.*1.5"),
        ({"noise": -0.1}, "noise"),
        ({"tempt_rate": 2}, "tempt_rate is a probability.*2"),
        ({"patience": 0}, "patience must be at least 1 or None, got 0"),
    ],
)
def test_impossible_settings_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        ScriptedPartner(DOMAINS["therapy"], **arguments)


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_a_line_depends_on_the_dialogues_own_generator_only(domain):
    env = PersonaDialogueEnv(domain=domain)
    transcripts = []
    for seed in range(6):
        env.reset(seed=seed)
        env.step("I have nothing to say about that today.")
        transcripts.append(env.transcript)
    partner = ScriptedPartner(DOMAINS[domain])
    alone = [partner([t], [np.random.default_rng(7)])[0] for t in transcripts]
    assert partner(transcripts, [np.random.default_rng(7) for _ in transcripts]) == alone
