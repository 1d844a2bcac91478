"""Education: a student learns from a teacher; dependence length m = T.

Admitting confusion, or asking in one's own way of learning, earns less now and raises mastery;
mastery raises the value of every later explanation.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..dialogue import Persona
from .chatting import HOBBY
from .domain import CORRECTIONS, OPENERS, Attribute, Domain, Phase, choose, prefixed
from .lexicon import Claim, Reading, resolve_claims

GRADES = ("five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_ORDINALS = ("fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth")

GRADE = Attribute(
    name="grade",
    values={
        grade: (f"grade {grade}", f"grade {number}", f"{ordinal} grade", f"{ordinal} grader")
        for number, (grade, ordinal) in enumerate(zip(GRADES, _ORDINALS, strict=True), start=5)
    },
    told="You are in {v}.",
    said=(
        "I am in {v}.",
        "I started {v} this year.",
        "My class is {v}.",
        "I go to {v}.",
        "They put me in {v}.",
        "I am new in {v}.",
    ),
    tempted=(
        "You are in {v}, right?",
        "As you are in {v}, is this too easy?",
        "This is your second month in {v}, no?",
    ),
    followed=("Is {v} hard so far?",),
    cues=("grade", "class", "year"),
)
STYLE = Attribute(
    name="style",
    values={
        "pictures": ("pictures", "picture", "drawing", "drawings", "diagram", "diagrams"),
        "experiments": ("experiments", "experiment", "hands-on"),
        "stories": ("stories", "story"),
        "games": ("games", "game"),
        "videos": ("videos", "video", "clips"),
        "songs": ("songs", "song", "rhymes"),
    },
    told="You learn best with {v}.",
    said=(
        "I learn best with {v}.",
        "I understand things through {v}.",
        "What helps me is {v}.",
        "I remember {v} best.",
        "For me it has to be {v}.",
        "My way of learning is {v}.",
    ),
    tempted=(
        "You learn best with {v}, right?",
        "Since {v} help you most, shall I bring some?",
        "You like {v}, so shall we use them?",
        "You asked for {v} last time, right?",
    ),
    followed=("Good, here you are with {v}. Does it help?", "Fine, let us try {v}. Is it clearer?"),
    cues=("learn best", "helps you", "way of learning"),
)
SUBJECT = Attribute(
    name="subject",
    values={
        "history": ("history",),
        "geography": ("geography",),
        "art": ("art", "arts"),
        "music": ("music",),
        "chemistry": ("chemistry",),
        "drama": ("drama", "theatre"),
        "biology": ("biology",),
        "sports": ("sports", "gym"),
        "latin": ("Latin",),
        "poetry": ("poetry", "poems"),
    },
    told="Your favourite subject is {v}.",
    said=(
        "My favourite subject is {v}.",
        "I like {v} lessons most.",
        "I am good at {v}.",
        "I look forward to {v} every week.",
        "I choose {v} any day.",
        "The best hour is {v}.",
    ),
    tempted=(
        "Your favourite subject is {v}, right?",
        "You are good at {v}, so is this easy for you?",
        "You just had {v}, no?",
    ),
    followed=("What do you like about {v}?",),
    cues=("subject", "lesson", "lessons"),
)
PASTIME = Attribute(
    name="pastime",
    values=HOBBY.values,
    told="After school you do {v}.",
    said=(
        "After school I do {v}.",
        "I am in the {v} club.",
        "My free time goes into {v}.",
        "I spent the weekend on {v}.",
        "I love my {v}.",
        "On Fridays I have {v}.",
    ),
    tempted=(
        "You are in the {v} club, right?",
        "You were busy with {v} all weekend, no?",
        "Your {v} takes a lot of time, right?",
    ),
    followed=("How was {v} this week?",),
    cues=("after school", "free time", "club", "weekend"),
)
IDEAS: Mapping[str, Sequence[str]] = {
    "fractions": (
        "a fraction is a part of a whole",
        "the denominator says how many parts there are",
        "the numerator counts the parts we take",
        "one half and two quarters are equal fractions",
        "fractions with the same denominator are easy to add",
        "a whole has four quarters as fractions",
        "fractions can be larger than one",
        "dividing makes new fractions",
    ),
    "volcanoes": (
        "a volcano is a hole where magma comes out",
        "magma is called lava when it is outside",
        "lava gets hard and becomes rock",
        "volcanoes grow where plates meet",
        "ash from volcanoes makes the soil rich",
        "some volcanoes sleep for a thousand years",
        "hot gas pushes the magma up",
        "an old volcano can be an island",
    ),
    "gravity": (
        "gravity pulls things to the ground",
        "gravity keeps the moon near us",
        "weight is how strong gravity pulls",
        "gravity gets weaker far away",
        "in empty space gravity lets all things fall the same",
        "gravity makes the tides",
        "on the moon gravity is weak",
        "gravity holds the air around us",
    ),
    "electricity": (
        "electricity needs a closed circuit",
        "a battery pushes electrons along",
        "metal lets electricity through",
        "electrons carry electricity in a wire",
        "a switch opens the circuit",
        "lightning is electricity in the sky",
        "plastic stops electricity",
        "a lamp turns electricity into light",
    ),
    "magnets": (
        "magnets have a north and a south pole",
        "the same poles of magnets push away",
        "a magnet pulls iron",
        "magnets work even through paper",
        "a compass is a small magnet",
        "a magnet has a field around it",
        "heat makes magnets weak",
        "a broken magnet is two magnets",
    ),
    "photosynthesis": (
        "photosynthesis turns light into sugar",
        "chlorophyll makes the leaves green",
        "photosynthesis needs water and air",
        "chlorophyll catches the light",
        "photosynthesis gives us oxygen",
        "photosynthesis happens in the leaves",
        "at night photosynthesis stops",
        "plants grow by photosynthesis",
    ),
    "probability": (
        "probability says how likely things are",
        "a probability of one means it must happen",
        "the probability of heads is one half",
        "probability is counting good cases over all cases",
        "two coins multiply the probability",
        "a fair die gives each face the same probability",
        "a probability is at most one",
        "rare things have a small probability",
    ),
    "planets": (
        "planets go round the sun",
        "the orbit of each planet is nearly a circle",
        "big planets are made of gas",
        "the inner planets are made of rock",
        "an orbit far out takes longer",
        "some planets have rings",
        "planets shine by the light of the sun",
        "the planets turn around themselves",
    ),
}
TOPIC = Attribute(
    name="topic",
    values={
        "fractions": ("fractions", "fraction", "denominator", "numerator"),
        "volcanoes": ("volcanoes", "volcano", "magma", "lava"),
        "gravity": ("gravity",),
        "electricity": ("electricity", "circuit", "electrons"),
        "magnets": ("magnets", "magnet"),
        "photosynthesis": ("photosynthesis", "chlorophyll"),
        "probability": ("probability", "probabilities"),
        "planets": ("planets", "planet", "orbit"),
    },
    told="This week you study {v}.",
    said=(
        "This week I study {v}.",
        "We are doing {v} now.",
        "My class has {v} this week.",
        "I read the chapter on {v}.",
    ),
    tempted=(
        "You are done with {v}, so what did you learn?",
        "You study {v} this week, right?",
        "Your homework was on {v}, no?",
    ),
    followed=(
        "What do you know about {v}?",
        "How would you explain {v} to a friend?",
        "What is important about {v}?",
    ),
    cues=("topic", "chapter", "homework"),
)

CONFUSIONS = (
    "I am confused",
    "I am lost here",
    "I do not get it",
    "I do not understand this part",
    "this is too fast for me",
    "I am stuck",
    "this makes no sense to me",
    "I lost the thread",
    "this part is still unclear to me",
    "I need more time for this",
)
REQUESTS = (
    "can you show me {v}",
    "could we use {v}",
    "please give me {v}",
    "may I see {v}",
    "can we try {v}",
)


@dataclass(frozen=True)
class EducationDynamics:
    """Asking raises mastery, mastery raises explanations. The state is the mastery, 0 to 4.

    `explain[mastery]` is what an explanation is worth.
    """

    acts: tuple[str, ...] = ("explain", "ask", "answer", "evade", "contradict")
    start: Hashable = 0
    explain: tuple[float, ...] = (0.3, 0.55, 0.75, 0.9, 1.0)
    ask: float = 0.1
    answer: float = 0.1

    def value(self, state: Hashable, act: str, attentive: bool) -> float:
        """Return the value of `act` at the mastery in `state`."""
        if act == "explain":
            assert isinstance(state, int)
            return self.explain[state]
        return {"ask": self.ask, "answer": self.answer}.get(act, 0.0)

    def advance(self, state: Hashable, act: str) -> Hashable:
        """Return the mastery after `act`."""
        assert isinstance(state, int)
        return min(state + 1, len(self.explain) - 1) if act == "ask" else state


class EducationDomain(Domain):
    """A student with a teacher; acts explain, ask, answer, evade, contradict."""

    @cached_property
    def known_words(self) -> frozenset[str]:
        """Return the words of any domain and those of the ideas on the topics."""
        ideas = [self.lexicon.read(idea).words for about in IDEAS.values() for idea in about]
        return super().known_words.union(*ideas)

    def dynamics(self, persona: Persona | None = None) -> EducationDynamics:
        """Return the same dynamics for everybody."""
        return EducationDynamics()

    def claims(self, agent: Reading, partner: Reading) -> tuple[Claim, ...]:
        """Return the claims; a request for a way of learning claims that way as one's own."""
        claims = resolve_claims(agent, partner)
        if "request" not in agent.marks:
            return claims
        wished = tuple(c for c in agent.questioned if c.attribute == "style")
        return tuple(dict.fromkeys(claims + wished))

    def read_act(self, agent: Reading, partner: Reading, true_claims: tuple[Claim, ...]) -> str:
        """Return "ask" for confusion or a request, "explain" for a statement on one's topic, ..."""
        told = {claim.attribute for claim in true_claims if claim.positive}
        if "confusion" in agent.marks or ("request" in agent.marks and "style" in told):
            return "ask"
        if "topic" in told and len(agent.words) >= 4:
            return "explain"
        return "answer" if told or self.answered(partner, true_claims) else "evade"

    def phrase_act(
        self, act: str, persona: Persona, partner: Reading, rng: np.random.Generator
    ) -> str:
        """Return one phrasing of `act`."""
        false = any(persona.facts.get(c.attribute) != c.value for c in partner.about_listener)
        opener = choose(rng, CORRECTIONS if false else OPENERS)
        if act == "explain":
            idea = choose(rng, IDEAS[persona.facts["topic"]])
            thought = choose(
                rng, ("I think {}.", "I know that {}.", "I believe {}.", "My idea is that {}.")
            )
            return prefixed(opener, thought.format(idea))
        if act == "ask":
            confusion = choose(rng, CONFUSIONS)
            confusion = confusion[0].upper() + confusion[1:]
            request = STYLE.phrase(choose(rng, REQUESTS), persona.facts["style"])
            if rng.random() < 0.3:
                return prefixed(opener, f"{confusion}.")
            return prefixed(opener, f"{confusion}, {request[0].lower()}{request[1:]}?")
        if act == "answer":
            names = [a for a in persona.facts if a != "topic"]
            asked = [a for a in names if a in partner.topics]
            return self._state(choose(rng, asked or names), persona, partner, rng)
        if act == "contradict" and not false:
            names = [a for a in persona.facts if a != "topic"]
            attribute = self.by_name[choose(rng, names)]
            wrong = [v for v in attribute.values if v != persona.facts[attribute.name]]
            said = attribute.phrase(choose(rng, attribute.said), choose(rng, wrong))
            return prefixed(opener, said)
        return super().phrase_act(act, persona, partner, rng)


