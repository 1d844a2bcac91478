"""Three ways to train one language model on dialogues of several turns.

    ours    PPGAgent: the key-value cache is kept from turn to turn, an update reads each dialogue
            once, as one sequence.
    plain   transformers alone: `generate` on the whole transcript at every turn; an update reads
            one sequence per turn, prompt and line, with the logits of all positions. Its gradient
            is that of `ours` (see `benchmarks.update`).
    trl     TRL's GRPOTrainer with a rollout over several turns: its own `generate` on the whole
            conversation at every turn, one sequence and one advantage per conversation.

All three play the same `WordDialogues` with the same model. A contender takes orders until there
are no more.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from agents import LMPolicy, PPGAgent
from agents.credit import advantages, credit_weights, parse_credit, partial_returns
from agents.rollout import RolloutBatch

from .measure import Contender, Meter, Order, Orders, Phase, Step
from .workload import WordDialogues, Workload, make_model, make_tokenizer

CREDIT = "full"
LEARNING_RATE = 1e-6
CONTEXT = 4096


@dataclass(frozen=True)
class Sample:
    """One line and what was read before it."""

    row: int
    turn: int
    prompt: list[int]
    line: list[int]


def _step(
    order: Order, rollout: Phase | None, update: Phase | None, samples: Sequence[Sample]
) -> Step:
    """Return the answer to an order: phases asked for, tokens counted from the lines."""
    lengths = [len(sample.line) for sample in samples]
    last = [sample for sample in samples if sample.turn == order.turns - 1]
    return Step(
        rollout=rollout if order.rollout else None,
        update=update if order.update else None,
        new_tokens=sum(lengths),
        line_tokens=(min(lengths), max(lengths)),
        tokens=sum(len(sample.prompt) + len(sample.line) for sample in last),
        keys_read=sum(
            len(sample.prompt) + i for sample in samples for i in range(len(sample.line))
        ),
    )


# -- ours ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ours:
    """This project's agent."""

    workload: Workload

    def __call__(self, orders: Orders) -> None:
        """Take orders."""
        envs = WordDialogues(self.workload, 1)
        agent = make_agent(self.workload, envs)
        meter = Meter(self.workload.device)
        batch = None
        for order in orders:
            envs.max_turns = order.turns
            rollout = update = None
            if order.rollout or batch is None or batch.num_turns != order.turns * envs.num_envs:
                meter.start()
                batch = agent.collect()
                rollout = meter.stop()
            if order.update:
                meter.start()
                agent.update(batch, agent.credited(batch))
                update = meter.stop()
                agent.num_updates += 1
            orders.report(_step(order, rollout, update, samples_of(batch)))


def make_agent(workload: Workload, envs: WordDialogues) -> PPGAgent:
    """Return the agent with its default settings, but for sizes and step size."""
    policy = LMPolicy(
        make_model(workload, CONTEXT),
        make_tokenizer(workload.vocab, workload.seed),
        max_new_tokens=workload.new_tokens,
        seed=workload.seed,
    )
    return PPGAgent(
        policy,
        envs,
        CREDIT,
        learning_rate=LEARNING_RATE,
        group_size=workload.group_size,
        token_budget=workload.token_budget,
        seed=workload.seed,
    )


def samples_of(batch: RolloutBatch) -> list[Sample]:
    """Return each line of a batch with what was read before it."""
    tape = batch.tape
    assert tape is not None
    samples = []
    for row, (ids, turn_L) in enumerate(zip(tape.token_SL.tolist(), tape.turn_SL, strict=True)):
        for turn in range(int(turn_L.max()) + 1):
            said = (turn_L == turn).nonzero()[0]
            start, end = int(said[0]), int(said[-1]) + 1
            samples.append(Sample(row, turn, ids[:start], ids[start:end]))
    return samples


# -- plain -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plain:
    """transformers' own `generate`, and one sequence per turn."""

    workload: Workload

    def __call__(self, orders: Orders) -> None:
        """Take orders."""
        workload = self.workload
        envs = WordDialogues(workload, 1)
        tokenizer = make_tokenizer(workload.vocab, workload.seed)
        tokenizer.padding_side = "left"
        learner = PlainLearner(workload)
        meter = Meter(workload.device)
        samples: list[Sample] = []
        reward_BT = np.empty((0, 0))
        seed = workload.seed
        for order in orders:
            envs.max_turns = order.turns
            rollout = update = None
            if order.rollout or len(samples) != order.turns * envs.num_envs:
                seed += 1
                meter.start()
                samples, reward_BT = play(learner.model, tokenizer, envs, workload, seed)
                rollout = meter.stop()
            if order.update:
                meter.start()
                learner.update(samples, credited(reward_BT, envs.group_B))
                update = meter.stop()
            orders.report(_step(order, rollout, update, samples))


