"""Mean and standard deviation of log-mel values, in one streaming pass over real frames.

Nothing is padded, cut or augmented; every frame counts the same. Parts add up exactly, so the
result does not depend on the number of processes.
"""

import itertools
import logging
import math
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from datasets import IterableDataset
from tqdm import tqdm

from feature_extraction import AudioDecodingError, kaldi_fbank, stream_audio
from feature_extraction.fbank_ast import LOG_FLOOR, frame_shift, num_frames

from ..common.options import did_you_mean

logger = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")

_CLIPS_PER_TASK = 8
_TASKS_AHEAD = 4  # per worker: enough to keep it busy, few enough to bound memory
HISTOGRAM_EDGES = np.linspace(-18, 18, 145)  # log-mel: silence is -15.9, full scale about 12


@dataclass
class Statistics:
    """Count, mean and sum of squared deviations of log-mel values, which can be merged."""

    clips: int = 0
    samples: int = 0
    frames: int = 0
    values: int = 0
    mean: float = 0.0
    squares: float = 0.0
    histogram: np.ndarray = field(
        default_factory=lambda: np.zeros(len(HISTOGRAM_EDGES) - 1, np.int64)
    )
    unreadable: list[str] = field(default_factory=list)
    too_short: int = 0

    @property
    def std(self) -> float:
        return math.sqrt(self.squares / self.values)

    @property
    def floor(self) -> float:
        """The share of values at the filterbank's floor: digital silence."""
        return self.histogram[np.searchsorted(HISTOGRAM_EDGES, math.log(LOG_FLOOR)) - 1] / (
            self.values
        )

    def add(self, other: "Statistics") -> None:
        """Merge in other clips by Chan's update, which is exact even for large, unequal parts."""
        values = self.values + other.values
        if other.values:
            difference = other.mean - self.mean
            self.mean += difference * (other.values / values)
            self.squares += other.squares + difference**2 * (self.values * other.values / values)
        self.values = values
        self.clips += other.clips
        self.samples += other.samples
        self.frames += other.frames
        self.histogram = self.histogram + other.histogram
        self.unreadable += other.unreadable
        self.too_short += other.too_short


def measure_sounds(sounds: list[Any], sampling_rate: int, num_mel_bins: int) -> Statistics:
    """Statistics of some sounds; unreadable ones are named, not counted."""
    total = Statistics()
    for sound in sounds:
        clip = Statistics(clips=1)
        kept = np.empty(0, np.float32)
        try:
            for _, block in stream_audio(sound, sampling_rate):
                clip.samples += len(block)
                kept = np.concatenate([kept, block])
                frames = num_frames(len(kept), sampling_rate)
                if frames:
                    log_mel = kaldi_fbank(torch.from_numpy(kept), sampling_rate, num_mel_bins)
                    clip.add(statistics_of(log_mel.numpy()))
                    kept = kept[frames * frame_shift(sampling_rate) :]
        except AudioDecodingError as error:
            total.unreadable.append(str(error))
            continue
        if clip.frames:
            total.add(clip)
        else:
            total.too_short += 1
    return total


def statistics_of(log_mel: np.ndarray) -> Statistics:
    """Of all values of some frames (frames, mel)."""
    values = log_mel.astype(np.float64)
    mean = float(values.mean())
    inside = values.clip(HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    return Statistics(
        frames=len(values),
        values=values.size,
        mean=mean,
        squares=float(np.square(values - mean).sum()),
        histogram=np.histogram(inside, HISTOGRAM_EDGES)[0],
    )


def measure_dataset(
    stream: IterableDataset,
    audio_column: str = "audio",
    sampling_rate: int = 16000,
    num_mel_bins: int = 128,
    num_workers: int = 0,
) -> Statistics:
    """Statistics of a streaming dataset's sounds, the same for any number of workers.

    Raises:
        ValueError: if it has no such column, or no sound that can be measured.
    """
    columns = stream.column_names or list(next(iter(stream), {}))
    if audio_column not in columns:
        raise ValueError(
            f"The dataset has no column {audio_column!r} (--audio_column)"
            + did_you_mean(audio_column, columns)
        )
    sounds = (row[audio_column] for row in stream.select_columns([audio_column]))
    measure = partial(measure_sounds, sampling_rate=sampling_rate, num_mel_bins=num_mel_bins)
    total = Statistics()
    with tqdm(unit=" clips", desc="Measuring") as progress:
        for part in _in_processes(measure, _groups(sounds, _CLIPS_PER_TASK), num_workers):
            total.add(part)
            progress.update(part.clips + len(part.unreadable) + part.too_short)
            progress.set_postfix_str(f"{total.samples / sampling_rate / 3600:.2f} h")
    for complaint in total.unreadable[:5]:
        logger.warning("Skipped: %s", complaint)
    if not total.frames:
        raise ValueError(
            f"No sound of the dataset could be measured: {len(total.unreadable)} unreadable, "
            f"{total.too_short} shorter than one frame of 25 ms."
        )
    return total


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    items = iter(items)
    while group := list(itertools.islice(items, size)):
        yield group


def _in_processes(function: Callable[[T], R], items: Iterable[T], num_workers: int) -> Iterator[R]:
    """`map(function, items)` in processes, in order, reading only a little ahead."""
    if num_workers == 0:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(
        num_workers,
        # Forking a process in which torch has started threads can hang.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as executor:
        ahead: deque[Future[R]] = deque()
        for item in items:
            ahead.append(executor.submit(function, item))
            if len(ahead) > _TASKS_AHEAD * num_workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
