"""A fine-tuning run: everything that the loops of both commands share.

`open_run` returns a `TrainingRun`; with_trainer.py and with_accelerate.py decide when to call which
of its methods.

    data, model, extractor, average         what it works on
    folder, progress                        where it is kept, how far it is
    batches -> augmented -> parts -> loss   an optimizer step
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.utils import logging

from ..common.lock import hold
from ..data.batches import Collator, SkippedSounds, repeated
from ..data.labelled import LabelledAudio
from .choices import choices, choose, describe_choices
from .distil import Student, make_student
from .embedded import Embedded, is_constant
from .optimisation import learning_rate_factor, make_average, make_optimizer
from .options import FinetuneOptions
from .run_folder import Progress, RunFolder
from .start import (
    check_sharded,
    choose_trained_weights,
    describe_data,
    describe_device,
    describe_run,
    describe_start,
    describe_teacher,
    describe_windows,
    frame_grid,
    keep_old_head,
    open_data,
    save_model,
    start_model,
    with_teachers_labels,
)
from .state import TrainingState
from .steps import (
    Batch,
    augment,
    count_steps,
    describe_epoch,
    epoch_batches,
    evaluate_model,
    evaluation_batches,
    parts_of,
    readable_time,
    training_loss,
    with_targets,
)
from .teachers import Teacher, open_teacher


@contextlib.contextmanager
def open_run(
    options: FinetuneOptions, command: str, rank: int, processes: int, device: torch.device
) -> "Iterator[TrainingRun]":
    """Begin or resume a run, alone in its folder.

    Args:
        options, command, rank, processes, device: see `TrainingRun`.

    Raises:
        ValueError: as for `open_data` and `TrainingRun`, and if another process has the folder.
    """
    data = open_data(options)  # first: if this fails, no folder is created
    # The first process holds the lock for all.
    with hold(Path(options.output)) if rank == 0 else contextlib.nullcontext():
        yield TrainingRun(options, data, command, rank, processes, device)


_TIMED_STEPS = 10
_EVALUATION_COST = 0.4  # of a clip, over that of training on it


class TrainingRun:
    """Data, model, average, run folder and progress of a run, begun or resumed.

    Args:
        options: the run's.
        data: what it trains on.
        command: the one that runs it, for messages; it cannot resume another command's run.
        rank, processes: this process among those training together.
        device: where this process computes.

    Raises:
        ValueError: for a folder that holds another run (before any model is built), and for weights
            that cannot be loaded.
    """

    def __init__(
        self,
        options: FinetuneOptions,
        data: LabelledAudio,
        command: str,
        rank: int,
        processes: int,
        device: torch.device,
    ):
        self.is_main = rank == 0
        self.data = data
        self.folder = RunFolder(options, command, processes, self.data.fingerprint)
        given, options = options, choose(options, data)
        self.options = options
        self._chosen = choices(given, options)
        self.skipped = SkippedSounds(
            options.max_corrupt, self.data.train_clips + self.data.evaluation_clips
        )
        self.say(describe_data(self.data))
        self.say(describe_device())
        self.teacher = open_teacher(options, self.data, device)
        self._is_unlabelled = self.teacher is not None and not self.data.label_names
        if self.teacher is not None and self._is_unlabelled:
            options = self.options = replace(options, teacher_share=1.0)
            self.data = with_teachers_labels(self.data, self.teacher)
        logging.disable_progress_bar()  # of transformers, for loading and saving
        self.say(describe_start(options))
        set_seed(options.seed)
        ast, self.extractor = start_model(options, self.data)
        self.folder.settle_statistics(self.extractor)
        self.frames = frame_grid(ast, options)
        self.say(describe_choices(self._chosen, options))
        long_clips, text = describe_windows(options, self.data, self.extractor)
        self.say(text)
        self.model: Any = choose_trained_weights(ast, options)
        if self.teacher is not None:
            self.model = self._student(self.model, self.teacher)
        # Before the model is prepared: mixed precision gives it a `forward` that a copy would
        # share, and that would run the original's weights.
        self.average = make_average(self.model, options)
        if self.average is not None:
            self.average.to(device)
        self.steps_per_epoch = count_steps(options, self.data, processes)
        self._rank, self._processes = rank, processes
        self._embedded: Embedded | None = None
        if processes == 1 and is_constant(options, self.model, long_clips):
            self.say("Nothing random comes before the frozen encoder: it runs only once per clip")
            self._embedded = Embedded(
                self.model,
                device,
                partial(self._whole_clips, replace(self.data, evaluation=self.data.train)),
                partial(self._whole_clips, self.data),
                options.seed,
            )
        self._begin = time.perf_counter() - self.progress.seconds
        self._steps_timed, self._first_step_at = 0, 0.0

    def _student(self, model: Any, teacher: Teacher) -> Student:
        embeddings = None
        if teacher.embedding_size and self.options.embedding_weight:
            collator = Collator(self.extractor, len(self.data.label_names))
            embeddings = teacher.measure_embeddings(self.data, collator)
        student = make_student(model, teacher, self.options, embeddings)
        is_head_old = keep_old_head(student, self.options)
        self.say(describe_teacher(self.options, teacher, student, is_head_old))
        return student

    @property
    def progress(self) -> Progress:
        return self.folder.progress

    @property
    def seconds(self) -> float:
        """Seconds of work so far, without interruptions."""
        return time.perf_counter() - self._begin

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return (self.progress.epoch - 1) * self.steps_per_epoch + self.progress.step

    @property
    def is_over(self) -> bool:
        return self.progress.epoch > self.options.num_epochs or self.folder.stops_early()

    def say(self, text: str) -> None:
        if self.is_main and text:
            print(text)

    @property
    def resumes(self) -> Path | None:
        """The state the run resumes from."""
        return self.folder.newest_state

    # Before the first step

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer(model, self.options)

    def make_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        def factor(step: int) -> float:
            return learning_rate_factor(step, self.options, self.steps_per_epoch)

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def begin(self, accelerator: Accelerator) -> None:
        """Write down what the run is made with, or say where it resumes.

        Raises:
            ValueError: for options that do not work with sharded weights.
        """
        if _is_sharded(accelerator):
            check_sharded(self.options)
        accelerator.wait_for_everyone()  # all have read the folder
        if self.is_main:
            about = describe_run(self.options, self.data, self.model, self.extractor)
            self.folder.begin({**about, "chosen": self._chosen})
        if self.resumes is not None:
            self.say(
                f"Resuming {self.folder.path}: epoch {self.progress.epoch}, "
                f"step {self.progress.step + 1}"
            )

    # An optimizer step

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """An epoch's batches of this process, one per optimizer step, after the first `skip`."""
        if self._embedded is not None:
            options = self.options
            size = options.batch_size * options.gradient_accumulation_steps
            one_pass = partial(self._embedded.epoch, epoch, size)
            steps = islice(repeated(one_pass), skip, self.steps_per_epoch)
            return (with_targets(batch, options, len(self.data.label_names)) for batch in steps)
        return epoch_batches(
            self.options,
            self.data,
            self.extractor,
            self.skipped,
            self.frames,
            epoch,
            skip,
            self._rank,
            self._processes,
            self.teacher,
        )

    def _whole_clips(self, data: LabelledAudio) -> Iterator[Batch]:
        return evaluation_batches(
            self.options,
            data,
            self.extractor,
            self.skipped,
            self.frames,
            self._rank,
            self._processes,
            self.teacher if self._is_unlabelled else None,
        )

    def augmented(self, batch: Batch, step: int) -> Batch:
        """A step's batch as the student gets it; an online teacher gets it first."""
        if self.teacher is not None:
            batch = self.teacher.with_answers(batch, self.extractor.sampling_rate)
        if self._is_unlabelled:
            batch = {**batch, "labels": batch["teacher_targets"]}
        if self._embedded is not None:
            return batch
        return augment(batch, self.options, self.extractor, step, self._rank, self._processes)

    def parts(self, batch: Batch) -> list[Batch]:
        """A step's batch in parts, one per forward pass."""
        return parts_of(batch, self.options.batch_size)

    def loss(self, model: nn.Module, part: Batch, num_items_in_batch: Any) -> Tensor:
        """The loss of a part; those of a step's parts add up to its mean."""
        pooling = self.options.window_pooling or "mean"
        return training_loss(model, part, pooling, num_items_in_batch)

    def end_step(self, loss: float, clips: int) -> None:
        """Count an optimizer step over `clips` clips with this mean loss, over all processes.

        Raises:
            ValueError: if the loss is not finite.
        """
        if not math.isfinite(loss):
            raise ValueError(
                f"The loss is {loss} in epoch {self.progress.epoch}, step "
                f"{self.progress.step + 1}. Lower --learning_rate (it is "
                f"{self.options.learning_rate:g})."
            )
        self.progress.add_step(loss, clips, self.seconds)
        self._steps_timed += 1
        if self._steps_timed == 1:
            self._first_step_at = self.seconds  # it takes longer than the others
        elif self._steps_timed == 1 + _TIMED_STEPS and self.is_main:
            tqdm.write(self._time_left())

    def _time_left(self) -> str:
        """What training and evaluation will take, after some steps."""
        steps = self.options.num_epochs * self.steps_per_epoch - self.step
        per_step = (self.seconds - self._first_step_at) / _TIMED_STEPS
        per_epoch = per_step * self.steps_per_epoch
        share = self.data.evaluation_clips / self.data.train_clips
        evaluated = _EVALUATION_COST * share * per_epoch * (
            self.options.num_epochs - self.progress.epoch + 1
        )  # fmt: skip
        return (
            f"About {readable_time(steps * per_step + evaluated)} to go: {steps} steps, "
            f"{per_step:.2f} s each, and an evaluation after each epoch"
        )

    def average_after_step(self) -> None:
        """With --ema_decay: call after the optimizer has changed the weights."""
        if self.average is not None and self.options.ema_decay:
            self.average.update_parameters(self.model)

    def saves_at(self, step: int) -> bool:
        """Whether to keep a state after this step of an epoch; the last step's is always kept."""
        return 0 < step < self.steps_per_epoch and step % self.options.save_steps == 0

    def state(self, model: nn.Module, accelerator: Accelerator) -> TrainingState:
        """What is saved and restored in addition to the progress, for the prepared model."""
        is_sharded = _is_sharded(accelerator)
        return TrainingState(
            model if is_sharded else self.model, self.average, self._rank, is_sharded
        )

    def save_state(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        scheduler: Any,
        write_more: Callable[[Path], None] | None = None,
    ) -> None:
        """Keep a state to resume from; every process must call it.

        Args:
            write_more: writes more files into the state's folder, in every process.
        """
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            return  # its states are pickles, which can hold code

        def write(folder: Path) -> None:
            self.state(model, accelerator).save(folder, optimizer, scheduler, accelerator.scaler)
            if write_more is not None:
                write_more(folder)

        self.folder.save_state(accelerator, self.step, write)

    # An epoch's end

    def average_after_epoch(self, epoch: int) -> None:
        """With --averaged_epochs: call at an epoch's end, before evaluation."""
        if self.average is not None and epoch > (
            self.options.num_epochs - self.options.averaged_epochs
        ):
            self.average.update_parameters(self.model)

    def result(self, model: nn.Module) -> nn.Module:
        """What to evaluate and save: the averaged weights, once there are any."""
        average = self.average
        return model if average is None or not int(average.n_averaged) else average.module

    def end_epoch(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        learning_rate: float,
        say: Callable[[str], object] = print,
    ) -> dict[str, Any]:
        """Evaluate, record, and keep the result if it is the best so far; returns the record."""
        batches = (
            self._whole_clips(self.data) if self._embedded is None else self._embedded.evaluation()
        )
        scores = evaluate_model(self.result(model), batches, accelerator)
        record = self.progress.end_epoch(scores, learning_rate, self.seconds)
        is_best = self.folder.record_epoch(record)
        if self.is_main:
            self.folder.write_records()
            say(describe_epoch(record))
        if is_best:
            self.folder.save_best(accelerator, partial(self._write_result, model, accelerator))
        return record

    def _write_result(self, model: nn.Module, accelerator: Accelerator, folder: Path) -> None:
        """Save the result as a checkpoint, gathered if it is sharded over processes."""
        weights = accelerator.get_state_dict(model) if _is_sharded(accelerator) else None
        if self.is_main:
            save_model(self.result(self.model), self.extractor, folder, weights)

    def finish(self, model: nn.Module, accelerator: Accelerator) -> dict[str, Any]:
        """Leave the result as the run folder's `checkpoint`; returns the last epoch's record."""
        write = partial(self._write_result, model, accelerator)
        self.folder.finish(accelerator, write, self.skipped)
        checkpoint = self.folder.checkpoint
        self.say(f"Saved {checkpoint}. Try it: ast-classify FILE --model {checkpoint}")
        return self.progress.records[-1]


def _is_sharded(accelerator: Accelerator) -> bool:
    """Whether weights, gradients or moments are sharded over processes."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
