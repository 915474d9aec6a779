"""Files: written whole or not at all, readable, safely named."""

import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path

_LONGEST_NAME = 100  # bytes; file systems allow 255, including prefix and suffix


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a temporary file, then move it into place: nobody ever sees half a file.

    Args:
        path: of the file; its folder is created.
        write: writes to the path it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.unfinished")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def usual_modes(folder: Path) -> None:
    """Give a folder's files the umask's permissions; safetensors makes them private."""
    umask = os.umask(0o077)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~umask)


def file_name(text: str) -> str:
    """A text as part of a file name: different texts never collide, and none leaves its folder.

    Letters, digits, `-`, `_` and dots stay; everything else becomes %XX. Beyond 100 bytes, the end
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
