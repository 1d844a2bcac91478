"""Therapy: a patient opens up to a therapist; dependence length m = 3.

What a line discloses has a depth: surface (job, pastime), gradual (symptom, feeling), deep (cause,
fear). Going deep at once is rewarded now and spoils the two turns after it; gradual steps first
make the deep one worth most. A guarded patient needs two gradual steps, an open one needs one.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from ..dialogue import Persona
from .chatting import HOBBY, JOB
from .domain import Attribute, Domain, Phase, choose
from .lexicon import Claim, Reading

DEPTH_ACTS = ("surface", "gradual", "deep")

WORK = Attribute(
    name="job",
    values=JOB.values,
    told=JOB.told,
    said=(
        *JOB.said,
        "I am still working as {a}.",
        "As {a} I am busy enough.",
        "I trained as {a}.",
    ),
    tempted=(
        "You are {a}, right? How is that going?",
        "Being {a} must wear you out, no?",
        "As {a} you see a lot of people, right?",
    ),
    followed=("How do you manage as {a} at the moment?", "What does it mean to you to be {a}?"),
    cues=JOB.cues,
)
PASTIME = Attribute(
    name="pastime",
    values=HOBBY.values,
    told="You spend your free time on {v}.",
    said=(
        "I still do some {v} on Sundays.",
        "My free time goes into {v}.",
        "I went back to {v} last week.",
        "I rest by doing {v}.",
        "I mostly do {v} to relax.",
        "On Saturdays I go back to my {v}.",
        "I took up {v} again.",
        "My evenings belong to {v}.",
    ),
    tempted=(
        "Your {v} helps you relax, right?",
        "You do {v} to get away from it all, no?",
        "How often do you do your {v} these days?",
    ),
    followed=("What does {v} give you?", "When you do {v}, what changes for you?"),
    cues=("free time", "pastime", "relax", "weekend"),
)
SYMPTOM = Attribute(
    name="symptom",
    values={
        "headaches": ("headaches", "headache", "migraine", "migraines"),
        "nightmares": ("nightmares", "nightmare", "bad dreams"),
        "insomnia": ("insomnia", "sleeplessness"),
        "dizziness": ("dizziness", "dizzy"),
        "panic attacks": ("panic attacks", "panic attack"),
        "stomach cramps": ("stomach cramps", "stomach ache", "stomach aches"),
        "exhaustion": ("exhaustion", "exhausted"),
        "crying spells": ("crying spells", "crying fits"),
        "nausea": ("nausea", "nauseous"),
        "back pain": ("back pain",),
    },
    told="You suffer from {v}.",
    said=(
        "I suffer from {v}.",
        "I had {v} again this week.",
        "What bothers me is the {v}.",
        "Most nights bring me {v}.",
        "My {v} came back on Monday.",
        "There were {v} again on Sunday.",
        "This month I have had {v} twice.",
        "I keep a diary of my {v}.",
        "My body answers with {v}.",
        "Every evening I get {v}.",
    ),
    tempted=(
        "Your {v} got worse, right?",
        "So you had {v} again, no?",
        "How bad was your {v} this week?",
        "You still suffer from {v}, right?",
    ),
    followed=("When did the {v} start?", "What do you do when the {v} comes?"),
    cues=("symptom", "symptoms", "sleep", "body"),
    depth=1,
)
FEELING = Attribute(
    name="feeling",
    values={
        "lonely": ("lonely", "loneliness"),
        "ashamed": ("ashamed", "shame"),
        "angry": ("angry", "anger"),
        "numb": ("numb", "numbness"),
        "guilty": ("guilty", "guilt"),
        "anxious": ("anxious", "anxiety"),
        "hopeless": ("hopeless", "hopelessness"),
        "restless": ("restless", "restlessness"),
        "jealous": ("jealous", "jealousy"),
        "worthless": ("worthless", "worthlessness"),
    },
    told="You often feel {v}.",
    said=(
        "I often feel {v}.",
        "I was {v} all week.",
        "Most of the time I am {v}.",
        "I woke up {v} again.",
        "Inside I feel {v} even among friends.",
        "Lately I feel {v}.",
        "On the way here I felt {v}.",
        "At work I feel {v}.",
        "Being alone makes me {v}.",
        "I felt {v} at breakfast.",
    ),
    tempted=(
        "You feel {v} most of the time, right?",
        "So you were {v} again this week, no?",
        "Do you feel {v} when you are here?",
        "It sounds as if you are {v}, right?",
    ),
    followed=("When do you feel most {v}?", "What do you do when you feel {v}?"),
    cues=("feeling", "mood", "emotion", "emotions"),
    depth=1,
)
CAUSE = Attribute(
    name="cause",
    values={
        "divorce": ("divorce", "divorced"),
        "accident": ("accident", "car crash"),
        "layoff": ("layoff", "laid off"),
        "burglary": ("burglary", "break-in"),
        "bullying": ("bullying", "bullied"),
        "funeral": ("funeral",),
        "bankruptcy": ("bankruptcy", "bankrupt"),
        "flood": ("flood",),
        "betrayal": ("betrayal", "betrayed"),
        "diagnosis": ("diagnosis",),
    },
    told="It began with the {v}.",
    said=(
        "It all began with the {v}.",
        "I never got over the {v}.",
        "Since the {v} I am not myself.",
        "The {v} broke something in me.",
        "I keep going back to the {v}.",
        "I still see the {v} before me.",
        "The {v} is always with me.",
        "My life fell apart with the {v}.",
        "I was different before the {v}.",
        "The {v} took everything from me.",
    ),
    tempted=(
        "It all goes back to the {v}, right?",
        "You never got over the {v}, no?",
        "How often do you think of the {v} you went through?",
        "The {v} still hurts you, right?",
    ),
    followed=("What was the {v} like for you?", "Who was with you at the time of the {v}?"),
    cues=("cause", "began", "happened", "trigger"),
    depth=2,
)
FEAR = Attribute(
    name="fear",
    values={
        "abandonment": ("abandonment", "abandoned"),
        "failure": ("failure", "failing"),
        "death": ("death", "dying"),
        "rejection": ("rejection", "rejected"),
        "illness": ("illness",),
        "poverty": ("poverty",),
        "madness": ("madness", "losing my mind"),
        "intimacy": ("intimacy",),
        "blindness": ("blindness",),
        "humiliation": ("humiliation", "humiliated"),
    },
    told="Deep down you fear {v}.",
    said=(
        "Deep down I fear {v}.",
        "What scares me most is {v}.",
        "I lie awake for fear of {v}.",
        "My secret terror is {v}.",
        "I am afraid of {v}.",
        "At night I think of {v}.",
        "Nothing frightens me more than {v}.",
        "I run from {v}.",
        "My worst thought is {v}.",
        "I see {v} everywhere.",
    ),
    tempted=(
        "You are afraid of {v}, right?",
        "Deep down you fear {v}, no?",
        "How strong is your fear of {v} today?",
        "It is {v} that scares you, right?",
    ),
    followed=("Where does the fear of {v} come from?", "What would {v} mean to you?"),
    cues=("fear", "afraid", "scares", "scared"),
    depth=2,
)


@dataclass(frozen=True)
class TherapyDynamics:
    """Depth must be prepared. The state is the last two acts, as far as they matter.

    Args:
        steps_needed: gradual acts among the last two that make a deep one worth most (1 or 2).
    """

    steps_needed: int = 2
    acts: tuple[str, ...] = ("surface", "gradual", "deep", "evade", "contradict")
    start: Hashable = ("", "")
    fresh: tuple[float, float, float] = (0.3, 0.45, 0.55)
    spoiled: tuple[float, float, float] = (0.15, 0.25, 0.3)
    prepared: float = 1.0

    def value(self, state: Hashable, act: str, attentive: bool) -> float:
        """Return the value of `act` after the two acts in `state`."""
        if act not in DEPTH_ACTS:
            return 0.0
        assert isinstance(state, tuple)
        if "deep" in state:
            return self.spoiled[DEPTH_ACTS.index(act)]
        if act == "deep" and state.count("gradual") >= self.steps_needed:
            return self.prepared
        return self.fresh[DEPTH_ACTS.index(act)]

    def advance(self, state: Hashable, act: str) -> Hashable:
        """Return the last two acts; those that prepare and spoil nothing are ""."""
        assert isinstance(state, tuple)
        return (state[1], act if act in ("gradual", "deep") else "")


class TherapyDomain(Domain):
    """A patient with a therapist; acts surface, gradual, deep, evade, contradict."""

    def dynamics(self, persona: Persona | None = None) -> TherapyDynamics:
        """Return the dynamics for the persona's guardedness (default: guarded)."""
        open_minded = persona is not None and persona.traits.get("guardedness") == "open"
        return TherapyDynamics(steps_needed=1 if open_minded else 2)

    def read_act(self, agent: Reading, partner: Reading, true_claims: tuple[Claim, ...]) -> str:
        """Return the depth of the most personal true claim; a bare true denial is "surface"."""
        depths = [self.by_name[c.attribute].depth for c in true_claims if c.positive]
        if depths:
            return DEPTH_ACTS[max(depths)]
        return "surface" if self.answered(partner, true_claims) else "evade"

    def phrase_act(
        self, act: str, persona: Persona, partner: Reading, rng: np.random.Generator
    ) -> str:
        """Return one phrasing of `act`: a true statement of that depth."""
        if act not in DEPTH_ACTS:
            return super().phrase_act(act, persona, partner, rng)
        depth = DEPTH_ACTS.index(act)
        names = [a for a in persona.facts if self.by_name[a].depth == depth]
        asked = [a for a in names if a in partner.topics]
        return self._state(choose(rng, asked or names), persona, partner, rng)