def play(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    envs: WordDialogues,
    workload: Workload,
    seed: int,
) -> tuple[list[Sample], np.ndarray]:
    """Return all lines and reward_BT; every turn reads every transcript from its start."""
    model.eval()
    samples, rewards = [], []
    observations, _ = envs.reset(seed=seed)
    for turn in range(envs.max_turns):
        prompts = tokenizer.apply_chat_template(
            list(observations),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        ).to(workload.device)
        token_BL = model.generate(
            **prompts, do_sample=True, top_k=0, max_new_tokens=workload.new_tokens
        )
        width = prompts["input_ids"].shape[1]
        lines = token_BL[:, width:].tolist()
        for row, (ids, mask) in enumerate(
            zip(prompts["input_ids"], prompts["attention_mask"].bool(), strict=True)
        ):
            samples.append(Sample(row, turn, ids[mask].tolist(), lines[row]))
        texts = tokenizer.batch_decode(lines, skip_special_tokens=True)
        observations, reward_B, *_ = envs.step(texts)
        rewards.append(reward_B)
    return samples, np.array(rewards).T


def credited(reward_BT: np.ndarray, group_B: np.ndarray) -> np.ndarray:
    """Return the same advantage_BT as `PPGAgent.credited`."""
    weight_TT = credit_weights(parse_credit(CREDIT), reward_BT.shape[1], scale="mean_window")
    return advantages(partial_returns(reward_BT, weight_TT), group_B=group_B)


