"""Checkpoints by name: a folder, one bundled with the commands, or one on the Hub.

    checkpoint_folder("ast-tiny-audioset")  -> its folder in hub_configs
    resolve_checkpoint(name)                -> what to give to `from_pretrained`

Nothing here imports torch or transformers.
"""

import os
import socket
import threading
import urllib.parse
from pathlib import Path

from .bundled import hub_configs_folder
from .descendants import published_descendants

DEFAULT_MODEL = "ast-tiny-audioset"  # in hub_configs: no network is needed
_PATIENCE_S = 1.5  # for a host to accept a connection


def bundled_checkpoints() -> dict[str, Path]:
    """The checkpoints bundled with the commands: their folders by name."""
    weights = sorted(hub_configs_folder().glob("*/model.safetensors"))
    return {file.parent.name: file.parent for file in weights}


def checkpoint_folder(name: str) -> str:
    """The folder of a checkpoint that the commands know by name; any other name unchanged.

    Bundled ones are in `hub_configs`. The weights of AST's descendants are fetched from their
    authors and converted on first use.

    Raises:
        ValueError: if they cannot be fetched; the message says what to do.
    """
    if Path(name).is_dir() or "/" in name:
        return name
    bundled = bundled_checkpoints()
    if name in bundled:
        return str(bundled[name])
    if name in published_descendants():
        from ..publishing.fetching import fetch_checkpoint  # which imports this file

        return fetch_checkpoint(name)
    return name


def resolve_checkpoint(name: str) -> str:
    """A folder, a bundled checkpoint's name or a Hub name, as `from_pretrained` takes it.

    A Hub name that was downloaded before also works without a network.

    Raises:
        ValueError: for a path without a folder, and, within two seconds, for a Hub name if the Hub
            cannot be reached and the checkpoint was not downloaded before.
    """
    local = Path(checkpoint_folder(name))
    if name.strip() and local.is_dir():
        return str(local)
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/")
    if is_path or not name.strip():
        raise ValueError(f"No such checkpoint folder: {name}. {what_works_offline()}")
    from huggingface_hub import constants, snapshot_download

    if can_reach(constants.ENDPOINT):
        return name
    from huggingface_hub.utils import HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        raise ValueError(
            f"The checkpoint {name} is neither a folder nor bundled, and the Hub cannot be "
            f"reached to look for it there. {what_works_offline()}"
        ) from None


def check_checkpoints(*names: str | None) -> None:
    """Refuse a name that leads nowhere, before importing anything that takes seconds.

    Raises:
        ValueError: as for `resolve_checkpoint`.
    """
    for name in names:
        if name is not None and (not name or not Path(name).exists()):
            resolve_checkpoint(name)


def what_works_offline() -> str:
    """The sentence that ends every message about a checkpoint that is not here."""
    names = ", ".join(bundled_checkpoints())
    return f"Without a network, give a checkpoint's folder or a bundled one: {names}."


def can_reach(url: str) -> bool:
    """Whether its host, or the proxy on the way to it, accepts a connection within 1.5 s.

    Nothing is reachable where the variables that keep `transformers` off the network are set.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE") == "1":
        return False
    from urllib.request import getproxies, proxy_bypass  # slow to import; a folder needs none

    address = urllib.parse.urlsplit(url)
    proxy = getproxies().get(address.scheme)
    if proxy and not proxy_bypass(address.hostname or ""):
        address = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = address.port or (443 if address.scheme == "https" else 80)
    reached = threading.Event()

    def connect() -> None:
        try:
            with socket.create_connection((address.hostname, port), timeout=_PATIENCE_S):
                reached.set()
        except OSError:
            return

    # A DNS lookup has no timeout, so it is left behind in a thread.
    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(_PATIENCE_S)
    return reached.is_set()
