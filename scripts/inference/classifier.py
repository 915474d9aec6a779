"""A loaded checkpoint: the one way from sound to scores, used by all commands.

sound       whatever `load_audio` reads
Window      a part of it, as the engine takes it, and its time span
Scored      the same with scores (labels,) and an embedding (D,); batches span sounds; for a frame
            model, each of its columns, stitched where windows overlap, without embedding
Heard       all of a sound's windows: labels, events, embeddings

An engine makes windows and scores: `TorchEngine` of a checkpoint, `OnnxEngine` of a waveform-in
ONNX file. Nothing here imports torch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from feature_extraction.audio_ast import AudioDecodingError
from modeling_ast.frames_ast import Stitcher, column_spans
from modeling_ast.onnx_file_ast import OnnxFile

from ..common.checkpoints import DEFAULT_MODEL
from ..common.options import did_you_mean
from .heard import Heard
from .onnx_engine import OnnxEngine

__all__ = ["DEFAULT_MODEL", "Classifier", "Scored", "Unreadable", "Window"]

K = TypeVar("K")
_NONE = np.empty(0, np.float32)


@dataclass(frozen=True)
class Window:
    """A part of a sound, from `start` to `end` in seconds, in the form the model takes."""

    start: float
    end: float
    is_last: bool  # of its sound
    content: Any  # features (1, T, F) by name, or a waveform (samples,)


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
        device: of a checkpoint, as torch names it; default: a GPU if there is one.
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
        device: Any = None,
        *,
        batch_size: int = 8,
        chunk_length_s: float | None = None,
        hop_length_s: float | None = None,
        function_to_apply: str | None = None,
        window_pooling: str | None = None,
        labels: Sequence[str] | None = None,
    ):
        self._engine = _open(model, device)
        self.model_name = model
        self.batch_size = batch_size
        self.chunk_length_s, self.hop_length_s = chunk_length_s, hop_length_s
        self.function_to_apply = function_to_apply
        self.window_pooling = window_pooling or self._engine.window_pooling
        self.problem_type: str | None = self._engine.problem_type
        self.label_names: list[str] = self._engine.label_names
        self._columns: list[int] | slice = slice(None)
        if labels is not None:
            for label in labels:
                if label not in self.label_names:
                    raise ValueError(
                        f"{model} has no label {label!r}{did_you_mean(label, self.label_names)}"
                    )
            self._columns = [self.label_names.index(label) for label in labels]
            self.label_names = list(labels)
        self.sampling_rate: int = self._engine.sampling_rate

    @property
    def pipeline(self) -> Any:
        """The checkpoint's pipeline; a waveform-in ONNX file has none here."""
        return self._engine.pipeline

    @property
    def is_frame_model(self) -> bool:
        """Whether it gives scores for every patch column instead of every window."""
        answer: bool = self._engine.is_frame_model
        return answer

    def window_samples(self, hop_length_s: float | None = None) -> tuple[int, int]:
        """Length of a window, and from one's start to the next one's unless it is given."""
        hop_s = self.hop_length_s if hop_length_s is None else hop_length_s
        length, hop = self._engine.window_samples(self.chunk_length_s, hop_s)
        return length, hop

    def new_heard(self) -> Heard:
        """A sound with no windows yet."""
        return Heard(self.label_names, pooling=self.window_pooling)

    def windows(self, source: Any, first: int = 0) -> Iterator[Window]:
        """A sound's windows, starting with number `first`.

        Raises:
            AudioDecodingError: for a sound that cannot be read, at the window concerned.
        """
        rate = self.sampling_rate
        for start, samples, is_last, content in self._engine.windows(
            source, self.chunk_length_s, self.hop_length_s, first
        ):
            yield Window(start / rate, (start + samples) / rate, is_last, content)

    def score(self, windows: list[Window]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A batch -> scores and logits (windows, labels), embeddings (windows, D).

        For a frame model: (windows, columns, labels) and no embeddings, (windows, 0).
        """
        contents = [window.content for window in windows]
        scores, logits, embeddings = self._engine.score(contents, self.function_to_apply)
        return scores[..., self._columns], logits[..., self._columns], embeddings

    def columns_of_sound(self, scores: np.ndarray, samples: int) -> np.ndarray:
        """Of a frame model: a window's scores (columns, labels), without columns of padding."""
        import torch

        columns: np.ndarray = self.pipeline.columns_of_sound(torch.from_numpy(scores), samples)
        return columns

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
        of_sound = self.columns_of_sound(scores, samples)
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


def _open(model: str, device: Any) -> Any:
    """The leanest engine that runs a model."""
    if model.endswith(".onnx"):
        file = OnnxFile(model)
        if OnnxEngine.can_run(file):
            return OnnxEngine(file)
    from .torch_engine import TorchEngine

    return TorchEngine(model, device)
