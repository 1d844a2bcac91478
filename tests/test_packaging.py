"""The package as a building: who may import whom, what an import costs, what an installation holds.

The floors (CONTRIBUTING.md) are checked by reading the source, so that a file breaks its floor on
the day the import is written.
"""

from __future__ import annotations

import ast
import fnmatch
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# A file imports only from lower floors. A folder is one room: its files may import each other. What
# a file imports inside its own main() is free: there it is a command, above everything.
FLOORS = {
    "ppg_env/dialogue": 0,
    "ppg_env/process": 0,
    "ppg_env/spaces": 1,
    "ppg_env/chat": 1,
    "ppg_env/consistent_llms": 1,
    "ppg_env/domains": 1,
    "ppg_env/personas": 2,
    "ppg_env/data": 3,
    "ppg_env/partners": 2,
    "ppg_env/judges": 2,
    "ppg_env/chat_judge": 2,
    "ppg_env/nli_judge": 2,
    "ppg_env/weighted_judge": 2,
    "ppg_env/verdict_cache": 2,
    "ppg_env/published_verdicts": 2,
    "ppg_env/quiz": 2,
    "ppg_env/rejudge": 3,
    "ppg_env/consistent_dialogues": 3,
    "ppg_env/world": 3,
    "ppg_env/env": 4,
    "ppg_env/vector_env": 4,
    "ppg_env/wrappers": 5,
    "agents/credit": 6,
    "agents/losses": 6,
    "agents/policy": 6,
    "agents/provenance": 6,
    "agents/statistics": 6,
    "agents/page": 6,
    "agents/page_template": 5,
    "agents/turn_gradients": 12,
    "agents/live": 11,
    "agents/runs": 7,
    "agents/tape": 6,
    "agents/logs": 7,
    "agents/offline_settings": 7,
    "agents/fragments": 7,
    "agents/batching": 8,
    "agents/splits": 8,
    "agents/weighting": 9,
    "agents/validation": 10,
    "agents/reading": 11,
    "agents/offline": 12,
    "agents/checkpoint": 7,
    "agents/sharding": 6,
    "agents/optimization": 7,
    "agents/chat_format": 7,
    "agents/decoding": 7,
    "agents/rollout": 7,
    "agents/sampling": 8,
    "agents/scoring": 8,
    "agents/conversation": 9,
    "agents/lm_policy": 10,
    "agents/evaluate": 10,
    "agents/quiz": 9,
    "agents/loading": 11,
    "agents/resume": 11,
    "agents/ppg": 13,
    "agents/sb3": 13,
    "agents/integrations": 13,
    "agents/ppo": 14,
    "agents/diagnostics": 14,
    "agents/suggest": 15,
    "agents/methods": 15,
    "agents/nano": 15,
    "agents/train": 16,
    "agents/web": 16,
    "agents/web_page": 15,
    "agents/pilot": 17,
    "agents/compare": 17,
    "agents/results": 18,
    "agents/figures": 19,
    "agents/report": 20,
    "agents/demo": 20,
    "agents/cli": 21,
}
TOP = 22  # a package's __init__ shows the public names of all its floors

# The only files of agents/ that know the worlds: the command line, and the script that makes the
# tiny model's pre-training text out of their dialogues.
THROUGH_THE_WALL = {"agents/cli.py", "agents/nano/make.py"}

STANDARD_LIBRARY_ONLY = {"ppg_env/dialogue.py"}
WORLD_THIRD_PARTY = {"numpy", "gymnasium"}
WORLD_THIRD_PARTY_LATE = {  # inside functions only
    *("torch", "transformers", "openai", "tenacity", "jinja2", "datasets"),
    "sentence_transformers",
}
ONE_OWNER = {
    "matplotlib": {"agents/figures.py"},
    "stable_baselines3": {"agents/sb3.py"},
    "starlette": {"agents/web.py"},
    "trl": {"agents/integrations/trl.py"},
    "tyro": {"agents/cli.py"},
    "uvicorn": {"agents/web.py"},
    "verl": {"agents/integrations/verl.py"},
}

# What importing gymnasium and numpy brings along.
LOADED_WITH_THE_WORLD = {
    "ppg_env",
    "numpy",
    "gymnasium",
    "cloudpickle",
    "farama_notifications",
    "typing_extensions",
}

# Names that say nothing about what is inside, so anything ends up there.
NOT_FILES = {
    *("utils", "helpers", "common", "types", "base", "config", "prompts", "registry", "factory"),
    *("buffer", "kv_cache", "callbacks"),
}


