"""The batches of a step, their augmentation, and the evaluation at an epoch's end.

(seed, epoch, rank) -> the epoch's batches, the same every time: what makes resuming exact
(seed, step, rank)  -> the augmentation of a step
"""

import math
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.functional import one_hot
from tqdm.auto import tqdm

from feature_extraction import (
    ASTFeatureExtractor,
    add_noise,
    augmentation_generator,
    filter_augment,
    roll,
    spec_augment,
)

from ..data.batches import Collator, SkippedSounds, batches, rank_share, repeated
from ..data.labelled import LabelledAudio
from ..evaluation.metrics import METRICS, compute_metrics, headline
from .options import FinetuneOptions

Batch = dict[str, Tensor]


def count_steps(options: FinetuneOptions, data: LabelledAudio, processes: int) -> int:
    """Optimizer steps in an epoch."""
    clips = options.batch_size * options.gradient_accumulation_steps * processes
    return math.ceil(data.train_clips / clips)


def epoch_batches(
    options: FinetuneOptions,
    data: LabelledAudio,
    extractor: ASTFeatureExtractor,
    skipped: SkippedSounds,
    epoch: int,
    skip: int = 0,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[Batch]:
    """An epoch's training batches in one process, each for one optimizer step.

    It is a function of its arguments alone, so going on after `skip` steps is exact. An epoch has
    `count_steps` of them in every process, whatever the shares of processes and workers: the last,
    incomplete batches of some may be left for another epoch.
    """
    num_labels = len(data.label_names)
    one_pass = partial(
        batches,
        rank_share(data.train, rank, processes, options.num_workers),
        options.batch_size * options.gradient_accumulation_steps,
        options.num_workers,
        Collator(
            extractor,
            num_labels,
            options.mixup_rate,
            (options.seed, epoch, rank),
            options.speed_perturbation,
        ),
        shuffle_buffer=options.shuffle_buffer,
        draws=data.balanced_draws() if options.balanced_sampling else None,
        bucket_batches=options.bucket_batches,
        skipped=skipped,
        read_in_turn=data.train_clips <= options.shuffle_buffer,
    )
    for batch in islice(repeated(one_pass), skip, count_steps(options, data, processes)):
        if options.loss == "binary_cross_entropy" and batch["labels"].dim() == 1:
            batch["labels"] = one_hot(batch["labels"], num_labels).float()
        yield batch


def evaluation_batches(
    options: FinetuneOptions,
    data: LabelledAudio,
    extractor: ASTFeatureExtractor,
    skipped: SkippedSounds,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[Batch]:
    """The evaluation part, this process's share of it."""
    share = rank_share(data.evaluation, rank, processes, options.num_workers)
    collator = Collator(extractor, len(data.label_names))
    return batches(share, options.batch_size, options.num_workers, collator, skipped=skipped)


def augment(
    batch: Batch,
    options: FinetuneOptions,
    extractor: ASTFeatureExtractor,
    step: int,
    rank: int,
    processes: int,
) -> Batch:
    """FilterAugment, SpecAugment, noise and rolling of an optimizer step's batch, on its device.

    Drawn from a generator of this step alone: there is no state to keep. Its keys are above those
    of the loaders' (epoch, rank < processes).
    """
    inputs = batch["input_values"]
    generator = augmentation_generator(options.seed, step, processes + rank, inputs.device)
    if options.filter_augment:
        decibel = math.log(10) / 10 / (2 * extractor.std)  # in normalised log-mel
        inputs = filter_augment(inputs, options.filter_augment * decibel, generator=generator)
    # Hidden parts become the data's mean. (The original hides before it normalises, with a log-mel
    # of 0, which is as loud as sound gets.)
    inputs = spec_augment(inputs, options.time_mask, options.frequency_mask, generator=generator)
    if options.noise_level:
        inputs = add_noise(inputs, options.noise_level, generator)
    return {**batch, "input_values": roll(inputs, options.time_roll, generator)}


def parts_of(batch: Batch, size: int) -> list[Batch]:
    """A step's batch in parts of `size` clips: equal loss and gradients in less memory."""
    pieces = {key: value.split(size) for key, value in batch.items()}
    return [dict(zip(pieces, part, strict=True)) for part in zip(*pieces.values(), strict=True)]


def _in_step(data: Iterator[Batch], accelerator: Accelerator) -> Iterator[tuple[Batch, bool]]:
    """A process's batches and whether they count, for as long as any process has one.

    Where weights are cut up over processes, all must run the model equally often: those that have
    no batch left repeat their last one, which does not count.
    """
    batch: Batch | None = None
    while True:
        following = next(data, None)
        has_one = torch.tensor(float(following is not None), device=accelerator.device)
        if not accelerator.reduce(has_one):
            return
        batch = batch if following is None else following
        if batch is not None:
            yield batch, following is not None


@torch.no_grad()
def evaluate_model(
    model: nn.Module, data: Iterator[Batch], accelerator: Accelerator
) -> dict[str, float | None]:
    """Loss and metrics over all processes' clips, each counted once; None where undefined."""
    model.eval()
    config: Any = getattr(model, "module", model).config  # DDP wraps the model
    multi_label = config.problem_type == "multi_label_classification"
    scores: list[list[float]] = []
    references: list[Any] = []
    losses: list[float] = []
    bar = tqdm(
        desc="evaluating", unit="batch", leave=False, disable=not accelerator.is_main_process
    )
    for batch, counts in _in_step(data, accelerator):
        bar.update()
        batch = {key: value.to(accelerator.device) for key, value in batch.items()}
        targets = batch["labels"].tolist()
        if multi_label and batch["labels"].dim() == 1:
            batch["labels"] = one_hot(batch["labels"], config.num_labels).float()
        with accelerator.autocast():
            output = model(**batch)
        if not counts:
            continue
        references += targets
        logits = output.logits.float()
        scores += (logits.sigmoid() if multi_label else logits.softmax(dim=1)).tolist()
        losses.append(output.loss.item() * len(logits))
    bar.close()
    scores, references = gather_object(scores), gather_object(references)
    values = {
        "loss": sum(gather_object(losses)) / len(references),
        **compute_metrics(scores, references),
        "clips": len(references),
    }
    return {
        f"evaluation_{name}": value if math.isfinite(value) else None
        for name, value in values.items()
    }


def describe_epoch(record: dict[str, Any]) -> str:
    metric = headline(name.removeprefix("evaluation_") for name in record)
    value = record[f"evaluation_{metric}"]
    return (
        f"epoch {record['epoch']}: train loss {record['train_loss']:.3f}, "
        f"evaluation loss {record['evaluation_loss']:.3f}, {METRICS[metric].title} "
        + ("undefined" if value is None else f"{100 * value:.2f} %")
        + f", {record['seconds']:.0f} s"
    )


def trackable(record: dict[str, Any]) -> dict[str, float]:
    """What a tracker draws over the epochs."""
    return {name: value for name, value in record.items() if value is not None and name != "epoch"}
