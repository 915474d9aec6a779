"""Writes a Hugging Face Space: the page with all the code it needs, ready to push."""

import shutil
from pathlib import Path

import feature_extraction
import modeling_ast

from ..common.bundled import hub_configs_folder
from ..common.checkpoints import checkpoint_folder

_SPACE_MODEL = "MIT/ast-finetuned-audioset-10-10-0.4593"  # as space/app.py has it


def write_space(folder: Path, checkpoint: str) -> None:
    """Write a Hugging Face Space: `hub_configs/space`, the code, and a local checkpoint.

    Raises:
        ValueError: if the folder exists and is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new folder for the Space.")
    shutil.copytree(hub_configs_folder() / "space", folder, dirs_exist_ok=True)
    for package, source in (
        ("feature_extraction", Path(feature_extraction.__file__).parent),
        ("modeling_ast", Path(modeling_ast.__file__).parent),
        ("ast_scripts", Path(__file__).parents[1]),
    ):
        for file in source.rglob("*.py"):
            target = folder / package / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    checkpoint = checkpoint_folder(checkpoint)
    if Path(checkpoint).is_dir():
        shutil.copytree(checkpoint, folder / "checkpoint")
    else:
        app = folder / "app.py"
        text = app.read_text(encoding="utf-8").replace(_SPACE_MODEL, checkpoint)
        app.write_text(text, encoding="utf-8")
