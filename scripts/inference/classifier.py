"""A loaded checkpoint: the one way from sound to scores, used by all commands.

sound       whatever `load_audio` reads
Window      a part of it: features (1, T, F) and its time span
Scored      the same with scores (labels,) and an embedding (D,); batches span sounds; for a frame
            model, each of its columns, stitched where windows overlap, without embedding
Heard       all of a sound's windows: labels, events, embeddings
"""

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import pipeline
from transformers.pipelines.base import pad_collate_fn

from feature_extraction import AudioDecodingError
from modeling_ast.frames_ast import Stitcher, column_spans
from modeling_ast.onnx_ast import OnnxClassifier
from modeling_ast.weights_ast import check_json_files

from ..common.checkpoints import DEFAULT_MODEL, resolve_checkpoint
from ..common.options import did_you_mean
from .heard import Heard

__all__ = ["DEFAULT_MODEL", "Classifier", "Scored", "Unreadable", "Window", "load_classifier"]

K = TypeVar("K")
_NONE = np.empty(0, np.float32)


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


@dataclass(frozen=True)
class Window:
    """A part of a sound, from `start` to `end` in seconds, in the form the model takes."""

    start: float
    end: float
    is_last: bool  # of its sound
    features: dict[str, Tensor]


@dataclass(frozen=True)
class Scored(Generic[K]):
    """A scored window, or a column of a frame model."""

    sound: K
    span: tuple[float, float]  # seconds
    is_last: bool
    scores: np.ndarray  # (labels,)
    logits: np.ndarray  # (labels,); none of a frame model
    embedding: np.ndarray  # (D,)


@dataclass(frozen=True)
class Unreadable(Generic[K]):
    """A sound that could not be read to its end; its windows so far do not count."""

    sound: K
    error: str


@dataclass
class _Columns:
    """How far a frame model is in the current sound."""

    stitcher: Stitcher | None = None
    count: int = 0

    def forget(self) -> None:
        """Start over: the next window belongs to another sound."""
        self.stitcher, self.count = None, 0


