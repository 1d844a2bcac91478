"""A domain of one's own, written as a user would."""

from ppg_env import Attribute, Domain, Persona

DRINK = Attribute(
    name="drink",
    values={"tea": ("tea",), "coffee": ("coffee", "espresso"), "cocoa": ("cocoa",)},
    told="You drink {v}.",
    said=("I drink {v}.", "{v} is my drink.", "I order {v} every time."),
    asked=("What would you like to drink?", "Which drink is yours?"),
    tempted=("{v} as always for you, right?", "You drink {v}, no?"),
    followed=("Large or small {v}?",),
    cues=("drink", "order"),
)
CAFE = Domain(
    name="cafe",
    agent_role="guest",
    partner_role="waiter",
    setting="You are a guest in a café.",
    attributes=(DRINK,),
)
GUESTS = [
    Persona(f"guest-{drink}", "cafe", f"You drink {drink}.", {"drink": drink})
    for drink in DRINK.values
]
