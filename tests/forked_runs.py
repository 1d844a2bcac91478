"""Training runs in child processes that kill themselves at an exact place, with a real SIGKILL.

Importing torch takes seconds, so one process does that and is forked for every run.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    killed: bool
    """Whether it killed itself."""
    code: int
    """Its exit code; -1 if it was killed."""
    output: str
    """All that it printed."""


class ForkedRuns:
    """A warmed-up process that trains in forks of itself."""

    def __init__(self) -> None:
        settings = {
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
            "OMP_NUM_THREADS": "1",
            "TQDM_DISABLE": "1",
            "CUDA_VISIBLE_DEVICES": "",  # a GPU cannot be taken over by a fork
        }
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **settings},
        )

    def train(
        self,
        kill_at: tuple[str, int] | None = None,
        largest_file: int | None = None,
        **config: Any,
    ) -> Ended:
        """Train with this TrainConfig.

        Args:
            kill_at: (place, n): die there at the n-th time; see `set_trap`.
            largest_file: bytes; writing more into a file fails, as on a full disk.
            config: of the run.
        """
        assert self._server.stdin is not None and self._server.stdout is not None
        request = {"config": config, "kill_at": kill_at, "largest_file": largest_file}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Ended(**json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=20)


# --- where a run can be killed --------------------------------------------------------------------


def die() -> None:
    """End this process at once, as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def watch(
    owner: Any,
    name: str,
    count: int,
    *,
    before: Callable[..., None] | None = None,
    after: Callable[..., None] | None = None,
    when: Callable[..., bool] = lambda *args, **kwargs: True,
) -> None:
    """Die at the count-th call of owner.name that fits `when`: before or after it."""
    original = getattr(owner, name)
    left = count

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= when(*args, **kwargs)
        now = left == 0 and when(*args, **kwargs)
        if now and before is not None:
            before(*args, **kwargs)
            die()
        result = original(*args, **kwargs)
        if now and after is not None:
            after(*args, **kwargs)
            die()
        return result

    setattr(owner, name, watched)


def at_once(*args: Any, **kwargs: Any) -> None:
    """Do nothing more before the end."""


def half_a_text(path: Path, text: str, **kwargs: Any) -> None:
    """Write the first half of a text file."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text[: len(text) // 2])


def half_a_row(folder: Any, row: dict[str, float]) -> None:
    """Write the first half of a row of metrics."""
    with (folder.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row)[:99])


def half_a_file(tensors: Any, path: Path) -> None:
    """Cut the file that was just written in half."""
    os.truncate(path, path.stat().st_size // 2)


def half_a_folder(path: Path, **kwargs: Any) -> None:
    """Remove some of a folder."""
    for file in sorted(path.iterdir())[:2]:
        file.unlink()


def half_an_agent(policy: Any, path: Path, *more: Any) -> None:
    """Write the model without its tokenizer."""
    policy.model.save_pretrained(path)


def set_trap(place: str, count: int) -> None:
    """Make this process die when it comes to `place` for the count-th time."""
    from agents import ppg, resume
    from agents.conversation import Conversation
    from agents.lm_policy import LMPolicy
    from agents.optimization import Optimization
    from agents.runs import RunFolder

    def is_named(*names: str) -> Callable[..., bool]:
        return lambda path, *args, **kwargs: Path(path).name in names

    def is_manifest(path: Path, *args: Any, **kwargs: Any) -> bool:
        return path.name == "manifest.json"

    def to_checkpoint(path: Path, target: Path) -> bool:
        return target.name.isdecimal()

    def to_agent(path: Path, target: Path) -> bool:
        return target.name == "agent"

    def is_old(path: Path, **kwargs: Any) -> bool:
        return path.name.startswith(".part-old")

    def is_weights(tensors: Any, path: Path) -> bool:
        return path.name == "model.safetensors"

    places: dict[str, Callable[[], None]] = {
        "half the run's manifest": lambda: watch(
            Path, "write_text", count, before=half_a_text, when=is_named("manifest.json.part")
        ),
        "in a rollout": lambda: watch(Conversation, "reply", count, after=at_once),
        "between backward and step": lambda: watch(Optimization, "step", count, before=at_once),
        "before the metrics": lambda: watch(RunFolder, "log", count, before=at_once),
        "half a row of metrics": lambda: watch(RunFolder, "log", count, before=half_a_row),
        "after the metrics": lambda: watch(ppg.PPGAgent, "checkpoint", count, before=at_once),
        "half the weights": lambda: watch(
            resume, "save_file", count, after=half_a_file, when=is_weights
        ),
        "after the weights": lambda: watch(
            resume, "save_file", count, after=at_once, when=is_weights
        ),
        "half the manifest": lambda: watch(
            Path, "write_text", count, before=half_a_text, when=is_manifest
        ),
        "before the rename": lambda: watch(
            Path, "rename", count, before=at_once, when=to_checkpoint
        ),
        "after the rename": lambda: watch(Path, "rename", count, after=at_once, when=to_checkpoint),
        "while the old one is removed": lambda: watch(
            shutil, "rmtree", count, before=half_a_folder, when=is_old
        ),
        "half an agent": lambda: watch(LMPolicy, "save", count, before=half_an_agent),
        "before the agent's rename": lambda: watch(
            Path, "rename", count, before=at_once, when=to_agent
        ),
        "before the result": lambda: watch(RunFolder, "finish", count, before=at_once),
        "half the result": lambda: watch(
            Path, "write_text", count, before=half_a_text, when=is_named("result.json.part")
        ),
    }
    places[place]()


# --- the server -----------------------------------------------------------------------------------


def serve() -> None:
    """Train as each line of the standard input asks, in a fork of this process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from agents.train import TrainConfig, make_agent, train

    make_agent(TrainConfig())  # what it imports stays imported
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile("w+") as output:
            child = os.fork()
            if child == 0:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                code = 1
                try:
                    if request["largest_file"] is not None:
                        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                        limit = request["largest_file"]
                        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                    if request["kill_at"] is not None:
                        set_trap(*request["kill_at"])
                    train(TrainConfig(**request["config"]), progress_bar=False)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            _, status = os.waitpid(child, 0)
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            output.seek(0)
            ended = {
                "killed": killed,
                "code": -1 if killed else os.waitstatus_to_exitcode(status),
                "output": output.read(),
            }
        answers.write(json.dumps(ended) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