class Classifier:
    """A checkpoint: sounds to windows, batches of windows to scores and embeddings.

    Args:
        model: checkpoint folder, ONNX file, Hub name or bundled name.
        device: default: a GPU if there is one.
        batch_size: windows per forward pass.
        chunk_length_s, hop_length_s: of the windows, as in the pipeline.
        function_to_apply: "softmax", "sigmoid" or "none" instead of the checkpoint's.
        window_pooling: over a sound's windows; default: as the checkpoint was trained, else mean.
        labels: the ones to report, in this order; None: all. Scores do not change.

    Raises:
        ValueError: for a checkpoint that cannot be loaded, or is not an AST.
    """

    def __init__(
        self,
        model: str,
        device: torch.device | None = None,
        *,
        batch_size: int = 8,
        chunk_length_s: float | None = None,
        hop_length_s: float | None = None,
        function_to_apply: str | None = None,
        window_pooling: str | None = None,
        labels: Sequence[str] | None = None,
    ):
        self.pipeline: Any = (
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
        self.model_name = model
        self.batch_size = batch_size
        self.chunk_length_s, self.hop_length_s = chunk_length_s, hop_length_s
        self.function_to_apply = function_to_apply
        self.window_pooling = window_pooling or getattr(config, "window_pooling", None)
        self.problem_type: str | None = config.problem_type
        self.label_names: list[str] = [config.id2label[i] for i in range(config.num_labels)]
        self._columns: list[int] | slice = slice(None)
        if labels is not None:
            for label in labels:
                if label not in self.label_names:
                    raise ValueError(
                        f"{model} has no label {label!r}{did_you_mean(label, self.label_names)}"
                    )
            self._columns = [self.label_names.index(label) for label in labels]
            self.label_names = list(labels)
        self.sampling_rate: int = self.pipeline.feature_extractor.sampling_rate

    @property
    def is_frame_model(self) -> bool:
        """Whether it gives scores for every patch column instead of every window."""
        return self.pipeline.is_frame_model

    def new_heard(self) -> Heard:
        """A sound with no windows yet."""
        return Heard(self.label_names, pooling=self.window_pooling)

    def windows(self, source: Any, first: int = 0) -> Iterator[Window]:
        """A sound's windows, starting with number `first`.

        Raises:
            AudioDecodingError: for a sound that cannot be read, at the window concerned.
        """
        for window in self.pipeline.preprocess(
            source,
            chunk_length_s=self.chunk_length_s,
            hop_length_s=self.hop_length_s,
            first_window=first,
        ):
            start = window.pop("start") / self.sampling_rate
            end = start + window.pop("samples") / self.sampling_rate
            yield Window(start, end, window.pop("is_last"), window)

    @torch.inference_mode()
    def score(self, windows: list[Window]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A batch -> scores and logits (windows, labels), embeddings (windows, D).

        For a frame model: (windows, columns, labels) and no embeddings, (windows, 0).
        """
        model = self.pipeline.model
        features = pad_collate_fn(None, self.pipeline.feature_extractor)(
            [window.features for window in windows]
        )
        features = {name: values.to(model.device) for name, values in features.items()}
        if isinstance(self.pipeline, OnnxClassifier) or self.is_frame_model:
            logits, pooled = model(**features).logits, torch.empty(len(windows), 0)
        else:
            pooled = model.base_model(**features).pooler_output
            logits = model.classifier(pooled)
        logits = logits.float()
        scores = self.pipeline.scores(logits, self.function_to_apply)
        of_labels = (values[..., self._columns].cpu().numpy() for values in (scores, logits))
        return *of_labels, pooled.float().cpu().numpy()

    def listen(self, sounds: Iterable[tuple[K, Any, int]]) -> Iterator[Scored[K] | Unreadable[K]]:
        """Window by window through sounds, in order; batches span sounds.

        Args:
            sounds: for each one its name in the answers, the sound, and the window to begin with.
        """
        batch: list[tuple[K, Window]] = []
        columns = _Columns()

        def answers() -> Iterator[Scored[K]]:
            answered = self.score([window for _, window in batch])
            done, batch[:] = batch[:], []
            for (key, window), of_labels, logits, vector in zip(done, *answered, strict=True):
                if self.is_frame_model:
                    yield from self._settled_columns(key, window, of_labels, columns)
                    continue
                span = (window.start, window.end)
                yield Scored(key, span, window.is_last, of_labels, logits, vector)

        for key, source, first in sounds:
            begun = len(batch)
            try:
                for window in self.windows(source, first):
                    batch.append((key, window))
                    if len(batch) == self.batch_size:
                        begun = 0
                        yield from answers()
            except AudioDecodingError as error:
                del batch[begun:]
                if not begun:
                    columns.forget()
                yield Unreadable(key, str(error))
        if batch:
            yield from answers()

    def _settled_columns(
        self, key: K, window: Window, scores: np.ndarray, columns: "_Columns"
    ) -> Iterator[Scored[K]]:
        """A frame model's columns that no later window of the sound will change."""
        config = self.pipeline.model.config
        samples = round((window.end - window.start) * self.sampling_rate)
        of_sound = self.pipeline.columns_of_sound(torch.from_numpy(scores), samples)
        hop = self.pipeline.columns_per_hop(self.chunk_length_s, self.hop_length_s)
        if columns.stitcher is None:
            columns.stitcher = Stitcher(hop)
        settled = columns.stitcher.add(of_sound, window.is_last)
        spans = column_spans(
            len(settled),
            config.time_stride,
            config.patch_shape[1],
            columns.count,
            window.end if window.is_last else None,
        )
        columns.count += len(settled)
        last = len(settled) - 1 if window.is_last else -1
        for number, ((start, end), of_labels) in enumerate(
            zip(spans.tolist(), settled, strict=True)
        ):
            yield Scored(key, (start, end), number == last, of_labels, _NONE, _NONE)
        if window.is_last:
            columns.forget()

    def hear_each(self, sounds: Iterable[tuple[K, Any]]) -> Iterator[tuple[K, Heard | str]]:
        """Sounds by name -> what was heard in each, or what is wrong with it.

        In order, except that unreadable sounds may overtake the one before them.
        """
        heard: dict[int, Heard] = {}
        numbered = (((number, key), source, 0) for number, (key, source) in enumerate(sounds))
        for answer in self.listen(numbered):
            number, key = answer.sound
            if isinstance(answer, Unreadable):
                heard.pop(number, None)
                yield key, answer.error
                continue
            sound = heard.setdefault(number, self.new_heard())
            sound.add(answer.span, answer.scores, answer.embedding)
            if answer.is_last:
                yield key, heard.pop(number)

    def hear(self, source: Any) -> Heard:
        """One sound.

        Raises:
            AudioDecodingError: if it cannot be read.
        """
        ((_, heard),) = self.hear_each([("", source)])
        if isinstance(heard, str):
            raise AudioDecodingError(heard)
        return heard