THERAPY = TherapyDomain(
    name="therapy",
    agent_role="patient",
    partner_role="therapist",
    setting="You are a patient talking to a therapist.",
    attributes=(WORK, PASTIME, SYMPTOM, FEELING, CAUSE, FEAR),
    openings=(
        "Welcome, take a seat.",
        "Hello, good that you came.",
        "Good morning, come in.",
        "Welcome back.",
    ),
    open_questions=(
        "What is on your mind today?",
        "Where would you like to start?",
        "How was your week?",
        "What should I know about that?",
        "Can you say a little more?",
        "What comes up for you right now?",
        "What else is there?",
        "I am listening, what is it?",
    ),
    distractions=(
        "Sorry, I was looking at my notes.",
        "One moment, I have to close the window.",
        "Excuse me, I lost the thread.",
    ),
    evasions=(
        "I do not know what to say.",
        "Nothing special, really.",
        "It is what it is.",
        "Can we talk about something else?",
        "I would rather not go there.",
        "Same as always, I guess.",
        "That is hard to put into words.",
        "You are the expert here.",
        "Maybe another time.",
        "It comes and goes.",
    ),
    phases=(
        Phase("opening", 0.375, ("job", "pastime", "symptom")),
        Phase("exploring", 0.375, ("symptom", "feeling", "cause")),
        Phase("closing", 0.25, ("cause", "fear", "feeling")),
    ),
    traits={
        "guardedness": {
            "guarded": "You are guarded and open up slowly.",
            "open": "You are open and trust quickly.",
        }
    },
    tempt_rate=0.35,
    follow_rate=0.3,
    value_name="disclosure",
    partner_brief=(
        "You are a therapist in a session with a patient. Listen, reflect what you hear in a few "
        "words, and ask one open question at a time; go from daily life to feelings and only then "
        "to causes. Never diagnose, never lecture. Now and then you misremember or assume "
        "something about the patient, and are glad to be corrected."
    ),
    judge_brief=(
        "The person is a patient in therapy. Mind the life, symptoms, feelings and causes that the "
        "background tells, and how open or guarded the person is: a patient who hides things at "
        "first is consistent with a guarded background; another job, symptom or history is not."
    ),
)
