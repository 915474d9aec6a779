"""The metrics as `evaluate.Metric`s, to accumulate batch by batch or combine with others.

    evaluate_metric("roc_auc").compute(predictions=scores, references=targets)

Unlike those of `evaluate.load`, they need no download.
"""

import math
from typing import Any

import datasets
import evaluate

from ..common.options import did_you_mean
from .metrics import METRICS, Measurement, ScoredClips


class _ClassificationMetric(evaluate.Metric):
    def measure(self, clips: ScoredClips) -> dict[str, Any]:
        raise NotImplementedError

    def _info(self) -> evaluate.MetricInfo:
        scores = datasets.Sequence(datasets.Value("float32"))
        one_label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions: (N, labels) scores; references: (N,) class indices, "
            "or (N, labels) of 0 and 1",
            features=[
                datasets.Features({"predictions": scores, "references": references})
                for references in (one_label, datasets.Sequence(one_label))
            ],
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
        return self.measure(ScoredClips(predictions, references))


def evaluate_metric(name: str) -> evaluate.Metric:
    """A metric of `METRICS`: its value under its name, and, for a mean over classes,
    "classes_without_positives": the indices of the classes it excludes.

    Raises:
        ValueError: for a name that is not in the table, or for the loss.
    """
    known = {key: metric for key, metric in METRICS.items() if metric.function is not None}
    if name not in known:
        raise ValueError(f"Unknown metric {name!r}{did_you_mean(name, known)}")
    metric = known[name]

    def measure(self: Any, clips: ScoredClips) -> dict[str, Any]:
        measured: dict[str, Any] = {name: metric.function(Measurement(clips))}  # type: ignore[misc]
        if metric.over_classes:
            measured["classes_without_positives"] = clips.classes_without_positives
        return measured

    members = {"measure": measure, "__doc__": metric.title, "__module__": __name__}
    return type(name, (_ClassificationMetric,), members)()


class AveragePrecision(_ClassificationMetric):
    """Average precision of each class: {"average_precision": [0..1, or None without positives]}."""

    def measure(self, clips: ScoredClips) -> dict[str, Any]:
        values = clips.rankings()[0].tolist()
        return {"average_precision": [None if math.isnan(value) else value for value in values]}
