"""What a model hears in a sound, and the labels and events that follow from it.

spans       (windows, 2)        seconds
scores      (windows, labels)   float32
embeddings  (windows, D)        float32; D is 0 if not requested

For a frame model the windows are its columns: a tenth of a second each, without overlap.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from modeling_ast.events_ast import Event, EventRules, events_from_scores
from modeling_ast.scores_ast import LabelScore, pool_windows, top_labels
from modeling_ast.windows_ast import KeptRows, Row, stack_rows


class Span(NamedTuple):
    """A part of a sound, in seconds, and its labels, best first."""

    start: float
    end: float
    labels: list[LabelScore]


@dataclass
class Heard:
    """A sound's windows so far."""

    label_names: Sequence[str]
    spans: list[tuple[float, float]] = field(default_factory=list)
    _scores: list[Row] = field(default_factory=list)
    _embeddings: list[Row] = field(default_factory=list)
    pooling: str | None = None  # over the windows, see `pool_windows`
    _kept_scores: KeptRows = field(default_factory=KeptRows)
    _kept_embeddings: KeptRows = field(default_factory=KeptRows)

    def add(self, span: tuple[float, float], scores: np.ndarray, embedding: np.ndarray) -> float:
        """Add a window. Returns how many seconds of it are new, not part of an earlier one."""
        heard = self.duration
        self.spans.append(span)
        self._scores += self._kept_scores.keep(scores[None])
        self._embeddings += self._kept_embeddings.keep(embedding[None])
        return span[1] - heard

    @property
    def duration(self) -> float:
        """Seconds up to the end of the last window."""
        return self.spans[-1][1] if self.spans else 0.0

    @property
    def scores(self) -> np.ndarray:
        """(windows, labels)."""
        return stack_rows(self._scores)

    @property
    def embeddings(self) -> np.ndarray:
        """(windows, D)."""
        return stack_rows(self._embeddings)

    def clip_scores(self) -> np.ndarray:
        """(labels,): of the whole sound, pooled over its windows."""
        lengths = np.array([end - start for start, end in self.spans])
        pooled: np.ndarray = pool_windows(self.scores, lengths, self.pooling)
        return pooled

    def labels(self, top_k: int | None = None) -> list[LabelScore]:
        """The whole sound's labels, best first."""
        return top_labels(self.clip_scores(), self.label_names, top_k)

    def highest(self, top_k: int | None = None) -> list[LabelScore]:
        """The labels that score highest in any window, best first."""
        return top_labels(self.scores.max(axis=0), self.label_names, top_k)

    def windows(self, top_k: int | None = None) -> list[Span]:
        """Each window with its labels."""
        return [
            Span(start, end, top_labels(scores, self.label_names, top_k))
            for (start, end), scores in zip(self.spans, self.scores, strict=True)
        ]

    def scores_of(self, labels: Sequence[str]) -> np.ndarray:
        """(windows, labels): the scores of some labels, in their order."""
        return self.scores[:, [list(self.label_names).index(label) for label in labels]]

    def best_window(self, label: str) -> tuple[float, float]:
        """The window in which a label scores highest."""
        return self.spans[int(self.scores_of([label]).argmax())]

    def events(self, rules: EventRules) -> list[Event]:
        """What was heard, from when to when."""
        return events_from_scores(self.spans, self.scores, self.label_names, rules)

    @classmethod
    def of_arrays(
        cls,
        label_names: Sequence[str],
        spans: Iterable[Sequence[float]],
        scores: np.ndarray,
        embeddings: np.ndarray,
    ) -> "Heard":
        """Restored from `spans`, `scores` and `embeddings`."""
        starts = [(float(start), float(end)) for start, end in spans]
        keep = KeptRows().keep
        return cls(label_names, starts, keep(scores), keep(embeddings))

    @classmethod
    def of_answer(cls, answer: Any) -> "Heard":
        """From the pipeline's answer with `return_timestamps=True`; labels missing from a window
        have no score there.

        Raises:
            ValueError: if the answer has no windows, or they name no label.
        """
        windows = answer.get("windows") if isinstance(answer, Mapping) else None
        if not windows:
            raise ValueError(
                "The answer has no windows: call the pipeline with return_timestamps=True."
            )
        names = list(dict.fromkeys(e["label"] for w in windows for e in w["labels"]))
        if not names:
            raise ValueError("The answer's windows name no label: use a lower threshold.")
        lowest = min(0.0, *(e["score"] for w in windows for e in w["labels"]), math.inf)
        scores = np.full((len(windows), len(names)), lowest, np.float32)
        for row, window in zip(scores, windows, strict=True):
            for entry in window["labels"]:
                row[names.index(entry["label"])] = entry["score"]
        spans = [(window["start"], window["end"]) for window in windows]
        return cls.of_arrays(names, spans, scores, np.empty((len(windows), 0), np.float32))
