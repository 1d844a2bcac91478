"""Which language model is meant: "nano", a folder, a saved agent, or a Hugging Face name."""

from __future__ import annotations

import difflib
import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from .lm_policy import LMPolicy

NANO = Path(__file__).parent / "nano"
"""Folder of the bundled tiny language model."""

AGENT_SETTINGS = "ppg_agent.json"
"""File beside the model in a saved agent's folder."""


def load_policy(
    policy: str | Path, *, max_new_tokens: int | None = None, **settings: Any
) -> LMPolicy:
    """Return the LMPolicy of "nano", or of the folder or name of a Hugging Face model.

    Args:
        policy: which; a saved agent speaks with its own longest line and temperature.
        max_new_tokens: None = the saved agent's, else 32 for nano, 64 for others.
        settings: those of `LMPolicy.from_pretrained`.

    Raises:
        ValueError: if there is no such model; says what there is and suggests the nearest.
    """
    check_model_name(policy)
    saved = Path(policy) / AGENT_SETTINGS
    if saved.exists():
        record = json.loads(saved.read_text(encoding="utf-8"))
        longest = record["max_new_tokens"]
        settings = {"temperature": record["temperature"], **settings}
    else:
        longest = 32 if str(policy) == "nano" else 64
    return LMPolicy.from_pretrained(
        NANO if str(policy) == "nano" else policy,
        max_new_tokens=longest if max_new_tokens is None else max_new_tokens,
        **settings,
    )


def check_model_name(policy: str | Path) -> None:
    """Refuse what can be neither "nano" nor a folder nor a Hugging Face name; loads nothing.

    A slip such as "nanoo" is refused here: asking Hugging Face for it takes long, offline a minute.

    Raises:
        ValueError: says what there is and suggests the nearest.
    """
    name = str(policy)
    if (Path(policy) / "agent").is_dir() and not (Path(policy) / "config.json").exists():
        raise ValueError(f"{name} is a run folder; the agent that it trained is {name}/agent.")
    if name == "nano" or Path(policy).is_dir():
        return
    near = difflib.get_close_matches(name.lower(), ["nano"], n=1, cutoff=0.8)
    is_path = isinstance(policy, Path) or name.count("/") > 1 or name.startswith((".", "/", "~"))
    if near or is_path or name.startswith("runs/"):
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"Unknown agent or model {name!r}.{hint} There are 'nano' (bundled), folders such as "
            "runs/train/agent (written by ppg train and PPGAgent.save; this one does not exist), "
            "and Hugging Face names such as 'org/model'."
        )


def weights_fingerprint(model: str | Path) -> str:
    """Return what tells a local model's weights from others of its name; "" for remote ones."""
    folder = NANO if str(model) == "nano" else Path(model)
    if not folder.is_dir():
        return ""
    files = [(file, file.stat()) for file in sorted(folder.glob("*.safetensors"))]
    return _fingerprint(tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in files))


@lru_cache
def _fingerprint(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Return a hash of the files' contents; size and time of each tell when to read it again."""
    digest = hashlib.sha256()
    for file, _, _ in files:
        with file.open("rb") as weights:
            digest.update(hashlib.file_digest(weights, "sha256").digest())
    return digest.hexdigest()[:16]
