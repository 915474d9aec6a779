"""Checkpoints of AST's descendants by name: fetched from their authors, converted, kept.

    fetch_checkpoint("ced-tiny")

returns a checkpoint folder in the cache of `huggingface_hub`; the second time, without a network.
"""

import os
import shutil
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from ..common.files import write_whole
from .conversion import weights_to_repository
from .descendants import descendant_license, published_descendants, weights_file, weights_page

_TIMEOUT_S = 30


def cache_folder(name: str) -> Path:
    """Where a checkpoint is kept; you can also put the authors' file there by hand."""
    return Path(constants.HF_HOME) / "ast" / name


def fetch_checkpoint(name: str) -> str:
    """The checkpoint folder of one of `hub_configs/published_descendants.yaml`.

    Raises:
        ValueError: if its weights cannot be fetched; the message says what to download and where to
            put it. Also if something else was fetched.
    """
    folder = cache_folder(name)
    checkpoint = folder / "checkpoint"
    if (checkpoint / "config.json").is_file():
        return str(checkpoint)
    weights = folder / weights_file(name)
    source = "" if weights.is_file() else f"fetching {weights_page(name)}, "
    print(
        f"{name}: {source}converting it and keeping it in {checkpoint}; its licence is "
        f"{descendant_license(name)}.",
        file=sys.stderr,
    )
    if not weights.is_file():
        try:
            weights = _fetch(name, weights)
        except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"The weights of {name} could not be fetched ({reason}). Download "
                f"{weights_file(name)} from {weights_page(name)}, put it into {folder} and run the "
                "same command again."
            ) from error
    folder.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: an interrupted conversion leaves no partial folder behind.
    with tempfile.TemporaryDirectory(prefix=".checkpoint_", dir=folder) as unfinished:
        target = Path(unfinished) / "checkpoint"
        weights_to_repository(weights, target, name)
        os.replace(target, checkpoint)
    return str(checkpoint)


def _fetch(name: str, target: Path) -> Path:
    published: dict[str, Any] = published_descendants()[name]
    if "hub" in published:
        return Path(hf_hub_download(published["hub"], target.name))
    if "url" not in published:
        raise OSError("its page only serves browsers")
    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")

    def download(unfinished: Path) -> None:
        with (
            urllib.request.urlopen(published["url"], timeout=_TIMEOUT_S) as answer,
            unfinished.open("wb") as file,
        ):
            shutil.copyfileobj(answer, file)

    write_whole(target, download)
    return target
