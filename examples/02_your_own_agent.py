"""Your own agent needs only `predict`; your own domain is mostly data; both meet in the same loop.

python examples/02_your_own_agent.py
"""

import gymnasium as gym

from agents import ScriptedPolicy, collect_rollouts
from ppg_env import Attribute, Domain, Persona

# A domain of one's own, in under 30 lines: what a persona can be like and how one speaks of it.
INSTRUMENT = Attribute(
    name="instrument",
    values={"violin": ("violin", "fiddle"), "drums": ("drums", "drummer"), "harp": ("harp",)},
    told="You play the {v}.",
    said=("I play the {v}.", "My instrument is the {v}.", "I have played the {v} since school."),
    asked=("Which instrument do you play?", "What do you play in the orchestra?"),
    tempted=("You play the {v}, right?", "As you play the {v}, is it heavy to carry?"),
    followed=("The {v}! How did you choose it?",),
    cues=("instrument", "play", "orchestra"),
)
ORCHESTRA = Domain(
    name="orchestra",
    agent_role="musician",
    partner_role="conductor",
    setting="You are a musician talking to a new conductor.",
    attributes=(INSTRUMENT,),
    openings=("Good to meet you.", "Welcome to the rehearsal."),
)
PERSONAS = [
    Persona(f"player-{value}", "orchestra", f"You play the {value}.", {"instrument": value})
    for value in INSTRUMENT.values
]


class HonestAgent:
    """Says what its system message says, in the first person, in ever new words."""

    def predict(self, observation, deterministic=False):
        """Return (utterance, None), as agents of Stable-Baselines3 do."""
        instrument = observation[0]["content"].removesuffix(".").split()[-1]
        spoken = sum(message["role"] == "assistant" for message in observation)
        openings = ("I play the", "My instrument is the", "People know me for the", "I love the")
        return f"{openings[spoken % len(openings)]} {instrument}.", None


yes_sayer = ScriptedPolicy(lambda observation: "Yes, exactly.")
for name, agent in {"honest agent": HonestAgent(), "yes-sayer": yes_sayer}.items():
    envs = gym.make_vec(
        "PersonaDialogue-v0", num_envs=12, domain=ORCHESTRA, personas=PERSONAS, max_turns=4
    )
    batch = collect_rollouts(envs, agent, seed=0)
    print(f"{name}: mean reward {batch.reward_BT.mean():.2f}")
