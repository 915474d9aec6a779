"""A checkpoint, ready to classify: by name, from a folder or the Hub, or as an ONNX file."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import pipeline
from transformers.pipelines.base import pad_collate_fn

from modeling_ast.onnx_ast import OnnxClassifier

from ..common.checkpoints import DEFAULT_MODEL, resolve_checkpoint

__all__ = ["DEFAULT_MODEL", "Classifier", "load_classifier"]


def load_classifier(model: str, **kwargs: Any) -> Any:
    """`pipeline("audio-classification")` of a checkpoint: a folder, a bundled or a Hub name.

    Raises:
        ValueError: when there is no such folder, or the Hub cannot be reached.
        OSError: when there is no such model on the Hub.
    """
    # transformers builds its own extractor first, and warns of it; the pipeline takes ours.
    warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
    return pipeline("audio-classification", model=resolve_checkpoint(model), **kwargs)


class Classifier:
    """A checkpoint: sounds to windows, batches of windows to scores and embeddings.

    Raises:
        ValueError: for a checkpoint that cannot be loaded, or is no AST.
    """

    def __init__(self, model: str, device: torch.device | None = None):
        self.pipeline: Any = (
            OnnxClassifier(model)
            if model.endswith(".onnx")
            else load_classifier(model, device=device)
        )
        config = self.pipeline.model.config
        if not self.pipeline.is_ast:
            raise ValueError(
                f"{model} is a {config.model_type} checkpoint, expected an Audio Spectrogram "
                "Transformer."
            )
        self.label_names: list[str] = [config.id2label[i] for i in range(config.num_labels)]
        self.sampling_rate: int = self.pipeline.feature_extractor.sampling_rate

    def windows(
        self, source: Any, chunk_length_s: float | None, hop_length_s: float | None
    ) -> Iterator[tuple[float, float, bool, dict[str, Any]]]:
        """A sound's windows: start and end in seconds, whether it is the last, its features."""
        options = {"chunk_length_s": chunk_length_s, "hop_length_s": hop_length_s}
        for window in self.pipeline.preprocess(source, **options):
            start = window.pop("start") / self.sampling_rate
            end = start + window.pop("samples") / self.sampling_rate
            yield start, end, window.pop("is_last"), window

    @torch.inference_mode()
    def __call__(self, windows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """Features of some windows -> scores (windows, labels), embeddings (windows, D).

        An ONNX file gives no embeddings: (windows, 0).
        """
        model = self.pipeline.model
        batch = pad_collate_fn(None, self.pipeline.feature_extractor)(windows)
        batch = {name: values.to(model.device) for name, values in batch.items()}
        if isinstance(self.pipeline, OnnxClassifier):
            scores = self.pipeline.scores(model(**batch).logits)
            return scores.numpy(), np.empty((len(scores), 0), np.float32)
        pooled = model.audio_spectrogram_transformer(**batch).pooler_output
        scores = self.pipeline.scores(model.classifier(pooled).float())
        return scores.cpu().numpy(), pooled.float().cpu().numpy()