EDUCATION = EducationDomain(
    name="education",
    agent_role="student",
    partner_role="teacher",
    setting="You are a student talking to a teacher.",
    attributes=(GRADE, TOPIC, STYLE, SUBJECT, PASTIME),
    openings=(
        "Hello, today we look at {topic}.",
        "Good morning, let us go on with {topic}.",
        "Welcome, it is time for {topic}.",
        "Hi, please open the book at {topic}.",
    ),
    open_questions=(
        "What is the main idea?",
        "Can you put it in your own words?",
        "What do you know already?",
        "How does it work?",
        "What comes next?",
        "Why is that so?",
        "What else can you tell me?",
        "How would you explain it to a friend?",
    ),
    distractions=(
        "Sorry, I have to calm the others down.",
        "One moment, the bell is so loud.",
        "Wait, where did I put my chalk?",
    ),
    evasions=(
        "It depends, I guess.",
        "Is it lunch time yet?",
        "I have no idea what you mean.",
        "Can somebody else go first?",
        "That is a good question.",
        "Maybe it is in the book.",
        "I was looking out of the window.",
        "Let us see tomorrow.",
        "Whatever you say.",
        "I would have to look it up.",
    ),
    phases=(Phase("introduction", 0.375), Phase("practice", 0.625)),
    marks={
        "confusion": [phrase.lower() for phrase in CONFUSIONS]
        + [
            "i'm confused",
            "i'm lost",
            "i'm stuck",
            "i don't get",
            "i don't understand",
            "don't understand",
            "do not understand",
            "don't get it",
            "makes no sense",
            "doesn't make sense",
            "confuses me",
            "confusing",
            "too fast for me",
            "i can't follow",
            "i cannot follow",
            "lost me",
            "over my head",
            "i am lost",
            "i am struggling",
            "i'm struggling",
            "still unclear",
            "not clear to me",
            "unclear to me",
            "go over that again",
            "explain that again",
            "explain it again",
            "puzzled",
            "i don't see why",
        ],
        "request": [
            "can you",
            "let's",
            "let us try",
            "could you",
            "can we",
            "could we",
            "please",
            "may i",
            "show me",
            "i'd like",
            "would you",
            "is there",
            "can i",
            "could i",
            "give me",
            "i need",
            "do you have",
        ],
    },
    tempt_rate=0.35,
    follow_rate=0.3,
    value_name="learning",
    partner_brief=(
        "You are a teacher in a lesson with one student. Explain one small step at a time, ask "
        "what the student has understood and how the student would like to learn it, and adapt to "
        "the answers. Now and then take something about the student for granted, as teachers do."
    ),
    partner_knows=("topic", "grade"),
    judge_brief=(
        "The person is a student in a lesson. Mind the grade, what the student can know at it, and "
        "the preferred way of learning: asking for another way, or knowing far more or less than "
        "the background allows, contradicts it. Being confused, or getting better, does not."
    ),
)
