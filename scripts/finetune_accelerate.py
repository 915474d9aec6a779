"""Fine-tune AST on labelled sound with a plain Accelerate loop over streaming datasets.

    ast-finetune-accelerate my_sounds/ --output_dir runs/my_sounds

`my_sounds` has one sub-folder of sounds per class; a Parquet or tar file, a folder of them, or the
name of a Hub dataset do as well. A recipe sets options, the command line overrides it:

    ast-finetune-accelerate esc10.yaml path/to/esc10 --num_epochs 5

The run folder holds `arguments.yaml` (itself a recipe), `metrics.jsonl` (a line per epoch),
`learning_curve.png` and `checkpoint/`: weights, config with label names, preprocessor_config.json.
"""

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from datasets.distributed import split_dataset_by_node
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm
from transformers import AutoConfig, get_scheduler
from transformers.utils import logging

from feature_extraction import (
    ASTFeatureExtractor,
    augmentation_generator,
    roll,
    spec_augment,
)
from modeling_ast import ASTConfig, ASTForAudioClassification
from modeling_ast.conversion_ast import vision_config

from .arguments import parse_arguments, run_command
from .batches import Collator, batches, repeated
from .data import open_labelled_audio
from .dataset_stats import measure_sounds
from .metrics import Accuracy

_MEASURED_CLIPS = 200  # for the normalisation of a model that comes without statistics


def _option(default: Any, help: str) -> Any:  # noqa: A002
    return field(default=default, metadata={"help": help})


@dataclass
class FinetuneArguments:
    """Options of a run. Lengths in frames are of 10 ms."""

    dataset: str = _option("", "folder of class folders, Parquet or tar file(s), or a Hub dataset")
    dataset_config: str | None = _option(None, "configuration of the Hub dataset")
    audio_column: str = _option("audio", "column with the sound")
    label_column: str = _option("label", "column with the class, a name or an index")
    train_split: str = _option("train", "split to train on")
    evaluation_split: str | None = _option(None, "split to evaluate on")
    fold_column: str | None = _option(None, "column with the fold, instead of a split")
    evaluation_fold: str | None = _option(None, "the fold to evaluate on; the others train")
    evaluation_fraction: float = _option(0.2, "held out when there is no split and no fold")

    model: str = _option(
        "MIT/ast-finetuned-audioset-10-10-0.4593",
        "start: an AST checkpoint (folder or Hub name), DeiT/ViT weights (file or folder), or "
        "'scratch' for random weights",
    )
    hidden_size: int = _option(192, "width, from scratch only")
    num_hidden_layers: int = _option(12, "depth, from scratch only")
    num_attention_heads: int = _option(3, "heads, from scratch only")
    max_length: int = _option(1024, "frames per clip: longer clips are cut, shorter ones padded")
    num_mel_bins: int = _option(128, "mel bins")
    frequency_stride: int = _option(10, "mel bins between patches")
    time_stride: int = _option(10, "frames between patches")
    mean: float | None = _option(None, "of the log-mel values; default: measured, or the model's")
    std: float | None = _option(None, "of the log-mel values; default: measured, or the model's")

    output_dir: str = _option("runs/ast", "run folder")
    overwrite: bool = _option(False, "replace a finished run in output_dir")
    num_epochs: int = _option(10, "passes over the training part")
    batch_size: int = _option(16, "clips per step and process")
    gradient_accumulation_steps: int = _option(1, "batches per optimizer step")
    averaged_epochs: int = _option(1, "the result is the mean of the weights after the last epochs")
    learning_rate: float = _option(1e-4, "peak, after the warm-up")
    warmup_ratio: float = _option(0.1, "share of the steps with a rising learning rate")
    lr_scheduler_type: str = _option("cosine", "decay after the warm-up: cosine, linear, constant…")
    weight_decay: float = _option(0.01, "AdamW's, on matrices only")
    max_grad_norm: float = _option(1.0, "gradients are scaled down to this norm")
    mixup_rate: float = _option(0.0, "share of the clips mixed with another one of the batch")
    time_mask: int = _option(96, "SpecAugment: hide up to this many frames")
    frequency_mask: int = _option(24, "SpecAugment: hide up to this many mel bins")
    time_patchout: int = _option(0, "patch columns dropped per clip: cheaper steps, less overfit")
    frequency_patchout: int = _option(0, "patch rows dropped per clip")
    label_smoothing: float = _option(0.0, "part of the target spread over all classes")
    time_roll: int = _option(0, "shift clips in a circle by up to this many frames")
    shuffle_buffer: int = _option(1000, "clips that a random next one is drawn from")
    num_workers: int = _option(2, "processes that decode and featurise")
    mixed_precision: str = _option("auto", "auto (bf16 or fp16 on a GPU), no, bf16, fp16")
    seed: int = _option(0, "of weights, order and augmentation")
    report_to: str | None = _option(None, "tracker that Accelerate knows, e.g. tensorboard")


