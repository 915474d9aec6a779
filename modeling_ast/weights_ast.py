"""A look at a checkpoint folder's weights before anything is built: headers only, no tensor."""

import json
import math
from pathlib import Path

from safetensors import SafetensorError, safe_open


def check_weights(folder: Path, num_encoder_parameters: int) -> None:
    """Refuse weights that hold less than the encoder that their config describes.

    `transformers` would make room for all that a config describes, and then see that it does not
    fit. Weights of another format than safetensors are left to `transformers`.

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
            raise ValueError(f"{index} is no index of weights: {error!r}") from error
        if outside:
            raise ValueError(f"{index} names files outside of its folder: {outside[0]!r}.")
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
            f"parameters, the weights beside it hold {held:,}: they are not of one model."
        )
