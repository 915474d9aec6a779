"""A checkpoint, or any ONNX file, in the pipeline, ready to listen; see `Classifier`."""

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import pipeline
from transformers.pipelines.base import pad_collate_fn

from modeling_ast import ASTAudioClassificationPipeline  # registers what `pipeline` loads
from modeling_ast.onnx_ast import OnnxClassifier
from modeling_ast.weights_ast import check_json_files

from ..common.checkpoints import resolve_checkpoint


def load_classifier(model: str, **kwargs: Any) -> Any:
    """`pipeline("audio-classification")` of a checkpoint: a folder, a bundled or a Hub name.

    Raises:
        ValueError: if there is no such folder, or the Hub cannot be reached.
        OSError: if there is no such model on the Hub.
    """
    model = resolve_checkpoint(model)
    check_json_files(Path(model))  # if it is a folder; `transformers` does not expect mistakes
    config = Path(model) / "config.json"
    architectures = json.loads(config.read_bytes()).get("architectures") if config.is_file() else ()
    if architectures == ["ASTModel"]:
        raise ValueError(
            f"{model} has no classification head: fine-tune it first (ast-finetune --model)."
        )
    # transformers first builds its own extractor, with a warning; the pipeline then uses ours.
    warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
    return pipeline("audio-classification", model=model, **kwargs)


class TorchEngine:
    """See `Classifier`, which asks it.

    Args:
        model: checkpoint folder, ONNX file, Hub name or bundled name.
        device: default: a GPU where there is one.

    Raises:
        ValueError: for a checkpoint that cannot be loaded, or is no AST.
    """

    def __init__(self, model: str, device: str | None = None):
        self.pipeline: ASTAudioClassificationPipeline = (
            OnnxClassifier(model)
            if model.endswith(".onnx")
            else load_classifier(model, device=device)
        )
        config = self.pipeline.model.config
        if not self.pipeline.is_ast:
            raise ValueError(
                f"{model} is a {config.model_type} checkpoint; expected an Audio Spectrogram "
                "Transformer."
            )
        self.label_names: list[str] = [config.id2label[i] for i in range(config.num_labels)]
        self.problem_type: str | None = config.problem_type
        self.window_pooling: str | None = getattr(config, "window_pooling", None)
        self.sampling_rate: int = self.pipeline.feature_extractor.sampling_rate

    @property
    def is_frame_model(self) -> bool:
        """Whether it answers for every patch column, not for windows."""
        answer: bool = self.pipeline.is_frame_model
        return answer

    def window_samples(
        self, chunk_length_s: float | None, hop_length_s: float | None
    ) -> tuple[int, int]:
        """Length of a window and from one's start to the next one's, in samples."""
        length, hop = self.pipeline.window_samples(chunk_length_s, hop_length_s)
        return length, hop

    def windows(
        self, source: Any, chunk_length_s: float | None, hop_length_s: float | None, first: int
    ) -> Iterator[tuple[int, int, bool, dict[str, torch.Tensor]]]:
        """Start, length in samples, whether it is the last one, and the features (1, T, F)."""
        for window in self.pipeline.preprocess(
            source,
            chunk_length_s=chunk_length_s,
            hop_length_s=hop_length_s,
            first_window=first,
        ):
            yield window.pop("start"), window.pop("samples"), window.pop("is_last"), window

    @torch.inference_mode()
    def score(
        self, windows: Sequence[dict[str, torch.Tensor]], function_to_apply: str | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Features -> scores and logits (windows, labels), embeddings (windows, D).

        For a frame model: (windows, columns, labels) and no embeddings, (windows, 0).
        """
        model = self.pipeline.model
        features = pad_collate_fn(None, self.pipeline.feature_extractor)(list(windows))
        features = {name: values.to(model.device) for name, values in features.items()}
        if isinstance(self.pipeline, OnnxClassifier) or self.is_frame_model:
            logits, pooled = model(**features).logits, torch.empty(len(windows), 0)
        else:
            pooled = model.base_model(**features).pooler_output
            logits = model.classifier(pooled)
        logits = logits.float()
        scores = self.pipeline.scores(logits, function_to_apply)
        return scores.cpu().numpy(), logits.cpu().numpy(), pooled.float().cpu().numpy()
