"""What comes with the commands: recipes, label names, cards, and checkpoints by name."""

import json
from pathlib import Path


def hub_configs_folder() -> Path:
    """`hub_configs`, in a checkout or next to the installed commands."""
    package = Path(__file__).parents[1]
    installed = package / "hub_configs"
    return installed if installed.is_dir() else package.parent / "hub_configs"


def find_bundled(name: str, folder: str, suffix: str, what: str) -> Path:
    """The user's file of this name, or else the one in a folder of `hub_configs`.

    Raises:
        ValueError: if there is neither; it names those that are bundled.
    """
    if Path(name).is_file():
        return Path(name)
    bundled = hub_configs_folder() / folder
    path = bundled / f"{name}{suffix}"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in bundled.glob(f"*{suffix}")))
        raise ValueError(f"No {what} {name}: neither a file nor bundled ({known}).")
    return path


def read_label_names(labels: str) -> list[str]:
    """Names in order from a JSON list of names, or of {"index", "name"}; or a bundled list."""
    path = find_bundled(labels, "labels", ".json", "label names")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(entry, dict) for entry in entries):
            by_index = {entry["index"]: entry["name"] for entry in entries}
            entries = [by_index[index] for index in range(len(entries))]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must hold a JSON list of label names. ({error!r})") from error
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"{path} must hold a JSON list of label names.")
    return entries
