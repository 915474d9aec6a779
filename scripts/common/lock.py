"""One process at a time in an output folder."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout


@contextlib.contextmanager
def locked(folder: Path, command: str) -> Iterator[None]:
    """Have a folder to oneself; it is made where there is none.

    The lock belongs to the process: when that ends, however it ends, the folder is free.

    Args:
        folder: where the command writes.
        command: its name, to tell others who is at work.

    Raises:
        ValueError: when another process has it; the message says which.
    """
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / ".lock.json"
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{folder} is in use by {_described(holder)}. Wait until it has ended, or choose "
            "another --output."
        ) from None
    try:
        now = datetime.now().isoformat(sep=" ", timespec="seconds")
        about = {"command": command, "process": os.getpid(), "host": socket.gethostname()}
        holder.write_text(json.dumps({**about, "since": now}), encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _described(holder: Path) -> str:
    try:
        about = json.loads(holder.read_text(encoding="utf-8"))
        return (
            f"{about['command']}, process {about['process']} on {about['host']}, "
            f"since {about['since']}"
        )
    except (OSError, ValueError, LookupError, TypeError):  # it has only just begun
        return "another process"
