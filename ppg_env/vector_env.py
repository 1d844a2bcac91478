"""PersonaDialogue-v0, N dialogues at once: one judge call and one partner call a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from .dialogue import Messages, Persona, Transcript, Verdict
from .domains import Domain
from .judges import Judge
from .partners import Partner
from .world import Dialogue, Snapshot, World, check_options, draw_dialogue_seed

_OPTIONS = ("persona", "history", "reset_mask", "group_size")


class PersonaDialogueVectorEnv(
    gym.vector.VectorEnv[tuple[Messages, ...], Sequence[str], np.ndarray]
):
    """N dialogues in step; slot i seeded with s is the single environment seeded with s.

    Arguments are those of `World`, and `num_envs`. Observations are a tuple of N message lists,
    actions a sequence of N strings.

    Episodes do not start again by themselves (AutoresetMode.DISABLED): a finished slot stays as it
    is, its action is ignored, its reward is 0 and it remains terminated, until it is reset:

        reset(options={"reset_mask": mask_N})            only the slots in the mask
        reset(seed=7, options={"group_size": 8})         slots 0-7 share persona, opening and
                                                         partner seed, so do 8-15, ...; group k is
                                                         seeded 7 + k
        reset(options={"persona": id | Persona | [N of them], "history": messages | [N of them]})

    `infos` follows Gymnasium's convention: key -> array of length N, "_key" -> where it holds.
    """

    metadata = {
        "render_modes": [],
        "autoreset_mode": AutoresetMode.DISABLED,
    }

    def __init__(
        self,
        num_envs: int = 1,
        domain: str | Domain = "chatting",
        personas: str | Path | Sequence[Persona] | None = None,
        partner: str | Partner = "scripted",
        judge: str | Judge = "rules",
        max_turns: int = 8,
        noise: float = 0.1,
        max_utterance_length: int = 2000,
        unscorable_reward: float = float("nan"),
        verdict_cache: str | Path | None = None,
        render_mode: str | None = None,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}.")
        if render_mode is not None:
            raise ValueError("The vector environment renders nothing; render a single environment.")
        self.world = World(
            domain,
            personas,
            partner,
            judge,
            max_turns,
            noise,
            max_utterance_length,
            unscorable_reward,
            verdict_cache,
        )
        self.num_envs = num_envs
        self.render_mode = None
        self.max_turns = self.world.max_turns
        self.phase_boundaries = self.world.phase_boundaries
        self.num_phases = len(self.phase_boundaries)
        self.single_observation_space = self.world.observation_space
        self.single_action_space = self.world.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators: list[np.random.Generator | None] = [None] * num_envs
        self._dialogues: list[Dialogue | None] = [None] * num_envs

    @property
    def persona_ids(self) -> tuple[str, ...]:
        """Return the ids of the personas that dialogues are drawn from."""
        return tuple(persona.id for persona in self.world.personas)

    @property
    def transcripts(self) -> list[Transcript]:
        """Return the transcripts of all slots."""
        return [dialogue.transcript for dialogue in self._running()]

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[tuple[Messages, ...], dict[str, Any]]:
        """Start dialogues in all slots or in those of the mask; see the class docstring.

        Args:
            seed: an int s seeds slot i with s + i (group k with s + k); a sequence seeds each slot;
                None goes on with each slot's generator.
            options: see the class docstring.
        """
        options = check_options(options, _OPTIONS)
        mask_N = self._reset_mask(options.get("reset_mask"))
        leader_N = self._leaders(options.get("group_size", 1))
        seeds = self._slot_seeds(seed, leader_N, options.get("group_size", 1))
        personas = self._per_slot(options.get("persona"), (str, Persona), "persona")
        histories = self._histories(options.get("history"))

        slots = np.flatnonzero(mask_N)
        for slot in slots:
            self.world.check_start(personas[slot], histories[slot])
        generators = list(self._generators)
        states = [None if g is None else g.bit_generator.state for g in generators]
        dialogue_seeds = self._dialogue_seeds(slots, seeds, leader_N)
        try:
            started = self.world.begin(
                dialogue_seeds, [personas[i] for i in slots], [histories[i] for i in slots]
            )
        except BaseException:  # the partner failed: the same reset can be tried again
            self._generators = generators
            for generator, state in zip(generators, states, strict=True):
                if generator is not None and state is not None:
                    generator.bit_generator.state = state
            raise
        for slot, dialogue in zip(slots, started, strict=True):
            self._dialogues[slot] = dialogue
        infos = self._infos(
            {int(i): self.world.start_info(d) for i, d in zip(slots, started, strict=True)}
        )
        return self._observations(), infos

    def step(
        self, actions: Sequence[str]
    ) -> tuple[tuple[Messages, ...], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Say one line in every running dialogue.

        Returns:
            observations, reward_N (float64), terminated_N, truncated_N (bool), infos.

        Raises:
            ResetNeeded: before the first reset.
            ValueError: for a wrong number of actions or one outside the action space; nothing has
                changed.
        """
        dialogues = self._running()
        if isinstance(actions, str) or len(actions) != self.num_envs:
            raise ValueError(f"step takes {self.num_envs} actions, one a slot, got {actions!r:.80}")
        slots = [i for i, dialogue in enumerate(dialogues) if not dialogue.over]
        running = [dialogues[i] for i in slots]
        verdicts = self.world.advance(running, [actions[i] for i in slots]) if slots else []
        reward_N = np.zeros(self.num_envs)
        reward_N[slots] = [self.world.reward(verdict) for verdict in verdicts]
        terminated_N = np.array([dialogue.over for dialogue in dialogues])
        truncated_N = np.zeros(self.num_envs, dtype=bool)
        infos = self._step_infos(slots, running, verdicts)
        return self._observations(), reward_N, terminated_N, truncated_N, infos

    def state(self) -> list[Snapshot]:
        """Return a picklable snapshot of every slot."""
        return [self.world.freeze(dialogue) for dialogue in self._running()]

    def restore(self, snapshots: Sequence[Snapshot]) -> tuple[Messages, ...]:
        """Go on from the snapshots, one a slot; return the observations."""
        if len(snapshots) != self.num_envs:
            raise ValueError(f"restore takes {self.num_envs} snapshots, got {len(snapshots)}.")
        self._dialogues = [self.world.thaw(snapshot) for snapshot in snapshots]
        return self._observations()

    def _running(self) -> list[Dialogue]:
        if any(dialogue is None for dialogue in self._dialogues):
            raise ResetNeeded("Call reset() for all slots before the dialogues can go on.")
        return self._dialogues  # type: ignore[return-value]

    def _observations(self) -> tuple[Messages, ...]:
        return tuple(self.world.observe(dialogue) for dialogue in self._running())

    def _reset_mask(self, mask: object) -> np.ndarray:
        if mask is None:
            return np.ones(self.num_envs, dtype=bool)
        if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape != (self.num_envs,):
            raise ValueError(
                f"options['reset_mask'] is a bool array of shape ({self.num_envs},), "
                f"got {mask!r:.80}"
            )
        if not mask.any():
            raise ValueError("options['reset_mask'] selects no slot; set at least one entry.")
        return mask

    def _leaders(self, group_size: int) -> np.ndarray:
        """Return leader_N: the first slot of the group that each slot belongs to."""
        whole = isinstance(group_size, (int, np.integer))
        if not whole or group_size < 1 or self.num_envs % group_size:
            raise ValueError(
                f"options['group_size'] must divide num_envs={self.num_envs}, got {group_size!r}."
            )
        slot_N = np.arange(self.num_envs)
        return slot_N - slot_N % group_size

    def _slot_seeds(
        self, seed: int | Sequence[int | None] | None, leader_N: np.ndarray, group_size: int
    ) -> list[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, (int, np.integer)):
            return [int(seed) + int(leader) // group_size for leader in leader_N]
        seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"seed needs {self.num_envs} entries, one a slot, got {len(seeds)}.")
        return [seeds[leader] for leader in leader_N]

    def _dialogue_seeds(
        self, slots: np.ndarray, seeds: Sequence[int | None], leader_N: np.ndarray
    ) -> list[int]:
        """Return the dialogue seed of each slot to reset; a group shares its first one's."""
        drawn: dict[int, int] = {}
        result = []
        for slot in slots:
            seed = seeds[slot]
            if seed is not None or self._generators[slot] is None:
                self._generators[slot], _ = seeding.np_random(seed)
            generator = self._generators[slot]
            assert generator is not None
            own = draw_dialogue_seed(generator)
            result.append(drawn.setdefault(int(leader_N[slot]), own))
        return result

    def _per_slot(self, given: Any, one: tuple[type, ...], name: str) -> list[Any]:
        if given is None or isinstance(given, one):
            return [given] * self.num_envs
        listed = isinstance(given, Sequence)
        if not listed or len(given) != self.num_envs:
            number = len(given) if listed else repr(given)
            raise ValueError(
                f"options[{name!r}] is one for all or {self.num_envs} of them, got {number}."
            )
        return list(given)

    def _histories(self, given: Any) -> list[Any]:
        shared = isinstance(given, Sequence) and len(given) > 0 and isinstance(given[0], Mapping)
        return [given] * self.num_envs if shared else self._per_slot(given, (), "history")

    def _infos(self, by_slot: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        infos: dict[str, Any] = {}
        for slot, info in by_slot.items():
            infos = self._add_info(infos, dict(info), slot)
        return infos

    def _step_infos(
        self, slots: Sequence[int], dialogues: Sequence[Dialogue], verdicts: Sequence[Verdict]
    ) -> dict[str, Any]:
        """Return what `_add_info` over `World.step_info` would, column by column and so much
        faster.

        A reward part that does not apply (None in the single environment) is NaN.
        """
        if not slots:
            return {}
        held_N = np.zeros(self.num_envs, dtype=bool)
        held_N[slots] = True

        def spread(columns: Mapping[str, tuple[type, Sequence[Any]]]) -> dict[str, Any]:
            infos: dict[str, Any] = {}
            for key, (dtype, values) in columns.items():
                infos[key] = np.full(self.num_envs, None if dtype is object else 0, dtype=dtype)
                for slot, value in zip(slots, values, strict=True):
                    infos[key][slot] = value
                infos[f"_{key}"] = held_N.copy()
            return infos

        turns = [len(dialogue.transcript.turns) for dialogue in dialogues]
        infos = spread(
            {
                "domain": (object, [self.world.domain.name] * len(slots)),
                "persona": (object, [d.transcript.persona.id for d in dialogues]),
                "group_id": (int, [d.seed for d in dialogues]),
                "turn": (int, turns),
                "phase": (int, [self.world.phase_index(turn - 1) for turn in turns]),
                "act": (object, [v.act for v in verdicts]),
                "claims": (object, [v.claims for v in verdicts]),
                "reason": (object, [v.reason for v in verdicts]),
                "unscorable": (bool, [v.reward is None for v in verdicts]),
            }
        )
        names = dict.fromkeys(name for verdict in verdicts for name in verdict.parts)
        infos["reward_parts"] = spread(
            {name: (float, [v.parts.get(name) for v in verdicts]) for name in names}
        )
        infos["_reward_parts"] = held_N
        return infos
