"""The batches of a step, their augmentation, and the evaluation at an epoch's end.

(seed, epoch, rank) -> the epoch's batches, always the same, which makes resuming exact
(seed, step, rank)  -> the augmentation of a step
bags                -> one loss and one score per clip, pooled from its windows
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from tqdm.auto import tqdm

from feature_extraction import (
    ASTFeatureExtractor,
    add_noise,
    augmentation_generator,
    filter_augment,
    roll,
    spec_augment,
)
from modeling_ast import ASTFrameConfig
from modeling_ast.detection_ast import detection_loss
from modeling_ast.loss_ast import classification_loss
from modeling_ast.pooling_ast import pool_logits
from modeling_ast.scores_ast import scores_from_logits

from ..data.batches import Collator, FrameGrid, SkippedSounds, batches, rank_share, repeated
from ..data.labelled import LabelledAudio
from ..evaluation.metrics import METRICS, compute_metrics, headline
from .distil import Student
from .options import FinetuneOptions
from .teachers import Teacher

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
    frames: FrameGrid | None,
    epoch: int,
    skip: int = 0,
    rank: int = 0,
    processes: int = 1,
    teacher: Teacher | None = None,
) -> Iterator[Batch]:
    """An epoch's training batches in one process, one per optimizer step.

    They depend only on the arguments, so resuming after `skip` steps is exact. An epoch has
    `count_steps` of them in every process, however the clips are divided among processes and
    workers; some workers' last, incomplete batches may be left for another epoch.
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
            options.windows_per_clip,
            frames,
            None if teacher is None else teacher.stored,
            teacher is not None and bool(teacher.online),
        ),
        shuffle_buffer=options.shuffle_buffer,
        draws=data.balanced_draws() if options.balanced_sampling else None,
        bucket_batches=options.bucket_batches,
        skipped=skipped,
        read_in_turn=data.train_clips <= options.shuffle_buffer,
    )
    for batch in islice(repeated(one_pass), skip, count_steps(options, data, processes)):
        yield with_targets(batch, options, num_labels)


def with_targets(batch: Batch, options: FinetuneOptions, num_labels: int) -> Batch:
    """A batch whose labels are targets, where the loss is of each label by itself."""
    if options.loss == "binary_cross_entropy" and batch["labels"].dim() == 1:
        return {**batch, "labels": one_hot(batch["labels"], num_labels).float()}
    return batch


def evaluation_batches(
    options: FinetuneOptions,
    data: LabelledAudio,
    extractor: ASTFeatureExtractor,
    skipped: SkippedSounds,
    frames: FrameGrid | None,
    rank: int = 0,
    processes: int = 1,
    teacher: Teacher | None = None,
) -> Iterator[Batch]:
    """This process's share of the evaluation part: all windows of its clips.

    Args:
        teacher: gives the labels where the data has none.
    """
    share = rank_share(data.evaluation, rank, processes, options.num_workers)
    collator = Collator(
        extractor,
        len(data.label_names),
        frames=frames,
        answers=None if teacher is None else teacher.stored,
        keeps_waveforms=teacher is not None and bool(teacher.online),
    )
    of_share = batches(
        share, options.batch_size, options.num_workers, collator, skipped=skipped, whole=True
    )
    for batch in of_share:
        if teacher is not None:
            batch = teacher.with_answers(batch, extractor.sampling_rate)
            batch["labels"] = said_labels(batch["teacher_targets"], teacher)
        yield batch


def said_labels(targets: Tensor, teacher: Teacher) -> Tensor:
    """What a teacher said, as labels: those above a half, or the likeliest one."""
    if teacher.activation == "softmax":
        return targets.argmax(dim=-1)
    return (targets > 0.5).float()


