"""PersonaDialogue-v0 for learners of numbers: a menu of acts, observations as vectors.

    env = gym.make("PersonaDialogue-v0", domain="therapy")
    env = EmbeddedObservation(DiscreteReply(env))      # any algorithm for Box and Discrete

Learners reset environments by themselves when an episode ends, without seed and options. With these
views such a dialogue goes on with the random numbers of the last seed, and under the options
(a persona, say) given last; `reset(options={})` lifts them.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.utils import RecordConstructorArgs

from .dialogue import Messages
from .env import PersonaDialogueEnv
from .spaces import DialogueMessages

Observation = TypeVar("Observation")
Action = TypeVar("Action")
Embedding = Callable[[Sequence[str]], npt.NDArray[np.float32]]
"""Turns N texts into an array (N, size)."""


class _LastingOptions(gym.Wrapper[Observation, Action, Messages, Any]):
    """Passes on the options of the last reset that had any."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self._options: dict[str, Any] | None = None

    def _reset_inner(
        self, seed: int | None, options: dict[str, Any] | None
    ) -> tuple[Any, dict[str, Any]]:
        chosen = self._options if options is None else options
        found = self.env.reset(seed=seed, options=chosen)
        self._options = chosen  # only now: options that the environment refuses do not last
        return found


class DiscreteReply(_LastingOptions[Messages, np.int64], RecordConstructorArgs):
    """A menu of dialogue acts instead of free text: action i performs `acts[i]` in words.

    The sentences are the domain's own phrasings with the persona's facts, never one already said.
    With this view the dialogue IS the process of acts in ppg_env.process.

    Args:
        env: a PersonaDialogue-v0 environment (possibly wrapped).
    """

    def __init__(self, env: gym.Env[Messages, str]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        inner = env.unwrapped
        if not isinstance(inner, PersonaDialogueEnv):
            raise TypeError(f"DiscreteReply wraps PersonaDialogue-v0, got {type(inner).__name__}.")
        self._inner = inner
        self.acts = inner.world.domain.dynamics().acts
        self.action_space = gym.spaces.Discrete(len(self.acts))
        self._rng = np.random.default_rng()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Messages, dict[str, Any]]:
        """Start a dialogue; the phrasings follow from the same seed."""
        if seed is not None:
            self._rng = np.random.default_rng([seed, 1])
        return self._reset_inner(seed, options)

    def step(self, action: Any) -> tuple[Messages, Any, bool, bool, dict[str, Any]]:
        """Perform the act with index `action`."""
        if not self.action_space.contains(action):
            listed = ", ".join(f"{i}: {act}" for i, act in enumerate(self.acts))
            raise ValueError(f"Invalid action {action!r}; there are {listed}.")
        act = self.acts[int(action)]
        line = self._inner.world.domain.speak(act, self._inner.transcript, self._rng)
        return self.env.step(line)  # type: ignore[arg-type]


class EmbeddedObservation(_LastingOptions[npt.NDArray[np.float32], Any], RecordConstructorArgs):
    """The dialogue as one vector instead of chat messages.

    Side by side: the system message, the partner's latest line, the agent's `recent` latest lines
    (latest first), the sum of all its lines, and the share of the dialogue that is over. Lines not
    yet said are zeros.

    Args:
        env: an environment whose observations are dialogues (possibly wrapped).
        embed: "hashed" = HashedWords(); any other name = that sentence-transformers model; or a
            function of your own from N texts to an array (N, size), entries in [-1, 1].
        recent: how many of the agent's lines are told apart.
    """

    def __init__(
        self, env: gym.Env[Messages, Any], embed: str | Embedding = "hashed", recent: int = 2
    ) -> None:
        RecordConstructorArgs.__init__(self, embed=embed, recent=recent)
        super().__init__(env)
        space = env.observation_space
        if not isinstance(space, DialogueMessages):
            raise TypeError(
                f"EmbeddedObservation wraps environments that observe chat messages, got {space}."
            )
        if recent < 0:
            raise ValueError(f"recent must be at least 0, got {recent}.")
        self._embed = _embedding(embed) if isinstance(embed, str) else embed
        self._recent, self._most_turns = recent, (space.max_messages - 1) // 2
        self._known: dict[str, npt.NDArray[np.float32]] = {}
        self._size = self._vectors(["Hello."])[0].size
        most = np.ones((recent + 3) * self._size + 1, dtype=np.float32)
        most[-1 - self._size : -1] = self._most_turns
        self.observation_space = gym.spaces.Box(-most, most, dtype=np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Start a dialogue and return it as a vector."""
        messages, info = self._reset_inner(seed, options)
        return self._vector(messages), info

    def step(self, action: Any) -> tuple[npt.NDArray[np.float32], Any, bool, bool, dict[str, Any]]:
        """Act and return the dialogue as a vector."""
        messages, reward, terminated, truncated, info = self.env.step(action)
        return self._vector(messages), reward, terminated, truncated, info

    def _vector(self, messages: Any) -> npt.NDArray[np.float32]:
        def said(role: str) -> list[str]:
            return [message["content"] for message in messages if message["role"] == role]

        own = said("assistant")
        nothing = np.zeros(self._size, dtype=np.float32)
        own_vectors = self._vectors(own)
        latest = [*own_vectors[::-1], *[nothing] * self._recent][: self._recent]
        system, partner = self._vectors([messages[0]["content"], said("user")[-1]])
        share = np.array([len(own) / self._most_turns], dtype=np.float32)
        return np.concatenate([system, partner, *latest, sum(own_vectors, nothing), share])

    def _vectors(self, texts: Sequence[str]) -> list[npt.NDArray[np.float32]]:
        """Return a vector for each text; each text is embedded once."""
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        if new:
            found = np.asarray(self._embed(new), dtype=np.float32)
            if found.ndim != 2 or len(found) != len(new) or not np.isfinite(found).all():
                raise ValueError(
                    f"embed must return finite numbers of shape ({len(new)}, size) for {len(new)} "
                    f"texts, got shape {found.shape}."
                )
            if len(self._known) > _MOST_KNOWN:
                self._known.clear()
                return self._vectors(texts)
            self._known.update(zip(new, np.clip(found, -1.0, 1.0), strict=True))
        return [self._known[text] for text in texts]


_MOST_KNOWN = 20_000  # vectors that are kept, 40 MB at 512 entries


class HashedWords:
    """Counts words in `size` buckets by a hash with a sign, then scales to length 1.

    The hashing trick: no vocabulary, the same everywhere and always; two words that share a bucket
    are confused.
    """

    def __init__(self, size: int = 512) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}.")
        self.size = size

    def __call__(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return an array (N, size), rows of length 1, of length 0 for a text without words."""
        found_NV = np.zeros((len(texts), self.size), dtype=np.float32)
        for vector_V, text in zip(found_NV, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                number = zlib.crc32(word.encode("utf-8"))
                vector_V[number % self.size] += 1.0 if number >> 31 else -1.0
        length_N1 = np.linalg.norm(found_NV, axis=1, keepdims=True)
        return found_NV / np.maximum(length_N1, 1e-6)


def _embedding(name: str) -> Embedding:
    """Return the embedding of that name."""
    if name == "hashed":
        return HashedWords()
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            f"embed={name!r} is taken for a sentence-transformers model, and the package is not "
            'installed: pip install sentence-transformers, or take embed="hashed".'
        ) from error
    model = SentenceTransformer(name)
    return lambda texts: model.encode(list(texts), normalize_embeddings=True)
