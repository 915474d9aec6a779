"""Reads weight files of any code base without running code: tensors by name, and settings."""

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
_INSIDE = ("model", "state_dict")  # where training code keeps the weights, next to its own state
# Prefixes that data-parallel, compiled and wrapped models put on every name.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")
# Training code stores its command line with the weights. These types can only hold data.
_HARMLESS: list[Any] = [argparse.Namespace, pathlib.PosixPath, pathlib.WindowsPath]


def read_weights(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors in a `.pth`, `.pt` or `.safetensors` file or a folder, and their settings.

    Args:
        path: a file, or a folder with `model.safetensors` or `pytorch_model.bin`.

    Returns:
        state dict, without any prefix that a wrapper put on all names; settings: the dict `config`
        in the file, or the `config.json` next to it, else empty.

    Raises:
        ValueError: if there is no such file, if it holds anything but tensors, or if it is a pickle
            that would run code.
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
        if found is None:
            raise ValueError(f"No weights in {path}: expected {' or '.join(_WEIGHTS)}.")
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
            raise ValueError(f"{beside} is not valid JSON. ({error})") from error
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
            f"Refused to read {path}: it is a pickle that holds more than tensors, or not a pickle "
            "at all. Unpickling it could run any code its author put there, so only plain tensors "
            "are read. If you trust the file, load it yourself and save just its state_dict. "
            f"({_reason(error)})"
        ) from error
    except (EOFError, RuntimeError) as error:
        raise ValueError(
            f"{path} was not written by torch.save, or is truncated. ({error})"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a dict of tensors.")
    return content


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    while state:
        prefix = next((p for p in _WRAPPERS if all(name.startswith(p) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _reason(error: Exception) -> str:
    """torch's own account of what it refused, without its advice to turn the check off."""
    found = re.search(r"WeightsUnpickler error: (.+?)(\.\s|\n|$)", str(error))
    return found[1] if found else "not written by torch.save"
