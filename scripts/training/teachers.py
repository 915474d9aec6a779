"""Teachers: models whose answers a student learns, computed during training or stored before.

    stored      -> `data.answers`: the loaders' workers find the answers to each crop
    online      -> `OnlineTeacher`: answers, in inference mode, the exact sound the student gets

    answers     targets (B, labels): probabilities; embeddings (B, D)

Several online teachers form an ensemble: the mean of their targets, their embeddings concatenated.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import FeatureExtractionMixin

from feature_extraction import load_audio
from modeling_ast.onnx_ast import OnnxClassifier
from modeling_ast.scores_ast import activation as activation_of

from ..common.bundled import read_label_names
from ..data.answers import (
    ACTIVATIONS,
    EMBEDDING,
    KEY,
    LOGITS,
    Answers,
    ColumnAnswers,
    FileAnswers,
    is_answers,
    probabilities,
    read_answers,
    read_vector,
)
from ..data.batches import Collator
from ..data.labelled import LabelledAudio
from ..inference.torch_engine import load_classifier
from .options import FinetuneOptions

_LOOKED_AT = 20  # rows of the data; stored answers must have one of them
_MEASURED_STORED, _MEASURED_ONLINE = 2000, 64  # clips, for the embeddings' mean and deviation
_HEARD_AT_ONCE = 16
_SMALLEST_DEVIATION = 1e-4

Batch = dict[str, Tensor]


class OnlineTeacher:
    """An audio classifier that answers during training.

    Args:
        name: checkpoint folder, one of our ONNX files, bundled or Hub name of any classifier.
        device: where it computes.
        activation: "sigmoid" or "softmax" instead of the checkpoint's.

    Raises:
        ValueError: for a frame model, and as for `load_classifier`.
    """

    def __init__(self, name: str, device: torch.device, activation: str | None = None):
        self.pipeline: Any = (
            OnnxClassifier(name) if name.endswith(".onnx") else load_classifier(name, device=device)
        )
        if self.pipeline.is_ast and self.pipeline.is_frame_model:
            raise ValueError(f"{name} is a frame model; a teacher must score whole clips.")
        self._model: Any = self.pipeline.model
        config = self._model.config
        self.label_names = [config.id2label[index] for index in range(config.num_labels)]
        self.activation = activation or activation_of(config.problem_type)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"{name} is a regression model; a teacher must score labels.")
        self._embedder: nn.Module | None = None
        self.embedding_size = 0
        if isinstance(self._model, nn.Module):
            self._embedder = _embedder(self._model, config.num_labels)
            self._model.eval().requires_grad_(False)
            self.embedding_size = _last_linear(self._model, config.num_labels).in_features

    def answer(
        self, sounds: list[np.ndarray], rate: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Waveforms (samples,) -> targets (B, labels), embeddings (B, D), on the CPU.

        For a sound longer than the teacher's input: the mean over its windows.
        """
        windows: list[tuple[int, float, dict[str, Tensor]]] = []
        for number, sound in enumerate(sounds):
            for features in self._features(sound, rate):
                weight = float(features.pop("samples", len(sound)))
                windows.append((number, weight, features))
        targets = torch.zeros(len(sounds), len(self.label_names))
        embeddings = torch.zeros(len(sounds), self.embedding_size)
        total = torch.zeros(len(sounds), 1)
        # Padding could change an answer, so only inputs of equal shape go in together.
        groups: dict[Any, list[tuple[int, float, dict[str, Tensor]]]] = {}
        for window in windows:
            shapes = tuple((name, values.shape) for name, values in window[2].items())
            groups.setdefault(shapes, []).append(window)
        for group in groups.values():
            for begin in range(0, len(group), _HEARD_AT_ONCE):
                some = group[begin : begin + _HEARD_AT_ONCE]
                logits, vectors = self._heard([features for _, _, features in some])
                scores = probabilities(logits, self.activation, temperature)
                for (number, weight, _), of_labels, vector in zip(
                    some, scores, vectors, strict=True
                ):
                    targets[number] += weight * of_labels
                    embeddings[number] += weight * vector
                    total[number] += weight
        return targets / total, embeddings / total

    def _features(self, sound: np.ndarray, rate: int) -> list[dict[str, Any]]:
        """The model's inputs, window by window, each a batch of one."""
        pipeline = self.pipeline
        extractor: FeatureExtractionMixin = pipeline.feature_extractor
        wanted = extractor.sampling_rate
        if wanted != rate:
            sound = load_audio({"array": sound, "sampling_rate": rate}, wanted)
        if not pipeline.is_ast:
            return [dict(pipeline.preprocess({"raw": sound, "sampling_rate": wanted}))]
        chunk = pipeline.window_samples()[0] / wanted
        found = []
        for window in pipeline.preprocess(sound, hop_length_s=chunk):
            features = {name: window[name] for name in ("input_values", "attention_mask")
                        if name in window}  # fmt: skip
            found.append({**features, "samples": window["samples"]})
        return found

    def _heard(self, windows: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        """Logits (windows, labels) and embeddings (windows, D)."""
        device = self._model.device
        features = {
            name: torch.cat([window[name] for window in windows]).to(device) for name in windows[0]
        }
        kept: list[Tensor] = []
        hook = None
        if self._embedder is not None:
            hook = self._embedder.register_forward_pre_hook(
                lambda _, inputs: kept.append(inputs[0])
            )
        try:
            with torch.inference_mode():
                logits = self._model(**features).logits
        finally:
            if hook is not None:
                hook.remove()
        vectors = kept[0] if kept else torch.empty(len(windows), 0)
        # Copies: tensors made in inference mode cannot take part in a loss.
        return logits.float().cpu().clone(), vectors.float().cpu().clone()


def _last_linear(model: nn.Module, num_labels: int) -> nn.Linear:
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features == num_labels
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear layer that ends in its labels.")
    return found[-1]


def _embedder(model: Any, num_labels: int) -> nn.Module:
    """The module whose input is the embedding: an AST's head, or another model's last layer."""
    is_ours = hasattr(model, "audio_spectrogram_transformer")
    return model.classifier if is_ours else _last_linear(model, num_labels)


@dataclass
class Teacher:
    """All teachers of a run, as one.

    Args:
        label_names: of the targets.
        activation: "sigmoid" or "softmax".
        embedding_size: 0 if there are no embeddings.
        stored: answers that the loaders' workers find.
        online: models that answer during training.
        temperature: of the targets.
        cache: online teachers' answers by the crops' keys; None: no cache.
    """

    label_names: list[str]
    activation: str
    embedding_size: int
    stored: Answers | None = None
    online: tuple[OnlineTeacher, ...] = ()
    temperature: float = 1.0
    cache: dict[int, Tensor] | None = None

    @property
    def are_names_known(self) -> bool:
        return self.stored is None or self.stored.label_names is not None

    def with_answers(self, batch: Batch, rate: int) -> Batch:
        """Replace a batch's sounds by the online teachers' answers to them."""
        if not self.online:
            return batch
        batch = dict(batch)
        waveforms = batch.pop("teacher_waveforms").cpu().numpy()
        lengths, keys = batch.pop("teacher_samples").tolist(), batch.pop("teacher_keys").tolist()
        sounds = [sound[:length] for sound, length in zip(waveforms, lengths, strict=True)]
        answers = self._answers(sounds, keys, rate).to(batch["input_values"].device)
        batch["teacher_targets"] = answers[:, : len(self.label_names)]
        batch["teacher_embeddings"] = answers[:, len(self.label_names) :]
        return batch

    def _answers(self, sounds: list[np.ndarray], keys: list[int], rate: int) -> Tensor:
        """(B, labels + D)."""
        if self.cache is None:
            return self._heard(sounds, rate)
        answers = []
        for sound, key in zip(sounds, keys, strict=True):
            answer = self.cache.get(key)
            if answer is None:
                # One by one: in a batch, an answer's last bits would depend on its neighbours, and
                # a resumed run, with an empty cache, would differ.
                answer = self._heard([sound], rate)[0]
                if key >= 0:
                    self.cache[key] = answer
            answers.append(answer)
        return torch.stack(answers)

    def _heard(self, sounds: list[np.ndarray], rate: int) -> Tensor:
        targets: Tensor | float = 0.0
        embeddings = []
        for teacher in self.online:
            of_teacher, vectors = teacher.answer(sounds, rate, self.temperature)
            order = [teacher.label_names.index(name) for name in self.label_names]
            targets = targets + of_teacher[:, order] / len(self.online)
            embeddings.append(vectors)
        return torch.cat([torch.as_tensor(targets), *embeddings], dim=1)

    def measure_embeddings(self, data: LabelledAudio, collator: Collator) -> tuple[Tensor, Tensor]:
        """Mean and deviation (D,) of the embeddings, over answers to the first training clips."""
        if isinstance(self.stored, FileAnswers):
            vectors = torch.from_numpy(self.stored.embeddings.astype(np.float32))
        elif self.stored is not None:
            rows = data.train.take(_MEASURED_STORED)
            vectors = torch.from_numpy(np.stack([read_vector(row[EMBEDDING]) for row in rows]))
        else:
            rate = collator.feature_extractor.sampling_rate
            plain = replace(collator, mixup_rate=0.0, speed_perturbation=0.0)
            generator = torch.Generator().manual_seed(0)
            sounds = [
                plain.decode(row, generator).waveform.numpy()
                for row in data.train.take(_MEASURED_ONLINE)
            ]
            answers = torch.cat([self._heard([sound], rate) for sound in sounds])
            vectors = answers[:, len(self.label_names) :]
        deviation = vectors.std(dim=0, correction=0)
        return vectors.mean(dim=0), deviation.clamp(min=_SMALLEST_DEVIATION)


def kept_columns(options: FinetuneOptions) -> Mapping[str, str]:
    """The data's columns with a teacher's answers, or keys to them, by their name in rows."""
    found = {
        LOGITS: options.teacher_column,
        EMBEDDING: options.teacher_embedding_column,
        KEY: options.teacher_key,
    }
    return {name: column for name, column in found.items() if column is not None}


def open_teacher(
    options: FinetuneOptions, data: LabelledAudio, device: torch.device
) -> Teacher | None:
    """The teacher that the options name; None if there is none.

    Raises:
        ValueError: for one that cannot be loaded, teachers with different labels, and stored
            answers that do not belong to these sounds.
    """
    if not options.has_teacher:
        return None
    if options.teacher and not any(map(is_answers, options.teacher)):
        return _open_online(options, device)
    if options.teacher and not all(map(is_answers, options.teacher)):
        raise ValueError(
            "--teacher takes files of answers or models, not both: " + ", ".join(options.teacher)
        )
    stored: Answers
    if options.teacher:
        stored = read_answers(options.teacher, options.teacher_key)
        first = list(data.train.take(_LOOKED_AT))
        if not any(map(stored.knows, first)):
            raise ValueError(
                f"{' '.join(options.teacher)} has no answers to the first {len(first)} sounds of "
                f"{options.dataset}, such as {first[0].get(KEY, first[0]['name'])}. Sounds are "
                "found by name; --teacher_key names a column that both have."
            )
    else:
        stored = _of_columns(next(iter(data.train)))
    if options.teacher_labels is not None:
        stored.label_names = read_label_names(options.teacher_labels)
    names = stored.label_names
    if names is not None and stored.num_labels and len(names) != stored.num_labels:
        raise ValueError(
            f"The teacher's answers have {stored.num_labels} numbers, but there are {len(names)} "
            "label names for them (--teacher_labels)."
        )
    stored.activation = options.teacher_activation or stored.activation or "sigmoid"
    stored.temperature = options.teacher_temperature
    if names is None or not stored.num_labels:
        names = [f"label {index}" for index in range(stored.num_labels)]
    return Teacher(names, stored.activation, stored.embedding_size, stored)


def _open_online(options: FinetuneOptions, device: torch.device) -> Teacher:
    online = [OnlineTeacher(name, device, options.teacher_activation) for name in options.teacher]
    first = online[0]
    for name, teacher in zip(options.teacher, online, strict=True):
        if set(teacher.label_names) != set(first.label_names):
            raise ValueError(
                f"Teachers must have the same labels: {options.teacher[0]} has "
                f"{len(first.label_names)}, such as {first.label_names[0]!r}, {name} has "
                f"{len(teacher.label_names)}, such as {teacher.label_names[0]!r}."
            )
        if teacher.activation != first.activation:
            raise ValueError(
                f"{options.teacher[0]} answers by {first.activation}, {name} by "
                f"{teacher.activation}: say --teacher_activation."
            )
    return Teacher(
        first.label_names,
        first.activation,
        sum(teacher.embedding_size for teacher in online),
        online=tuple(online),
        temperature=options.teacher_temperature,
        cache={} if options.teacher_cache else None,
    )


def _of_columns(row: Mapping[str, Any]) -> ColumnAnswers:
    labels, size = (
        len(read_vector(row[name])) if name in row else 0 for name in (LOGITS, EMBEDDING)
    )
    if not labels and not size:
        raise ValueError("The first row's answers of the teacher are empty.")
    return ColumnAnswers(labels, size)
