"""Embeddings that a benchmark computes once and keeps in a file for its next runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ..common.files import write_whole
from ..inference.run import model_version

Arrays = dict[str, np.ndarray]


def cached_arrays(path: Path | None, checkpoint: str, compute: Callable[[], Arrays]) -> Arrays:
    """What `compute` returns, or returned in an earlier run with the same weights.

    Args:
        path: of the file, .npz; None: compute, and keep nothing.
        checkpoint: the model whose embeddings they are.

    Raises:
        ValueError: for a file of other weights, even under the same name, or of no arrays.
    """
    if path is None:
        return compute()
    version = model_version(checkpoint)
    if path.exists():
        try:
            with np.load(path) as file:
                arrays = dict(file)
        except (ValueError, TypeError, EOFError, BadZipFile) as error:
            raise ValueError(
                f"{path} holds no embeddings: name another file, or delete it."
            ) from error
        if str(arrays.get("version")) != version:
            raise ValueError(
                f"{path} holds embeddings from {arrays.get('model')}, not from these weights of "
                f"{checkpoint}: name another file, or delete it."
            )
        return arrays
    arrays = {**compute(), "model": np.array(checkpoint), "version": np.array(version)}

    def save(unfinished: Path) -> None:
        with unfinished.open("wb") as file:
            contents: dict[str, Any] = arrays
            np.savez(file, **contents)

    write_whole(path, save)
    return arrays
