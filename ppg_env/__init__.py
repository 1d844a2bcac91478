"""Persona dialogues as Gymnasium environments.

    import gymnasium as gym
    import ppg_env                              # registers PersonaDialogue-v0

    env = gym.make("PersonaDialogue-v0", domain="therapy")

Needs numpy and gymnasium only.
"""

from gymnasium.envs.registration import register

from .chat import ChatError, ChatModel, Completion, OpenAIChat, TransformersChat, open_chat
from .chat_judge import ChatJudge, UnparsableJudgeError
from .dialogue import Farewell, Messages, Persona, Transcript, Turn, Verdict
from .domains import DOMAINS, Attribute, Domain, Phase, get_domain
from .env import PersonaDialogueEnv
from .judges import Judge, RuleJudge
from .nli_judge import NLIJudge
from .partners import ChatPartner, Partner, ScriptedPartner
from .personas import PersonaFileError, bundled_personas, load_personas
from .process import ActProcess
from .quiz import ChatQuiz, FactQuiz
from .vector_env import PersonaDialogueVectorEnv
from .verdict_cache import CachedJudge
from .weighted_judge import WeightedJudge
from .wrappers import DiscreteReply, EmbeddedObservation, HashedWords

__version__ = "0.1.0"

register(
    id="PersonaDialogue-v0",
    entry_point="ppg_env.env:PersonaDialogueEnv",
    vector_entry_point="ppg_env.vector_env:PersonaDialogueVectorEnv",
    order_enforce=False,  # the environment does so itself, and knows restore() besides reset()
)

__all__ = [
    "DOMAINS",
    "ActProcess",
    "Attribute",
    "CachedJudge",
    "ChatError",
    "ChatJudge",
    "ChatModel",
    "ChatPartner",
    "ChatQuiz",
    "Completion",
    "DiscreteReply",
    "Domain",
    "EmbeddedObservation",
    "FactQuiz",
    "Farewell",
    "HashedWords",
    "Judge",
    "Messages",
    "NLIJudge",
    "OpenAIChat",
    "Partner",
    "Persona",
    "PersonaDialogueEnv",
    "PersonaDialogueVectorEnv",
    "PersonaFileError",
    "Phase",
    "RuleJudge",
    "ScriptedPartner",
    "Transcript",
    "TransformersChat",
    "Turn",
    "UnparsableJudgeError",
    "Verdict",
    "WeightedJudge",
    "bundled_personas",
    "get_domain",
    "load_personas",
    "open_chat",
]
