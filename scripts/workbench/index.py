"""An index of sound: one model's embeddings of the windows of hours of recordings.

    INDEX/index.json                the model, a checksum of its encoder
    INDEX/settings.json             the windows' length
    INDEX/parts/….parquet           one row per recording: its windows and their embeddings

The parts are those of `ast-classify` (see `inference.parts`): any number of processes write them, a
killed one resumes, and a recording that changed is processed again. Name more recordings to add
them; nothing is processed twice.

spans       (windows, 2)   seconds
embeddings  (windows, D)   float32, in memory: 0.8 GB for a million windows of a width of 192
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.files import write_whole
from ..data.recordings import locate
from ..inference.parts import Parts
from .heads import Head, Standard, layer_deviation, layer_normed

if TYPE_CHECKING:
    from ..inference.classifier import Classifier
    from ..inference.options import ClassifyOptions
    from ..inference.run import Run

# Keys of settings.json: windows, and where datasets have their sounds.
_SETTINGS = ("chunk_length_s", "hop_length_s", "split", "dataset_config", "audio_column")
_SAMPLE = 50_000  # windows, for means and deviations
_LOGITS = 1 << 22  # at a time, 16 MB: a product of few windows is not worth its threads
_BLOCK = 1024  # windows at a time: 1 MB, which a processor's cache holds


def build_index(folder: Path, options: "ClassifyOptions") -> "tuple[Run, dict[str, str]] | None":
    """Add recordings to an index; with several processes, this one's share of them.

    Args:
        folder: the index.
        options: what to add, with which model and windows.

    Returns:
        what the run has done, and what could not be read: name -> why. None in all processes but
        the first.

    Raises:
        ValueError: if the index was made by another model, or with other windows.
    """
    from modeling_ast.events_ast import EventRules

    from ..inference.run import listen_into

    if options.model.endswith(".onnx"):
        raise ValueError("An index needs a checkpoint: an ONNX file only gives scores.")
    settings = {"kind": "index", **{name: getattr(options, name) for name in _SETTINGS}}

    def check(classifier: "Classifier") -> None:
        about = {
            "model": options.model,
            "encoder": encoder_checksum(classifier),
            "head_epsilon": classifier.pipeline.model.config.layer_norm_eps,
        }
        path = folder / "index.json"
        if path.exists():
            check_encoder(folder, _about(folder), options.model, about["encoder"])
        else:
            text = json.dumps(about, indent=2)
            write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))

    # No score reaches 2: labels and events are up to the reader of the index.
    with listen_into(folder, options, EventRules(2.0), settings, check) as run:
        return None if run is None else (run, Parts(folder).errors())


def encoder_checksum(classifier: "Classifier") -> str:
    """A checksum of what embeddings depend on: encoder weights, how it runs, and features.

    Checkpoints that differ only in the classifier have the same.
    """
    model, extractor = classifier.pipeline.model, classifier.pipeline.feature_extractor
    settings = [
        getattr(model.config, name)
        for name in ("frequency_stride", "time_stride", "max_length", "merged_tokens_per_layer")
    ]
    settings += [
        getattr(extractor, name)
        for name in ("mean", "std", "num_mel_bins", "sampling_rate", "return_attention_mask")
    ]
    checksum = hashlib.sha256(json.dumps(settings).encode())
    for name, values in sorted(model.base_model.state_dict().items()):
        checksum.update(name.encode())
        checksum.update(values.detach().float().cpu().contiguous().numpy().tobytes())
    return checksum.hexdigest()[:16]


def check_encoder(folder: Path, about: dict[str, Any], model: str, encoder: str) -> None:
    """
    Raises:
        ValueError: if the index holds another encoder's embeddings.
    """
    if about["encoder"] != encoder:
        raise ValueError(
            f"{folder} holds embeddings from {about['model']} (encoder {about['encoder']}), which "
            f"differs from {model} (encoder {encoder}): use that model, or another index."
        )


def _about(folder: Path) -> dict[str, Any]:
    path = folder / "index.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return {name: about[name] for name in ("model", "encoder", "head_epsilon")}
    except FileNotFoundError:
        raise ValueError(
            f"{folder} is not an index. Make one: ast-index RECORDINGS --output {folder}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}. Build the index again.") from error


def settings_of(folder: Path) -> dict[str, Any]:
    """How an index was made: its model and windows; empty if there is none yet."""
    if not (folder / "index.json").exists():
        return {}
    return {**_settings(folder), "model": _about(folder)["model"]}


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "settings.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        return {name: settings[name] for name in _SETTINGS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}. Build the index again.") from error


@dataclass
class SoundIndex:
    """An index in memory: windows by recording, and by time within each.

    Args:
        folder: where it is.
        about: model, encoder, head_epsilon.
        settings: of its windows and datasets.
        sounds: the recordings' names.
        sound_of_window: (windows,) positions in `sounds`.
        spans: (windows, 2) seconds.
        embeddings: (windows, D).
    """

    folder: Path
    about: dict[str, Any]
    settings: dict[str, Any]
    sounds: list[str]
    sound_of_window: np.ndarray
    spans: np.ndarray
    embeddings: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> "SoundIndex":
        """
        Raises:
            ValueError: for a folder that is not an index, or an empty one.
        """
        about = _about(folder)
        settings = _settings(folder)
        parts = sorted(Parts(folder).arrays(), key=lambda part: part[0])
        if not parts:
            raise ValueError(f"{folder} holds no recordings yet: ast-index RECORDINGS --output …")
        lengths = [len(spans) for _, spans, _ in parts]
        return cls(
            folder=folder,
            about=about,
            settings=settings,
            sounds=[sound for sound, _, _ in parts],
            sound_of_window=np.repeat(np.arange(len(parts)), lengths),
            spans=np.concatenate([spans for _, spans, _ in parts]),
            embeddings=np.concatenate([vectors for *_, vectors in parts]),
        )

    def __len__(self) -> int:
        return len(self.spans)

    def check(self, classifier: "Classifier") -> None:
        """
        Raises:
            ValueError: for a model with another encoder.
        """
        check_encoder(self.folder, self.about, classifier.model_name, encoder_checksum(classifier))

    def normed(self, windows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The inputs of the classifier's dense layer for some windows: (windows, D)."""
        return layer_normed(self.embeddings[windows], self.about["head_epsilon"])

    def locate(self, sounds: Iterable[str]) -> dict[str, Any]:
        """The sounds of some recordings, in a form that `load_audio` reads.

        Raises:
            ValueError: for one that no longer exists.
        """
        settings = self.settings
        return locate(
            sounds, settings["split"], settings["dataset_config"], settings["audio_column"]
        )

    def blocks(self, length: int = _BLOCK) -> Iterator[slice]:
        """All windows, in blocks that need little memory."""
        return (slice(first, first + length) for first in range(0, len(self), length))

    @cached_property
    def standard(self) -> Standard:
        """Mean and deviation of the normed embeddings' features, from a sample of the windows."""
        return Standard.of(self.normed(self._sample))

    @cached_property
    def _sample(self) -> np.ndarray:
        random = np.random.default_rng(0)
        return np.sort(random.permutation(len(self))[:_SAMPLE])

    @cached_property
    def _raw(self) -> Standard:
        return Standard.of(self.embeddings[self._sample])

    @cached_property
    def _lengths(self) -> np.ndarray:
        """Lengths of the standardised embeddings: (windows,)."""
        mean, scale = (
            values.astype(np.float32) for values in (self._raw.mean, 1 / self._raw.deviation)
        )

        def lengths(embeddings: np.ndarray) -> np.ndarray:
            standardised = (embeddings - mean) * scale
            return np.sqrt(np.einsum("ij,ij->i", standardised, standardised))

        return np.concatenate([lengths(self.embeddings[block]) for block in self.blocks()])

    @cached_property
    def _deviations(self) -> np.ndarray:
        """What LayerNorm divides each window's embedding by: (windows,)."""
        epsilon = self.about["head_epsilon"]
        return np.concatenate(
            [layer_deviation(self.embeddings[block], epsilon) for block in self.blocks()]
        )

    def features(self) -> np.ndarray:
        """Standardised embeddings of length 1, whose products are similarities: (windows, D)."""
        return np.concatenate(
            [
                (self._raw(self.embeddings[block]) / self._lengths[block, None]).astype(np.float32)
                for block in self.blocks()
            ]
        )

    def similarity(self, examples: np.ndarray) -> np.ndarray:
        """Each window's similarity to the most similar example.

        The cosine of embeddings standardised over the index, exact: every window is compared.
        Standardising folds into the examples, so nothing but the embeddings is held in memory.

        Args:
            examples: (examples, D) embeddings.

        Returns:
            (windows,) from -1 to 1.
        """
        examples = np.atleast_2d(np.asarray(examples, np.float32))
        if examples.shape[1] != self.embeddings.shape[1]:
            raise ValueError(
                f"The example is {examples.shape[1]} wide, the index {self.embeddings.shape[1]}: "
                "it comes from another model."
            )
        best = np.full(len(self), -np.inf, np.float32)
        for example in examples:
            standardised = self._raw(example)
            standardised /= np.linalg.norm(standardised)
            direction = standardised / self._raw.deviation
            products = self.embeddings @ direction.astype(np.float32)
            products -= np.float32(self._raw.mean @ direction)
            products /= np.maximum(self._lengths, np.float32(1e-12))
            np.maximum(best, products, out=best)
        return best

    def logits(
        self, weight: np.ndarray, bias: np.ndarray, windows: slice = slice(None)
    ) -> np.ndarray:
        """Logits of a dense layer on the normed embeddings of some windows: (windows, labels).

        LayerNorm folds into the product: the weights take its mean, a division its deviation.
        """
        weight = (weight - weight.mean(axis=1, keepdims=True)).T.astype(np.float32)
        logits: np.ndarray = self.embeddings[windows] @ weight
        logits /= self._deviations[windows, None]
        logits += bias.astype(np.float32)
        return logits

    def scores(self, head: Head, label: int) -> np.ndarray:
        """Each window's score for one of a head's labels: (windows,)."""
        from scipy.special import expit, softmax

        if not head.exclusive:  # the others do not matter
            head, label = Head(head.weight[[label]], head.bias[[label]], False), 0

        def of(windows: slice) -> np.ndarray:
            # A label's scores lie together: a few long loops instead of many short ones.
            logits = np.ascontiguousarray(self.logits(head.weight, head.bias, windows).T)
            return softmax(logits, axis=0)[label] if head.exclusive else expit(logits[0])

        blocks = self.blocks(max(_BLOCK, _LOGITS // len(head.weight)))
        return np.concatenate([of(windows) for windows in blocks])


def read_vectors(path: str) -> np.ndarray:
    """Embeddings from a .npy file: (examples, D).

    Raises:
        ValueError: for a file that cannot be read.
    """
    try:
        return np.atleast_2d(np.load(path, allow_pickle=False))
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot read embeddings from {path}: {error}") from error


def embed(classifier: "Classifier", example: str) -> np.ndarray:
    """Embeddings of a file, or of a stretch of it, `FILE:START-END` in seconds: (windows, D).

    Raises:
        ValueError: for an invalid stretch.
        AudioDecodingError: for a file that cannot be read.
    """
    from feature_extraction import load_audio

    file, stretch = parse_example(example)
    if stretch is None:
        return classifier.hear(file).embeddings
    start, end = stretch
    waveform = load_audio(file, classifier.sampling_rate, start, end - start)
    return classifier.hear(waveform).embeddings


def parse_example(example: str) -> tuple[str, tuple[float, float] | None]:
    """`rain.wav:1.5-4` -> file and stretch in seconds; None: all of it.

    Raises:
        ValueError: for a stretch that ends before it starts.
    """
    file, colon, stretch = example.rpartition(":")
    start, dash, end = stretch.partition("-")
    try:
        span = float(start), float(end)
    except ValueError:
        return example, None
    if not (colon and dash):
        return example, None
    if not 0 <= span[0] < span[1]:
        raise ValueError(f"{example}: a stretch is START-END in seconds, with END after START.")
    return file, span
