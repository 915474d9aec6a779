"""Audio classification pipeline for AST: any sound of any length in, labels (and when) out.

sound                       path, bytes, array, dict … at any rate
blocks      (samples,)      mono, at the extractor's rate, read one by one
windows                     `chunk_length_s` long, one every `hop_length_s`, the last one partial
logits      (1, labels)     per window, batched across windows and files
scores      (labels,)       pooled over windows: their mean, weighted by the sound in each, or the
                            checkpoint's `window_pooling`

For a frame model, `ASTForAudioFrameClassification`, the windows are its columns:

logits      (1, columns, labels)    per window
scores      (columns, labels)       of the whole sound, stitched where windows overlap, then pooled
"""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import (
    AudioClassificationPipeline,
    AutoModelForAudioClassification,
    Pipeline,
)
from transformers.pipelines.base import ChunkPipeline
from transformers.pipelines.pt_utils import KeyDataset

from .frames_ast import column_spans, count_columns, stitch
from .pooling_ast import check_pooling
from .scores_ast import LabelScore, pool_windows, scores_from_logits, top_labels
from .windows_ast import KeptRows, cut_windows, window_and_hop

_MODEL_TYPE = "audio-spectrogram-transformer"
_FRAME_MODEL_TYPE = "ast-frame-classification"
_SHORTEST_S = 0.01  # shortest window: AST's hop


