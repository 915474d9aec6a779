"""What both fine-tuning commands share: the model's start, its training settings, batches, scores.

FinetuneArguments -> data, model, optimizer, schedule
(seed, epoch, rank) -> the epoch's batches, the same every time: what makes resuming exact
(seed, step, rank)  -> the augmentation of a step
"""

import copy
import math
import re
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm
from transformers import AutoConfig

from feature_extraction import (
    ASTFeatureExtractor,
    add_noise,
    augmentation_generator,
    filter_augment,
    roll,
    spec_augment,
)
from modeling_ast import ASTConfig, ASTForAudioClassification
from modeling_ast.conversion_ast import vision_config

from .batches import Collator, SkippedSounds, batches, rank_share, repeated
from .data import LabelledAudio, open_labelled_audio
from .dataset_stats import measure_sounds
from .finetune_arguments import FinetuneArguments
from .metrics import compute_metrics
from .run_folder import main_metric

_MEASURED_CLIPS = 200  # for the normalisation of a model that comes without statistics

Batch = dict[str, Tensor]


def open_data(args: FinetuneArguments) -> LabelledAudio:
    """The dataset that the options name."""
    if not args.dataset:
        raise ValueError("Name a dataset, for example my_sounds/ (see --help).")
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
        args.group_column,
        args.label_separator,
    )
    if len(data.label_names) < 2 and data.problem_type == "single_label_classification":
        raise ValueError(
            f"{args.dataset} has one label only ({data.label_names[0]!r}); a classifier needs at "
            "least two."
        )
    return data


def describe_data(data: LabelledAudio) -> str:
    more = " …" if len(data.label_names) > 10 else ""
    return (
        f"{data.train_clips} clips to train on, {data.evaluation_clips} to evaluate on, "
        f"{len(data.label_names)} classes: {', '.join(data.label_names[:10])}{more}"
    )


def describe_run(
    args: FinetuneArguments, data: LabelledAudio, model: nn.Module, extractor: ASTFeatureExtractor
) -> dict[str, Any]:
    """Dataset and model for the run's report."""
    parameters = list(model.parameters())
    return {
        "dataset": {
            "name": args.dataset,
            "labels": data.problem_type,
            "train_clips": data.train_clips,
            "evaluation_clips": data.evaluation_clips,
            "clips_per_class": {
                name: {"train": train, "evaluation": evaluation}
                for name, train, evaluation in zip(
                    data.label_names, data.train_counts, data.evaluation_counts, strict=True
                )
            },
        },
        "model": {
            "parameters": sum(parameter.numel() for parameter in parameters),
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "mean": float(extractor.mean),
            "std": float(extractor.std),
        },
    }


def describe_epoch(record: dict[str, Any]) -> str:
    metric = main_metric(record)
    value = record[f"evaluation_{metric}"]
    return (
        f"epoch {record['epoch']}: train loss {record['train_loss']:.3f}, "
        f"evaluation loss {record['evaluation_loss']:.3f}, {metric.replace('_', ' ')} "
        + ("undefined" if value is None else f"{100 * value:.2f} %")
        + f", {record['seconds']:.0f} s"
    )


def trackable(record: dict[str, Any]) -> dict[str, float]:
    """What a tracker draws over the epochs."""
    return {name: value for name, value in record.items() if value is not None and name != "epoch"}


def check_sharded(args: FinetuneArguments) -> None:
    """What cannot be had when FSDP or DeepSpeed cuts the weights up over processes.

    Raises:
        ValueError: when the options ask for it.
    """
    for option, off in (
        ("averaged_epochs", 1), ("ema_decay", 0.0), ("gradient_accumulation_steps", 1),
    ):  # fmt: skip
        if getattr(args, option) != off:
            raise ValueError(f"With FSDP or DeepSpeed --{option} must be {off}.")
    if args.trained == "lora":
        raise ValueError("--trained lora does not go with FSDP or DeepSpeed.")


