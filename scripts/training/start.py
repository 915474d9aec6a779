"""What a run starts with: data, model, precision; and how its result is saved."""

import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoConfig

from feature_extraction import (
    ASTFeatureExtractor,
)
from modeling_ast import ASTConfig, ASTForAudioClassification
from modeling_ast.conversion_ast import vision_config

from ..common.bundled import checkpoint_folder
from ..data.labelled import LabelledAudio, open_labelled_audio
from ..data.statistics import measure_sounds
from .options import FinetuneArguments

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
    name = checkpoint_folder(args.model)
    path = _vision_weights(name)
    if path is not None:
        config = vision_config(path, **geometry, **labels, **training)
        return ASTForAudioClassification.from_vision_checkpoint(path, config), None
    if not ASTConfig.from_pretrained(name).is_native:
        # Of AST's descendants, strides and mel bins are the checkpoint's.
        geometry = {"max_length": args.max_length}
    model = ASTForAudioClassification.from_pretrained(
        name, ignore_mismatched_sizes=True, **geometry, **labels, **training
    )
    return model, ASTFeatureExtractor.from_pretrained(
        name, max_length=args.max_length, num_mel_bins=model.config.num_mel_bins
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
