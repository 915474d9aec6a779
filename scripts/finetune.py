"""Fine-tune AST on labelled sound with a `transformers` Trainer, over streaming datasets.

    ast-finetune my_sounds/ --output_dir runs/my_sounds

Datasets, recipes, options, run folder and result are those of `ast-finetune-accelerate`; take this
one to build on `Trainer` and its callbacks. An interrupted run goes on, exactly, when the same
command is given again.

`Trainer` asks streams for `max_steps` and does not resume them past their first pass. Here it is
given a dataset of known length that makes each epoch's batches anew, one per optimizer step.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, IterableDataset
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from feature_extraction import ASTFeatureExtractor

from .common.arguments import parse_arguments, run_command
from .data.batches import SkippedSounds
from .data.labelled import LabelledAudio
from .training.folds import finetune_folds
from .training.optimisation import (
    current_result,
    learning_rate_factor,
    make_average,
    make_optimizer,
)
from .training.options import FinetuneArguments
from .training.run_folder import RunFolder
from .training.start import (
    check_sharded,
    choose_trained_weights,
    describe_data,
    describe_run,
    open_data,
    precision,
    save_model,
    start_model,
)
from .training.steps import (
    Batch,
    augment,
    count_steps,
    describe_epoch,
    epoch_batches,
    evaluate_model,
    evaluation_batches,
    parts_of,
    trackable,
)


class EpochBatches(IterableDataset):
    """The batches of `epoch`, one per optimizer step, as a dataset with a length."""

    def __init__(self, make_epoch: Callable[[int], Iterator[Batch]], steps: int):
        self.epoch = 1
        self._make_epoch = make_epoch
        self._steps = steps

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        return self._make_epoch(self.epoch)


class ASTTrainer(Trainer):
    """`Trainer` with our batches, augmentation, optimizer, evaluation and atomic checkpoints."""

    optimizer: Any
    lr_scheduler: Any
    control: Any

    def __init__(
        self,
        run: RunFolder,
        data: LabelledAudio,
        extractor: ASTFeatureExtractor,
        average: AveragedModel | None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs, processing_class=extractor)
        self.run, self.options, self.data, self.extractor = run, run.args, data, extractor
        self.average = average
        self.begin = time.perf_counter() - run.progress.seconds
        self.share = {"rank": self.args.process_index, "processes": self.args.world_size}
        self.steps_per_epoch = count_steps(self.options, data, self.args.world_size)
        self.skipped = SkippedSounds(
            self.options.max_corrupt, data.train_clips + data.evaluation_clips
        )
        make_epoch = partial(
            epoch_batches, self.options, data, extractor, self.skipped, **self.share
        )
        self.train_dataset = EpochBatches(make_epoch, self.steps_per_epoch)
        self.add_callback(_EveryEpoch(self))

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataset, batch_size=None)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model if model is None else model, self.options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            factor = partial(
                learning_rate_factor, args=self.options, steps_per_epoch=self.steps_per_epoch
            )
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, factor
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """A whole optimizer step's batch, in parts whose losses add up to its mean."""
        batch = self._prepare_inputs(inputs)
        clips = self.accelerator.reduce(torch.tensor(len(batch["labels"]), device=self.args.device))
        batch = augment(batch, self.options, self.extractor, self.state.global_step, **self.share)
        parts = parts_of(batch, self.options.batch_size)
        loss = torch.zeros((), device=self.args.device)
        for number, part in enumerate(parts, start=1):
            is_last = number == len(parts)
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                loss += super().training_step(model, part, num_items_in_batch)
        mean_loss = self.accelerator.reduce(loss, "mean").item()
        if not math.isfinite(mean_loss):
            raise ValueError(
                f"The loss is {mean_loss} in step {self.state.global_step + 1}. Lower "
                f"--learning_rate (it is {self.options.learning_rate:g})."
            )
        self.run.progress.add_step(mean_loss, int(clips), time.perf_counter() - self.begin)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """End an epoch: evaluate, record, keep the best."""
        scores = evaluate_model(
            current_result(self.model, self.average),
            evaluation_batches(self.options, self.data, self.extractor, self.skipped, **self.share),
            self.accelerator,
        )
        rate = float(self.lr_scheduler.get_last_lr()[-1])
        record = self.run.progress.end_epoch(scores, rate, time.perf_counter() - self.begin)
        is_best = self.run.record_epoch(record)
        self.log(trackable(record))
        if self.is_world_process_zero():
            self.run.write_records()
            print(describe_epoch(record))
        if is_best:
            self.run.save_best(self.accelerator, self.write_result)
        self.control.should_training_stop |= self.run.stops_early()
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, record
        )
        return record

    def write_result(self, folder: Path) -> None:
        weights = self.accelerator.get_state_dict(self.model_wrapped) if _is_sharded(self) else None
        if self.args.should_save:
            save_model(current_result(self.model, self.average), self.extractor, folder, weights)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Trainer's own checkpoint, in a folder that gets its name when it is whole."""

        def write(folder: Path) -> None:
            self.args.output_dir = str(folder)
            super(ASTTrainer, self)._save_checkpoint(model, trial)
            if self.average is not None and self.args.should_save:
                torch.save(self.average.state_dict(), folder / "average.pt")

        self.run.save_state(self.accelerator, self.state.global_step, write)


