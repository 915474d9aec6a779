"""A waveform-in ONNX file, ready to listen, without torch: it starts soon and needs little memory.

windows     waveforms (samples,); the file has the filterbank in it
scores      (windows, labels); no embeddings
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from feature_extraction.audio_ast import stream_audio
from modeling_ast.onnx_file_ast import OnnxFile
from modeling_ast.scores_ast import activation
from modeling_ast.windows_ast import cut_windows, window_and_hop

# ONNX Runtime's memory grows with what goes in at once; on a CPU more at once is no faster.
_MOST_AT_ONCE = 4
_LONGEST_WINDOW = 1 << 24  # samples; a damaged file may ask for more


class OnnxEngine:
    """See `Classifier`, which asks it.

    Args:
        file: for which `can_run` holds.
    """

    is_frame_model = False

    def __init__(self, file: OnnxFile):
        self._file = file
        try:
            self.label_names: list[str] = json.loads(file.metadata["labels"])
            self.sampling_rate = int(file.metadata["sampling_rate"])
            self._model_samples = int(file.metadata["window_samples"])
            self._shortest_rest = int(file.metadata["frame_shift"])
            if not 0 < self._shortest_rest < self._model_samples < _LONGEST_WINDOW:
                raise ValueError(f"its windows have {self._model_samples} samples")
            if not all(isinstance(name, str) for name in self.label_names):
                raise ValueError("its labels are no names")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file.damaged}: {error}") from error
        self.problem_type: str | None = file.config.get("problem_type")
        self.window_pooling: str | None = file.config.get("window_pooling")

    @staticmethod
    def can_run(file: OnnxFile) -> bool:
        """Whether the file says all that is needed; older ones, and frame models, do not."""
        needed = {"labels", "sampling_rate", "window_samples", "frame_shift"}
        is_frame_model = file.config.get("model_type") == "ast-frame-classification"
        has_all = file.input_name == "waveform" and needed <= set(file.metadata)
        return has_all and not is_frame_model

    def window_samples(
        self, chunk_length_s: float | None, hop_length_s: float | None
    ) -> tuple[int, int]:
        """Length of a window and from one's start to the next one's, in samples."""
        return window_and_hop(self.sampling_rate, self._model_samples, chunk_length_s, hop_length_s)

    def windows(
        self, source: Any, chunk_length_s: float | None, hop_length_s: float | None, first: int
    ) -> Iterator[tuple[int, int, bool, np.ndarray]]:
        """Start, length in samples, whether it is the last one, and the waveform."""
        length, hop = self.window_samples(chunk_length_s, hop_length_s)
        blocks = stream_audio(source, self.sampling_rate)
        windows = cut_windows(blocks, length, hop, self._shortest_rest)
        for start, samples, is_last in itertools.islice(windows, first, None):
            yield start, len(samples), is_last, samples

    def score(
        self, windows: Sequence[np.ndarray], function_to_apply: str | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Waveforms (samples,) -> scores and logits (windows, labels), and (windows, 0)."""
        answers: dict[int, np.ndarray] = {}
        for length in {len(window) for window in windows}:
            rows = [row for row, window in enumerate(windows) if len(window) == length]
            for first in range(0, len(rows), _MOST_AT_ONCE):
                some = rows[first : first + _MOST_AT_ONCE]
                batch = np.stack([windows[row] for row in some])
                answers.update(zip(some, self._file.run(batch), strict=True))
        logits = np.stack([answers[row] for row in range(len(windows))])
        scores = _applied(logits, function_to_apply or activation(self.problem_type))
        return scores, logits, np.empty((len(windows), 0), np.float32)


def _applied(logits: np.ndarray, function: str) -> np.ndarray:
    """As `scores_from_logits`, on arrays."""
    if function == "sigmoid":
        return np.exp(-np.logaddexp(0, -logits))
    if function == "softmax":
        powers: np.ndarray = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True)
    if function == "none":
        return logits
    raise ValueError(f"function_to_apply must be softmax, sigmoid or none, got {function!r}.")
