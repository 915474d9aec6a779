"""The loop without its page: find, mark, teach, repeat.

One person, one index, one file of marks. Marks are on disk before `mark` returns; everything else
can be rebuilt from them.
"""

import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..inference.classifier import Classifier
from ..inference.clips import read_stretch
from .calibration import Wish
from .heads import layer_normed
from .index import SoundIndex
from .marks import BACKGROUND, Mark, MarkBook, label_names, match_files, window_targets
from .queues import pick
from .teach import Lesson, next_windows, teach, write_checkpoint

_QUEUE = 20  # windows at a time
_COUNT_KEPT = 200  # recordings whose location is cached


@dataclass(frozen=True)
class Stretch:
    """A window to listen to: where it is, and what the model makes of it."""

    window: int
    file: str
    start: float
    end: float
    score: float
    suggestion: str | None = None


@dataclass(frozen=True)
class Progress:
    """The result of a lesson, compared with the one before."""

    lesson: Lesson
    report: dict[str, Any]
    checkpoint: Path
    marks_since: int | None  # None: this is the first
    changed: int | None  # windows of the index whose best label has changed
    figure_before: float | None


class Workbench:
    """An index, the marks of its windows, and what was last learned from them.

    Args:
        folder: of the index.
        marks: CSV to write to; created if missing.
        model: checkpoint; default: the one that made the index.

    Raises:
        ValueError: for another model's index, or marks that do not belong to it.
    """

    def __init__(self, folder: Path, marks: Path, model: str | None = None):
        self.index = SoundIndex.open(folder)
        self.classifier = Classifier(
            model or self.index.about["model"],
            chunk_length_s=self.index.settings["chunk_length_s"],
            hop_length_s=self.index.settings["hop_length_s"],
        )
        self.index.check(self.classifier)
        self.book = MarkBook(marks)
        self._targets()  # raises now if marks name recordings that are not in the index
        self.progress: Progress | None = None
        self._marks_at_lesson = 0
        self._passed: set[int] = set()  # windows that were skipped
        self._queue: list[int] = []
        self._queue_kind: tuple[str, str | None] | None = None
        self._sources: dict[str, Any] = {}
        self._lock = threading.RLock()  # the page's handlers run in threads

    @property
    def labels(self) -> list[str]:
        """Names marked so far."""
        return label_names(self.book.marks)

    def _targets(self) -> np.ndarray:
        index = self.index
        # One extra column, so that windows with only background also count as marked.
        labels = [*self.labels, ""]
        return window_targets(
            self.book.marks, index.sounds, index.sound_of_window, index.spans, labels
        )

    @property
    def marked(self) -> np.ndarray:
        """(windows,) bool."""
        marked: np.ndarray = ~np.isnan(self._targets()).all(axis=1)
        return marked

    def find(self, examples: np.ndarray, count: int) -> list[Stretch]:
        """The windows most similar to any of the given embeddings, (examples, D)."""
        values = self.index.similarity(examples)
        windows = pick(values, self.index.sound_of_window, self.index.spans, count)
        return [self._stretch(window, float(values[window])) for window in windows]

    def next(self, kind: str, label: str | None = None) -> Stretch | None:
        """The first window of a queue that is neither marked nor skipped; None if there is none.

        Until something has been taught, only "novel" and "random" work; the others fall back to
        "novel".
        """
        with self._lock:
            if self.progress is None and kind not in ("novel", "random"):
                kind, label = "novel", None
            if (kind, label) != self._queue_kind:
                self._queue, self._queue_kind = [], (kind, label)
            marked = self.marked
            self._queue = [w for w in self._queue if not marked[w] and w not in self._passed]
            if not self._queue:
                self._queue = self._choose(kind, label)
            if not self._queue:
                return None
            window = self._queue[0]
            if self.progress is None:
                return self._stretch(window)
            lesson = self.progress.lesson
            scores = lesson.head.scores(self.index.normed(np.array([window])))[0]
            best = int(scores.argmax())
            suggestion = lesson.labels[best]
            if not lesson.head.exclusive and scores[best] < 0.5:
                suggestion = BACKGROUND
            return self._stretch(window, float(scores[best]), suggestion)

    def _choose(self, kind: str, label: str | None) -> list[int]:
        targets = self._targets()
        if self._passed:
            targets[list(self._passed)] = 0  # count as marked for the choice
        head, column = None, None
        if self.progress is not None:
            lesson = self.progress.lesson
            head = lesson.head
            if kind == "disputed":
                targets = window_targets(
                    self.book.marks, self.index.sounds, self.index.sound_of_window,
                    self.index.spans, lesson.labels,
                )  # fmt: skip
            if kind == "likely":
                if label not in lesson.labels:
                    raise ValueError("Choose a label to hear its highest scores.")
                column = lesson.labels.index(label)
        found = next_windows(
            self.index, kind, _QUEUE + len(self._passed), targets, head, column,
            seed=len(self.book.marks),
        )  # fmt: skip
        return [window for window in found if window not in self._passed]

    def mark(self, stretch: Stretch, label: str) -> None:
        """Write down what can be heard in a window: a name, several joined by `;`, `background` …

        Raises:
            ValueError: for an empty name.
        """
        label = " ".join(label.split())
        if not label:
            raise ValueError("Say what it is: type or choose a label.")
        with self._lock:
            self.book.add(Mark(stretch.file, stretch.start, stretch.end, label))

    def skip(self, stretch: Stretch) -> None:
        """Do not ask about it again until the page is restarted."""
        self._passed.add(stretch.window)

    def undo(self) -> tuple[Mark, Stretch | None] | None:
        """Undo the last mark; returns it, and its window, to be shown again.

        No window: the mark was made elsewhere, of another stretch or a whole file. None: there is
        no mark.

        Raises:
            ValueError: as `MarkBook.undo`.
        """
        with self._lock:
            mark = self.book.undo()
            if mark is None:
                return None
            index = self.index
            sound = match_files([mark], index.sounds)[mark.file]
            number = index.sounds.index(sound)
            for window in np.flatnonzero(index.sound_of_window == number).tolist():
                span = index.spans[window]
                if mark.start is not None and abs(span[0] - mark.start) < 0.01:
                    self._queue.insert(0, window)
                    return mark, self._stretch(window)
            return mark, None

    def teach(self, wish: Wish, folder: Path) -> Progress:
        """Fit a head on all marks and write the checkpoint into a folder.

        Raises:
            ValueError: if there are too few marks to teach anything.
        """
        with self._lock:
            marks = list(self.book.marks)
        before = self.progress
        lesson = teach(self.index, marks, wish)
        report = lesson.report(self.index)
        write_checkpoint(lesson, self.classifier, folder, report)
        changed = None
        if before is not None:
            changed = int((self._best(before.lesson) != self._best(lesson)).sum())
        with self._lock:
            since = None if before is None else len(marks) - self._marks_at_lesson
            self.progress = Progress(
                lesson, report, folder, since, changed,
                None if before is None else _figure(before.report),
            )  # fmt: skip
            self._marks_at_lesson = len(marks)
            self._queue = []
        return self.progress

    def hear(self, source: Any) -> dict[str, float]:
        """The last lesson's opinion of a sound: label -> its highest score at any time.

        Raises:
            AudioDecodingError: for a sound that cannot be read.
        """
        assert self.progress is not None
        lesson = self.progress.lesson
        vectors = self.classifier.hear(source).embeddings
        normed = layer_normed(vectors, self.index.about["head_epsilon"])
        highest = lesson.head.scores(normed).max(axis=0)
        return dict(zip(lesson.labels, highest.tolist(), strict=True))

    def _best(self, lesson: Lesson) -> np.ndarray:
        logits = self.index.logits(lesson.head.weight, lesson.head.bias)
        return np.array(lesson.labels)[logits.argmax(axis=1)]

    def _stretch(
        self, window: int, score: float = float("nan"), suggestion: str | None = None
    ) -> Stretch:
        start, end = self.index.spans[window]
        file = self.index.sounds[self.index.sound_of_window[window]]
        return Stretch(window, file, float(start), float(end), score, suggestion)

    def read(self, stretch: Stretch, around: float) -> tuple[np.ndarray, int]:
        """A stretch's sound with a little around it, mono, and its rate.

        Raises:
            ValueError: for a recording that no longer exists.
        """
        if stretch.file not in self._sources:
            if len(self._sources) >= _COUNT_KEPT:
                self._sources.clear()
            self._sources.update(self.index.locate([stretch.file]))
        source = self._sources[stretch.file]
        samples, rate = read_stretch(source, stretch.start, stretch.end, around)
        return (samples if samples.ndim == 1 else samples.mean(axis=1)), rate


def _figure(report: dict[str, Any]) -> float:
    """The one number that summarises a lesson."""
    return report.get("accuracy", report["mean_average_precision"])


def pack(checkpoint: Path, folder: Path) -> Path:
    """A checkpoint as one ZIP file to download."""
    target = Path(tempfile.mkdtemp(dir=folder), "taught")
    return Path(shutil.make_archive(str(target), "zip", checkpoint))
