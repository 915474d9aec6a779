"""A short fingerprint of a dataset, to notice if it changes before a killed run resumes.

For files in folders or tables: names, sizes and labels, class by class. For Parquet and tar files:
labels in order, and the files' names and sizes. For a dataset on the Hub, also its revision.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_MENTIONED = 5  # differences in a message


@dataclass
class ClassFingerprint:
    """The clips of a class: how many, and a sum of checksums, independent of order."""

    train: int = 0
    evaluation: int = 0
    checksum: int = 0

    def add(self, checksum: int, is_train: bool) -> None:
        self.train += is_train
        self.evaluation += not is_train
        self.checksum = (self.checksum + checksum) % 2**64


@dataclass
class Fingerprint:
    """Fingerprint of the data that a run is trained and evaluated on."""

    classes: dict[str, ClassFingerprint] = field(default_factory=dict)  # in the labels' order
    files: dict[str, int] = field(default_factory=dict)  # Parquet or tar: bytes by name
    revision: str | None = None

    @property
    def digest(self) -> str:
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "order": list(self.classes)}

    def differences(self, stored: dict[str, Any]) -> list[str]:
        """What has changed since `stored`, a result of `to_json`; for an error message."""
        found: list[str] = []
        if stored["order"] != list(self.classes):
            found.append(f"classes {_listed(stored['order'])}, now {_listed(list(self.classes))}")
        for name, now in self.classes.items():
            before = stored["classes"].get(name)
            if before is None or before == asdict(now):
                continue
            counts = [(c["train"], c["evaluation"]) for c in (before, asdict(now))]
            if counts[0] != counts[1]:
                (train, evaluation), (train_now, evaluation_now) = counts
                found.append(
                    f"{train} + {evaluation} clips of {name!r} to train and evaluate on, now "
                    f"{train_now} + {evaluation_now}"
                )
            else:
                found.append(f"other sounds of {name!r}: their names, sizes or order differ")
        for name in sorted({*stored["files"], *self.files}):
            sizes = [files.get(name) for files in (stored["files"], self.files)]
            if sizes[0] != sizes[1]:
                was, is_now = ("absent" if s is None else f"{s} bytes" for s in sizes)
                found.append(f"{name} {was}, now {is_now}")
        if stored["revision"] != self.revision:
            found.append(f"revision {stored['revision']} of the dataset, now {self.revision}")
        if len(found) > _MENTIONED:
            found[_MENTIONED:] = [f"{len(found) - _MENTIONED} more differences of the data"]
        return found


def checksum(*parts: Any) -> int:
    """A 64-bit checksum of some values, text or bytes."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        encoded = part if isinstance(part, bytes) else str(part).encode(errors="surrogateescape")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return int.from_bytes(digest.digest(), "big")


def short_name(path: str) -> str:
    """A sound's name in its class: the same on any machine."""
    return "/".join(Path(path).parts[-2:])


def file_size(path: str) -> int:
    """In bytes; -1 if it is not a local file, such as an address."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _listed(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
