"""The teaching notebooks are fit to be read, kept in git and worked through in order.

That every cell runs is tested in test_examples.py.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

# A path of somebody's machine, in quotes.
ABSOLUTE_PATH = re.compile(r"""["'](?:/(?!["'])|~/|[A-Za-z]:\\)""")


def read(path: Path) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def sources(path: Path, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == kind]


def imported(code: str) -> list[tuple[str, list[str]]]:
    """Return (module, names taken from it) of every import in the code."""
    found: list[tuple[str, list[str]]] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", [alias.name for alias in node.names]))
    return found


def test_notebooks_are_numbered_in_reading_order_without_gaps() -> None:
    numbers = [int(path.stem.partition("_")[0]) for path in NOTEBOOKS]
    assert numbers == list(range(1, len(NOTEBOOKS) + 1))
    assert len(numbers) >= 8


@each_notebook
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    for cell in read(path)["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
        assert cell["metadata"] == {}, "collapsed, timed or tagged: strip it"


@each_notebook
def test_a_notebook_runs_under_any_python_3_kernel(path: Path) -> None:
    metadata = read(path)["metadata"]
    assert metadata["kernelspec"]["name"] == "python3"
    assert metadata.keys() <= {"kernelspec", "language_info"}


@each_notebook
def test_every_cell_has_an_id_of_its_own(path: Path) -> None:
    ids = [cell["id"] for cell in read(path)["cells"]]
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", each) for each in ids)


@each_notebook
def test_a_notebook_begins_with_its_title_and_what_it_is_for(path: Path) -> None:
    first = read(path)["cells"][0]
    title, _, rest = "".join(first["source"]).partition("\n")
    assert first["cell_type"] == "markdown"
    assert re.fullmatch(r"# \S.*[^.]", title)
    assert len(rest.split()) >= 20


@each_notebook
def test_a_notebook_ends_with_exercises_and_a_hint_for_each(path: Path) -> None:
    last = read(path)["cells"][-1]
    assert last["cell_type"] == "markdown"
    heading, *exercises = re.split(r"^\d+\. ", "".join(last["source"]), flags=re.M)
    assert heading.rstrip().endswith("## Exercises")
    assert 3 <= len(exercises) <= 5
    for exercise in exercises:
        assert "*Hint:*" in exercise, exercise


@each_notebook
def test_only_public_names_are_imported_and_nothing_from_tests(path: Path) -> None:
    helpers = {file.stem for file in (ROOT / "tests").glob("*.py")}
    for code in sources(path, "code"):
        for module, names in imported(code):
            first = module.partition(".")[0]
            assert first != "tests" and first not in helpers, f"{module} is a helper of the tests"
            private = [n for n in (*module.split("."), *names) if n.startswith("_")]
            assert not private or module == "__future__", f"{module} {names}"


@each_notebook
def test_a_notebook_names_no_path_of_a_machine(path: Path) -> None:
    for code in sources(path, "code"):
        assert not ABSOLUTE_PATH.search(code), ABSOLUTE_PATH.search(code)


def test_the_path_pattern_knows_paths_from_other_texts() -> None:
    for text in ('"/home/me/log"', "'~/log'", '"C:\\log"', 'Path("/tmp")'):
        assert ABSOLUTE_PATH.search(text), text
    for text in ('a / "b"', "'/'", '"runs/train"', '"1 / 2"', 'f"{x:.1f} /turn"'):
        assert not ABSOLUTE_PATH.search(text), text


@each_notebook
def test_every_figure_says_what_its_axes_are(path: Path) -> None:
    for code in sources(path, "code"):
        if "plt.show()" in code:
            assert "xlabel" in code or "set_xticks" in code, code
            assert "ylabel" in code, code


@each_notebook
def test_cells_are_short(path: Path) -> None:
    for code in sources(path, "code"):
        assert len(code.splitlines()) <= 45, code
    for text in sources(path, "markdown"):
        assert len(text.split()) <= 300, text


@each_notebook
def test_the_readme_links_the_notebook(path: Path) -> None:
    assert f"(examples/notebooks/{path.name})" in README.read_text(encoding="utf-8")