def precision(args: FinetuneArguments) -> str:
    """What --mixed_precision means on this machine: no, bf16 or fp16."""
    if args.mixed_precision != "auto":
        return args.mixed_precision
    if not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def start_model(
    args: FinetuneArguments, data: LabelledAudio
) -> tuple[ASTForAudioClassification, ASTFeatureExtractor]:
    """The model to fine-tune and its feature extractor, with statistics of the data if need be."""
    model, extractor = _load_model(args, data)
    if extractor is None:
        extractor = ASTFeatureExtractor(max_length=args.max_length, num_mel_bins=args.num_mel_bins)
        if args.mean is None or args.std is None:
            sounds = [row["audio"] for row in data.train.take(_MEASURED_CLIPS)]
            measured = measure_sounds(sounds, extractor.sampling_rate, extractor.num_mel_bins)
            if not measured.frames:
                raise ValueError(f"No sound can be measured: {measured.unreadable[:1]}")
            extractor.mean, extractor.std = measured.mean, measured.std
    extractor.mean = extractor.mean if args.mean is None else args.mean
    extractor.std = extractor.std if args.std is None else args.std
    if args.bucket_batches:
        extractor.return_attention_mask = True  # pads to the longest of a batch
    return model, extractor


def _load_model(
    args: FinetuneArguments, data: LabelledAudio
) -> tuple[ASTForAudioClassification, ASTFeatureExtractor | None]:
    problem_type = data.problem_type
    if problem_type == "multi_label_classification" and args.loss == "cross_entropy":
        raise ValueError(
            "--loss cross_entropy needs one label per clip; here are several. Leave it out."
        )
    if args.loss == "binary_cross_entropy":
        problem_type = "multi_label_classification"
    labels = {
        "num_labels": len(data.label_names),
        "id2label": dict(enumerate(data.label_names)),
        "label2id": {name: index for index, name in enumerate(data.label_names)},
        "problem_type": problem_type,
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
    path = _vision_weights(args.model)
    if path is not None:
        config = vision_config(path, **geometry, **labels, **training)
        return ASTForAudioClassification.from_vision_checkpoint(path, config), None
    model = ASTForAudioClassification.from_pretrained(
        args.model, ignore_mismatched_sizes=True, **geometry, **labels, **training
    )
    return model, ASTFeatureExtractor.from_pretrained(
        args.model, max_length=args.max_length, num_mel_bins=args.num_mel_bins
    )


def _vision_weights(model: str) -> Path | None:
    """Where the DeiT or ViT weights are that the option names; None when it names an AST."""
    path = Path(model)
    if path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        return path  # bare weights, as timm leaves them
    if AutoConfig.from_pretrained(model).model_type not in ("deit", "vit"):
        return None
    if path.is_dir():
        return path
    weights = ["config.json", "model.safetensors", "pytorch_model.bin"]
    return Path(snapshot_download(model, allow_patterns=weights))


def choose_trained_weights(model: ASTForAudioClassification, args: FinetuneArguments) -> Any:
    """Freeze what `args.trained` leaves out; with "lora", the model wrapped by PEFT."""
    if args.trained == "lora":
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ValueError("--trained lora needs PEFT: pip install peft") from error
        config = LoraConfig(
            r=args.lora_rank,
            lora_alpha=2 * args.lora_rank,
            target_modules=r".*encoder\.layer\..*(query|key|value|dense)",
            modules_to_save=["classifier"],
        )
        return get_peft_model(model, config)
    prefix = {"all": "", "head": "classifier.", "linear": "classifier.dense."}[args.trained]
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(prefix)
    return model


def save_model(
    model: Any, extractor: ASTFeatureExtractor, folder: Path, weights: Batch | None = None
) -> None:
    """A checkpoint that loads anywhere: adapters, where there are some, merged into the weights.

    Args:
        weights: the model's, gathered, when it holds only a part of them itself.
    """
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    model.save_pretrained(folder, state_dict=weights)
    extractor.save_pretrained(folder)


def make_optimizer(model: nn.Module, args: FinetuneArguments) -> torch.optim.Optimizer:
    """Adam or AdamW over the trained weights."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    return kind(
        parameter_groups(model, args.learning_rate, args.weight_decay, args.layer_decay),
        betas=(args.adam_beta1, args.adam_beta2),
    )


def parameter_groups(
    model: Any, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """The trained weights by learning rate and weight decay.

    Weight decay on matrices; none on biases, norms, tokens and positions. The head learns at
    `learning_rate`, the last layer at `layer_decay` times it, and so on down to the embeddings
    (BEiT, arXiv 2106.08254).
    """
    layers = model.config.num_hidden_layers
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = re.search(r"encoder\.layer\.(\d+)\.", name)
        above = layers - int(layer[1]) if layer else layers + 1 if ".embeddings." in name else 0
        is_matrix = parameter.dim() > 1 and "embeddings.position" not in name
        decay = weight_decay if is_matrix and "token" not in name else 0.0
        groups.setdefault((learning_rate * layer_decay**above, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def learning_rate_factor(step: int, args: FinetuneArguments, steps_per_epoch: int) -> float:
    """The learning rate at an optimizer step, counted from 0, over the peak's."""
    steps = args.num_epochs * steps_per_epoch
    warmup = args.warmup_steps or round(args.warmup_ratio * steps)
    if step < warmup:
        return step / warmup
    if args.lr_scheduler_type == "step":
        late = step // steps_per_epoch - args.lr_step_start
        return args.lr_step_factor ** (late // args.lr_step_epochs + 1) if late >= 0 else 1.0
    if args.lr_scheduler_type == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 1 - done if args.lr_scheduler_type == "linear" else (1 + math.cos(math.pi * done)) / 2


def make_average(model: nn.Module, args: FinetuneArguments) -> AveragedModel | None:
    """The averaged copy of the weights that will be the result; None when there is none."""
    if args.ema_decay:
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay))
    return AveragedModel(model) if args.averaged_epochs > 1 else None


