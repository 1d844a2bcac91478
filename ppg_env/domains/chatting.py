"""Chatting: two strangers get acquainted; dependence length m = 2.

Volunteering a true detail that nobody asked for costs a little now; an attentive partner picks it
up, and the next in-character turn is worth more.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from ..dialogue import Persona
from .domain import Attribute, Domain, Phase, choose, prefixed
from .lexicon import Claim, Reading

JOB = Attribute(
    name="job",
    values={
        "nurse": ("nurse", "nurses", "nursing"),
        "baker": ("baker", "bakers", "bakery"),
        "carpenter": ("carpenter", "carpenters", "carpentry"),
        "pilot": ("pilot", "pilots"),
        "lawyer": ("lawyer", "lawyers"),
        "plumber": ("plumber", "plumbers", "plumbing"),
        "librarian": ("librarian", "librarians", "library"),
        "farmer": ("farmer", "farmers", "farm"),
        "tailor": ("tailor", "tailors"),
        "dentist": ("dentist", "dentists"),
        "mechanic": ("mechanic", "mechanics"),
        "journalist": ("journalist", "journalists"),
        "engineer": ("engineer", "engineers"),
        "florist": ("florist", "florists"),
    },
    told="You work as {a}.",
    said=(
        "I work as {a}.",
        "I am {a} by trade.",
        "My job is being {a}.",
        "I have been {a} for years.",
        "I make my living as {a}.",
    ),
    asked=(
        "What do you do for a living?",
        "Where do you work?",
        "What kind of job do you have?",
        "What keeps you busy during the week, workwise?",
    ),
    tempted=(
        "As a fellow {v}, you must be tired in the evening, right?",
        "You said you are {a}, is that hard?",
        "Being {a} must be fun for you, no?",
        "So how long have you been {a} now?",
    ),
    followed=(
        "Oh, {a}! How did you get into that?",
        "{a}, how nice. What is that like for you?",
        "I have never met {a} before, tell me more!",
    ),
    cues=("living", "work", "job", "workwise", "profession", "career", "employed", "occupation"),
)
CITY = Attribute(
    name="city",
    values={
        city: (city,)
        for city in (
            "Oslo",
            "Lisbon",
            "Kyoto",
            "Dublin",
            "Cairo",
            "Lima",
            "Vienna",
            "Nairobi",
            "Boston",
            "Prague",
            "Toronto",
            "Athens",
            "Seoul",
            "Madrid",
        )
    },
    told="You live in {v}.",
    said=(
        "I live in {v}.",
        "My home is in {v}.",
        "I have a small flat in {v}.",
        "I moved to {v} some time ago.",
        "I am from {v}.",
    ),
    asked=(
        "Where do you live?",
        "Which city are you from?",
        "Where is home for you?",
        "What town do you call home?",
    ),
    tempted=(
        "You live in {v} like me, right?",
        "How is the weather at your place in {v} today?",
        "So you moved to {v}, do you like it there?",
        "You are from {v}, is it loud at night?",
    ),
    followed=(
        "Oh, {v}! What do you like about it?",
        "{v}, how nice. What is it like there?",
        "I have never been to {v}, tell me more!",
    ),
    cues=("live", "city", "home", "town", "from", "hometown"),
)
PET = Attribute(
    name="pet",
    values={
        "dog": ("dog", "dogs", "puppy", "puppies"),
        "cat": ("cat", "cats", "kitten", "kittens"),
        "parrot": ("parrot", "parrots"),
        "rabbit": ("rabbit", "rabbits", "bunny"),
        "hamster": ("hamster", "hamsters"),
        "turtle": ("turtle", "turtles", "tortoise"),
        "goldfish": ("goldfish",),
        "horse": ("horse", "horses", "pony"),
        "lizard": ("lizard", "lizards", "gecko"),
        "ferret": ("ferret", "ferrets"),
    },
    told="You have {a}.",
    said=(
        "I have {a}.",
        "I share my home with {a}.",
        "My {v} is my best company.",
        "I look after {a}.",
        "There is {a} waiting for me at home.",
    ),
    asked=(
        "Do you have any pets?",
        "Is there an animal at your place?",
        "What about pets, do you have one?",
        "Do any animals keep you company?",
    ),
    tempted=(
        "As a fellow {v} owner, you must get up early, right?",
        "Your {v} must keep you busy, no?",
        "You said you have {a}, how old is it?",
        "How is your {v} doing today?",
    ),
    followed=(
        "Oh, {a}! What is its name?",
        "{a}, how nice. How long have you had it?",
        "I always liked {v} stories, tell me more!",
    ),
    cues=("pet", "pets", "animal", "animals"),
)
HOBBY = Attribute(
    name="hobby",
    values={
        "chess": ("chess",),
        "knitting": ("knitting", "knit"),
        "hiking": ("hiking", "hike", "hikes"),
        "pottery": ("pottery", "ceramics"),
        "fishing": ("fishing",),
        "dancing": ("dancing", "dance"),
        "photography": ("photography", "photographs"),
        "gardening": ("gardening",),
        "sailing": ("sailing", "sail"),
        "painting": ("painting", "paint"),
        "cycling": ("cycling",),
        "surfing": ("surfing", "surf"),
        "birdwatching": ("birdwatching", "bird watching"),
        "climbing": ("climbing",),
    },
    told="Your hobby is {v}.",
    said=(
        "My hobby is {v}.",
        "I spend my free time on {v}.",
        "I do a lot of {v}.",
        "Most weekends I am busy with {v}.",
        "I got into {v} years ago.",
    ),
    asked=(
        "What do you do in your free time?",
        "Do you have a hobby?",
        "How do you spend your weekends?",
        "What do you enjoy doing after hours?",
    ),
    tempted=(
        "You spend a lot of time on {v} too, right?",
        "Since you are into {v}, do you do it alone?",
        "Your {v} must take up the whole weekend, no?",
        "How often do you go out for your {v}?",
    ),
    followed=(
        "Oh, {v}! How did you start?",
        "{v}, how nice. What do you like about it?",
        "I never tried {v}, tell me more!",
    ),
    cues=(
        "hobby",
        "hobbies",
        "free time",
        "weekends",
        "weekend",
        "after hours",
        "for fun",
        "off work",
        "after work",
        "spare time",
        "pastime",
    ),
)
FOOD = Attribute(
    name="food",
    values={
        food: (food,) if food.endswith("s") else (food, food + "s")
        for food in (
            "pizza",
            "sushi",
            "curry",
            "pasta",
            "tacos",
            "dumplings",
            "pancakes",
            "paella",
            "ramen",
            "falafel",
            "lasagna",
            "risotto",
        )
    },
    told="Your favourite food is {v}.",
    said=(
        "My favourite food is {v}.",
        "I can eat {v} every day.",
        "I love {v}.",
        "I cook {v} all the time.",
        "For dinner I like {v} best.",
    ),
    asked=(
        "What do you like to eat?",
        "What is your favourite food?",
        "Which dish do you cook most?",
        "What do you have for dinner on a good day?",
    ),
    tempted=(
        "You love {v} as much as I do, right?",
        "Where do you get your {v}, as you eat it so often?",
        "Your favourite is {v}, so do you cook it yourself?",
        "Would you share your recipe for {v}?",
    ),
    followed=(
        "Oh, {v}! Do you cook it yourself?",
        "{v}, how nice. Who taught you?",
        "I get hungry when I hear {v}, tell me more!",
    ),
    cues=("eat", "food", "dish", "dinner", "meal", "lunch", "cook"),
)
MUSIC = Attribute(
    name="music",
    values={
        music: (music,)
        for music in (
            "jazz",
            "opera",
            "reggae",
            "techno",
            "salsa",
            "gospel",
            "disco",
            "flamenco",
            "bluegrass",
            "punk",
        )
    },
    told="You listen to {v}.",
    said=(
        "I listen to {v}.",
        "My music is {v}.",
        "I play {v} records all day.",
        "I am a {v} person.",
        "Nothing cheers me up like {v}.",
    ),
    asked=(
        "What music do you listen to?",
        "Which songs do you play most?",
        "What kind of music do you like?",
        "What was the last concert you went to?",
    ),
    tempted=(
        "You are a {v} fan like me, right?",
        "You listen to {v} a lot, who is your star?",
        "Which {v} concert did you enjoy most?",
        "So your {v} records, where do you keep them?",
    ),
    followed=(
        "Oh, {v}! Who is your star?",
        "{v}, how nice. When did you start listening?",
        "I know little about {v}, tell me more!",
    ),
    cues=("music", "listen", "songs", "song", "concert", "band"),
)
SEASON = Attribute(
    name="season",
    values={
        "spring": ("spring", "springtime"),
        "summer": ("summer", "summers", "summertime"),
        "autumn": ("autumn",),
        "winter": ("winter", "winters", "wintertime"),
    },
    told="You like {v} best.",
    said=(
        "My season is {v}.",
        "I like {v} best.",
        "I feel most alive in {v}.",
        "I wait for {v} all year.",
        "Give me {v} any time.",
    ),
    asked=(
        "Which season do you like best?",
        "What time of year is yours?",
        "Which season suits you?",
        "What is your favourite season?",
    ),
    tempted=(
        "You like {v} best as well, right?",
        "Since {v} is your season, what do you do in it?",
        "You are a {v} person, why is that?",
        "What do you love most about {v}?",
    ),
    followed=(
        "Oh, {v}! Why is that?",
        "{v}, how nice. What do you do then?",
        "I never thought much of {v}, tell me more!",
    ),
    cues=("season", "time of year", "seasons"),
)


@dataclass(frozen=True)
class ChattingDynamics:
    """Volunteering costs now and pays in the next turn, if the partner is attentive then.

    The state is whether the last act volunteered something.
    """

    acts: tuple[str, ...] = ("answer", "volunteer", "evade", "contradict")
    start: Hashable = False
    answer: float = 0.55
    volunteer: float = 0.45
    picked_up: float = 0.45

    def value(self, state: Hashable, act: str, attentive: bool) -> float:
        """Return the value of `act`, with the bonus if an earlier detail was picked up."""
        worth = {"answer": self.answer, "volunteer": self.volunteer}.get(act)
        if worth is None:
            return 0.0
        return worth + (self.picked_up if state and attentive else 0.0)

    def advance(self, state: Hashable, act: str) -> Hashable:
        """Return whether this act volunteered something."""
        return act == "volunteer"


class ChattingDomain(Domain):
    """Two strangers; acts answer, volunteer, evade, contradict."""

    def dynamics(self, persona: Persona | None = None) -> ChattingDynamics:
        """Return the same dynamics for everybody."""
        return ChattingDynamics()

    def read_act(self, agent: Reading, partner: Reading, true_claims: tuple[Claim, ...]) -> str:
        """Return "answer", "volunteer" (an answer and another true detail) or "evade"."""
        answered = self.answered(partner, true_claims)
        if not answered:
            return "evade"
        told = {claim.attribute for claim in true_claims if claim.positive}
        if not partner.topics:
            return "volunteer" if len(told) > 1 else "answer"
        return "volunteer" if told - partner.topics else "answer"

    def phrase_act(
        self, act: str, persona: Persona, partner: Reading, rng: np.random.Generator
    ) -> str:
        """Return one phrasing of `act`; "volunteer" is an answer joined to another true detail."""
        if act != "volunteer":
            return super().phrase_act(act, persona, partner, rng)
        topic = self._topic(persona, partner, rng)
        answer = self._state(topic, persona, partner, rng)
        others = [a for a in persona.facts if a != topic and a not in partner.topics]
        other = self.by_name[choose(rng, others)]
        detail = other.phrase(choose(rng, other.said), persona.facts[other.name])
        return prefixed(answer[:-1] + choose(rng, (", and ", ", also ")), detail)


CHATTING = ChattingDomain(
    name="chatting",
    agent_role="stranger",
    partner_role="other stranger",
    setting="You are chatting with a stranger.",
    attributes=(JOB, CITY, PET, HOBBY, FOOD, MUSIC, SEASON),
    openings=("Hi there!", "Hello, nice to meet you!", "Hey, good to see you!", "Good evening!"),
    distractions=(
        "Sorry, my phone just rang.",
        "Wait, I lost my thread.",
        "One moment, somebody waved at me.",
    ),
    evasions=(
        "It depends on the day.",
        "That is hard to say.",
        "Let us talk about something else.",
        "Who knows, really.",
        "I would rather not say.",
        "There is not much to tell.",
        "You tell me first.",
        "Good question, no idea.",
        "A bit of this and that.",
        "Maybe later.",
    ),
    phases=(
        Phase("small talk", 0.25, ("city", "job", "season")),
        Phase("getting acquainted", 0.5, ("hobby", "music", "pet", "food")),
        Phase("winding down", 0.25),
    ),
    follow_rate=1.0,
    value_name="openness",
    partner_brief=(
        "You are a stranger who gets to know somebody in a chat. You know nothing about the other "
        "but what they say. Be curious and friendly: follow up on what they tell, ask about their "
        "life, work, home and tastes, and now and then take something about them for granted that "
        "they never said, as people do."
    ),
    judge_brief=(
        "The person is one of two strangers who chat. Everyday talk about the person that the "
        "background leaves open is consistent; a job, home, family, taste or past that the "
        "background rules out contradicts it, also where the other stranger suggested it."
    ),
)
