"""Checks a checkpoint folder before anything is built: its JSON files and its weights' headers."""

import json
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

# Types that `transformers` relies on before any class can check its own settings.
_TYPES: dict[str, type] = {
    "architectures": list,
    "auto_map": dict,
    "custom_pipelines": dict,
    "dtype": str,
    "feature_extractor_type": str,
    "model_type": str,
    "processor_class": str,
    "quantization_config": dict,
    "torch_dtype": str,
    "transformers_version": str,
}
_LONGEST_TEXT = 200


def check_settings(content: Any, source: Any) -> None:
    """Refuse settings from JSON that no class's own check would ever see.

    Raises:
        ValueError: if they are not an object, or names of classes and files are not texts.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{source} is not a JSON object of names and values.")
    for name, expected in _TYPES.items():
        value = content.get(name)
        texts = [value]
        if expected is list and isinstance(value, list):
            texts = value
        elif name == "auto_map" and isinstance(value, dict):  # a name, or a tokenizer's two
            texts = [
                v for entry in value.values() for v in (entry if type(entry) is list else [entry])
            ]
        elif expected is dict:
            texts = []
        is_text = all(isinstance(text, str) and len(text) <= _LONGEST_TEXT for text in texts)
        if value is not None and not (isinstance(value, expected) and is_text):
            kinds: dict[type, str] = {
                list: "a list of texts",
                dict: "an object",
                str: "a short text",
            }
            kind = kinds[expected]
            raise ValueError(f"{source}: {name} must be {kind}, got {repr(value)[:60]}.")


def check_json_files(folder: Path) -> None:
    """`check_settings` for a folder's config and feature extractor, if present.

    Call it before `transformers`' Auto classes or `pipeline` read a folder you did not write: they
    do not expect such mistakes.
    """
    for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from error
        check_settings(content, file)
        if "feature_extractor" in content:
            check_settings(content["feature_extractor"], file)


def check_weights(folder: Path, num_encoder_parameters: int) -> None:
    """Refuse weights that are smaller than the encoder their config describes.

    `transformers` would allocate everything the config describes before noticing that it does not
    fit. Weights in formats other than safetensors are left to `transformers`.

    Raises:
        ValueError: also for a damaged file, and for an index that names files elsewhere.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file() and not (folder / names[0]).is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
            outside = [name for name in names if Path(name).name != name]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not an index of weights: {error!r}") from error
        if outside:
            raise ValueError(f"{index} names files outside its folder: {outside[0]!r}.")
    held = 0
    for name in names:
        if not (folder / name).is_file():
            return
        try:
            with safe_open(folder / name, framework="pt") as file:
                for tensor in file.keys():  # noqa: SIM118  (no mapping)
                    held += math.prod(file.get_slice(tensor).get_shape())
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged: {error}") from error
    if held < num_encoder_parameters:
        raise ValueError(
            f"{folder / 'config.json'} describes an encoder of {num_encoder_parameters:,} "
            f"parameters, but the weights next to it hold {held:,}: they are not the same model."
        )
