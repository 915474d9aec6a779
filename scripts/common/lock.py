"""Lets only one run at a time write to a folder."""

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from .files import write_whole


@contextmanager
def hold(folder: Path, name: str = "run") -> Iterator[None]:
    """Keep other processes out of a folder, or one part of it, while this one uses it.

    The lock is the operating system's: it ends with the process, even if that is killed, so a stale
    lock never blocks anyone. It also works over NFS.

    Args:
        folder: created if missing; `.NAME.lock` and `.NAME.holder.json` in it are the lock and its
            holder.
        name: of the part: processes that hold different parts can work side by side.

    Raises:
        ValueError: if another process holds it; the message says which one.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / f".{name}.holder.json"
    lock = FileLock(folder / f".{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{folder} is being written by {_described(holder)}. Wait until it is done, or choose "
            "another folder."
        ) from None
    try:
        about = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": Path(sys.argv[0]).name,
        }
        write_whole(holder, lambda path: path.write_text(json.dumps(about), encoding="utf-8"))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _described(holder: Path) -> str:
    try:
        about = json.loads(holder.read_text(encoding="utf-8"))
        return (
            f"process {about['process']} on {about['host']} ({about['command']}, since "
            f"{about['since']})"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
