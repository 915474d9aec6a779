"""Audio classification pipeline for AST: any sound of any length in, labels (and when) out.

sound                       path, bytes, array, dict … at any rate
waveform    (samples,)      mono, at the extractor's rate
windows                     `chunk_length_s` long, one every `hop_length_s`, the last one partial
logits      (1, labels)     per window, batched across windows and files
scores      (labels,)       mean over windows, weighted by the sound in each
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from transformers import AudioClassificationPipeline
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.pipelines.base import ChunkPipeline

_MODEL_TYPE = "audio-spectrogram-transformer"
_FRAMES_PER_SECOND = 100


class ASTAudioClassificationPipeline(AudioClassificationPipeline, ChunkPipeline):
    """`pipeline("audio-classification")` for AST checkpoints.

    Takes whatever `load_audio` reads: no ffmpeg, any sampling rate, any number of channels. Sound
    longer than the model's length is cut into overlapping windows; nothing is dropped. Checkpoints
    of other models are handled by the stock pipeline's code.

    Call arguments besides the stock ones (`top_k`, `function_to_apply`, `batch_size`):
        chunk_length_s: length of a window; default: the model's length.
        hop_length_s: from one window's start to the next; default: half a window.
        return_timestamps: also return the scores of every window:
            {"labels": […], "windows": [{"start": s, "end": s, "labels": […]}, …]}.

    Raises:
        ValueError: for unknown or impossible arguments.
        AudioDecodingError: for a sound that cannot be read.
    """

    # Ours, set by `modeling_ast`: without remote code, transformers loads its own extractor.
    feature_extractor_class: ClassVar[type | None] = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        ours = self.feature_extractor_class
        if self._is_ast and ours is not None and not isinstance(self.feature_extractor, ours):
            self.feature_extractor = ours(**self.feature_extractor.to_dict())

    @property
    def _is_ast(self) -> bool:
        return self.model.config.model_type == _MODEL_TYPE

    def _sanitize_parameters(
        self,
        chunk_length_s: float | None = None,
        hop_length_s: float | None = None,
        return_timestamps: bool | None = None,
        **kwargs,
    ):
        if not self._is_ast:
            return super()._sanitize_parameters(**kwargs)
        stock = {key: kwargs.pop(key) for key in ("top_k", "function_to_apply") if key in kwargs}
        if kwargs:
            raise ValueError(
                f"Unknown argument {', '.join(map(repr, kwargs))}; this pipeline takes top_k, "
                "function_to_apply, batch_size, chunk_length_s, hop_length_s, return_timestamps."
            )
        _, _, postprocess_params = super()._sanitize_parameters(**stock)
        if "top_k" not in stock and hasattr(self, "_postprocess_params"):
            del postprocess_params["top_k"]  # at a call: keep what the pipeline was made with
        preprocess_params = {}
        for name, seconds in (("chunk_length_s", chunk_length_s), ("hop_length_s", hop_length_s)):
            if seconds is not None:
                if seconds <= 0:
                    raise ValueError(f"{name} must be a positive number of seconds, got {seconds}.")
                preprocess_params[name] = seconds
        if return_timestamps is not None:
            postprocess_params["return_timestamps"] = return_timestamps
        return preprocess_params, {}, postprocess_params

    def preprocess(
        self, inputs: Any, chunk_length_s: float | None = None, hop_length_s: float | None = None
    ) -> Iterator[dict[str, Any]]:
        if not self._is_ast:
            yield {**super().preprocess(inputs), "is_last": True}
            return
        extractor = self.feature_extractor
        waveform = extractor.load_audio(inputs)
        rate = extractor.sampling_rate
        max_length = self.model.config.max_length
        if chunk_length_s is None:
            # The last frame of 25 ms reaches 15 ms beyond max_length steps of 10 ms.
            chunk = int((max_length / _FRAMES_PER_SECOND + 0.015) * rate)
        else:
            chunk = round(chunk_length_s * rate)
        hop = chunk // 2 if hop_length_s is None else round(hop_length_s * rate)
        if hop > chunk:
            raise ValueError(
                f"hop_length_s ({hop / rate:g}) is longer than chunk_length_s ({chunk / rate:g}): "
                "the sound between the windows would not be heard."
            )
        start = 0
        while True:
            # Less than a frame's step (10 ms) beyond a window holds no further frame.
            is_last = len(waveform) - (start + chunk) < rate // _FRAMES_PER_SECOND
            window = waveform[start:] if is_last else waveform[start : start + chunk]
            # A checkpoint trained with masks gets its windows unpadded; one trained on padded
            # spectrograms, as all published ones were, gets them padded.
            masked = extractor.return_attention_mask
            features = extractor(
                window,
                sampling_rate=rate,
                padding=False if masked else "max_length",
                max_length=max(max_length, round(chunk / rate * _FRAMES_PER_SECOND)),
                return_tensors="pt",
            )
            if self.dtype is not None:
                features["input_values"] = features["input_values"].to(self.dtype)
            yield {**features, "is_last": is_last, "start": start, "samples": len(window)}
            if is_last:
                return
            start += hop

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        bookkeeping: dict[str, Any] = {
            key: model_inputs.pop(key)
            for key in ("is_last", "start", "samples")
            if key in model_inputs
        }
        return {"logits": self.model(**model_inputs).logits, **bookkeeping}

    def postprocess(
        self,
        model_outputs: list[dict[str, Any]],
        top_k: int = 5,
        function_to_apply: str | None = None,
        return_timestamps: bool = False,
    ) -> list[dict[str, Any]] | dict[str, Any]:
        if not self._is_ast:
            stock_output = SequenceClassifierOutput(logits=model_outputs[0]["logits"])
            return super().postprocess(stock_output, top_k, function_to_apply)
        scores = self._scores(
            torch.cat([window["logits"].float() for window in model_outputs]), function_to_apply
        )  # (windows, labels)
        samples = torch.tensor([float(window["samples"]) for window in model_outputs])
        labels = self._top_labels(samples @ scores / samples.sum(), top_k)
        if not return_timestamps:
            return labels
        rate = self.feature_extractor.sampling_rate
        windows = [
            {
                "start": window["start"] / rate,
                "end": (window["start"] + window["samples"]) / rate,
                "labels": self._top_labels(window_scores, top_k),
            }
            for window, window_scores in zip(model_outputs, scores, strict=True)
        ]
        return {"labels": labels, "windows": windows}

    def _scores(self, logits: torch.Tensor, function_to_apply: str | None) -> torch.Tensor:
        if function_to_apply is None:
            function_to_apply = {
                "regression": "none",
                "multi_label_classification": "sigmoid",
            }.get(self.model.config.problem_type, "softmax")
        if function_to_apply == "none":
            return logits
        return logits.softmax(-1) if function_to_apply == "softmax" else logits.sigmoid()

    def _top_labels(self, scores: torch.Tensor, top_k: int) -> list[dict[str, Any]]:
        best = scores.topk(top_k)
        id2label = self.model.config.id2label
        return [
            {"score": score, "label": id2label[index]}
            for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