def start_model(
    args: FinetuneArguments, label_names: list[str]
) -> tuple[ASTForAudioClassification, ASTFeatureExtractor | None]:
    """The model to fine-tune, and its feature extractor where it comes with one."""
    labels = {
        "num_labels": len(label_names),
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: index for index, name in enumerate(label_names)},
        "problem_type": "single_label_classification",
    }
    geometry = {
        "max_length": args.max_length,
        "num_mel_bins": args.num_mel_bins,
        "frequency_stride": args.frequency_stride,
        "time_stride": args.time_stride,
    }
    training = {
        "time_patchout": args.time_patchout,
        "frequency_patchout": args.frequency_patchout,
        "label_smoothing": args.label_smoothing,
    }
    if args.model == "scratch":
        size = {
            "hidden_size": args.hidden_size,
            "num_hidden_layers": args.num_hidden_layers,
            "num_attention_heads": args.num_attention_heads,
            "intermediate_size": 4 * args.hidden_size,
            # 1 / sqrt(fan-in). The config's 0.02 is made for width 768; a narrow encoder that
            # starts there hardly learns in the first epochs.
            "initializer_range": args.hidden_size**-0.5,
        }
        return ASTForAudioClassification(ASTConfig(**size, **geometry, **labels, **training)), None
    path = Path(args.model)
    if path.is_file() or (path.is_dir() and _is_vision_folder(path)):
        config = vision_config(path, **geometry, **labels, **training)
        return ASTForAudioClassification.from_vision_checkpoint(path, config), None
    model = ASTForAudioClassification.from_pretrained(
        args.model, ignore_mismatched_sizes=True, **geometry, **labels, **training
    )
    return model, ASTFeatureExtractor.from_pretrained(
        args.model, max_length=args.max_length, num_mel_bins=args.num_mel_bins
    )


