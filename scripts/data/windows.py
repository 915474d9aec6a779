"""Chooses which windows to read of clips that are longer than the model's input.

    training        N windows per clip and epoch: they tile the clip if N are enough, else each is
                    drawn from its own N-th of the clip
    evaluation      as many as tile the clip, so that nothing is missed

Windows are decoded one by one, from their offset: a clip of hours costs no more than its windows.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from datasets import IterableDataset

from feature_extraction import AudioDecodingError, audio_duration

_SHORTEST_REST_S = 0.01  # less than one hop beyond a window yields no further frame
_COUNTED_CLIPS = 2000  # headers to read at the start of a run

Row = dict[str, Any]


def tiling(duration: float, window_s: float) -> list[float]:
    """Starts, in seconds, of the fewest windows that cover a clip, evenly spread.

    The last one ends where the clip ends, or less than 10 ms before; all overlap equally.
    """
    count = max(1, math.ceil((duration - _SHORTEST_REST_S) / window_s))
    if count == 1:
        return [0.0]
    # Never farther apart than their length: only a rest shorter than one hop may be left out.
    step = min((duration - window_s) / (count - 1), window_s)
    return [index * step for index in range(count)]


def training_windows(
    duration: float, window_s: float, count: int, generator: torch.Generator
) -> list[float]:
    """Starts, in seconds, of the windows of a clip in an epoch: at most `count`.

    Nothing is random for a clip that its windows cover.
    """
    starts = tiling(duration, window_s)
    if len(starts) <= count:
        return starts
    stratum = (duration - window_s) / count
    drawn = torch.rand(count, generator=generator).tolist()
    return [(index + where) * stratum for index, where in enumerate(drawn)]


def whole_clips(rows: Iterable[Row], window_s: float, first_number: int = 0) -> Iterator[Row]:
    """Rows to the rows of all their windows, with "offset", in seconds, and "clip", its number.

    A sound that cannot be read stays one row, and fails on decoding.
    """
    for number, row in enumerate(rows, start=first_number):
        try:
            duration = audio_duration(row["audio"])
        except AudioDecodingError:
            duration = None
        for offset in [0.0] if duration is None else tiling(duration, window_s):
            yield {**row, "offset": offset, "clip": number}


def count_long_clips(
    stream: IterableDataset, clips: int, window_s: float
) -> tuple[int, int, float]:
    """How many of the first clips exceed a window: long ones, inspected, the longest in seconds."""
    looked_at = min(clips, _COUNTED_CLIPS)
    long, longest = 0, 0.0
    for row in stream.take(looked_at):
        try:
            duration = audio_duration(row["audio"]) or 0.0
        except AudioDecodingError:
            continue  # reported on decoding
        long += len(tiling(duration, window_s)) > 1
        longest = max(longest, duration)
    return long, looked_at, longest


def describe_long_clips(
    long: int,
    looked_at: int,
    longest: float,
    clips: int,
    window_s: float,
    windows_per_clip: int,
    is_annotated: bool = False,
) -> str:
    """What happens to clips longer than a window, shown when a run starts; "" if there are none."""
    if not long:
        return ""
    of = f"the first {looked_at} training clips" if looked_at < clips else f"{clips} training clips"
    enough = math.ceil((longest - _SHORTEST_REST_S) / window_s)
    if windows_per_clip == 1:
        label = "the annotations" if is_annotated else "the whole clip's label"
        how = (
            f"each epoch uses one random window of each, with {label} "
            "(--windows_per_clip N uses N windows together)"
        )
    elif windows_per_clip < enough:
        how = f"each epoch uses {windows_per_clip} random windows of each, together"
    else:
        how = "each epoch uses all of each, in windows"
    return (
        f"{long} of {of} are longer than the model's {window_s:.2f} s, up to {longest:.0f} s: "
        f"{how}. Evaluation uses them whole."
    )
