"""Live sound: the one path from windows to events, on sound that has not ended yet.

Ring        the last seconds of the sound, in fixed memory; one thread writes, another reads
Listener    every hop a window that ends now -> scores -> what begins and what is over
Line        one of these, with its latency

Windows are as long as the model's and end one hop apart; at the start they hold what there is. If
the model is slower than the sound, hops are skipped, because windows overlap; sound that no window
covers counts as dropped.
"""

import bisect
import math
import statistics
import threading
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from modeling_ast.events_ast import Event, EventRules, EventStream
from modeling_ast.frames_ast import column_spans

from .classifier import Classifier

_SAME_S = 1e-4  # times closer than this are equal up to rounding
_ARRIVALS = 1 << 12  # blocks with a known arrival time: minutes
_LATENCIES = 1 << 14  # lines in the median


class Ring:
    """The latest part of an ongoing sound, in fixed memory. Positions are samples from its start.

    Args:
        samples: how many to keep.
        waits: `write` waits until the listener has room, so nothing is lost: for files. Otherwise
            the oldest samples go: for sound that does not wait.
    """

    def __init__(self, samples: int, waits: bool = False):
        self.waits = waits
        self.end = 0  # of what was written
        self.is_closed = False
        self._samples = np.zeros(samples, np.float32)
        self._needed_from = 0
        self._arrivals: deque[tuple[int, float]] = deque(maxlen=_ARRIVALS)
        self._changed = threading.Condition()

    @property
    def begin(self) -> int:
        """The oldest sample still kept."""
        return max(0, self.end - len(self._samples))

    def write(self, samples: np.ndarray) -> None:
        """The next (samples,) of the sound."""
        for part in np.split(samples, range(len(self._samples), len(samples), len(self._samples))):
            with self._changed:
                while self.waits and not self.is_closed:
                    if self.end + len(part) <= self._needed_from + len(self._samples):
                        break
                    self._changed.wait()
                place = self.end % len(self._samples)
                room = len(self._samples) - place
                self._samples[place : place + len(part)] = part[:room]
                self._samples[: max(0, len(part) - room)] = part[room:]
                self.end += len(part)
                self._arrivals.append((self.end, time.monotonic()))
                self._changed.notify_all()

    def skip(self, samples: int) -> None:
        """Insert silence for sound that never arrived."""
        silence = min(samples, len(self._samples))
        with self._changed:
            self.end += samples - silence
        self.write(np.zeros(silence, np.float32))

    def read(self, start: int, end: int) -> np.ndarray:
        """A copy of the samples from `start` to `end`, as far as they are kept."""
        with self._changed:
            places = np.arange(max(start, self.begin), min(end, self.end)) % len(self._samples)
            return self._samples[places]

    def release(self, position: int) -> None:
        """Tell the ring that the listener no longer needs samples before this one."""
        with self._changed:
            self._needed_from = position
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing follows."""
        with self._changed:
            self.is_closed = True
            self._changed.notify_all()

    def wait(self, position: int, seconds: float) -> None:
        """Wait until the sound has reached this point, is over, or the time has passed."""
        with self._changed:
            self._changed.wait_for(lambda: self.end >= position or self.is_closed, seconds)

    def arrival(self, position: int) -> float:
        """When a sample arrived, by `time.monotonic`."""
        with self._changed:
            place = bisect.bisect_right(self._arrivals, position, key=lambda entry: entry[0])
            return self._arrivals[min(place, len(self._arrivals) - 1)][1]


@dataclass(frozen=True)
class Line:
    """An event begins, or is over."""

    is_over: bool
    event: Event  # one that begins ends, so far, with its window
    latency_s: float  # since the first new sound in its window


@dataclass
class Figures:
    """How listening went."""

    windows: int = 0
    heard_s: float = 0.0
    computed_s: float = 0.0
    dropped_s: float = 0.0  # arrived, but no window covered it
    drops: int = 0
    hops_left_out: int = 0  # no sound was lost with them
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=_LATENCIES))

    @property
    def real_time_factor(self) -> float:
        """Computing time per second of sound: below 1 keeps up."""
        return self.computed_s / self.heard_s if self.heard_s else 0.0

    def __str__(self) -> str:
        parts = [f"heard {self.heard_s:.1f} s", f"real-time factor {self.real_time_factor:.3f}"]
        if self.latencies_s:
            median, longest = statistics.median(self.latencies_s), max(self.latencies_s)
            parts.append(f"latency {median:.2f} s, at most {longest:.2f} s")
        parts.append(f"{self.drops} drops ({self.dropped_s:.1f} s)")
        if self.hops_left_out:
            parts.append(f"{self.hops_left_out} hops left out")
        return ", ".join(parts)


class Listener:
    """Classifies the sound in a ring, window by window.

    Args:
        classifier: the model; its `chunk_length_s` is the windows'.
        rules: for events.
        hop_length_s: from one window's end to the next; no longer than a window.
        buffer_s: how much sound to keep; longer than a window and a hop.
        waits: as for `Ring`.

    Raises:
        ValueError: for a hop or buffer that does not fit the window.
    """

    def __init__(
        self,
        classifier: Classifier,
        rules: EventRules,
        hop_length_s: float = 1.0,
        buffer_s: float = 60.0,
        waits: bool = False,
    ):
        self.classifier = classifier
        self.rate = classifier.sampling_rate
        self.length, self.hop = classifier.window_samples(hop_length_s)
        least = math.ceil((self.length + self.hop) / self.rate) + 1
        if buffer_s < least:
            raise ValueError(
                f"--buffer_s must hold a window, a hop and a second, {least} s here, got "
                f"{buffer_s:g}."
            )
        self.ring = Ring(round(buffer_s * self.rate), waits)
        self.figures = Figures()
        self._events = EventStream(classifier.label_names, rules)
        self._heard_to = 0  # samples
        self._columns_to = 0.0  # seconds, of a frame model

    @property
    def next_end(self) -> int:
        """The sample at which the next window ends."""
        return self._heard_to + self.hop

    @property
    def is_ready(self) -> bool:
        """Whether a window is ready."""
        rest = self.ring.end - self._heard_to
        return rest >= self.hop or (self.ring.is_closed and rest > 0)

    def step(self) -> list[Line]:
        """Classify one window; returns what begins with it, and what is over."""
        begin, end = self.ring.begin, self.ring.end
        if begin > self._heard_to:
            self.figures.drops += 1
            self.figures.dropped_s += (begin - self._heard_to) / self.rate
            self._heard_to = begin
        waiting = max(1, (end - self._heard_to) // self.hop)
        hops = 1 if self.ring.waits else min(waiting, self.length // self.hop)
        self.figures.hops_left_out += hops - 1
        first_new, self._heard_to = self._heard_to, min(end, self._heard_to + hops * self.hop)
        start = max(0, self._heard_to - self.length)
        samples = self.ring.read(start, self._heard_to)
        span = (self._heard_to - len(samples)) / self.rate, self._heard_to / self.rate
        arrived, began = self.ring.arrival(first_new), time.perf_counter()
        (window,) = self.classifier.windows(samples)
        scores, _, _ = self.classifier.score([window])
        begun: list[Event] = []
        ended: list[Event] = []
        for part, of_labels in self._parts(span, len(samples), scores[0]):
            more_begun, more_ended = self._events.add(part, of_labels)
            begun, ended = begun + more_begun, ended + more_ended
        self.ring.release(self._heard_to + self.hop - self.length)
        latency = time.monotonic() - arrived
        self.figures.windows += 1
        self.figures.heard_s += (self._heard_to - first_new) / self.rate
        self.figures.computed_s += time.perf_counter() - began
        self.figures.latencies_s.append(latency)
        lines = [Line(True, event, latency) for event in ended]
        return lines + [Line(False, event, latency) for event in begun]

    def finish(self) -> list[Line]:
        """End the sound, and with it all events."""
        return [Line(True, event, 0.0) for event in self._events.close()]

    def cut(self, start: float, end: float) -> np.ndarray:
        """The sound from `start` to `end`, in seconds, as far as it is kept: (samples,)."""
        return self.ring.read(max(0, round(start * self.rate)), round(end * self.rate))

    def _parts(
        self, span: tuple[float, float], samples: int, scores: np.ndarray
    ) -> list[tuple[tuple[float, float], np.ndarray]]:
        """The window, or a frame model's new columns."""
        if not self.classifier.is_frame_model:
            return [(span, scores)]
        config = self.classifier.pipeline.model.config
        of_sound = self.classifier.columns_of_sound(scores, samples)
        spans = column_spans(len(of_sound), config.time_stride, config.patch_shape[1])
        spans += span[0]
        new: list[tuple[tuple[float, float], np.ndarray]] = []
        for (start, end), of_column in zip(spans.tolist(), of_sound, strict=True):
            if end > self._columns_to + _SAME_S:
                # No gap from rounding, which would end an event.
                is_next = start < self._columns_to + _SAME_S
                new.append(((self._columns_to if is_next else start, end), of_column))
                self._columns_to = end
        return new
