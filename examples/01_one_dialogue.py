"""One dialogue: the environment, an agent, the reward of every turn.

python examples/01_one_dialogue.py
"""

import gymnasium as gym

import ppg_env  # noqa: F401  (registers PersonaDialogue-v0)
from agents import PPGAgent

env = gym.make("PersonaDialogue-v0", domain="therapy", render_mode="human")
agent = PPGAgent("nano", env=None, seed=0)  # the bundled tiny language model, untrained

observation, info = env.reset(seed=1)
total, over = 0.0, False
while not over:
    utterance, _ = agent.predict(observation)
    observation, reward, terminated, truncated, info = env.step(utterance)
    total, over = total + reward, terminated or truncated

print(f"\nmean reward {total / info['turn']:.2f} over {info['turn']} turns as {info['persona']}")
