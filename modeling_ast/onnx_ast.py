"""Runs the ONNX files of `export_ast.py` in the pipeline, with ONNX Runtime instead of PyTorch.

classifier = OnnxClassifier("model_int8.onnx")
classifier("recording.mp3", return_timestamps=True)
"""

import json
import os
from pathlib import Path
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
from .export_ast import import_optional
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
        onnxruntime = import_optional("onnxruntime")
        self.path = path
        if not Path(path).is_file():
            raise ValueError(f"No such file: {path}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors only: it warns about half precision, then casts it
        try:
            self.session = onnxruntime.InferenceSession(
                path, options, providers=onnxruntime.get_available_providers()
            )
        # Its errors have no common class.
        except Exception as error:
            raise ValueError(f"ONNX Runtime cannot read {path}: {error}") from error
        try:
            metadata = self.session.get_modelmeta().custom_metadata_map
            missing = {"config", "preprocessor_config"} - set(metadata)
            if missing:
                raise ValueError(f"it has no {' and no '.join(sorted(missing))} in its metadata")
            if "logits" not in [output.name for output in self.session.get_outputs()]:
                raise ValueError("it has no output named logits")
            self.input_name = self.session.get_inputs()[0].name
            extractor_class = _Waveforms if self.input_name == "waveform" else ASTFeatureExtractor
            config = json.loads(metadata["config"])
            is_frame_model = config.get("model_type") == ASTFrameConfig.model_type
            self.config = (ASTFrameConfig if is_frame_model else ASTConfig).from_dict(config)
            self.feature_extractor = extractor_class(**json.loads(metadata["preprocessor_config"]))
        # Configs fail in many ways on invalid values.
        except Exception as error:
            raise ValueError(f"{self._damaged()}: {error}") from error

    def _damaged(self) -> str:
        return f"{self.path} is damaged, or was not written by ast-export-onnx"

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
            try:
                (found,) = self.session.run(["logits"], {self.input_name: clips})
            except Exception as error:
                raise ValueError(f"{self._damaged()}: {' '.join(str(error).split())}") from error
            logits.update(zip(np.flatnonzero(rows), torch.from_numpy(found), strict=True))
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

    def check_model_type(self, supported_models: Any) -> None:
        """The stock pipeline wants one of `transformers`' model classes."""


class _Waveforms(ASTFeatureExtractor):
    """Passes waveforms through: the filterbank is in the graph."""

    def __call__(self, raw_speech: np.ndarray, **_: Any) -> BatchFeature:  # type: ignore[override]
        waveform = torch.from_numpy(np.asarray(raw_speech, np.float32))[None]  # (1, samples)
        mask = torch.ones_like(waveform, dtype=torch.long)
        return BatchFeature({"input_values": waveform, "attention_mask": mask})
