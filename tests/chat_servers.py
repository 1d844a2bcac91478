"""A small language model that plays partner and judge, and a real server that serves it.

`answer` says by rules what a judge or a partner answers to the real prompts; the model learns that
in seconds and is right nearly always. Tests that need many requests let `answer` itself answer,
behind a FaultProxy.

    python tests/chat_servers.py FOLDER PORT

serves FOLDER with `transformers serve` for as long as its standard input is open.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

import ppg_env  # registers PersonaDialogue-v0
from ppg_env.chat import Completion
from ppg_env.chat_judge import ChatJudge
from ppg_env.dialogue import Messages
from ppg_env.partners import ChatPartner

ROOT = Path(__file__).parent.parent
DOMAIN = "therapy"
"""Whose prompts the model has learned."""

_ADVERBS = ("never", "never", "often", "always", "usually", "sometimes", "maybe")
_ACTS = (
    "walk by the river|cook for my friends|read in the garden|play the piano|swim in the lake|"
    "call my sister|paint the kitchen wall|listen to old songs|bake bread|watch the birds|"
    "write long letters|clean the windows|repair my bike|drink tea with milk|sing in the choir"
).split("|")
_TIMES = (
    "in the morning|after work|on Sundays|in winter|when it rains|before dinner|late at night|"
    "with my neighbour|during the holidays|at the weekend"
).split("|")
_PARTNER_LINES = {
    "never": "Why is that? Did you like it once?",
    "maybe": "You do not sound sure. What is in the way?",
    "": "Hello! How have you been?",
}


def agent_line(rng: np.random.Generator) -> str:
    """Return a well-formed line such as "I often bake bread on Sundays."."""
    adverb, act, when = (
        words[int(rng.integers(len(words)))] for words in (_ADVERBS, _ACTS, _TIMES)
    )
    return f"I {adverb} {act} {when}."


def answer(chat: Messages) -> str:
    """Return the answer to a prompt of ChatJudge or ChatPartner, by the adverb of a line.

    To the judge, "never" contradicts, and "maybe" gets no verdict even when asked again.
    """
    system = chat[0]["content"]
    if "VERDICT:" not in system and "CONFLICTS:" not in system:
        said = _adverb(chat[-1]["content"]) if len(chat) > 2 else ""
        return _PARTNER_LINES.get(said, "That sounds good. What do you like about it?")
    adverb = _adverb(json.loads(chat[1]["content"].partition("\n\n")[0])["line"])
    if adverb == "maybe":
        return "That is hard to say."
    if "CONFLICTS:" in system:
        return "They differ.\nCONFLICTS: 0" if adverb == "never" else "CONFLICTS: none"
    if adverb == "never":
        return "That does not fit.\nVERDICT: CONTRADICTS"
    return "That fits.\nVERDICT: CONSISTENT"


def _adverb(line: str) -> str:
    words = line.split()
    return words[1] if len(words) > 1 else ""


def play(
    env: ppg_env.PersonaDialogueVectorEnv, seed: int = 0
) -> tuple[list[ppg_env.Transcript], np.ndarray, list[dict[str, Any]]]:
    """Let all dialogues run to their end; return transcripts, reward_TN and infos."""
    rng = np.random.default_rng(seed)
    env.reset(seed=seed)
    rewards, infos = [], []
    for _ in range(env.max_turns):
        _, reward_N, _, _, info = env.step([agent_line(rng) for _ in range(env.num_envs)])
        rewards.append(reward_N)
        infos.append(info)
    return list(env.transcripts), np.array(rewards), infos


def same_transcripts(
    some: Sequence[ppg_env.Transcript], others: Sequence[ppg_env.Transcript]
) -> bool:
    """Return whether the same was said to the same personas."""
    return [(t.persona.id, t.messages()) for t in some] == [
        (t.persona.id, t.messages()) for t in others
    ]


# ---- the model -----------------------------------------------------------------------------------


class RuleChat:
    """A chat model in this process that answers by `answer` and keeps what it was asked."""

    name, remote, nondeterministic = "rules", False, False

    def __init__(self) -> None:
        self.pairs: list[tuple[Messages, str]] = []

    def __call__(
        self, chats: Sequence[Messages], seeds: Sequence[int], **settings: Any
    ) -> list[Completion]:
        answered = [(chat, answer(chat)) for chat in chats]
        self.pairs += answered
        return [Completion(text, True) for _, text in answered]


def make_chat_model(folder: Path) -> float:
    """Write a Llama of 0.2M parameters that has learned `answer`; return its accuracy.

    Accuracy is the share of prompts that it never saw whose answer it has right to the last token.
    """
    import torch
    from tiny_models import CHATML
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rules = RuleChat()
    judge = ChatJudge(rules, DOMAIN, min_parse_rate=0.0)
    env = gym.make_vec(
        "PersonaDialogue-v0",
        num_envs=64,
        domain=DOMAIN,
        judge=judge,
        partner=ChatPartner(rules, DOMAIN),
    )
    assert isinstance(env, ppg_env.PersonaDialogueVectorEnv)
    play(env)
    pairs, num_unseen = rules.pairs, 150

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([m["content"] for c, _ in pairs for m in c], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},  # words count, not places
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )

    examples = []
    for chat, text in pairs:
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        examples.append((prompt, [*tokenizer(text).input_ids, end]))
    examples, unseen = examples[:-num_unseen], examples[-num_unseen:]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    rng = np.random.default_rng(0)
    # First the ends of the prompts, where the words that matter stand closer together.
    for num_steps, batch_size, longest in ((110, 16, 100), (30, 8, 250), (50, 8, 10_000)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
        for step in range(num_steps):
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - 0.8 * step / num_steps)
            drawn = [examples[i] for i in rng.integers(len(examples), size=batch_size)]
            token_BL, label_BL = _padded([(p[-longest:], a) for p, a in drawn], end)
            hidden_BLH = model.model(token_BL).last_hidden_state
            answers = label_BL[:, 1:] >= 0
            logit_nV = model.lm_head(hidden_BLH[:, :-1][answers])
            loss = torch.nn.functional.cross_entropy(logit_nV, label_BL[:, 1:][answers])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    right = 0
    for prompt, text in unseen:
        with torch.no_grad():
            logit_LV = model(torch.tensor([prompt + text])).logits[0]
        right += logit_LV.argmax(-1)[-len(text) - 1 : -1].tolist() == text
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return right / len(unseen)


def _padded(examples: Sequence[tuple[list[int], list[int]]], end: int) -> tuple[Any, Any]:
    """Return token_BL and label_BL; only the answers have labels, all else has -100."""
    import torch

    longest = max(len(prompt) + len(text) for prompt, text in examples)
    token_BL = torch.full((len(examples), longest), end)
    label_BL = torch.full((len(examples), longest), -100)
    for b, (prompt, text) in enumerate(examples):
        token_BL[b, : len(prompt) + len(text)] = torch.tensor(prompt + text)
        label_BL[b, len(prompt) : len(prompt) + len(text)] = torch.tensor(text)
    return token_BL, label_BL


# ---- the server ----------------------------------------------------------------------------------


class ChatServer:
    """`transformers serve` in a process of its own, on a free port, until `stop` or our own end.

    Attributes:
        address: e.g. http://127.0.0.1:40123; the endpoint's root is `url`.
        model: the model's name in requests.

    Raises:
        RuntimeError: it did not start; shows what it printed.
    """

    def __init__(self, folder: Path) -> None:
        self.model = str(folder)
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [sys.executable, __file__, self.model, str(port)],
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,  # the process ends when this closes, however we end
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        """Return the endpoint's root, as clients want it."""
        return f"{self.address}/v1"

    @property
    def output(self) -> str:
        """Return the end of what the server has printed."""
        self._log.seek(0)
        return self._log.read()[-4000:]

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _wait_until_healthy(self, patience: float = 120.0) -> None:
        started = time.monotonic()
        while time.monotonic() - started < patience and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(f"transformers serve did not start; it printed:\n{self.output}")


@functools.cache
def chat_model() -> Path:
    """Return a folder with the trained model, for "hf:FOLDER" or a server; once a test process."""
    folder = tempfile.mkdtemp(prefix="chat-model-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    accuracy = make_chat_model(Path(folder))
    assert accuracy > 0.8, f"the model has learned too little: {accuracy:.0%} right"
    return Path(folder)


@functools.cache
def _chat_server() -> ChatServer:
    server = ChatServer(chat_model())
    atexit.register(server.stop)
    return server


def serving() -> Iterator[ChatServer]:
    """Yield a server of the trained model, one a test process; for fixtures.

    What it has printed is printed again, which pytest shows where a test has failed.
    """
    server = _chat_server()
    yield server
    print(f"transformers serve has printed:\n{server.output}")


def serve(folder: str, port: str) -> None:
    """Serve until standard input closes, which it does even if our parent was killed."""

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    from transformers.cli.transformers import main

    options = ["--host", "127.0.0.1", "--port", port, "--device", "cpu", "--log-level", "error"]
    sys.argv = ["transformers", "serve", folder, *options]
    main()


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2])