def augment(
    batch: Batch,
    options: FinetuneOptions,
    extractor: ASTFeatureExtractor,
    step: int,
    rank: int,
    processes: int,
) -> Batch:
    """FilterAugment, SpecAugment, noise and rolling of an optimizer step's batch, on its device.

    Each step has its own generator, so there is no state to keep. Its keys are above the loaders'
    (epoch, rank < processes).
    """
    shape = batch["input_values"].shape
    inputs = batch["input_values"].flatten(0, -3)  # windows of bags one by one
    generator = augmentation_generator(options.seed, step, processes + rank, inputs.device)
    if options.filter_augment:
        decibel = math.log(10) / 10 / (2 * extractor.std)  # in normalised log-mel
        inputs = filter_augment(inputs, options.filter_augment * decibel, generator=generator)
    # Masked parts become the data's mean. (The original masks before normalising, with a log-mel of
    # 0, about as loud as sound gets.)
    inputs = spec_augment(
        inputs, options.time_mask or 0, options.frequency_mask or 0, generator=generator
    )
    if options.noise_level:
        inputs = add_noise(inputs, options.noise_level, generator)
    inputs = roll(inputs, options.time_roll, generator)
    return {**batch, "input_values": inputs.view(shape)}


def parts_of(batch: Batch, size: int) -> list[Batch]:
    """A step's batch in parts of `size` clips: same loss and gradients, less memory."""
    pieces = {key: value.split(size) for key, value in batch.items()}
    return [dict(zip(pieces, part, strict=True)) for part in zip(*pieces.values(), strict=True)]


def training_loss(model: nn.Module, batch: Batch, pooling: str, num_items_in_batch: Any) -> Tensor:
    """The loss of a plain batch, or of bags: windows whose pooled score is the clip's.

    Args:
        model: prepared for training.
        batch: if it has "window_weights" (B, N), it consists of bags.
        pooling: for bags; a frame model's is in its config.
        num_items_in_batch: see `classification_loss`.
    """
    student: Any = getattr(model, "module", model)  # DDP wraps the model
    if "embeddings" in batch:
        return student.loss_function(  # as in its `forward`
            batch["labels"],
            student.classifier(batch["embeddings"]),
            student.config,
            num_items_in_batch=num_items_in_batch,
        )
    if isinstance(student, Student):
        inputs = {key: batch[key] for key in ("input_values", "attention_mask") if key in batch}
        if "window_weights" in batch:
            is_there = batch["window_weights"] > 0  # (B, N)
            inputs = {key: values[is_there] for key, values in inputs.items()}
        return student.loss(model(**inputs), batch, num_items_in_batch, pooling)
    if "window_weights" not in batch:
        return model(**batch, num_items_in_batch=num_items_in_batch).loss
    weights, labels = batch["window_weights"], batch["labels"]
    is_there = weights > 0  # (B, N)
    windows = {
        key: batch[key][is_there] for key in ("input_values", "attention_mask") if key in batch
    }
    logits = model(**windows).logits
    bags = logits.new_zeros(*weights.shape, *logits.shape[1:])
    bags[is_there] = logits
    config = student.config
    if config.model_type == ASTFrameConfig.model_type:
        # The columns of all windows of a clip are those of one long window.
        is_sound = torch.zeros(*bags.shape[:3], dtype=torch.bool, device=bags.device)
        is_sound[is_there] = student.column_mask(
            windows["input_values"], windows.get("attention_mask")
        )
        return detection_loss(
            bags.flatten(1, 2),
            labels,
            batch["clip_labels"],
            is_sound.flatten(1, 2),
            config.window_pooling,
            num_items_in_batch,
        )
    pooled = pool_logits(bags, config.problem_type, pooling, weights)
    smoothing = config.label_smoothing if model.training else 0.0
    return classification_loss(pooled, labels, config.problem_type, num_items_in_batch, smoothing)


