"""The `Trainer` of `ast-finetune`, with our batches, augmentation, evaluation and states.

`Trainer` needs `max_steps` for streams and cannot resume them past their first pass. It therefore
gets a dataset of known length that makes each epoch's batches anew, one per optimizer step.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TrainerState

from .options import FinetuneOptions
from .run import TrainingRun, open_run
from .start import precision
from .steps import Batch, trackable


class EpochBatches(IterableDataset):
    """The batches of `epoch`, one per optimizer step, as a dataset of known length."""

    def __init__(self, run: TrainingRun):
        self.epoch = 1
        self._run = run

    def __len__(self) -> int:
        return self._run.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        return self._run.batches(self.epoch)


class ASTTrainer(Trainer):
    """`Trainer` with our batches, augmentation, optimizer, evaluation and atomic checkpoints."""

    optimizer: Any
    lr_scheduler: Any
    control: Any

    def __init__(self, run: TrainingRun, **kwargs: Any):
        super().__init__(**kwargs, model=run.model, processing_class=run.extractor)
        self.run = run
        self.train_dataset = EpochBatches(run)
        self.add_callback(_EveryEpoch(self))

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataset, batch_size=None)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self.run.make_optimizer(self.model if model is None else model)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = self.run.make_scheduler(optimizer or self.optimizer)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """A whole optimizer step's batch, in parts whose losses add up to its mean."""
        batch = self._prepare_inputs(inputs)
        clips = self.accelerator.reduce(torch.tensor(len(batch["labels"]), device=self.args.device))
        parts = self.run.parts(self.run.augmented(batch, self.state.global_step))
        loss = torch.zeros((), device=self.args.device)
        for number, part in enumerate(parts, start=1):
            is_last = number == len(parts)
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                loss += super().training_step(model, part, num_items_in_batch)
        self.run.end_step(self.accelerator.reduce(loss, "mean").item(), int(clips))
        return loss

    def floating_point_ops(self, inputs: Batch) -> int:
        """Not counted: a batch of embeddings has no input to count by."""
        return 0

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """The loss of a part of a step's batch."""
        is_plain = "input_values" in inputs and "window_weights" not in inputs
        if is_plain and self.run.teacher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = self.run.loss(model, inputs, num_items_in_batch)
        # As in Trainer: the count covers all processes, whose gradients are averaged.
        return loss * self.accelerator.num_processes

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """End an epoch: evaluate, record, keep the best."""
        rate = float(self.lr_scheduler.get_last_lr()[-1])
        record = self.run.end_epoch(self.model_wrapped, self.accelerator, rate)
        self.log(trackable(record))
        self.control.should_training_stop |= self.run.is_over
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, record
        )
        return record

    # Trainer's own states are pickles, and it does not check whether anything is missing. Ours
    # replace them wherever it writes and reads.

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        def write_more(folder: Path) -> None:
            if self.run.is_main:
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

        self.run.save_state(
            self.accelerator, self.model_wrapped, self.optimizer, self.lr_scheduler, write_more
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state = self.run.state(self.model if model is None else model, self.accelerator)
        state.load_weights(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.run.state(self.model_wrapped, self.accelerator).load_optimizer(
                Path(checkpoint), self.optimizer, self.lr_scheduler, self.accelerator.scaler
            )

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Restored along with the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.run.state(self.model, self.accelerator).load_random(Path(checkpoint))


class _EveryEpoch(TrainerCallback):
    """Decides when to evaluate and save, and averages weights."""

    def __init__(self, trainer: ASTTrainer):
        self.trainer, self.run = trainer, trainer.run

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.train_dataset.epoch = 1 + state.global_step // self.run.steps_per_epoch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.run.average_after_step()
        control.should_save = self.run.saves_at(state.global_step % self.run.steps_per_epoch)
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.run.average_after_epoch(state.global_step // self.run.steps_per_epoch)
        control.should_evaluate = control.should_save = True
        return control


class _Progress(ProgressCallback):
    """Trainer's progress bar, with loss and speed next to it instead of a line per log."""

    def __init__(self, run: TrainingRun):
        super().__init__()
        self.run = run

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if state.is_world_process_zero:
            self.training_bar.set_postfix(self.run.progress.figures())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        pass


def _check_trainer_state(path: Path, step: int) -> None:
    """Check Trainer's own file of step counts, which must be intact and agree with ours.

    Raises:
        ValueError: if it is damaged or disagrees.
    """
    try:
        counted = TrainerState.load_from_json(str(path)).global_step
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"Cannot resume from {path}: {error}") from error
    if counted != step:
        raise ValueError(f"Cannot resume from {path}: it is from step {counted}, not {step}.")


def finetune(options: FinetuneOptions) -> dict[str, Any]:
    """Run the whole fine-tuning, or the rest of it; returns the last epoch's record.

    Raises:
        ValueError: for wrong paths, columns, labels or options, before any model is built, and if a
            checkpoint cannot be written.
    """
    mixed_precision = precision(options)
    arguments = TrainingArguments(
        output_dir=options.output,
        max_grad_norm=options.max_grad_norm,
        bf16=mixed_precision == "bf16",
        fp16=mixed_precision == "fp16",
        seed=options.seed,
        remove_unused_columns=False,
        eval_strategy="no",  # our callback decides
        save_strategy="no",
        logging_strategy="no",
        report_to=options.report_to or "none",
    )
    with open_run(
        options, "ast-finetune", arguments.process_index, arguments.world_size, arguments.device
    ) as run:
        options = run.options  # with what it chose itself
        arguments.num_train_epochs = options.num_epochs
        arguments.per_device_train_batch_size = (
            options.batch_size * options.gradient_accumulation_steps
        )
        trainer = ASTTrainer(run, args=arguments)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_Progress(run))
        run.begin(trainer.accelerator)
        if run.resumes is not None:
            _check_trainer_state(run.resumes / TRAINER_STATE_NAME, run.step)
        if not run.is_over:
            trainer.train(resume_from_checkpoint=str(run.resumes) if run.resumes else None)
        elif run.resumes is not None:  # killed after its last epoch
            trainer._load_from_checkpoint(str(run.resumes))
        return run.finish(trainer.model_wrapped, trainer.accelerator)
