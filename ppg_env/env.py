"""PersonaDialogue-v0: one dialogue as a Gymnasium environment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.error import ResetNeeded

from .dialogue import Messages, Persona, Transcript, Verdict
from .domains import Domain
from .judges import Judge
from .partners import Partner
from .world import Dialogue, Snapshot, World, check_options, draw_dialogue_seed

_OPTIONS = ("persona", "history")
_GREEN, _RED, _DIM, _BOLD, _PLAIN = "\033[32m", "\033[31m", "\033[2m", "\033[1m", "\033[0m"


class PersonaDialogueEnv(gym.Env[Messages, str]):
    """A dialogue in which the agent plays a persona and every reply is a step.

    ## Description
    The agent is one side of a conversation: a stranger getting acquainted (chatting), a student
    (education) or a patient (therapy). The environment plays the other side and scores, turn by
    turn, how well the reply plays the persona.

    ## Action Space
    `Utterance`: any non-blank Unicode text up to `max_utterance_length` characters.

    ## Observation Space
    `DialogueMessages`: the dialogue so far as chat messages as the agent sees it: "system" tells
    who the agent is, "user" is the partner, "assistant" are the agent's own lines. Ready for a chat
    template.

    ## Starting State
    A persona drawn from the environment's personas and the partner's first line, both by the seed.
    `reset(options={"persona": id or Persona, "history": [messages]})` chooses the persona and
    continues a dialogue.

    ## Rewards
    One float in [0, 1] a turn, from the judge; NaN for a turn the judge cannot score, unless
    `unscorable_reward` is given.

    ## Episode End
    `terminated` after `max_turns` agent turns (the task's own end) or when the partner closes the
    dialogue. `truncated` is left to wrappers that cut from outside.

    ## Information
    After reset and step: "domain", "persona" (id), "turn" (agent turns spoken), "phase" (index of
    the phase), "group_id" (dialogues with equal ids share persona, opening and partner seed). After
    step also: "act" and "claims" read from the line, "reward_parts", "reason", "unscorable".

    ## Arguments
    See `World`: domain, personas, partner, judge, max_turns, noise, max_utterance_length,
    unscorable_reward, verdict_cache. `render_mode` is None, "human" (coloured transcript) or "ansi"
    (text).

    ## References
    Mathur, Kveton, Mukherjee, Lai: Partial Policy Gradients for RL in LLMs, arXiv 2603.06138.
    Abdulhai et al.: Consistently Simulating Human Personas with Multi-Turn RL, arXiv 2511.00222.

    ## Version History
    v0: first version.
    """

    metadata = {"render_modes": ["human", "ansi"], "render_fps": 4}

    def __init__(
        self,
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
        if render_mode == "rgb_array":  # Stable-Baselines3 asks every environment for pictures
            render_mode = None
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"render_mode is None, 'human' or 'ansi', got {render_mode!r}.")
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
        self.observation_space = self.world.observation_space
        self.action_space = self.world.action_space
        self.max_turns = self.world.max_turns
        self.phase_boundaries = self.world.phase_boundaries
        self.num_phases = len(self.phase_boundaries)
        self.render_mode = render_mode
        self._dialogue: Dialogue | None = None
        self._verdicts: list[tuple[Verdict, float]] = []
        self._lines_shown = 0

    @property
    def persona_ids(self) -> tuple[str, ...]:
        """Return the ids of the personas that dialogues are drawn from."""
        return tuple(persona.id for persona in self.world.personas)

    @property
    def transcript(self) -> Transcript:
        """Return the transcript of the running (or just finished) dialogue."""
        return self._running().transcript

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Messages, dict[str, Any]]:
        """Start a dialogue; see the class docstring for the options."""
        super().reset(seed=seed)
        options = check_options(options, _OPTIONS)
        self.world.check_start(options.get("persona"), options.get("history"))
        state = self.np_random.bit_generator.state
        dialogue_seed = draw_dialogue_seed(self.np_random)
        try:
            (self._dialogue,) = self.world.begin(
                [dialogue_seed], [options.get("persona")], [options.get("history")]
            )
        except BaseException:  # the partner failed: the same reset can be tried again
            self.np_random.bit_generator.state = state
            raise
        self._verdicts, self._lines_shown = [], 0
        if self.render_mode == "human":
            self._show()
        return self.world.observe(self._dialogue), self.world.start_info(self._dialogue)

    def step(self, action: str) -> tuple[Messages, float, bool, bool, dict[str, Any]]:
        """Say `action`; return observation, reward, terminated, truncated (always False), info.

        Raises:
            ResetNeeded: before the first reset and after the end of the episode.
            ValueError: for an action outside the action space; the dialogue goes on unharmed.
        """
        dialogue = self._running()
        if dialogue.over:
            raise ResetNeeded("This dialogue is over; call reset() to start the next one.")
        (verdict,) = self.world.advance([dialogue], [action])
        reward = self.world.reward(verdict)
        self._verdicts.append((verdict, reward))
        if self.render_mode == "human":
            self._show()
        info = self.world.step_info(dialogue, verdict)
        return self.world.observe(dialogue), reward, dialogue.over, False, info

    def state(self) -> Snapshot:
        """Return a picklable snapshot from which `restore` branches or resumes the dialogue."""
        return self.world.freeze(self._running())

    def restore(self, snapshot: Snapshot) -> tuple[Messages, dict[str, Any]]:
        """Go on from `snapshot`; return the observation and info as after a reset."""
        self._dialogue = self.world.thaw(snapshot)
        self._verdicts, self._lines_shown = [], 0
        info = self.world.start_info(self._dialogue) if not snapshot.over else {}
        return self.world.observe(self._dialogue), info

    def render(self) -> str | None:
        """Return the transcript with rewards ("ansi"); "human" prints as the dialogue goes on."""
        if self.render_mode == "ansi":
            return "\n".join(self._rendered_lines(colour=False)) + "\n"
        return None

    def _running(self) -> Dialogue:
        if self._dialogue is None:
            raise ResetNeeded("Call reset() before the dialogue can go on.")
        return self._dialogue

    def _show(self) -> None:
        lines = self._rendered_lines(colour=True)
        print("\n".join(lines[self._lines_shown :]))
        self._lines_shown = len(lines)

    def _rendered_lines(self, colour: bool) -> list[str]:
        transcript, domain = self._running().transcript, self.world.domain
        return render_lines(
            transcript,
            [v for v, _ in self._verdicts],
            domain.agent_role,
            domain.partner_role,
            colour,
        )


def render_lines(
    transcript: Transcript,
    verdicts: Sequence[Verdict],
    agent_role: str,
    partner_role: str,
    colour: bool,
) -> list[str]:
    """Return the transcript as lines of text; `verdicts` belong to its last turns."""

    def paint(code: str, text: str) -> str:
        return f"{code}{text}{_PLAIN}" if colour else text

    lines = [paint(_DIM, f"[{transcript.persona.id}] {transcript.system}")]
    unscored = len(transcript.turns) - len(verdicts)
    for number, turn in enumerate(transcript.turns):
        lines.append(f"{paint(_BOLD, partner_role)}: {turn.partner}")
        score = ""
        if number >= unscored:
            verdict = verdicts[number - unscored]
            if verdict.reward is None:
                score = paint(_RED, f"   [unscorable: {verdict.reason}]")
            else:
                code = _GREEN if verdict.reward >= 0.5 else _RED
                score = paint(code, f"   [{verdict.reward:.2f} {verdict.reason}]")
        lines.append(f"{paint(_BOLD, agent_role)}: {turn.agent}{score}")
    if transcript.pending is not None:
        lines.append(f"{paint(_BOLD, partner_role)}: {transcript.pending}")
    return lines
