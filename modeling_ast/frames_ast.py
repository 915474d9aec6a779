"""The times of a frame model's columns: which part of a sound each represents, window by window.

Column c of a window that starts at frame f sees frames f + c * stride to + 16; a frame is 25 ms
long, and there is one every 10 ms. The column represents `stride` frames around the middle of what
it sees; a sound's first column also covers what comes before, the last one what comes after:

    stride 10       column 0: 0 … 0.1375 s, column 1: 0.1375 … 0.2375 s, …

Windows of a long sound overlap, and their columns fall on one grid. Where several windows cover a
column, its score is their mean, each weighted by the column's distance from that window's edge. A
window's weight falls to nothing at its edges, so it leaves no step there:

    windows     scores (columns, labels) each, one every `hop` columns
    stitched    scores (columns of the sound, labels)
"""

from collections.abc import Iterable, Sequence

import numpy as np

_FRAMES_PER_SECOND = 100
_FRAME_LENGTH_S = 0.025


def column_spans(
    columns: int,
    time_stride: int,
    patch_frames: int = 16,
    first: int = 0,
    duration: float | None = None,
) -> np.ndarray:
    """The time span that each column of a sound represents.

    Args:
        columns: how many.
        time_stride: frames from one column to the next.
        patch_frames: frames that a column sees.
        first: index of the first one.
        duration: of the sound, in seconds, if its last column is included.

    Returns:
        (columns, 2) seconds, without gaps, from 0 (if `first` is 0) to `duration` (if given).
    """
    seen_s = (patch_frames - 1) / _FRAMES_PER_SECOND + _FRAME_LENGTH_S
    step_s = time_stride / _FRAMES_PER_SECOND
    edges = (np.arange(first, first + columns + 1) - 0.5) * step_s + seen_s / 2
    if first == 0:
        edges[0] = 0.0
    if duration is not None:
        edges = np.minimum(edges, duration)
        edges[-1] = duration
    return np.stack([edges[:-1], edges[1:]], axis=1)


def count_columns(frames: int, time_stride: int, patch_frames: int = 16) -> int:
    """Columns without padding, at least 1, as in `count_valid_columns`."""
    return max(0, frames - patch_frames) // time_stride + 1


def frame_targets(
    events: Iterable[tuple[float, float, int]], spans: np.ndarray, num_labels: int
) -> np.ndarray:
    """Targets of the columns: 1 where an event covers at least half of a column's time.

    An event shorter than half a column marks the column at its middle, so none is lost.

    Args:
        events: start and end in seconds, index of the label.
        spans: (columns, 2), from `column_spans`.
        num_labels: how many.

    Returns:
        (columns, labels) float32.
    """
    targets = np.zeros((len(spans), num_labels), np.float32)
    lengths = spans[:, 1] - spans[:, 0]
    for start, end, label in events:
        covered = np.minimum(spans[:, 1], end) - np.maximum(spans[:, 0], start)
        is_marked = (covered >= lengths / 2) & (covered > 0)
        middle = (start + end) / 2
        targets[is_marked | ((spans[:, 0] <= middle) & (middle < spans[:, 1])), label] = 1.0
    return targets


class Stitcher:
    """Joins the scores of overlapping windows, in order, into those of the whole sound, seamlessly.

    Holds at most one window.

    Args:
        hop: columns from one window's start to the next one's.
    """

    def __init__(self, hop: int):
        self.hop = hop
        self._sum: np.ndarray | None = None  # (columns, labels), weighted
        self._weight = np.empty(0, np.float32)

    def add(self, scores: np.ndarray, is_last: bool) -> np.ndarray:
        """One more window (columns, labels) -> the columns that are now final, in order."""
        columns = len(scores)
        weight = np.minimum(np.arange(1, columns + 1), np.arange(columns, 0, -1)).astype(np.float32)
        length = max(columns, len(self._weight))
        sums = np.zeros((length, scores.shape[1]), np.float32)
        weights = np.zeros(length, np.float32)
        if self._sum is not None:
            sums[: len(self._sum)] = self._sum
            weights[: len(self._weight)] = self._weight
        sums[:columns] += scores * weight[:, None]
        weights[:columns] += weight
        settled = length if is_last else self.hop
        self._sum, self._weight = sums[settled:], weights[settled:]
        return sums[:settled] / weights[:settled, None]


def stitch(windows: Sequence[np.ndarray], hop: int) -> np.ndarray:
    """All windows (columns, labels) of a sound, `hop` columns apart -> (columns, labels)."""
    stitcher = Stitcher(hop)
    last = len(windows) - 1
    return np.concatenate([stitcher.add(scores, i == last) for i, scores in enumerate(windows)])


def median_filter(scores: np.ndarray, length: int) -> np.ndarray:
    """Replace each score by the median of the `length` columns around it; edges are repeated.

    This removes peaks and gaps shorter than half of `length` columns and leaves onsets and offsets
    where they are.

    Args:
        scores: (columns, labels).
        length: odd; 1 changes nothing.

    Raises:
        ValueError: if `length` is even or below 1.
    """
    if length < 1 or length % 2 == 0:
        raise ValueError(f"A median filter needs an odd number of columns, got {length}.")
    if length == 1 or not len(scores):
        return scores
    padded = np.pad(scores, ((length // 2, length // 2), (0, 0)), mode="edge")
    around = np.lib.stride_tricks.sliding_window_view(padded, length, axis=0)
    return np.median(around, axis=-1).astype(scores.dtype)