def current_result(model: nn.Module, average: AveragedModel | None) -> nn.Module:
    """What is evaluated and saved: the averaged weights as soon as there are some."""
    return model if average is None or not int(average.n_averaged) else average.module


def count_steps(args: FinetuneArguments, data: LabelledAudio, processes: int) -> int:
    """Optimizer steps in an epoch."""
    clips = args.batch_size * args.gradient_accumulation_steps * processes
    return math.ceil(data.train_clips / clips)


def epoch_batches(
    args: FinetuneArguments,
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
        rank_share(data.train, rank, processes, args.num_workers),
        args.batch_size * args.gradient_accumulation_steps,
        args.num_workers,
        Collator(
            extractor,
            num_labels,
            args.mixup_rate,
            (args.seed, epoch, rank),
            args.speed_perturbation,
        ),
        shuffle_buffer=args.shuffle_buffer,
        draws=data.balanced_draws() if args.balanced_sampling else None,
        bucket_batches=args.bucket_batches,
        skipped=skipped,
        read_in_turn=data.train_clips <= args.shuffle_buffer,
    )
    for batch in islice(repeated(one_pass), skip, count_steps(args, data, processes)):
        if args.loss == "binary_cross_entropy" and batch["labels"].dim() == 1:
            batch["labels"] = one_hot(batch["labels"], num_labels).float()
        yield batch


def evaluation_batches(
    args: FinetuneArguments,
    data: LabelledAudio,
    extractor: ASTFeatureExtractor,
    skipped: SkippedSounds,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[Batch]:
    """The evaluation part, this process's share of it."""
    share = rank_share(data.evaluation, rank, processes, args.num_workers)
    collator = Collator(extractor, len(data.label_names))
    return batches(share, args.batch_size, args.num_workers, collator, skipped=skipped)


def augment(
    batch: Batch,
    args: FinetuneArguments,
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
    generator = augmentation_generator(args.seed, step, processes + rank, inputs.device)
    if args.filter_augment:
        decibel = math.log(10) / 10 / (2 * extractor.std)  # in normalised log-mel
        inputs = filter_augment(inputs, args.filter_augment * decibel, generator=generator)
    # Hidden parts become the data's mean. (The original hides before it normalises, with a log-mel
    # of 0, which is as loud as sound gets.)
    inputs = spec_augment(inputs, args.time_mask, args.frequency_mask, generator=generator)
    if args.noise_level:
        inputs = add_noise(inputs, args.noise_level, generator)
    return {**batch, "input_values": roll(inputs, args.time_roll, generator)}


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
