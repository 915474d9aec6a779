"""The plain loop of `ast-finetune-accelerate`, from top to bottom."""

import contextlib
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from .options import FinetuneOptions
from .run import TrainingRun, open_run
from .start import precision
from .steps import trackable


def finetune(options: FinetuneOptions) -> dict[str, Any]:
    """Run the whole fine-tuning, or the rest of it; returns the last epoch's record.

    Raises:
        ValueError: for wrong paths, columns, labels or options, before any model is built, and if a
            checkpoint cannot be written.
    """
    accelerator = Accelerator(
        mixed_precision=precision(options), log_with=options.report_to, project_dir=options.output
    )
    with open_run(
        options,
        "ast-finetune-accelerate",
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.device,
    ) as run:
        return _train(run, accelerator)


def _train(run: TrainingRun, accelerator: Accelerator) -> dict[str, Any]:
    options = run.options
    if accelerator.state.deepspeed_plugin is not None:  # it asks for a loader, or for this
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = options.batch_size
    optimizer = run.make_optimizer(run.model)
    scheduler = run.make_scheduler(optimizer)
    model, optimizer = accelerator.prepare(run.model, optimizer)
    run.model = accelerator.unwrap_model(model)
    run.begin(accelerator)
    if options.report_to is not None:
        accelerator.init_trackers("ast")
    if run.resumes is not None:
        state = run.state(model, accelerator)
        state.load_weights(run.resumes)
        state.load_optimizer(run.resumes, optimizer, scheduler, accelerator.scaler)
        state.load_random(run.resumes)
    progress = run.progress
    with tqdm(
        total=options.num_epochs * run.steps_per_epoch,
        initial=run.step,
        unit="step",
        disable=not run.is_main,
    ) as bar:
        while not run.is_over:
            epoch = progress.epoch
            bar.set_description(f"epoch {epoch}/{options.num_epochs}")
            model.train()
            for batch in run.batches(epoch, skip=progress.step):
                batch = {key: value.to(accelerator.device) for key, value in batch.items()}
                batch = run.augmented(batch, run.step)
                labels = batch["labels"]
                # Over all processes: gradients are averaged, so each process divides by the mean.
                clips = accelerator.reduce(torch.tensor(len(labels), device=labels.device))
                items = torch.tensor(float(labels.numel()), device=labels.device)
                items = accelerator.reduce(items, "mean")
                step_loss = torch.zeros((), device=labels.device)
                parts = run.parts(batch)
                for number, part in enumerate(parts, start=1):
                    is_last = number == len(parts)
                    with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                        loss = run.loss(model, part, items)
                        accelerator.backward(loss)
                    step_loss += loss.detach()
                mean_loss = accelerator.reduce(step_loss, "mean").item()
                if options.max_grad_norm:
                    accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                run.average_after_step()

                run.end_step(mean_loss, int(clips))
                bar.set_postfix(progress.figures())
                bar.update()
                if run.saves_at(progress.step):
                    run.save_state(accelerator, model, optimizer, scheduler)

            run.average_after_epoch(epoch)
            rate = float(scheduler.get_last_lr()[-1])
            record = run.end_epoch(model, accelerator, rate, say=bar.write)
            accelerator.log(trackable(record), step=epoch)
            run.save_state(accelerator, model, optimizer, scheduler)

    last = run.finish(model, accelerator)
    accelerator.end_training()
    return last
