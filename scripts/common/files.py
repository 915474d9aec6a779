"""Files: there whole or not at all, readable, named safely."""

import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path

_LONGEST_NAME = 100  # bytes; file systems allow 255, and something comes before and after it


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the file, then take its place: nobody sees half of it, whatever happens.

    Args:
        path: of the file; its folder is made.
        write: writes the path that it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.unfinished")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def usual_modes(folder: Path) -> None:
    """Let others read a folder's files as the umask says; safetensors writes for the owner only."""
    umask = os.umask(0o077)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~umask)


def file_name(text: str) -> str:
    """A text as a part of a file's name: two texts never give the same, and none leaves its folder.

    Letters, digits, `-`, `_` and dots stay; the rest is written as %XX. Over 100 bytes the end
    becomes a checksum.
    """
    name = "".join(
        character
        if character.isalnum() or character in "-_."
        else "".join(f"%{byte:02X}" for byte in character.encode(errors="surrogateescape"))
        for character in text
    )
    encoded = name.encode()
    if len(encoded) <= _LONGEST_NAME:
        return name
    checksum = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    return encoded[: _LONGEST_NAME - 18].decode(errors="ignore") + "~" + checksum
