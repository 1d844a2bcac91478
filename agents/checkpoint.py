"""Checkpoints that a crash cannot spoil: whole folders, checked by hash, or nothing.

FOLDER/00000012/                 after update 12; the newest one counts
    manifest.json                what made it: settings, seed, hashes of data, commit, versions;
                                 and the size and SHA-256 of every other file
    ...                          what the writer puts there

A checkpoint is written beside its place, forced to disk and then renamed, so that a kill at any
point leaves the previous one valid. Nothing in it is a pickle, which could run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from .provenance import provenance

MANIFEST = "manifest.json"
_PART = ".part-"  # a folder that is being written or removed
_ASIDE = ".aside-"  # a checkpoint that makes room for a newer one of its number


class CheckpointError(ValueError):
    """A checkpoint is damaged, or of another run; nothing was changed."""


def write_checkpoint(
    folder: str | Path,
    number: int,
    write: Callable[[Path], None],
    origin: Mapping[str, Any],
    keep: int = 2,
    data: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint in whole or not at all, then remove all but the newest `keep`.

    Args:
        folder: of all checkpoints of a run; made if missing.
        number: rises during a run.
        write: writes its files into the folder that it is given.
        origin: what made the checkpoint; `read_checkpoint` compares it.
        keep: how many to keep, at least 1.
        data: hashes of what the run reads, for the manifest.

    Raises:
        CheckpointError: the folder holds those of another run, or later ones; nothing was changed.
        OSError: the files could not be written; says what is still valid and what to do.
    """
    folder = Path(folder)
    place = folder / f"{number:08d}"
    draft, aside = folder / f"{_PART}{place.name}", folder / f"{_ASIDE}{place.name}"
    try:
        _refuse_others(folder, number, origin)
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        draft.mkdir()
        write(draft)
        files = {path.name: _fingerprint(path) for path in sorted(draft.iterdir())}
        manifest = {
            "number": number,
            "origin": origin,
            "data": dict(data or {}),
            **provenance(),
            "files": files,
        }
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in (*draft.iterdir(), draft):
            _force_to_disk(path)
        if place.exists():
            place.rename(aside)
        draft.rename(place)
        _force_to_disk(folder)
        for old in (aside, *checkpoints(folder)[: -max(1, keep)]):
            if old.exists():
                _remove(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        found = checkpoints(folder)
        valid = f"{found[-1]} is still valid" if found else "there was none before it"
        raise OSError(
            f"Cannot write the checkpoint {place}: {error}; {valid}. Free some space or choose "
            "another run folder, then go on."
        ) from error
    return place


def checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first; none if there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    for aside in folder.glob(f"{_ASIDE}*"):  # a kill came before the newer one was there
        place = folder / aside.name.removeprefix(_ASIDE)
        if not place.exists():
            with suppress(FileNotFoundError):  # another process was faster
                aside.rename(place)
    found = [path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal()]
    return sorted(found, key=lambda path: int(path.name))


def read_checkpoint(place: str | Path, origin: Mapping[str, Any]) -> None:
    """Check that a checkpoint is whole and was made by `origin`.

    Raises:
        CheckpointError: names the file, or the difference, and the remedy.
    """
    place = Path(place)
    manifest = _manifest(place)
    for name, expected in manifest["files"].items():
        file = place / name
        if not file.exists() or _fingerprint(file) != expected:
            raise CheckpointError(
                f"{file} is {'damaged' if file.exists() else 'missing'}. Remove the folder {place} "
                "to go on from the checkpoint before it."
            )
    _refuse_foreign(place, manifest, origin)
    then, now = manifest.get("versions"), provenance()["versions"]
    if then != now:
        warnings.warn(
            f"{place} was written with {then}, now it is {now}: learning goes on, but not bit for "
            "bit as it would have.",
            stacklevel=3,
        )


def random_states() -> dict[str, Any]:
    """Return the state of every global random generator of this process, as JSON.

    This project draws from none of them; partners, judges and callbacks of others may.
    """
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - kept for others, not drawn from
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
        "cuda": [bytes(state.tolist()).hex() for state in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_available()
        else [],
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Set the global random generators to what `random_states` returned."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(_bytes_tensor(states["torch"]))
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_bytes_tensor(state), device)


def _bytes_tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def _refuse_others(folder: Path, number: int, origin: Mapping[str, Any]) -> None:
    found = checkpoints(folder)
    if not found:
        return
    newest = found[-1]
    _refuse_foreign(newest, _manifest(newest), origin)
    if int(newest.name) > number:
        raise CheckpointError(
            f"{folder} has a checkpoint after update {int(newest.name)}, this one would be after "
            f"update {number}. Go on from there, or choose another folder."
        )


def _refuse_foreign(place: Path, manifest: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    found, wanted = manifest["origin"], json.loads(json.dumps(origin))
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise CheckpointError(
                f"{place} is a checkpoint of another run: {key} is {found.get(key)!r} there and "
                f"{wanted.get(key)!r} now. Choose another run folder, or the old settings."
            )


def _manifest(place: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        manifest["files"].items(), manifest["origin"].items()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{place / MANIFEST} is missing or damaged ({type(error).__name__}), so {place} is no "
            "checkpoint of this project. Remove that folder to go on from the one before it."
        ) from error
    return manifest


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _remove(place: Path) -> None:
    """Remove a checkpoint so that no half of it is ever taken for one."""
    gone = place.with_name(f"{_PART}old-{place.name}")
    place.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    for path in (*folder.glob(f"{_PART}*"), *folder.glob(f"{_ASIDE}*")):
        shutil.rmtree(path, ignore_errors=True)


def _force_to_disk(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
