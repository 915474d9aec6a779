"""Metrics as `evaluate.Metric` classes that need no download."""

import datasets
import evaluate
import numpy as np

# `evaluate.load("accuracy")` fetches a script from the Hub; instantiating a class does not.


class Accuracy(evaluate.Metric):
    """Share of clips whose highest score is on their label.

    compute(predictions=(N, labels) scores, references=(N,) class indices) -> {"accuracy": 0..1}
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions: (N, labels) scores; references: (N,) class indices",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        best = np.argmax(np.asarray(predictions), axis=1)
        return {"accuracy": float(np.mean(best == np.asarray(references)))}
