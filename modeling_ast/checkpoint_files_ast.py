"""Weight files of any code base, read without running anything: tensors by name, and settings."""

import argparse
import json
import os
import pathlib
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_INSIDE = ("model", "state_dict")  # where training code keeps the weights, beside its own state
# What data-parallel, compiled and wrapped models write before every name.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")
# Training code stores its command line beside the weights. These hold data, whatever is in them.
_HARMLESS: list[Any] = [argparse.Namespace, pathlib.PosixPath, pathlib.WindowsPath]


def read_weights(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a `.pth`, `.pt` or `.safetensors` file or of a folder, and their settings.

    Args:
        path: a file, or a folder with `model.safetensors` or `pytorch_model.bin`.

    Returns:
        state dict, without the prefix that a wrapper put before all names; settings: the dict
        `config` in the file, or the `config.json` beside it, else empty.

    Raises:
        ValueError: when there is no such file, when it holds something else than tensors, or when
            it is a pickle that would run code.
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
        if found is None:
            raise ValueError(f"{path} holds no weights: expected {' or '.join(_WEIGHTS)} in it.")
        path = found
    if not path.is_file():
        raise ValueError(f"No such checkpoint: {path}")
    content = _load(path)
    settings: Any = content.get("config")
    beside = path.with_name("config.json")
    if not isinstance(settings, dict) and path.name in _WEIGHTS and beside.is_file():
        try:
            settings = json.loads(beside.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{beside} is no JSON file. ({error})") from error
    inside = next((content[name] for name in _INSIDE if isinstance(content.get(name), dict)), None)
    tensors = {
        name: tensor
        for name, tensor in (content if inside is None else inside).items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
    return _unwrapped(tensors), settings if isinstance(settings, dict) else {}


def _load(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was not read: it is a pickle that holds more than tensors, or none at all, "
            "and unpickling it could run any code that its author put there. Only plain tensors "
            "are read; where you trust the file, save its state_dict alone. "
            f"({_reason(error)})"
        ) from error
    except (EOFError, RuntimeError) as error:
        raise ValueError(f"{path} is no file of torch.save, or it is cut off. ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dict of tensors.")
    return content


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    while state:
        prefix = next((p for p in _WRAPPERS if all(name.startswith(p) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _reason(error: Exception) -> str:
    """torch's own sentence on what it refused, without its advice to switch the check off."""
    found = re.search(r"WeightsUnpickler error: (.+?)(\.\s|\n|$)", str(error))
    return found[1] if found else "not a file of torch.save"
