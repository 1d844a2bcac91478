"""One dialogue in which language models behind an endpoint play the partner and the judge.

Any OpenAI-compatible server will do; this one comes with transformers and needs no account:

    pip install "partial-policy-gradients[chat]" "transformers[serving]"
    transformers serve                                      # in another terminal
    python examples/03_endpoint_partner_and_judge.py --model Qwen/Qwen3-4B-Instruct-2507

    python examples/03_endpoint_partner_and_judge.py --model NAME --url http://localhost:8000/v1

The agent is the bundled tiny model, so that nothing else has to be loaded. A key, where the server
wants one, is read from the environment variable OPENAI_API_KEY.
"""

import argparse

import gymnasium as gym

import ppg_env
from agents import load_policy

parser = argparse.ArgumentParser(description="Speak with a model behind an endpoint.")
parser.add_argument("--model", required=True, help="the model's name as the server knows it")
parser.add_argument("--url", default="http://localhost:8000/v1")
parser.add_argument("--domain", default="therapy", choices=sorted(ppg_env.DOMAINS))
parser.add_argument("--max-turns", type=int, default=4)
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()

chat = ppg_env.OpenAIChat(options.model, options.url, timeout=120, budget=600)
env = gym.make(
    "PersonaDialogue-v0",
    domain=options.domain,
    partner=ppg_env.ChatPartner(chat, options.domain),
    # One dialogue is no statistics: show what the judge says, however often it says nothing.
    judge=ppg_env.ChatJudge(chat, options.domain, line_to_line=True, min_parse_rate=0.0),
    max_turns=options.max_turns,
    render_mode="human",
)
agent = load_policy("nano", seed=options.seed)

observation, info = env.reset(seed=options.seed)
over, rewards = False, []
while not over:
    line, _ = agent.predict(observation)
    observation, reward, terminated, truncated, info = env.step(line)
    rewards.append(float(reward))
    over = terminated or truncated

scored = [reward for reward in rewards if reward == reward]  # NaN: the judge gave no verdict
print(f"\n{len(rewards)} turns, {len(scored)} of them scored", end="")
print(f", mean reward {sum(scored) / len(scored):.2f}" if scored else "")
if chat.retries:
    print("repeated requests:", dict(chat.retries))