def _in_step(data: Iterator[Batch], accelerator: Accelerator) -> Iterator[tuple[Batch, bool]]:
    """A process's batches and whether they count, for as long as any process has one.

    If weights are sharded, all processes must run the model equally often: one that has run out of
    batches repeats its last one, which does not count.
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
    """Loss and metrics over all processes' clips, each counted once; None where undefined.

    A clip's windows are pooled by `config.window_pooling`. For a frame model, the metrics are those
    of its columns: each counts as a clip with its own labels.
    """
    model.eval()
    config: Any = getattr(model, "module", model).config  # DDP wraps the model
    clips: dict[int, _ScoredClip] = {}
    bar = tqdm(
        desc="evaluating", unit="batch", leave=False, disable=not accelerator.is_main_process
    )
    for batch, counts in _in_step(data, accelerator):
        bar.update()
        inputs = {
            key: batch[key].to(accelerator.device)
            for key in ("input_values", "attention_mask")
            if key in batch
        }
        with accelerator.autocast():
            if "embeddings" in batch:
                logits = _head(model)(batch["embeddings"].to(accelerator.device))
            else:
                logits = model(**inputs).logits
        if not counts:
            continue
        windows = zip(
            batch["clip"].tolist(), logits.float().cpu(), batch["labels"], batch["window_weights"],
            strict=True,
        )  # fmt: skip
        for number, of_window, label, weight in windows:
            clips.setdefault(number, _ScoredClip()).add(of_window, label, weight)
    bar.close()
    scored = list(clips.values())
    losses: list[float] = []
    scores: list[list[float]] = []
    references: list[Any] = []
    if scored:  # with few clips and many processes, some have none
        is_frame_model = config.model_type == ASTFrameConfig.model_type
        rows = _columns(scored) if is_frame_model else _pooled_clips(scored, config)
        losses, scores, references = _measured(*rows, config.problem_type)
    scores, references = gather_object(scores), gather_object(references)
    values = {
        "loss": sum(gather_object(losses)) / len(references),
        **compute_metrics(scores, references),
        "clips": len(gather_object([None] * len(scored))),
    }
    return {
        f"evaluation_{name}": value if math.isfinite(value) else None
        for name, value in values.items()
    }


def _head(model: Any) -> Any:
    return getattr(model, "module", model).classifier


@dataclass
class _ScoredClip:
    """The windows of a clip received so far."""

    logits: list[Tensor] = field(default_factory=list)  # (labels,) or (columns, labels) each
    labels: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor, label: Tensor, weight: Tensor) -> None:
        self.logits.append(logits)
        self.labels.append(label)
        self.weights.append(weight)


def _pooled_clips(clips: list[_ScoredClip], config: Any) -> tuple[Tensor, Tensor]:
    """Logits (clips, labels) and the clips' labels, as in the dataset."""
    pooling = config.window_pooling or "mean"
    logits = [
        clip.logits[0]
        if len(clip.logits) == 1
        else pool_logits(
            torch.stack(clip.logits), config.problem_type, pooling, torch.stack(clip.weights)
        )
        for clip in clips
    ]
    return torch.stack(logits), torch.stack([clip.labels[0] for clip in clips])


def _columns(clips: list[_ScoredClip]) -> tuple[Tensor, Tensor]:
    """Logits and labels (known columns, labels) of a frame model."""
    logits = [window for clip in clips for window in clip.logits]
    labels = [window for clip in clips for window in clip.labels]
    is_known = [(of_window >= 0).all(dim=1) for of_window in labels]
    return (
        torch.cat([window[known] for window, known in zip(logits, is_known, strict=True)]),
        torch.cat([window[known] for window, known in zip(labels, is_known, strict=True)]),
    )


def _measured(
    logits: Tensor, targets: Tensor, problem_type: str | None
) -> tuple[list[float], list[list[float]], list[Any]]:
    """Loss, scores and target of each row."""
    if problem_type != "multi_label_classification":
        per_row = cross_entropy(logits, targets, reduction="none")
        return per_row.tolist(), scores_from_logits(logits, problem_type).tolist(), targets.tolist()
    references = targets.tolist()
    if targets.dim() == 1:
        targets = one_hot(targets, logits.shape[1])
    per_row = binary_cross_entropy_with_logits(logits, targets.float(), reduction="none").mean(1)
    return per_row.tolist(), scores_from_logits(logits, problem_type).tolist(), references


def readable_time(seconds: float) -> str:
    """A duration, as precise as one wants to know it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


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
    """What a tracker plots over the epochs."""
    return {name: value for name, value in record.items() if value is not None and name != "epoch"}