class PlainLearner:
    """One gradient step on one sequence per turn, with the logits of all positions."""

    def __init__(self, workload: Workload) -> None:
        self.model = make_model(workload, CONTEXT)
        self.token_budget = workload.token_budget
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, eps=1e-4, weight_decay=0.0
        )

    def update(self, samples: Sequence[Sample], advantage_BT: np.ndarray) -> None:
        """Step along (1/B) sum over lines of advantage x grad log-probability of the line."""
        self.model.eval()  # no dropout, as ours
        self.optimizer.zero_grad(set_to_none=True)
        for batch in self._batches(samples):
            loss = -self._advantage_times_logprob(batch, advantage_BT) / len(advantage_BT)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def _batches(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """Return the samples, longest first, in batches of at most `token_budget` tokens."""
        batches: list[list[Sample]] = []
        room = 0
        for sample in sorted(samples, key=lambda sample: -len(sample.prompt)):
            if room == 0:
                batches.append([])
                room = max(1, self.token_budget // (len(sample.prompt) + len(sample.line)))
            batches[-1].append(sample)
            room -= 1
        return batches

    def _advantage_times_logprob(
        self, batch: Sequence[Sample], advantage_BT: np.ndarray
    ) -> torch.Tensor:
        length = max(len(sample.prompt) + len(sample.line) for sample in batch)
        token_nL = torch.zeros(len(batch), length, dtype=torch.long)
        mask_nL = torch.zeros_like(token_nL)
        target_nL = torch.full_like(
            token_nL, -100
        )  # the token that follows, where it is the line's
        weight_nL = torch.zeros(len(batch), length)
        for i, sample in enumerate(batch):
            ids = torch.tensor(sample.prompt + sample.line)
            said = slice(len(sample.prompt) - 1, len(ids) - 1)
            token_nL[i, : len(ids)] = ids
            mask_nL[i, : len(ids)] = 1
            target_nL[i, said] = ids[len(sample.prompt) :]
            weight_nL[i, said] = float(advantage_BT[sample.row, sample.turn])
        device = self.model.device
        output = self.model(
            input_ids=token_nL.to(device), attention_mask=mask_nL.to(device), use_cache=False
        )
        surprise_N = torch.nn.functional.cross_entropy(
            output.logits.flatten(0, 1).float(), target_nL.flatten().to(device), reduction="none"
        )
        return -(weight_nL.flatten().to(device) * surprise_N).sum()


# -- TRL -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trl:
    """TRL's GRPOTrainer; one order is one training step: generate, score, one optimizer step.

    Settings that differ from TRL's defaults, each the faster choice on a CPU: no gradient
    checkpointing, no mixed precision (the model has the workload's dtype throughout), and the
    number of conversations in a forward and backward pass. Further, what the workload asks for:
    lengths, group size, step size, device, nothing written. Tried and not faster: TRL's tool loop
    in place of `rollout_func`, a static cache, continuous batching.
    """

    workload: Workload
    turns: int

    def __call__(self, orders: Orders) -> None:
        """Take orders."""
        from datasets import Dataset
        from transformers import PrinterCallback, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer

        workload = self.workload
        rollout = _TrlRollout(workload)

        class TakeOrders(TrainerCallback):
            """Waits for an order before every training step and reports it afterwards."""

            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                rollout.order = orders.wait()

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                orders.report(rollout.step())
                rollout.order = orders.wait()
                control.should_training_stop = rollout.order is None

        with tempfile.TemporaryDirectory() as folder:
            settings = GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=self.batch_size,
                gradient_accumulation_steps=workload.dialogues // self.batch_size,
                gradient_checkpointing=False,
                bf16=False,
                num_generations=workload.group_size,
                max_completion_length=CONTEXT,
                generation_kwargs={"max_new_tokens": workload.new_tokens},
                learning_rate=LEARNING_RATE,
                max_steps=1_000_000,  # until there are no more orders
                use_cpu=workload.device == "cpu",
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                seed=workload.seed,
            )
            # The world makes the prompts; these rows only stand for its groups.
            rows = [[{"role": "user", "content": ""}]] * workload.num_groups
            trainer = GRPOTrainer(
                model=make_model(workload, CONTEXT),
                reward_funcs=_conversation_reward,
                args=settings,
                train_dataset=Dataset.from_dict({"prompt": rows}),
                processing_class=make_tokenizer(workload.vocab, workload.seed),
                rollout_func=rollout,
                callbacks=[TakeOrders()],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()

    @property
    def batch_size(self) -> int:
        """Conversations in one pass, 1 to 2 thousand tokens: among the fastest at 4 and 8 turns."""
        wanted = max(1.0, 32 / self.turns)
        return min(self.workload.dialogues, 2 ** int(math.log2(wanted)))


def _conversation_reward(conversation_reward: Sequence[float], **_: Any) -> list[float]:
    """Return what the rollout has added up."""
    return list(conversation_reward)


class _TrlRollout:
    """TRL's `rollout_func`: plays all conversations with the trainer's own way to generate.

    It also measures: the update begins when it returns and ends when `step` is called.
    """

    def __init__(self, workload: Workload) -> None:
        self.order: Order | None = None
        self._envs = WordDialogues(workload, 1)
        self._tokenizer = make_tokenizer(workload.vocab, workload.seed)
        self._meter = Meter(workload.device)
        self._seed = workload.seed

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        """Return ids, the mask of the agent's own tokens, and the reward of each conversation."""
        assert self.order is not None
        self._envs.max_turns = self.order.turns
        self._meter.start()
        self._samples, reward_B = self._play(trainer)
        self._rollout = self._meter.stop()
        played = _conversations(self._samples, reward_B)
        self._meter.start()
        return played

    def step(self) -> Step:
        """Return the training step that ends now."""
        assert self.order is not None
        return _step(self.order, self._rollout, self._meter.stop(), self._samples)

    def _play(self, trainer: Any) -> tuple[list[Sample], np.ndarray]:
        self._seed += 1
        samples: list[Sample] = []
        reward_B = np.zeros(self._envs.num_envs)
        observations, _ = self._envs.reset(seed=self._seed)
        prompts = self._tokenizer.apply_chat_template(
            list(observations), add_generation_prompt=True
        )["input_ids"]
        for turn in range(self._envs.max_turns):
            lines, _ = trainer._generate_single_turn(prompts, None, {}, num_generations=1)
            samples += [
                Sample(row, turn, ids, line)
                for row, (ids, line) in enumerate(zip(prompts, lines, strict=True))
            ]
            texts = self._tokenizer.batch_decode(lines, skip_special_tokens=True)
            observations, turn_reward_B, *_ = self._envs.step(texts)
            reward_B += turn_reward_B
            tails = self._tokenizer([_tail(chat[-1]["content"]) for chat in observations])
            prompts = [
                ids + line + tail
                for ids, line, tail in zip(prompts, lines, tails["input_ids"], strict=True)
            ]
        return samples, reward_B


def _tail(partner_text: str) -> str:
    """Return what stands between one line of the agent and the next."""
    return f"<|im_end|>\n<|im_start|>user\n{partner_text}<|im_end|>\n<|im_start|>assistant\n"


def _conversations(samples: Sequence[Sample], reward_B: np.ndarray) -> dict[str, Any]:
    """Return the lines as TRL wants them: one prompt and one completion per conversation."""
    rows: list[list[Sample]] = [[] for _ in reward_B]
    for sample in samples:
        rows[sample.row].append(sample)
    starts = [len(row[0].prompt) for row in rows]
    masks = [np.zeros(len(row[-1].prompt) + len(row[-1].line), dtype=int) for row in rows]
    for sample in samples:
        masks[sample.row][len(sample.prompt) : len(sample.prompt) + len(sample.line)] = 1
    return {
        "prompt_ids": [row[0].prompt for row in rows],
        "completion_ids": [
            (row[-1].prompt + row[-1].line)[start:] for row, start in zip(rows, starts, strict=True)
        ],
        "env_mask": [mask[start:].tolist() for mask, start in zip(masks, starts, strict=True)],
        "logprobs": None,
        "conversation_reward": reward_B.tolist(),
    }


CONTENDERS: dict[str, Callable[[Workload, int], Contender]] = {
    "ours": lambda workload, turns: Ours(workload),
    "plain": lambda workload, turns: Plain(workload),
    "trl": Trl,
}
"""How to make each contender for dialogues of at most so many turns."""


def make_contender(name: str, workload: Workload, turns: int) -> Contender:
    """Return a contender for dialogues of at most `turns` turns."""
    return CONTENDERS[name](workload, turns)
