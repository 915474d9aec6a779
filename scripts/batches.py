"""Streams of sounds to featurised batches, decoded, mixed and featurised in worker processes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from datasets import IterableDataset
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader

from feature_extraction import ASTFeatureExtractor, augmentation_generator, mixup


@dataclass
class Collator:
    """Decodes and featurises rows, in a worker: -> input_values (B, T, F), labels.

    Labels are class indices (B,), or with mixup their mixed probabilities (B, classes).
    """

    feature_extractor: ASTFeatureExtractor
    num_labels: int
    mixup_rate: float = 0.0
    generator_key: tuple[int, int, int] = (0, 0, 0)  # seed, epoch, rank
    _generator: torch.Generator | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        extractor = self.feature_extractor
        labels = torch.tensor([row["label"] for row in rows])
        waveforms = [torch.from_numpy(extractor.load_audio(row["audio"])) for row in rows]
        if self.mixup_rate:
            # Made here, in the worker, so that each worker has its own.
            self._generator = self._generator or augmentation_generator(*self.generator_key)
            targets = one_hot(labels, self.num_labels).float()
            waveforms, labels = mixup(
                waveforms, targets, self.mixup_rate, generator=self._generator
            )
        features = extractor(waveforms, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        return {**features, "labels": labels}


def batches(
    stream: IterableDataset, batch_size: int, num_workers: int, collator: Collator
) -> Iterator[dict[str, torch.Tensor]]:
    """One pass over a stream in featurised batches."""
    loader = DataLoader(
        stream,
        batch_size=batch_size,
        num_workers=min(num_workers, stream.num_shards),
        collate_fn=collator,
    )
    return iter(loader)


def repeated(make_batches: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """A stream over and over: processes must take equally many steps, whatever their shares."""
    while True:
        yield from make_batches()
