"""Cuts stretches of recordings into files to listen to."""

import heapq
import re
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from feature_extraction.audio_ast import load_audio
from modeling_ast.events_ast import Event

from ..common.files import write_whole
from ..common.shown import valid_text
from .parts import Result

AROUND_S = 1.0  # seconds before and after a stretch
_RATE = 16000  # for formats that soundfile cannot read
_NAME_BYTES = 80


def best_events(results: Iterable[Result], count: int) -> dict[str, list[tuple[str, Event]]]:
    """Each label's highest-scoring events: the sound's name and the event, best first."""
    best: dict[str, list[tuple[float, int, str, Event]]] = {}
    number = 0  # breaks ties: the first events stay
    for result in results:
        for event in result.events:
            number -= 1
            of_label = best.setdefault(event.label, [])
            entry = (event.score, number, result.sound, event)
            if len(of_label) < count:
                heapq.heappush(of_label, entry)
            else:
                heapq.heappushpop(of_label, entry)
    return {
        label: [(sound, event) for _, _, sound, event in sorted(of_label, reverse=True)]
        for label, of_label in best.items()
    }


def clip_name(sound: str, start: float, end: float, score: float, suffix: str) -> str:
    """`0.913_field_12.0-17.1s.wav`: score, source and time; sorted by name, the best come last."""
    stem = re.sub(r"[^\w.-]+", "_", valid_text(PurePath(sound).stem))
    stem = stem.encode()[:_NAME_BYTES].decode("utf-8", "ignore") or "sound"
    return f"{score:.3f}_{stem}_{start:.1f}-{end:.1f}s{suffix}"


def read_stretch(
    source: Any, start: float, end: float, around: float = AROUND_S
) -> tuple[np.ndarray, int]:
    """A stretch with a margin before and after it, in its original form where possible.

    Args:
        source: what `load_audio` reads.
        start, end: seconds.
        around: seconds.

    Returns:
        (samples,) or (samples, channels), and the sampling rate in Hz.

    Raises:
        AudioDecodingError: for a sound that cannot be read.
    """
    import soundfile

    first = max(0.0, start - around)
    if isinstance(source, str) and Path(source).is_file():
        try:
            with soundfile.SoundFile(source) as file:
                rate = file.samplerate
                file.seek(min(round(first * rate), file.frames))
                return file.read(round((end + around - first) * rate), dtype="float32"), rate
        except (soundfile.LibsndfileError, RuntimeError):
            pass  # one of the formats that need ffmpeg
    return load_audio(source, _RATE, first, end + around - first), _RATE


def write_clip(path: Path, source: Any, start: float, end: float, around: float = AROUND_S) -> None:
    """A stretch as WAV or FLAC, by the file's suffix; see `read_stretch`."""
    import soundfile

    samples, rate = read_stretch(source, start, end, around)
    kind = path.suffix[1:].upper()
    write_whole(path, lambda unfinished: soundfile.write(unfinished, samples, rate, format=kind))
