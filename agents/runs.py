"""The run folder: the one owner of its format.

RUN/manifest.json        what was run: settings, versions, hardware
RUN/metrics.jsonl        one line an update (keys as in Stable-Baselines3)
RUN/result.json          written last; its presence means that the run is complete
RUN/transcripts.jsonl    dialogues with the reward of every turn
RUN/agent/               the trained agent (transformers folder, safetensors)
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

MANIFEST, METRICS, RESULT, TRANSCRIPTS, AGENT = (
    "manifest.json",
    "metrics.jsonl",
    "result.json",
    "transcripts.jsonl",
    "agent",
)


class RunFolder:
    """A folder that holds one run.

    Args:
        path: created if missing.
        settings: what makes this run this run; a folder that holds another one is refused.

    Raises:
        FileExistsError: the folder holds another run, or files that are no run.
        PermissionError: the folder cannot be written to.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise FileExistsError(f"{self.path} is a file; name a folder for the run.") from None
        except OSError as error:
            raise PermissionError(f"Cannot make the run folder {self.path}: {error}.") from error
        if not os.access(self.path, os.W_OK):
            raise PermissionError(f"Cannot write to {self.path}; choose another run folder.")
        settings = json.loads(json.dumps(settings))
        manifest = self._read(MANIFEST)
        if manifest is None and any(file.suffix != ".part" for file in self.path.iterdir()):
            raise FileExistsError(
                f"{self.path} is not empty and holds no run; choose a new or empty folder."
            )
        if manifest is not None and manifest["settings"] != settings:
            raise FileExistsError(
                f"{self.path} holds another run "
                f"({_first_difference(manifest['settings'], settings)}); "
                "choose another folder or remove this one."
            )
        if manifest is None:
            self._write(MANIFEST, {"settings": settings, **_versions()})

    @property
    def result(self) -> dict[str, Any] | None:
        """Return the result of a complete run, else None."""
        return self._read(RESULT)

    @property
    def agent(self) -> Path:
        """Return the folder for the trained agent."""
        return self.path / AGENT

    def restart(self) -> None:
        """Forget the metrics of an attempt that did not finish."""
        (self.path / METRICS).unlink(missing_ok=True)

    def log(self, row: Mapping[str, float]) -> None:
        """Append one line of metrics."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, float]]:
        """Return the metrics written so far; an unfinished last line is left out."""
        return read_metrics(self.path)

    def write_transcripts(
        self, transcripts: Sequence[Any], rewards: Sequence[Sequence[float]]
    ) -> None:
        """Write dialogues, each with its rewards."""
        rows = [
            {"messages": messages, "rewards": list(reward)}
            for messages, reward in zip(transcripts, rewards, strict=True)
        ]
        self._write_text(TRANSCRIPTS, (json.dumps(row, ensure_ascii=False) for row in rows))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the result; the run is complete then."""
        self._write(RESULT, result)

    def _read(self, name: str) -> dict[str, Any] | None:
        file = self.path / name
        if not file.exists():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}); remove its folder.") from error
        if not isinstance(content, dict) or (name == MANIFEST and "settings" not in content):
            raise ValueError(f"{file} is not what this project writes; remove its folder.")
        return content

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        self._write_text(name, [json.dumps(content, indent=2, ensure_ascii=False)])

    def _write_text(self, name: str, lines: Iterable[str]) -> None:
        """Write a file in whole or not at all."""
        draft = self.path / f"{name}.part"
        draft.write_text("\n".join(lines) + "\n", encoding="utf-8")
        draft.replace(self.path / name)


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Return the metrics in a run folder; none if there are none yet."""
    file = Path(path) / METRICS
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def read_transcripts(path: str | Path) -> list[dict[str, Any]]:
    """Return the dialogues in a run folder: {"messages": [...], "rewards": [...]} each."""
    text = (Path(path) / TRANSCRIPTS).read_text(encoding="utf-8")
    # Not splitlines: lines of a dialogue may hold other line separators, such as U+2028.
    return [json.loads(line) for line in text.split("\n") if line]


def _first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            return f"{key} is {old.get(key)!r} there and {new.get(key)!r} now"
    return "settings differ"


def _versions() -> dict[str, Any]:
    import torch
    import transformers

    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count()},
    }