class ASTAudioClassificationPipeline(AudioClassificationPipeline, ChunkPipeline):
    """`pipeline("audio-classification")` for AST checkpoints.

    Takes whatever `load_audio` reads: no ffmpeg, any sampling rate, any number of channels; also
    lists and generators of these, `KeyDataset`s and columns of `datasets`, whose audio it decodes
    itself. Sound longer than the model's length is cut into overlapping windows; nothing is
    dropped. Files are read while they are classified, so memory does not grow with their length.
    Checkpoints of other models get the stock pipeline's behaviour.

    Call arguments in addition to the stock ones (`top_k`, `function_to_apply`, `batch_size`):
        chunk_length_s: length of a window; default: the model's length.
        hop_length_s: from one window's start to the next; default: half a window.
        return_timestamps: also return the scores of every window:
            {"labels": […], "windows": [{"start": s, "end": s, "labels": […]}, …]}.
        window_pooling: how to combine the windows' scores: "mean", "max" or "linear_softmax";
            default: as the checkpoint was trained, else mean.
        threshold: drop labels that score less: a number, or a dict of a number per label, which
            drops all other labels. At most `top_k` of the rest are returned.

    Batches are filled across files. A last, partial window is padded as in training: with a mask if
    `feature_extractor.return_attention_mask` is set, so that padding never counts, else as
    `transformers`' AST pads.

    Made with `speed="fast"` or "fastest", it runs the fastest way on this machine that loses at
    most 0.5 or 2 points (see `speed_ast.py`), and cuts windows that do not overlap where only their
    mean is asked for, with "fastest" always.

    Raises:
        ValueError: for unknown or invalid arguments.
        AudioDecodingError: for a sound that cannot be read.
    """

    model: Any
    feature_extractor: Any

    # Ours, set by `modeling_ast`: replaces transformers' own extractor, which reads no files.
    feature_extractor_class: ClassVar[type | None] = None

    # Swaps model and extractor for a faster pair, set by `modeling_ast`; not part of what travels.
    speed_up: ClassVar[Callable[[Any, Any, str], tuple[Any, Any]] | None] = None

    def __init__(self, *args: Any, speed: str = "exact", **kwargs: Any) -> None:
        self.speed = speed
        if speed != "exact":
            swap = type(self).speed_up
            if swap is None:
                raise ValueError(f"speed={speed!r} needs this project installed: pip install .")
            pair = swap(kwargs["model"], kwargs.get("feature_extractor"), speed)
            kwargs["model"], kwargs["feature_extractor"] = pair
            if not isinstance(pair[0], torch.nn.Module):
                kwargs["device"] = -1
        super().__init__(*args, **kwargs)
        is_native = type(self.model).__module__.startswith("transformers.")
        if self.is_ast and is_native and self.model.name_or_path:
            # `pipeline` fell back to transformers' class because ours refused the checkpoint. Load
            # it again to raise the reason.
            with contextlib.suppress(OSError):
                AutoModelForAudioClassification.from_pretrained(self.model.name_or_path)
        ours = self.feature_extractor_class
        stock: Any = getattr(self, "feature_extractor", None)
        if self.is_ast and ours is not None and not isinstance(stock, ours):
            self.feature_extractor = ours(**stock.to_dict())

    @property
    def is_ast(self) -> bool:
        """Whether the checkpoint is an AST; others get the stock pipeline's behaviour."""
        return self.model.config.model_type in (_MODEL_TYPE, _FRAME_MODEL_TYPE)

    @property
    def is_frame_model(self) -> bool:
        """Whether the checkpoint gives scores for every patch column."""
        return self.model.config.model_type == _FRAME_MODEL_TYPE

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Classify one sound (-> its answer), a list or column (-> a list), a generator or
        `KeyDataset` (-> an iterator)."""
        if not self.is_ast:
            return super().__call__(inputs, **kwargs)
        if self.speed != "exact":
            kwargs = self._with_hop(kwargs)
        if isinstance(inputs, (list, tuple)):
            return super().__call__(list(inputs), **kwargs) if inputs else []
        if isinstance(inputs, KeyDataset):
            inputs = KeyDataset(_undecoded(inputs.dataset, inputs.key), inputs.key)
        elif hasattr(inputs, "column_name") and hasattr(inputs, "source"):  # dataset["audio"]
            column = inputs.column_name
            rows = _undecoded(inputs.source, column)
            answers = super().__call__((row[column] for row in rows), **kwargs)
            return list(answers) if hasattr(inputs, "__len__") else answers
        return super().__call__(inputs, **kwargs)

    def _with_hop(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Windows that do not overlap, unless somebody says how far apart they are.

        A mean over the sound loses little by that; "fast" keeps the overlap where times are asked.
        """
        asked = {**self._preprocess_params, **self._postprocess_params, **kwargs}
        pooling = asked.get("window_pooling") or getattr(self.model.config, "window_pooling", None)
        is_averaged = pooling in (None, "mean") and not asked.get("return_timestamps")
        if "hop_length_s" in asked or self.is_frame_model:
            return kwargs
        if not is_averaged and self.speed != "fastest":
            return kwargs
        length, _ = self.window_samples(asked.get("chunk_length_s"))
        return {**kwargs, "hop_length_s": length / self.feature_extractor.sampling_rate}

    def check_model_type(self, supported_models: Any) -> None:
        """The stock pipeline wants one of `transformers`' model classes; ONNX files have none."""
        if isinstance(self.model, torch.nn.Module):
            super().check_model_type(supported_models)

    def get_iterator(self, *args: Any, **kwargs: Any) -> Any:
        # The stock pipeline is not a ChunkPipeline.
        iterator_of = ChunkPipeline if self.is_ast else Pipeline
        return iterator_of.get_iterator(self, *args, **kwargs)

    def forward(
        self, model_inputs: dict[str, Any], kept: KeptRows | None = None, **forward_params: Any
    ) -> Any:
        """As in `transformers`, but AST's logits become a `Row` per window."""
        outputs = super().forward(model_inputs, **forward_params)
        if self.is_ast:
            rows = (kept or KeptRows()).keep(outputs["logits"].float().numpy())
            outputs["logits"] = rows if isinstance(outputs["start"], list) else rows[0]
        return outputs

    def save_pretrained(
        self, save_directory: str | os.PathLike, with_code: bool = False, **kwargs: Any
    ) -> None:
        """As in `transformers`: save model and extractor, for any pipeline to load.

        Args:
            with_code: also write this pipeline's code and name it in the config. `pipeline` then
                loads the folder only with `trust_remote_code=True`.
        """
        if with_code:
            auto_class = {"pt": (AutoModelForAudioClassification,), "type": "audio"}
            self._registered_impl = {"audio-classification": {"impl": type(self), **auto_class}}
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.__dict__.pop("_registered_impl", None)

    def _sanitize_parameters(
        self,
        chunk_length_s: float | None = None,
        hop_length_s: float | None = None,
        return_timestamps: bool | None = None,
        threshold: float | Mapping[str, float] | None = None,
        window_pooling: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if not self.is_ast:
            return super()._sanitize_parameters(**kwargs)
        stock = {key: kwargs.pop(key) for key in ("top_k", "function_to_apply") if key in kwargs}
        if kwargs:
            raise ValueError(
                f"Unknown argument {', '.join(map(repr, kwargs))}; this pipeline takes top_k, "
                "function_to_apply, batch_size, chunk_length_s, hop_length_s, return_timestamps, "
                "window_pooling, threshold."
            )
        top_k = stock.get("top_k")
        if top_k is not None and (isinstance(top_k, bool) or top_k != int(top_k) or top_k < 1):
            raise ValueError(f"top_k must be a whole number from 1, or None for all, got {top_k}.")
        _, _, postprocess_params = super()._sanitize_parameters(**stock)
        if "top_k" not in stock and hasattr(self, "_postprocess_params"):
            del postprocess_params["top_k"]  # in a call: keep the value the pipeline was made with
        if "function_to_apply" not in stock:
            postprocess_params.pop("function_to_apply", None)  # filled in up to 5.20
        preprocess_params = {}
        for name, seconds in (("chunk_length_s", chunk_length_s), ("hop_length_s", hop_length_s)):
            if seconds is not None:
                if not 0 < seconds < math.inf:
                    raise ValueError(f"{name} must be a positive number of seconds, got {seconds}.")
                if seconds < _SHORTEST_S:
                    raise ValueError(f"{name} must be at least one frame, 0.01 s, got {seconds}.")
                preprocess_params[name] = seconds
        if return_timestamps is not None:
            if not isinstance(return_timestamps, bool):
                raise ValueError(
                    f"return_timestamps must be True or False, got {return_timestamps!r}."
                )
            postprocess_params["return_timestamps"] = return_timestamps
        if window_pooling is not None:
            check_pooling(window_pooling)
            postprocess_params["window_pooling"] = window_pooling
        if threshold is not None:
            postprocess_params["threshold"] = self._thresholds(threshold)
        return preprocess_params, {"kept": KeptRows()}, postprocess_params  # new in each call

    def _thresholds(self, threshold: float | Mapping[str, float]) -> torch.Tensor:
        """One number, or numbers by label -> (labels,)."""
        id2label = self.model.config.id2label
        if not isinstance(threshold, Mapping):
            threshold = dict.fromkeys(id2label.values(), threshold)
        thresholds = torch.full((len(id2label),), math.inf)
        index = {label: position for position, label in id2label.items()}
        for label, value in threshold.items():
            if label not in index:
                known = ", ".join([*index][:10]) + (", …" if len(index) > 10 else "")
                raise ValueError(f"Unknown label {label!r} in threshold. Known: {known}.")
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(
                    f"threshold must be a number or a dict of a number per label, got {value!r}."
                )
            thresholds[index[label]] = value
        return thresholds

    def preprocess(self, inputs: Any, **kwargs: Any) -> Any:
        return self._windows(inputs, **kwargs) if self.is_ast else super().preprocess(inputs)

    def _windows(
        self,
        sound: Any,
        chunk_length_s: float | None = None,
        hop_length_s: float | None = None,
        first_window: int = 0,
    ) -> Iterator[dict[str, Any]]:
        """The features of a sound, window by window, with the position of each, in samples.

        Windows before `first_window` are read, because decoders and resamplers keep state, but not
        processed.
        """
        extractor = self.feature_extractor
        rate, filterbank = extractor.sampling_rate, extractor.filterbank
        max_length = self.model.config.max_length
        chunk, hop = self.window_samples(chunk_length_s, hop_length_s)
        # A checkpoint trained with masks gets its windows padded to one patch at most; one trained
        # on padded spectrograms, like all published ones, gets them fully padded.
        if extractor.return_attention_mask:
            padded_length = self.model.config.patch_shape[1]
        else:
            padded_length = max(max_length, filterbank.num_frames(chunk))
        # Less than one hop beyond a window yields no further frame.
        shortest_rest = filterbank.frame_shift
        windows = cut_windows(extractor.stream_audio(sound), chunk, hop, shortest_rest)
        for start, samples, is_last in itertools.islice(windows, first_window, None):
            features = extractor(
                samples,
                sampling_rate=rate,
                padding="max_length",
                max_length=padded_length,
                truncation=False,
                return_tensors="pt",
            )
            if self.dtype is not None:
                features["input_values"] = features["input_values"].to(self.dtype)
            yield {**features, "is_last": is_last, "start": start, "samples": len(samples)}

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        if not self.is_ast:
            return super()._forward(model_inputs)
        inputs = {k: v for k, v in model_inputs.items() if k in ("input_values", "attention_mask")}
        bookkeeping = {k: model_inputs[k] for k in ("is_last", "start", "samples")}
        return {"logits": self.model(**inputs).logits, **bookkeeping}

    def postprocess(
        self,
        model_outputs: Any,
        top_k: int = 5,
        function_to_apply: str | None = None,
        return_timestamps: bool = False,
        threshold: torch.Tensor | None = None,
        window_pooling: str | None = None,
    ) -> list[dict[str, Any]] | dict[str, Any]:
        if not self.is_ast:
            return super().postprocess(model_outputs, top_k, function_to_apply)
        rate = self.feature_extractor.sampling_rate
        spans = [
            (window["start"] / rate, (window["start"] + window["samples"]) / rate)
            for window in model_outputs
        ]
        # (labels,) each; for a frame model (columns, labels)
        of_windows = [
            self.scores(torch.from_numpy(block[row]), function_to_apply)
            for block, row in (window["logits"] for window in model_outputs)
        ]
        if self.is_frame_model:
            spans, scores = self._columns(model_outputs, of_windows)
        else:
            scores = torch.stack(of_windows)
        lengths = torch.tensor([end - start for start, end in spans])
        pooling = window_pooling or getattr(self.model.config, "window_pooling", None)
        labels = self._top_labels(pool_windows(scores, lengths, pooling), top_k, threshold)
        if not return_timestamps:
            return labels
        windows = [
            {"start": start, "end": end, "labels": self._top_labels(of_window, top_k, threshold)}
            for (start, end), of_window in zip(spans, scores, strict=True)
        ]
        return {"labels": labels, "windows": windows}

    @property
    def _column_samples(self) -> int:
        """Samples from one column of a frame model to the next."""
        return self.model.config.time_stride * self.feature_extractor.filterbank.frame_shift

    def window_samples(
        self, chunk_length_s: float | None = None, hop_length_s: float | None = None
    ) -> tuple[int, int]:
        """Window length and hop, in samples.

        A frame model's windows are whole columns apart, so that all columns fall on one grid.
        """
        extractor = self.feature_extractor
        model_samples = extractor.filterbank.num_samples(self.model.config.max_length)
        chunk, hop = window_and_hop(
            extractor.sampling_rate, model_samples, chunk_length_s, hop_length_s
        )
        if self.is_frame_model:
            hop = max(1, hop // self._column_samples) * self._column_samples
        return chunk, hop

    def columns_per_hop(
        self, chunk_length_s: float | None = None, hop_length_s: float | None = None
    ) -> int:
        """Columns from one window of a frame model to the next."""
        return self.window_samples(chunk_length_s, hop_length_s)[1] // self._column_samples

    def columns_of_sound(self, scores: torch.Tensor, samples: int) -> np.ndarray:
        """A window's scores (columns, labels), without columns of padding."""
        config = self.model.config
        frames = self.feature_extractor.filterbank.num_frames(samples)
        columns = count_columns(frames, config.time_stride, config.patch_shape[1])
        return scores[:columns].cpu().numpy()

    def _columns(
        self, windows: list[dict[str, Any]], scores: list[torch.Tensor]
    ) -> tuple[list[tuple[float, float]], torch.Tensor]:
        """A frame model's windows -> spans in seconds, scores (columns, labels) of the sound."""
        config, rate = self.model.config, self.feature_extractor.sampling_rate
        hop = self._column_samples
        if len(windows) > 1:
            hop = windows[1]["start"] - windows[0]["start"]
        of_sound = [
            self.columns_of_sound(of_window, window["samples"])
            for window, of_window in zip(windows, scores, strict=True)
        ]
        stitched = stitch(of_sound, hop // self._column_samples)
        duration = (windows[-1]["start"] + windows[-1]["samples"]) / rate
        spans = column_spans(
            len(stitched), config.time_stride, config.patch_shape[1], duration=duration
        )
        return [(start, end) for start, end in spans.tolist()], torch.from_numpy(stitched)

    def scores(self, logits: torch.Tensor, function_to_apply: str | None = None) -> torch.Tensor:
        """Logits (…, labels) -> scores, by the argument or the checkpoint's `problem_type`."""
        return scores_from_logits(logits, self.model.config.problem_type, function_to_apply)

    def _top_labels(
        self, scores: torch.Tensor, top_k: int, threshold: torch.Tensor | None
    ) -> list[dict[str, Any]]:
        config = self.model.config
        names = [config.id2label[index] for index in range(config.num_labels)]
        thresholds = None if threshold is None else threshold.numpy()
        best = top_labels(scores.numpy(), names, top_k, thresholds)
        return [LabelScore._asdict(label) for label in best]


def _undecoded(dataset: Any, column: str) -> Any:
    """A dataset whose audio column is not decoded: `datasets` itself needs torchcodec for that."""
    feature: Any = (getattr(dataset, "features", None) or {}).get(column)
    if type(feature).__name__ == "Audio" and feature.decode:
        return dataset.cast_column(column, type(feature)(decode=False))
    return dataset
