"""A command's progress through its sounds: files, duration done and left, speed, time left."""

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from ..common.shown import clock

# With more files than this, their headers are not read: counting files is accurate enough.
_MEASURED_FILES = 500


class Progress:
    """A progress bar on standard error.

    With few files, it moves with the duration processed, even within a file of hours; with many, it
    counts files.

    Args:
        files: how many there are; None if a dataset does not tell.
        disabled: show nothing.
        leave: keep the bar at the end.
    """

    def __init__(self, files: Sequence[str] | None, disabled: bool = False, leave: bool = True):
        self.total_files = None if files is None else len(files)
        self.files = 0
        self.seconds = 0.0  # of sound done in this run
        self.text = ""
        self._postfix = [""]  # ours: a disabled bar has none
        self._at = 0.0  # seconds of the total, including earlier runs
        self._began = time.perf_counter()
        measured = files is not None and not disabled and len(files) <= _MEASURED_FILES
        self.total_s = total_duration(files) if files and measured else None
        self._bar = tqdm(
            total=self.total_s or self.total_files,
            desc="Listening",
            disable=disabled,
            leave=leave,
            bar_format="{desc}: {percentage:3.0f}%|{bar:20}| {postfix[0]}"
            if self.total_files
            else "{desc}: {postfix[0]}",
            postfix=self._postfix,
        )
        self._show()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self._bar.total:
            self._bar.n = self._bar.total
        self._show()
        self._bar.refresh()
        self._bar.close()

    def skip(self, seconds: float) -> None:
        """Count sound that an earlier run has done."""
        self._at += seconds
        self._show()

    def heard(self, seconds: float) -> None:
        """Count more sound as done."""
        self.seconds += seconds
        self._at += seconds
        if self.total_s is not None:
            self._bar.update(min(seconds, max(0.0, self.total_s - self._bar.n)))
        self._show()

    def finished(self) -> None:
        """Count a sound as done, or as unreadable."""
        self.files += 1
        if self.total_s is None:
            self._bar.update()
        self._show()

    def _show(self) -> None:
        elapsed = time.perf_counter() - self._began
        of_files = "" if self.total_files is None else f"/{self.total_files}"
        parts = [f"{self.files}{of_files} files"]
        left = None
        if self.total_s is not None:
            parts.append(f"{clock(self._at)} of {clock(self.total_s)} heard")
            if self.seconds:
                left = max(0.0, self.total_s - self._at) * elapsed / self.seconds
        else:
            parts.append(f"{clock(self._at)} heard")
            if self.files and self.total_files:
                left = (self.total_files - self.files) * elapsed / self.files
        if self.seconds:
            parts.append(f"{self.seconds / elapsed:.0f} x real time")
        if left is not None:
            parts.append(f"{clock(left)} left")
        self.text = self._postfix[0] = ", ".join(parts)


def total_duration(files: Sequence[str]) -> float | None:
    """Seconds of sound in files, by their headers; one that does not say counts as the mean.

    None if no file says.
    """
    import soundfile

    known = []
    for file in files:
        if not Path(file).is_file():  # an address, or a pipe, which would block
            continue
        try:
            with soundfile.SoundFile(file) as sound:
                if 0 < sound.frames < 1 << 62:
                    known.append(sound.frames / sound.samplerate)
        except (RuntimeError, OSError, ValueError, TypeError):
            continue
    return sum(known) * len(files) / len(known) if known else None
