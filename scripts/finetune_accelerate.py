"""Fine-tune AST on labelled sound with a plain Accelerate loop over streaming datasets.

    ast-finetune-accelerate my_sounds/ --output_dir runs/my_sounds

`my_sounds` has one sub-folder of sounds per class; a Parquet or tar file, a folder of them, or the
name of a Hub dataset do as well. A recipe sets options, the command line overrides it:

    ast-finetune-accelerate esc10.yaml path/to/esc10 --num_epochs 5

An interrupted run goes on, exactly, when the same command is given again. `ast-finetune` does the
same with a `Trainer`. The run folder is described in `run_folder.py`.
"""

import contextlib
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers.utils import logging

from .common.arguments import parse_arguments, run_command
from .data.batches import SkippedSounds
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
    augment,
    count_steps,
    describe_epoch,
    epoch_batches,
    evaluate_model,
    evaluation_batches,
    parts_of,
    trackable,
)


def finetune(args: FinetuneArguments) -> dict[str, Any]:
    """Run the whole fine-tuning, or the rest of it; returns the last epoch's record.

    Raises:
        ValueError: for wrong paths, columns, labels or options, before any model is built, and
            when a checkpoint cannot be written.
    """
    data = open_data(args)
    accelerator = Accelerator(
        mixed_precision=precision(args), log_with=args.report_to, project_dir=args.output_dir
    )
    rank, world = accelerator.process_index, accelerator.num_processes
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if sharded:
        check_sharded(args)
    if accelerator.state.deepspeed_plugin is not None:  # it asks for a loader, or for this
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = args.batch_size
    run = RunFolder(args, "ast-finetune-accelerate", world)
    progress = run.progress
    skipped = SkippedSounds(args.max_corrupt, data.train_clips + data.evaluation_clips)
    accelerator.print(describe_data(data))

    set_seed(args.seed)
    ast, extractor = start_model(args, data)
    model = choose_trained_weights(ast, args)
    optimizer = make_optimizer(model, args)
    steps_per_epoch = count_steps(args, data, world)
    factor = partial(learning_rate_factor, args=args, steps_per_epoch=steps_per_epoch)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    # Before `prepare`, which for mixed precision gives the model a `forward` that a copy of the
    # model would share: it would run the original's weights.
    average = make_average(model, args)
    if average is not None:
        average.to(accelerator.device)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    plain_model = accelerator.unwrap_model(model)

    def write_state(folder: Path) -> None:
        accelerator.save_state(str(folder))
        if average is not None and accelerator.is_main_process:
            torch.save(average.state_dict(), folder / "average.pt")

    def write_result(folder: Path) -> None:
        weights = accelerator.get_state_dict(model) if sharded else None
        if accelerator.is_main_process:
            save_model(current_result(plain_model, average), extractor, folder, weights)

    if run.newest_state is not None:
        accelerator.load_state(str(run.newest_state))
        if average is not None:
            average.load_state_dict(torch.load(run.newest_state / "average.pt", weights_only=True))
        accelerator.print(
            f"Going on with {run.path}: epoch {progress.epoch}, step {progress.step + 1}"
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        run.begin(describe_run(args, data, plain_model, extractor))
    if args.report_to is not None:
        accelerator.init_trackers("ast")
    begin = time.perf_counter() - progress.seconds
    with tqdm(
        total=args.num_epochs * steps_per_epoch,
        initial=(progress.epoch - 1) * steps_per_epoch + progress.step,
        unit="step",
        disable=not accelerator.is_main_process,
    ) as bar:
        while progress.epoch <= args.num_epochs and not run.stops_early():
            epoch = progress.epoch
            bar.set_description(f"epoch {epoch}/{args.num_epochs}")
            model.train()
            for batch in epoch_batches(
                args, data, extractor, skipped, epoch, progress.step, rank, world
            ):
                step = (epoch - 1) * steps_per_epoch + progress.step
                batch = {key: value.to(accelerator.device) for key, value in batch.items()}
                batch = augment(batch, args, extractor, step, rank, world)
                labels = batch["labels"]
                # Over all processes. Their gradients are averaged, so each divides by the mean.
                clips = accelerator.reduce(torch.tensor(len(labels), device=labels.device))
                items = torch.tensor(float(labels.numel()), device=labels.device)
                items = accelerator.reduce(items, "mean")
                step_loss = torch.zeros((), device=labels.device)
                parts = parts_of(batch, args.batch_size)
                for number, part in enumerate(parts, start=1):
                    is_last = number == len(parts)
                    with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                        loss = model(**part, num_items_in_batch=items).loss
                        accelerator.backward(loss)
                    step_loss += loss.detach()
                mean_loss = accelerator.reduce(step_loss, "mean").item()
                if not math.isfinite(mean_loss):
                    raise ValueError(
                        f"The loss is {mean_loss} in epoch {epoch}, step {progress.step + 1}. "
                        f"Lower --learning_rate (it is {args.learning_rate:g})."
                    )
                if args.max_grad_norm:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                if average is not None and args.ema_decay:
                    average.update_parameters(plain_model)

                progress.add_step(mean_loss, int(clips), time.perf_counter() - begin)
                bar.set_postfix(progress.figures())
                bar.update()
                if progress.step % args.save_steps == 0 and progress.step < steps_per_epoch:
                    run.save_state(accelerator, step + 1, write_state)

            if average is not None and epoch > args.num_epochs - args.averaged_epochs:
                average.update_parameters(plain_model)
            scores = evaluate_model(
                current_result(model, average),
                evaluation_batches(args, data, extractor, skipped, rank, world),
                accelerator,
            )
            record = progress.end_epoch(
                scores, float(scheduler.get_last_lr()[-1]), time.perf_counter() - begin
            )
            is_best = run.record_epoch(record)
            accelerator.log(trackable(record), step=epoch)
            if accelerator.is_main_process:
                bar.write(describe_epoch(record))
                run.write_records()
            if is_best:
                run.save_best(accelerator, write_result)
            run.save_state(accelerator, epoch * steps_per_epoch, write_state)

    run.finish(accelerator, write_result, skipped)
    accelerator.print(f"Saved {run.checkpoint}. Try it: ast-classify FILE --model {run.checkpoint}")
    accelerator.end_training()
    return progress.records[-1]


def main() -> None:
    logging.disable_progress_bar()  # transformers' own, for loading and saving

    def command() -> None:
        finetune_folds(
            finetune,
            parse_arguments(
                FinetuneArguments, "dataset", "Fine-tune AST on labelled sound (Accelerate)."
            ),
        )

    run_command("ast-finetune-accelerate", command)


if __name__ == "__main__":
    main()
