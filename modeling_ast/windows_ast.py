"""A sound that comes in blocks, cut into overlapping windows, and room for what is kept of them.

Needs no torch.
"""

from collections.abc import Iterable, Iterator

import numpy as np


def cut_windows(
    blocks: Iterable[tuple[int, np.ndarray]], length: int, hop: int, shortest_rest: int = 1
) -> Iterator[tuple[int, np.ndarray, bool]]:
    """Cut a sound that arrives in blocks into overlapping windows.

    Args:
        blocks: what `stream_audio` yields: starts, which are ignored, and waveforms (samples,).
        length: of a window, in samples.
        hop: from one window's start to the next, in samples.
        shortest_rest: a remainder with fewer samples joins the window before it.

    Yields:
        start in samples, waveform (samples,), whether it is the last one, with the remainder.
    """
    start = 0
    held = np.empty(0, np.float32)
    for _, block in blocks:
        held = np.concatenate([held, block])
        while len(held) >= length + shortest_rest:
            yield start, held[:length], False
            start += hop
            held = held[hop:]
    yield start, held, True


def window_and_hop(
    rate: int, model_samples: int, chunk_length_s: float | None, hop_length_s: float | None
) -> tuple[int, int]:
    """Window length and hop, in samples.

    Args:
        rate: in Hz.
        model_samples: length of the model's windows, the default.
        chunk_length_s: of a window, in seconds.
        hop_length_s: in seconds; None: half a window.

    Raises:
        ValueError: for a hop longer than a window.
    """
    chunk = model_samples if chunk_length_s is None else round(chunk_length_s * rate)
    hop = chunk // 2 if hop_length_s is None else round(hop_length_s * rate)
    if hop > chunk:
        raise ValueError(
            f"hop_length_s ({hop / rate:g}) is longer than chunk_length_s ({chunk / rate:g}): "
            "the sound between windows would be skipped."
        )
    return chunk, hop


_LARGEST_BLOCK = 1 << 21  # bytes
Row = tuple[np.ndarray, int]  # a block and which of its rows


class KeptRows:
    """Room for what is kept of each window while much larger arrays come and go.

    Small arrays allocated amid those would pin what glibc's allocator frees around them: with two
    hours' windows, 3 MB of logits once held up to 900 MB. Here they lie in blocks: the first just
    large enough, each next one four times as large, up to 2 MB. A row is a pair of Python objects,
    which have memory of their own; a block lives as long as one of its rows.
    """

    def __init__(self) -> None:
        self._block = np.empty((0,), np.float32)
        self._used = 0

    def keep(self, rows: np.ndarray) -> list[Row]:
        """Copy rows (n, …), of any shape and type."""
        block, first = self._block, self._used
        last = first + len(rows)
        if last > len(block) or block.shape[1:] != rows.shape[1:] or block.dtype != rows.dtype:
            fitting = _LARGEST_BLOCK // max(1, rows[:1].nbytes)
            length = max(min(4 * len(block), fitting), len(rows))
            block = self._block = np.empty((length, *rows.shape[1:]), rows.dtype)
            first, last = 0, len(rows)
        block[first:last] = rows
        self._used = last
        return [(block, row) for row in range(first, last)]


def stack_rows(rows: list[Row]) -> np.ndarray:
    """Rows of one shape (…) -> (rows, …)."""
    return np.stack([block[row] for block, row in rows])