def _is_vision_folder(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return True  # bare weights, as timm leaves them
    return AutoConfig.from_pretrained(folder).model_type in ("deit", "vit")


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices; none on biases, norms, tokens and positions."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() > 1 and "embeddings.position" not in name
        (matrices if is_matrix and "token" not in name else others).append(parameter)
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


@torch.no_grad()
def evaluate_model(
    model: torch.nn.Module,
    data: Iterator[dict[str, torch.Tensor]],
    accelerator: Accelerator,
) -> dict[str, float]:
    """Loss and accuracy over all processes' clips, each counted once."""
    model.eval()
    scores: list[list[float]] = []
    references: list[int] = []
    loss = 0.0
    for batch in tqdm(
        data, desc="evaluating", unit="batch", leave=False, disable=not accelerator.is_main_process
    ):
        labels = batch["labels"]
        with accelerator.autocast():
            output = model(**{key: value.to(accelerator.device) for key, value in batch.items()})
        loss += output.loss.item() * len(labels)
        scores += output.logits.float().cpu().tolist()
        references += labels.tolist()
    scores, references = gather_object(scores), gather_object(references)
    accuracy = Accuracy().compute(predictions=scores, references=references)["accuracy"]
    return {
        "evaluation_loss": sum(gather_object([loss])) / len(references),
        "evaluation_accuracy": accuracy,
        "evaluation_clips": len(references),
    }


def plot_learning_curve(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Losses and accuracy over epochs, as a PNG."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    epochs = [record["epoch"] for record in records]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.plot(epochs, [r["train_loss"] for r in records], "o-", label="train")
    left.plot(epochs, [r["evaluation_loss"] for r in records], "o-", label="evaluation")
    left.set(xlabel="epoch", ylabel="cross-entropy", title="loss", ylim=(0, None))
    left.legend()
    accuracy = [100 * r["evaluation_accuracy"] for r in records]
    right.plot(epochs, accuracy, "o-", color="tab:green")
    right.set(xlabel="epoch", ylabel="%", title="evaluation accuracy", ylim=(0, 102))
    right.annotate(f"{accuracy[-1]:.1f} %", (epochs[-1], accuracy[-1]), (-8, -14),
                   textcoords="offset points", ha="right")  # fmt: skip
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def finetune(args: FinetuneArguments) -> dict[str, Any]:
    """Run the whole fine-tuning; returns the last epoch's record.

    Raises:
        ValueError: for wrong paths, columns, labels or options, before any model is built.
    """
    if not args.dataset:
        raise ValueError("Name a dataset: ast-finetune-accelerate my_sounds/ (see --help).")
    run_folder = Path(args.output_dir)
    if (run_folder / "checkpoint").exists() and not args.overwrite:
        raise ValueError(
            f"{run_folder} holds a finished run; choose another --output_dir or pass --overwrite."
        )
    data = open_labelled_audio(
        args.dataset,
        args.dataset_config,
        args.audio_column,
        args.label_column,
        args.train_split,
        args.evaluation_split,
        args.fold_column,
        args.evaluation_fold,
        args.evaluation_fraction,
    )

    precision = args.mixed_precision
    if precision == "auto":
        has_gpu = torch.cuda.is_available()
        precision = ("bf16" if torch.cuda.is_bf16_supported() else "fp16") if has_gpu else "no"
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to,
        project_dir=run_folder,
    )
    set_seed(args.seed)
    is_main = accelerator.is_main_process
    say = accelerator.print
    train_clips, evaluation_clips = sum(data.train_counts), sum(data.evaluation_counts)
    say(
        f"{train_clips} clips to train on, {evaluation_clips} to evaluate on, "
        f"{len(data.label_names)} classes: {', '.join(data.label_names[:10])}"
        + (" …" if len(data.label_names) > 10 else "")
    )

    model, extractor = start_model(args, data.label_names)
    if extractor is None:
        extractor = ASTFeatureExtractor(max_length=args.max_length, num_mel_bins=args.num_mel_bins)
        if args.mean is None or args.std is None:
            sounds = [row["audio"] for row in data.train.take(_MEASURED_CLIPS)]
            measured = measure_sounds(sounds, extractor.sampling_rate, extractor.num_mel_bins)
            if not measured.frames:
                raise ValueError(f"No sound can be measured: {measured.unreadable[:1]}")
            extractor.mean, extractor.std = measured.mean, measured.std
            say(
                f"log-mel statistics: mean {extractor.mean:.4f}, std {extractor.std:.4f} (measured)"
            )
    extractor.mean = extractor.mean if args.mean is None else args.mean
    extractor.std = extractor.std if args.std is None else args.std
    num_labels = len(data.label_names)

    rank, world = accelerator.process_index, accelerator.num_processes
    train_stream = split_dataset_by_node(data.train, rank, world) if world > 1 else data.train
    train_stream = train_stream.shuffle(seed=args.seed, buffer_size=args.shuffle_buffer)
    evaluation_stream = (
        split_dataset_by_node(data.evaluation, rank, world) if world > 1 else data.evaluation
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.learning_rate)
    batches_per_epoch = math.ceil(train_clips / (args.batch_size * world))
    steps = args.num_epochs * math.ceil(batches_per_epoch / args.gradient_accumulation_steps)
    # Accelerate steps a prepared scheduler once per process, so that it counts steps * world.
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=round(args.warmup_ratio * steps) * world,
        num_training_steps=steps * world,
    )
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

    if is_main:
        run_folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(run_folder / "checkpoint", ignore_errors=True)
        (run_folder / "metrics.jsonl").write_text("")
        arguments = yaml.safe_dump(dataclasses.asdict(args), sort_keys=False)
        (run_folder / "arguments.yaml").write_text(arguments, encoding="utf-8")
    if args.report_to is not None:
        accelerator.init_trackers("ast")
    generator = augmentation_generator(args.seed, rank=rank, device=accelerator.device)

    average = AveragedModel(accelerator.unwrap_model(model))
    result: Any = average.module  # what is saved; evaluated as soon as it exists
    records: list[dict[str, Any]] = []
    start = time.perf_counter()
    for epoch in range(1, args.num_epochs + 1):
        collator = Collator(extractor, num_labels, args.mixup_rate, (args.seed, epoch, rank))
        epoch_batches = partial(batches, train_stream, args.batch_size, args.num_workers, collator)
        train_stream.set_epoch(epoch)
        model.train()
        epoch_start = time.perf_counter()
        loss_sum, clips = 0.0, 0
        progress = tqdm(
            epoch_batches() if world == 1 else islice(repeated(epoch_batches), batches_per_epoch),
            desc=f"epoch {epoch}/{args.num_epochs}",
            total=batches_per_epoch,
            unit="batch",
            disable=not is_main,
        )
        for number, batch in enumerate(progress, start=1):
            inputs = batch["input_values"].to(accelerator.device)
            labels = batch["labels"].to(accelerator.device)
            inputs = roll(inputs, args.time_roll, generator)
            # Hidden parts become the data's mean. (The original hides before it normalises, with
            # a log-mel of 0, which is as loud as sound gets.)
            inputs = spec_augment(inputs, args.time_mask, args.frequency_mask, generator=generator)
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    loss = model(inputs, labels=labels).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            loss_sum += loss.item() * len(labels)
            clips += len(labels)
            if not math.isfinite(loss_sum):
                raise ValueError(
                    f"The loss is {loss.item()} in epoch {epoch}, batch {number}. Lower "
                    f"--learning_rate (it is {args.learning_rate:g})."
                )
            rate = clips / (time.perf_counter() - epoch_start)
            progress.set_postfix(loss=f"{loss_sum / clips:.3f}", clips_per_s=f"{rate:.1f}")
        train_seconds = time.perf_counter() - epoch_start
        if epoch > args.num_epochs - args.averaged_epochs:
            average.update_parameters(accelerator.unwrap_model(model))
            evaluated = result
        else:
            evaluated = model
        held_out = batches(
            evaluation_stream, args.batch_size, args.num_workers, Collator(extractor, num_labels)
        )
        scores = evaluate_model(evaluated, held_out, accelerator)
        total_clips = sum(gather_object([clips]))
        record = {
            "epoch": epoch,
            "train_loss": sum(gather_object([loss_sum])) / total_clips,
            **scores,
            "learning_rate": scheduler.get_last_lr()[0],
            "clips_per_second": total_clips / train_seconds,
            "seconds": time.perf_counter() - start,
        }
        records.append(record)
        accelerator.log(record, step=epoch)
        say(
            f"epoch {epoch}: train loss {record['train_loss']:.3f}, "
            f"evaluation loss {record['evaluation_loss']:.3f}, "
            f"accuracy {100 * record['evaluation_accuracy']:.2f} %, {record['seconds']:.0f} s"
        )
        if is_main:
            with (run_folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            plot_learning_curve(records, run_folder / "learning_curve.png")

    accelerator.wait_for_everyone()
    if is_main:
        checkpoint = run_folder / "checkpoint"
        result.save_pretrained(checkpoint)
        extractor.save_pretrained(checkpoint)
        say(f"Saved {checkpoint}. Try it: ast-classify FILE --model {checkpoint}")
    accelerator.end_training()
    return records[-1]


def main() -> None:
    logging.disable_progress_bar()  # transformers' own, for loading and saving

    def command() -> None:
        finetune(
            parse_arguments(
                FinetuneArguments, "dataset", "Fine-tune AST on labelled sound (Accelerate)."
            )
        )

    run_command("ast-finetune-accelerate", command)


if __name__ == "__main__":
    main()
