"""Checkpoints of AST's descendants by name: fetched from their authors, converted, kept.

    fetch_checkpoint("ced-tiny")

returns a checkpoint folder in the cache of `huggingface_hub`; the second time, without a network.
"""

import os
import sys
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

from ..common.checkpoints import can_reach, what_works_offline
from ..common.descendants import (
    descendant_license,
    published_descendants,
    weights_file,
    weights_page,
)
from ..common.files import write_whole

_TIMEOUT_S = 30


def cache_folder(name: str) -> Path:
    """Where a checkpoint is kept; you can also put the authors' file there by hand."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "ast" / name


def fetch_checkpoint(name: str) -> str:
    """The checkpoint folder of one of `hub_configs/published_descendants.yaml`.

    Raises:
        ValueError: when its weights are not here and cannot be fetched, within two seconds where
            there is no network; the message says what to download and where to put it. Also when
            what was fetched is something else.
    """
    folder = cache_folder(name)
    checkpoint = folder / "checkpoint"
    if (checkpoint / "config.json").is_file():
        return str(checkpoint)
    weights = _weights_here(name)
    problem = None if weights else _what_is_in_the_way(name)
    if problem:
        raise ValueError(_by_hand(name, problem))
    source = "" if weights else f"fetching {weights_page(name)}, "
    print(
        f"{name}: {source}converting it and keeping it in {checkpoint}; its licence is "
        f"{descendant_license(name)}.",
        file=sys.stderr,
    )
    weights = weights or fetch_weights(name)
    folder.mkdir(parents=True, exist_ok=True)
    # Only here, as both take seconds to import.
    from transformers.utils import logging

    from .conversion import weights_to_repository

    logging.disable_progress_bar()  # it writes one file
    # Whole or not at all: an interrupted conversion leaves no partial folder behind.
    with tempfile.TemporaryDirectory(prefix=".checkpoint_", dir=folder) as unfinished:
        target = Path(unfinished) / "checkpoint"
        weights_to_repository(weights, target, name)
        os.replace(target, checkpoint)
    return str(checkpoint)


def _weights_here(name: str) -> Path | None:
    """The authors' file, put here by hand or fetched before by `huggingface_hub`."""
    from huggingface_hub import try_to_load_from_cache

    by_hand = cache_folder(name) / weights_file(name)
    if by_hand.is_file():
        return by_hand
    hub = published_descendants()[name].get("hub")
    found = try_to_load_from_cache(hub, weights_file(name)) if hub else None
    return Path(found) if isinstance(found, str) else None


def _what_is_in_the_way(name: str) -> str | None:
    """Why its weights cannot be fetched, as far as one sees before trying."""
    from huggingface_hub import constants

    published = published_descendants()[name]
    address = constants.ENDPOINT if "hub" in published else published.get("url")
    if address is None:
        return "its page only serves browsers"
    host = urllib.parse.urlsplit(address).hostname
    return None if can_reach(address) else f"{host} cannot be reached"


def _by_hand(name: str, problem: str) -> str:
    return (
        f"The weights of {name} could not be fetched: {problem}. Download {weights_file(name)} "
        f"from {weights_page(name)}, put it into {cache_folder(name)} and run the same command "
        f"again. {what_works_offline()}"
    )


def fetch_weights(name: str) -> Path:
    """Download the authors' file: from the Hub into its own cache, else next to the checkpoint.

    Raises:
        ValueError: when that fails on the way.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    published = published_descendants()[name]
    target = cache_folder(name) / weights_file(name)
    try:
        if "hub" in published:
            return Path(hf_hub_download(published["hub"], target.name))
        write_whole(target, lambda unfinished: _download(published["url"], unfinished))
    except (OSError, HfHubHTTPError) as error:
        raise ValueError(_by_hand(name, " ".join(str(error).split())[:200])) from error
    return target


def _download(url: str, target: Path) -> None:
    from tqdm import tqdm

    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer, target.open("wb") as file:
        size = int(answer.headers.get("Content-Length") or 0) or None
        with tqdm(total=size, unit="B", unit_scale=True, desc="fetching", leave=False) as bar:
            while block := answer.read(1 << 20):
                bar.update(file.write(block))
