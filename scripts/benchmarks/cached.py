"""What a benchmark makes once and keeps for its next runs: never taken for something else."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ..common.files import write_whole
from ..inference.run import model_version

Arrays = dict[str, np.ndarray]
Settings = Mapping[str, Any]

_SETTINGS = "made_with"


def cached_arrays(
    path: Path | None, checkpoint: str, settings: Settings, compute: Callable[[], Arrays]
) -> Arrays:
    """What `compute` returns, or returned in an earlier run with the same weights and settings.

    Args:
        path: of the file, .npz; None: compute, and keep nothing.
        checkpoint: the model whose embeddings they are.
        settings: whatever else the arrays depend on, as JSON can hold it.

    Raises:
        ValueError: for a file of other weights or settings, or of no arrays.
    """
    if path is None:
        return compute()
    settings = {"weights": model_version(checkpoint), **settings}
    if path.exists():
        try:
            with np.load(path) as file:
                arrays = dict(file)
        except (ValueError, TypeError, EOFError, BadZipFile) as error:
            raise ValueError(
                f"{path} holds no embeddings: name another file, or delete it."
            ) from error
        made_with = json.loads(str(arrays.pop(_SETTINGS, "{}")))
        _refuse_other(path, made_with, settings, "name another file, or delete it")
        return arrays
    arrays = compute()

    def save(unfinished: Path) -> None:
        contents: dict[str, Any] = {**arrays, _SETTINGS: json.dumps(settings)}
        with unfinished.open("wb") as file:
            np.savez(file, **contents)

    write_whole(path, save)
    return arrays


def claim_folder(folder: Path, settings: Settings) -> None:
    """Note in a folder what its contents are made with, before they are made.

    Raises:
        ValueError: if the folder has a note with other settings, or contents without one.
    """
    note = folder / f"{_SETTINGS}.json"
    if folder.is_dir() and any(folder.iterdir()):
        made_with = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        _refuse_other(folder, made_with, settings, "name another --output")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(note, lambda path: path.write_text(json.dumps(settings), encoding="utf-8"))


def _refuse_other(path: Path, made_with: Settings, settings: Settings, remedy: str) -> None:
    changed = [
        f"{name} {made_with.get(name, 'unknown')}, now {value}"
        for name, value in settings.items()
        if name not in made_with or made_with[name] != value
    ]
    if changed:
        raise ValueError(f"{path} was made with {'; '.join(changed)}: {remedy}.")
