"""Runs the ONNX files of `export_ast.py` in the pipeline, with ONNX Runtime instead of PyTorch.

classifier = OnnxClassifier("model_int8.onnx")
classifier("recording.mp3", return_timestamps=True)
"""

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature
from transformers.modeling_outputs import SequenceClassifierOutput

from feature_extraction import ASTFeatureExtractor

from .configuration_ast import ASTConfig
from .detection_ast import ASTFrameConfig
from .onnx_file_ast import OnnxFile
from .pipeline_ast import ASTAudioClassificationPipeline


class OnnxModel:
    """Takes a model's place in a pipeline: features in, logits out.

    Args:
        path: a file that `export_onnx` wrote, waveform-in or spectrogram-in, any precision.

    Raises:
        ValueError: if the file is anything else, or the package onnxruntime is missing.
    """

    dtype = torch.float32
    device = torch.device("cpu")  # of inputs and outputs
    input_modalities = "audio"

    def __init__(self, path: str | os.PathLike):
        self.file = OnnxFile(path, torch.get_num_threads())
        self.input_name = self.file.input_name
        try:
            extractor_class = _Waveforms if self.input_name == "waveform" else ASTFeatureExtractor
            config = self.file.config
            is_frame_model = config.get("model_type") == ASTFrameConfig.model_type
            self.config = (ASTFrameConfig if is_frame_model else ASTConfig).from_dict(config)
            self.feature_extractor = extractor_class(**self.file.preprocessor_config)
        # Configs fail in many ways on invalid values.
        except Exception as error:
            raise ValueError(f"{self.file.damaged}: {error}") from error

    def __call__(
        self, input_values: Tensor, attention_mask: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """(B, samples) or (B, T, F), mask (B, samples) or (B, T) -> logits (B, labels).

        For a frame model (B, columns, labels); columns that a clip does not have are 0.

        The graphs take no mask: clips of equal length go in together, without their padding.
        """
        inputs = input_values.numpy()
        lengths = np.full(len(inputs), inputs.shape[1])
        if attention_mask is not None:
            shortest = 1 if self.input_name == "waveform" else self.config.patch_shape[1]
            inputs = inputs * attention_mask.numpy().reshape(
                *attention_mask.shape, *[1] * (inputs.ndim - 2)
            )
            lengths = np.maximum(attention_mask.sum(dim=1).numpy(), shortest)
        logits: dict[int, Tensor] = {}  # by row
        for length in np.unique(lengths):
            rows = lengths == length
            clips = np.ascontiguousarray(inputs[rows, :length], np.float32)
            found = torch.from_numpy(self.file.run(clips))
            logits.update(zip(np.flatnonzero(rows), found, strict=True))
        in_order = [logits[row] for row in range(len(inputs))]
        return SequenceClassifierOutput(logits=pad_sequence(in_order, batch_first=True))


class OnnxClassifier(ASTAudioClassificationPipeline):
    """The pipeline on an ONNX file: the same sounds in, the same answers out.

    With a waveform-in file, a last, partial window is not padded if `chunk_length_s` is longer than
    the model's.

    Args:
        path: a file that `export_onnx` wrote.
        **kwargs: as for any pipeline: top_k, batch_size …

    Raises:
        ValueError: as for `OnnxModel`.
    """

    def __init__(self, path: str | os.PathLike, **kwargs: Any):
        model = OnnxModel(path)
        super().__init__(
            model=model,
            feature_extractor=model.feature_extractor,
            task="audio-classification",
            device=-1,
            **kwargs,
        )


class _Waveforms(ASTFeatureExtractor):
    """Passes waveforms through: the filterbank is in the graph."""

    def __call__(self, raw_speech: np.ndarray, **_: Any) -> BatchFeature:  # type: ignore[override]
        waveform = torch.from_numpy(np.asarray(raw_speech, np.float32))[None]  # (1, samples)
        mask = torch.ones_like(waveform, dtype=torch.long)
        return BatchFeature({"input_values": waveform, "attention_mask": mask})