@dataclass(frozen=True)
class Import:
    """One imported module, in absolute dotted form, and how the source asks for it."""

    file: str  # from the repository's root, with slashes
    line: int
    target: str
    relative: bool
    inside: str = ""  # the outermost function, or TYPE_CHECKING; "" when importing the file runs it

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.target}"


def source_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_in(path: Path) -> Iterator[Import]:
    """Every import of a file; `from a import b` counts as a.b where that is a module, else as a."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    yield from _imports_below(tree, path, inside="")


def _imports_below(node: ast.AST, path: Path, inside: str) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(name_of(path), child.lineno, alias.name, False, inside)
        elif isinstance(child, ast.ImportFrom):
            for target in _targets(child, path):
                yield Import(name_of(path), child.lineno, target, child.level > 0, inside)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _imports_below(child, path, inside or child.name)
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            yield from _imports_below(child, path, inside or "TYPE_CHECKING")
        else:
            yield from _imports_below(child, path, inside)


def _targets(node: ast.ImportFrom, path: Path) -> set[str]:
    folder = path.relative_to(ROOT).parent.parts
    above = folder[: len(folder) - (node.level - 1)] if node.level else ()
    module = ".".join((*above, *(node.module or "").split("."))).strip(".")
    names = [f"{module}.{alias.name}" for alias in node.names]
    return {name if is_module(name) else module for name in names}


def is_module(dotted: str) -> bool:
    place = ROOT.joinpath(*dotted.split("."))
    return place.is_dir() or place.with_suffix(".py").is_file()


def top_level(dotted: str) -> str:
    return dotted.split(".")[0]


def room_of(dotted: str) -> str:
    """'ppg_env/domains' for ppg_env.domains.therapy; 'ppg_env/__init__' for ppg_env itself."""
    return "/".join([*dotted.split("."), "__init__"][:2])


def room_of_file(name: str) -> str:
    return "/".join(name.removesuffix(".py").split("/")[:2])


def floor_of(room: str) -> int:
    if room.endswith("/__init__"):
        return TOP
    if room not in FLOORS:
        raise AssertionError(f"{room} has no floor: add it to CONTRIBUTING.md and to FLOORS here")
    return FLOORS[room]


def imports_of(*packages: str) -> list[Import]:
    paths = [path for package in packages for path in source_files(package)]
    return [one for path in paths for one in imports_in(path)]


def python(code: str) -> str:
    """What a fresh interpreter prints that runs `code` in the repository's root."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def third_parties_loaded_by(module: str) -> set[str]:
    """Top-level names, outside the standard library, that importing `module` loads from files."""
    code = f"""
import sys
before = set(sys.modules)
import {module}
files = [n for n in set(sys.modules) - before if getattr(sys.modules[n], "__file__", None)]
print(*{{n.split(".")[0] for n in files}} - set(sys.stdlib_module_names))
"""
    return set(python(code).split())


# --- what an import costs ---


def test_importing_the_world_loads_numpy_and_gymnasium_and_nothing_else_of_others() -> None:
    assert third_parties_loaded_by("ppg_env") <= LOADED_WITH_THE_WORLD


def test_importing_the_learners_loads_neither_the_world_nor_a_plotting_library() -> None:
    loaded = third_parties_loaded_by("agents")

    assert not loaded & {"ppg_env", "matplotlib", "tyro"}


# --- floors and the wall ---


def test_a_file_imports_only_from_lower_floors() -> None:
    upward = []
    for one in imports_of("ppg_env", "agents"):
        here, there = room_of_file(one.file), room_of(one.target)
        own_package = top_level(one.target) == here.split("/")[0]
        if not own_package or here == there or one.inside == "main":
            continue
        if floor_of(there) >= floor_of(here):
            upward.append(str(one))

    assert not upward


def test_every_file_has_a_floor() -> None:
    for path in source_files("ppg_env") + source_files("agents"):
        floor_of(room_of_file(name_of(path)))


def test_the_world_never_imports_the_learners() -> None:
    assert not [str(one) for one in imports_of("ppg_env") if top_level(one.target) == "agents"]


def test_the_learners_never_import_the_world() -> None:
    through = [one for one in imports_of("agents") if top_level(one.target) == "ppg_env"]

    assert not [str(one) for one in through if one.file not in THROUGH_THE_WALL]