class _EveryEpoch(TrainerCallback):
    """Says when to evaluate and save, and averages weights."""

    def __init__(self, trainer: ASTTrainer):
        self.trainer = trainer
        self.options = trainer.options

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.train_dataset.epoch = 1 + state.global_step // self.trainer.steps_per_epoch

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.average is not None and self.options.ema_decay:
            self.trainer.average.update_parameters(self.trainer.model)
        step = state.global_step % self.trainer.steps_per_epoch
        control.should_save = step > 0 and step % self.options.save_steps == 0
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        epoch = state.global_step // self.trainer.steps_per_epoch
        last = self.options.num_epochs - self.options.averaged_epochs
        if self.trainer.average is not None and epoch > last:
            self.trainer.average.update_parameters(self.trainer.model)
        control.should_evaluate = control.should_save = True
        return control


class _Progress(ProgressCallback):
    """Trainer's bar, with loss and rate at its side instead of a line per log."""

    def __init__(self, run: RunFolder):
        super().__init__()
        self.run = run

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if state.is_world_process_zero:
            self.training_bar.set_postfix(self.run.progress.figures())

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


def _is_sharded(trainer: Trainer) -> bool:
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


def finetune(args: FinetuneArguments) -> dict[str, Any]:
    """Run the whole fine-tuning, or the rest of it; returns the last epoch's record.

    Raises:
        ValueError: for wrong paths, columns, labels or options, before any model is built, and
            when a checkpoint cannot be written.
    """
    data = open_data(args)
    mixed_precision = precision(args)
    training_arguments = TrainingArguments(
        output_dir=args.output_dir,
        num_train_epochs=args.num_epochs,
        per_device_train_batch_size=args.batch_size * args.gradient_accumulation_steps,
        max_grad_norm=args.max_grad_norm,
        bf16=mixed_precision == "bf16",
        fp16=mixed_precision == "fp16",
        seed=args.seed,
        remove_unused_columns=False,
        eval_strategy="no",  # our callback says when
        save_strategy="no",
        logging_strategy="no",
        report_to=args.report_to or "none",
    )
    run = RunFolder(args, "ast-finetune", training_arguments.world_size)
    if training_arguments.process_index == 0:
        print(describe_data(data))

    set_seed(args.seed)
    ast, extractor = start_model(args, data)
    model = choose_trained_weights(ast, args)
    average = make_average(model, args)
    if average is not None:
        average.to(training_arguments.device)
    trainer = ASTTrainer(run, data, extractor, average, model=model, args=training_arguments)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Progress(run))
    if _is_sharded(trainer):
        check_sharded(args)

    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        run.begin(describe_run(args, data, model, extractor))
    resume_from = None
    if run.newest_state is not None:
        if average is not None:
            average.load_state_dict(torch.load(run.newest_state / "average.pt", weights_only=True))
        (resume_from,) = map(str, run.newest_state.glob("checkpoint-*"))
        if trainer.is_world_process_zero():
            print(
                f"Going on with {run.path}: epoch {run.progress.epoch}, "
                f"step {run.progress.step + 1}"
            )
    if run.progress.epoch <= args.num_epochs and not run.stops_early():
        trainer.train(resume_from_checkpoint=resume_from)
    elif resume_from is not None:
        trainer._load_from_checkpoint(resume_from)
    run.finish(trainer.accelerator, trainer.write_result, trainer.skipped)
    if trainer.is_world_process_zero():
        print(f"Saved {run.checkpoint}. Try it: ast-classify FILE --model {run.checkpoint}")
    return run.progress.records[-1]


def main() -> None:
    logging.disable_progress_bar()  # transformers' own, for loading and saving

    def command() -> None:
        finetune_folds(
            finetune,
            parse_arguments(
                FinetuneArguments, "dataset", "Fine-tune AST on labelled sound (Trainer)."
            ),
        )

    run_command("ast-finetune", command)


if __name__ == "__main__":
    main()
