"""`--speed`: a command's model in the fastest way that loses little, and what that is.

Nothing here imports torch once the model was measured.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ..common.checkpoints import resolve_checkpoint
from ..common.lean import postpone_libraries
from .options import ClassifyOptions, DemoOptions, ListenOptions

O = TypeVar("O", ClassifyOptions, DemoOptions, ListenOptions)  # noqa: E741


def sped_up(options: O) -> O:
    """The options with the file that runs fastest in the checkpoint's place, and said so.

    Raises:
        ValueError: as `choose`; for an ONNX file, which is as fast as it is.
    """
    if options.speed == "exact":
        return options
    if options.model.endswith(".onnx"):
        raise ValueError(
            "--speed chooses an ONNX file for a checkpoint; --model names one already."
        )
    postpone_libraries()
    from modeling_ast.speed_ast import choose

    choice = choose(_folder(options.model), options.speed)
    print(f"--speed {options.speed}: {choice}", file=sys.stderr)
    changes: dict[str, Any] = {"speed": "exact"}
    if choice.file is not None:
        changes["model"] = str(choice.file)
    # Mypy takes an object of two of the three classes for possible.
    asked: Any = options
    is_open = isinstance(asked, ClassifyOptions) and asked.hop_length_s is None
    if is_open and asked.speed == "fastest":
        changes["hop_length_s"] = asked.chunk_length_s or choice.window_s
    return replace(options, **changes)


def _folder(model: str) -> str:
    found = resolve_checkpoint(model)
    if Path(found).is_dir():
        return found
    from huggingface_hub import snapshot_download

    return snapshot_download(found, allow_patterns=["*.json", "*.safetensors", "*.bin"])
