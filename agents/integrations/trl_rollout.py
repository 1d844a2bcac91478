"""TRL's `rollout_func` for vector environments of chat messages; TRL itself is not imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv

from ..policy import Messages
from ..rollout import RolloutBatch, collect_rollouts
from .dialogue_tokens import DialogueTokens, LineReader


class DialogueRollout:
    """TRL's `rollout_func` for a vector environment: one dialogue a slot, TRL's own generation.

    Every process plays all its slots. Dialogues are seeded by `args.seed`, the training step and
    the slot's number over all processes.

    Args:
        envs: a vector environment of chat messages.
    """

    def __init__(self, envs: VectorEnv[Any, Any, Any]) -> None:
        self.envs = envs
        self.batch: RolloutBatch | None = None
        """What was played last, by this process."""
        self._played = (-1, 0)  # training step, batches played in it

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Play a batch.

        Returns:
            what `PartialCreditTrainer` asks of a rollout_func.

        Raises:
            ValueError: another number of rows than slots; a chat template that TRL's generation
                does not suit; a first prompt that fills the model's context.
        """
        if len(prompts) != self.envs.num_envs:
            raise ValueError(
                f"TRL asks for {len(prompts)} dialogues, envs has {self.envs.num_envs} slots."
            )
        speakers = _Speakers(trainer, self.envs.num_envs)
        native = isinstance(self.envs.unwrapped, SyncVectorEnv | AsyncVectorEnv)
        self.batch = batch = collect_rollouts(
            self.envs,
            speakers,
            seed=self._seed(trainer),
            options=None if native else {"group_size": trainer.args.num_generations},
            first_slot=trainer.accelerator.process_index * self.envs.num_envs,
        )
        speakers.wait_for_others()
        rewards = [
            reward_T[alive_T].tolist()
            for reward_T, alive_T in zip(batch.reward_BT, batch.alive_BT, strict=True)
        ]
        return {
            **speakers.as_trl_wants_them(),
            "turn_rewards": rewards,
            "group_id": batch.group_B.tolist(),
            "boundaries": [batch.boundaries] * len(rewards),
        }

    def _seed(self, trainer: Any) -> int:
        step, number = trainer.state.global_step, 0
        if step == self._played[0]:
            number = self._played[1] + 1
        self._played = (step, number)
        sequence = np.random.SeedSequence([trainer.args.seed, step, number])
        return int(sequence.generate_state(1)[0])


class _Speakers:
    """The dialogues of one batch; TRL's trainer draws their lines, all in one call a turn.

    Several processes generate in step: whoever has fewer turns to play, or dialogues that are over,
    asks for lines that nobody reads. Without them sharded models and vLLM wait for ever.
    """

    def __init__(self, trainer: Any, size: int) -> None:
        self._trainer = trainer
        self._reader = LineReader(trainer.processing_class, "TRL", trainer.eos_token_ids)
        self._dialogues = [DialogueTokens(self._reader) for _ in range(size)]
        self._num_processes = trainer.accelerator.num_processes
        self._has_logprobs = False
        self.truncated_B = np.zeros(size, dtype=bool)
        self.spoke_B = np.zeros(size, dtype=bool)

    def begin(self, batch_size: int, rngs: Sequence[np.random.Generator]) -> _Speakers:
        """Return the speakers themselves: TRL draws from torch's generator, not from `rngs`."""
        return self

    def predict(self, observation: Messages, deterministic: bool = False) -> tuple[str, None]:
        """Refuse: lines are drawn for all dialogues at once."""
        raise NotImplementedError("These speakers answer through begin() and reply().")

    def reply(
        self, observations: Sequence[Messages], active_B: np.ndarray, deterministic: bool
    ) -> list[str]:
        """Return the next line of every active dialogue, "" for the rest or out of context."""
        prompts: dict[int, list[int]] = {}
        for row in np.flatnonzero(active_B & ~self.truncated_B).tolist():
            dialogue = self._dialogues[row]
            unread = dialogue.unread(observations[row])
            if self._is_full(len(dialogue.ids) + len(unread)):
                self.truncated_B[row] = True
                continue
            dialogue.read(unread)
            prompts[row] = list(dialogue.ids)
        self.spoke_B = np.isin(np.arange(len(self._dialogues)), list(prompts))
        texts = [""] * len(self._dialogues)
        if prompts:
            self._anyone_speaks(True)
            for row, (ids, logprobs) in self._lines(prompts).items():
                texts[row] = self._dialogues[row].say(ids, logprobs)
        return texts

    def tape(self) -> None:
        """Return None: TRL gets the tokens from `as_trl_wants_them`."""
        return None

    def wait_for_others(self) -> None:
        """Generate along until no process has a dialogue under way."""
        while self._anyone_speaks(False):
            self._lines({})

    def as_trl_wants_them(self) -> dict[str, Any]:
        """Return the dialogues as TRL's prompts and completions, with the turn of each token."""
        for slot, dialogue in enumerate(self._dialogues):
            if dialogue.num_turns == 0:
                raise ValueError(
                    f"The first prompt of slot {slot} leaves no room for a line of "
                    f"{self._trainer.max_completion_length} tokens in the model's context: use a "
                    "model with a longer context, or a smaller max_completion_length."
                )
        starts = [dialogue.prompt_length for dialogue in self._dialogues]
        turn_ids = [d.turns[start:] for d, start in zip(self._dialogues, starts, strict=True)]
        logprobs = [d.logprobs[start:] for d, start in zip(self._dialogues, starts, strict=True)]
        return {
            "prompt_ids": [d.ids[:start] for d, start in zip(self._dialogues, starts, strict=True)],
            "completion_ids": [
                d.ids[start:] for d, start in zip(self._dialogues, starts, strict=True)
            ],
            "logprobs": logprobs if self._has_logprobs else None,
            "env_mask": [[int(turn >= 0) for turn in turns] for turns in turn_ids],
            "turn_ids": turn_ids,
        }

    def _lines(self, prompts: Mapping[int, list[int]]) -> dict[int, tuple[list[int], Any]]:
        asked = list(prompts.values())
        if self._num_processes > 1:
            asked += [[self._reader.format.pad_id]] * (len(self._dialogues) - len(asked))
        lines, logprobs = self._trainer._generate_single_turn(asked, None, {}, num_generations=1)
        self._has_logprobs = logprobs is not None
        each = logprobs if logprobs is not None else [None] * len(lines)
        found = zip(lines, each, strict=True)
        return dict(zip(prompts, found, strict=False))

    def _is_full(self, length: int) -> bool:
        """Return whether the longest line would not fit into the context after so many tokens."""
        trainer = self._trainer
        context = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
        if trainer.use_vllm and trainer.args.vllm_max_model_length is not None:
            context = trainer.args.vllm_max_model_length
        return context is not None and length + trainer.max_completion_length > context

    def _anyone_speaks(self, here: bool) -> bool:
        return here if self._num_processes == 1 else any(gather_object([here]))