def test_imports_inside_agents_are_relative_because_another_package_uses_the_name() -> None:
    absolute = [one for one in imports_of("agents") if top_level(one.target) == "agents"]

    assert not [str(one) for one in absolute if not one.relative]


def test_the_world_imports_heavy_libraries_only_inside_functions() -> None:
    misplaced = []
    for one in imports_of("ppg_env"):
        name = top_level(one.target)
        allowed = {"ppg_env", *sys.stdlib_module_names}
        if one.file not in STANDARD_LIBRARY_ONLY:
            allowed |= WORLD_THIRD_PARTY | (WORLD_THIRD_PARTY_LATE if one.inside else set())
        if name not in allowed:
            misplaced.append(str(one))

    assert not misplaced


@pytest.mark.parametrize("library", ONE_OWNER)
def test_a_library_with_one_owner_is_imported_nowhere_else(library: str) -> None:
    users = [one for one in imports_of("ppg_env", "agents") if top_level(one.target) == library]

    assert not [str(one) for one in users if one.file not in ONE_OWNER[library]]


def test_credit_losses_policy_and_runs_do_without_transformers() -> None:
    users = [one for one in imports_of("agents") if top_level(one.target) == "transformers"]

    assert not [str(one) for one in users if floor_of(room_of_file(one.file)) <= 5]


def test_no_file_has_a_name_that_could_hold_anything() -> None:
    folders = ("ppg_env", "agents", "benchmarks", "examples", "tests")
    names = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]

    assert not [name_of(path) for path in names if path.stem in NOT_FILES]


def test_the_import_reader_sees_late_relative_and_type_only_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "ppg_env" / "domains").mkdir(parents=True)
    (tmp_path / "ppg_env" / "dialogue.py").touch()
    path = tmp_path / "ppg_env" / "domains" / "a.py"
    path.write_text(
        "import os.path\n"
        "from ..dialogue import Turn\n"
        "from .. import dialogue\n"
        "from .b import c\n"
        "if TYPE_CHECKING:\n"
        "    import torch\n"
        "def load():\n"
        "    import openai\n"
    )

    found = [(one.target, one.relative, one.inside) for one in imports_in(path)]

    assert found == [
        ("os.path", False, ""),
        ("ppg_env.dialogue", True, ""),
        ("ppg_env.dialogue", True, ""),
        ("ppg_env.domains.b", True, ""),
        ("torch", False, "TYPE_CHECKING"),
        ("openai", False, "load"),
    ]


# --- what an installation carries ---


@pytest.mark.parametrize("package", ["ppg_env", "agents"])
def test_a_package_ships_its_types(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_every_folder_with_files_is_an_installed_package() -> None:
    folders = {path.parent for package in ("ppg_env", "agents") for path in shipped_files(package)}
    dotted = {".".join(folder.relative_to(ROOT).parts) for folder in folders}

    assert dotted <= set(PYPROJECT["tool"]["setuptools"]["packages"])


def test_every_data_file_is_shipped() -> None:
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]
    left_out = []
    for path in shipped_files("ppg_env") + shipped_files("agents"):
        package = ".".join(path.parent.relative_to(ROOT).parts)
        shipped = any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns.get(package, []))
        if path.suffix != ".py" and not shipped:
            left_out.append(name_of(path))

    assert not left_out


def shipped_files(package: str) -> list[Path]:
    paths = (ROOT / package).rglob("*")
    return [path for path in paths if path.is_file() and "__pycache__" not in path.parts]


def test_the_command_resolves_to_a_function() -> None:
    module, function = PYPROJECT["project"]["scripts"]["ppg"].split(":")

    assert callable(getattr(importlib.import_module(module), function))


def test_the_version_is_the_same_in_the_package_and_in_its_metadata() -> None:
    assert importlib.import_module("ppg_env").__version__ == PYPROJECT["project"]["version"]


def test_constraints_pin_every_dependency_within_its_bounds() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    wanted = [*PYPROJECT["project"]["dependencies"], *(one for extra in extras for one in extra)]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    version_of = {canonicalize_name(name): version for name, version in pins.items()}

    for requirement in map(Requirement, wanted):
        pinned = version_of.get(canonicalize_name(requirement.name))
        assert pinned, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(pinned), f"{requirement} refuses the pin {pinned}"


def test_the_changelog_uses_the_six_fixed_headings() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = set(re.findall(r"^### (.+)$", text, flags=re.MULTILINE))

    assert headings <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
