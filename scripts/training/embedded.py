"""Embeddings of a frozen encoder, computed only once if nothing random comes before it.

clips -> pooler_output (clips, D) and labels, once
epoch -> batches of them: embeddings (B, D), labels, in a new order each time
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from feature_extraction import augmentation_generator

from .options import FinetuneOptions

Batch = dict[str, Tensor]
_RANDOM = (
    "mixup_rate", "time_mask", "frequency_mask", "time_roll", "noise_level", "filter_augment",
    "speed_perturbation", "time_patchout", "frequency_patchout", "balanced_sampling",
)  # fmt: skip


def is_constant(options: FinetuneOptions, model: Any, long_clips: int) -> bool:
    """Whether the encoder's output for a clip is the same in every epoch.

    Args:
        options: complete.
        model: in training.
        long_clips: how many clips are longer than its input; those get random windows.
    """
    config = model.config
    return (
        options.trained in ("head", "linear")
        and not options.has_teacher
        and options.annotations is None
        and not long_clips
        and not any(getattr(options, name) for name in _RANDOM)
        and not config.hidden_dropout_prob
        and not config.attention_probs_dropout_prob
    )


class Embedded:
    """Embeddings of the training and the evaluation part, each computed when first needed.

    Args:
        model: with the frozen encoder.
        device: of the model.
        train, evaluation: make the batches of the parts, in order.
        seed: for the order of the training clips.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        train: Callable[[], Iterator[Batch]],
        evaluation: Callable[[], Iterator[Batch]],
        seed: int,
    ):
        self._model, self._device, self._seed = model, device, seed
        self._make = {"train": train, "evaluation": evaluation}
        self._made: dict[str, list[Batch]] = {}

    def epoch(self, epoch: int, size: int) -> Iterator[Batch]:
        """The training clips in batches of `size`, the last one smaller, in this epoch's order."""
        parts = self._part("train")
        names = ("embeddings", "labels")
        whole = {name: torch.cat([part[name] for part in parts]) for name in names}
        generator = augmentation_generator(self._seed, epoch)
        for indices in torch.randperm(len(whole["labels"]), generator=generator).split(size):
            yield {name: values[indices] for name, values in whole.items()}

    def evaluation(self) -> Iterator[Batch]:
        yield from self._part("evaluation")

    @torch.no_grad()
    def _part(self, part: str) -> list[Batch]:
        if part in self._made:
            return self._made[part]
        was_training = self._model.training
        self._model.eval()
        encoder: nn.Module = self._model.audio_spectrogram_transformer
        batches = []
        for batch in self._make[part]():
            inputs = {
                name: batch.pop(name).to(self._device)
                for name in ("input_values", "attention_mask")
                if name in batch
            }
            batches.append({**batch, "embeddings": encoder(**inputs).pooler_output.cpu()})
        self._model.train(was_training)
        self._made[part] = batches
        return batches
