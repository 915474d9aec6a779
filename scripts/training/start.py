"""What a run starts from: data, model, precision; and how its result is saved."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.utils import logging

from feature_extraction import ASTFeatureExtractor
from modeling_ast import (
    ASTConfig,
    ASTForAudioClassification,
    ASTForAudioFrameClassification,
    ASTFrameConfig,
)
from modeling_ast.conversion_ast import vision_config

from ..common.checkpoints import DEFAULT_MODEL, resolve_checkpoint
from ..common.shown import shown
from ..data.annotated import open_annotated_audio
from ..data.answers import answer_files, is_answers
from ..data.batches import Collator, FrameGrid
from ..data.labelled import LabelledAudio, for_class_folders, open_labelled_audio
from ..data.options import LabelledOptions
from ..data.sources import class_folder_splits, open_stream
from ..data.statistics import measure_sounds
from ..data.windows import count_long_clips, describe_long_clips
from ..evaluation.metrics import METRICS
from .distil import Student
from .options import FinetuneOptions
from .teachers import Teacher, kept_columns

_LABEL_COLUMN = next(f.default for f in fields(LabelledOptions) if f.name == "label_column")
_MEASURED_CLIPS = 200  # for the normalisation of a model without statistics
_LARGER_START = "MIT/ast-finetuned-audioset-10-10-0.4593"

Batch = dict[str, Tensor]


def open_data(options: FinetuneOptions) -> LabelledAudio:
    """The dataset that the options name."""
    if not options.dataset:
        raise ValueError("Name a dataset, for example my_sounds/ (see --help).")
    if options.annotations is not None:
        return open_annotated_audio(
            options.dataset, options.annotations, options, options.annotation_label_column
        )
    plain = for_class_folders(options.dataset, options)
    if _has_no_labels(plain):
        plain = replace(plain, label_column="")
    data = open_labelled_audio(options.dataset, plain, kept_columns(options))
    # A run is not resumed on other answers, either.
    answers = answer_files([name for name in options.teacher if is_answers(name)])
    data.fingerprint.files.update({str(file): file.stat().st_size for file in answers})
    if not plain.label_column:
        return data
    if len(data.label_names) < 2 and data.problem_type == "single_label_classification":
        raise ValueError(
            f"{options.dataset} has only one label ({data.label_names[0]!r}); a classifier needs "
            "at least two."
        )
    if options.best_metric and data.problem_type not in METRICS[options.best_metric].kinds:
        raise ValueError(
            f"--best_metric {options.best_metric} does not work for {data.problem_type} data."
        )
    return data


def _has_no_labels(options: FinetuneOptions) -> bool:
    """Whether there is a teacher, and neither class folders nor the usual column of labels."""
    if not options.has_teacher or options.label_column != _LABEL_COLUMN:
        return options.has_teacher and not options.label_column
    folder = Path(options.dataset)
    if folder.is_dir() and class_folder_splits(options.dataset) == []:
        return not any(child.is_dir() for child in folder.iterdir())
    stream = open_stream(
        options.dataset, options.train_split, options.dataset_config, options.audio_column
    )
    return _LABEL_COLUMN not in (stream.column_names or next(iter(stream), {}))


def with_teachers_labels(data: LabelledAudio, teacher: Teacher) -> LabelledAudio:
    """Data without labels, with those of its teacher.

    Raises:
        ValueError: when their names are not known.
    """
    if not teacher.are_names_known or not teacher.label_names:
        raise ValueError(
            "There are no labels here but the teacher's: name them (--teacher_labels), for the "
            "checkpoint."
        )
    is_single = teacher.activation == "softmax"
    return replace(
        data,
        label_names=teacher.label_names,
        problem_type=f"{'single' if is_single else 'multi'}_label_classification",
    )


def keep_old_head(student: Student, options: FinetuneOptions) -> bool:
    """Let the teacher's head begin as the start's own, if that has the teacher's labels."""
    head = student.teacher_head
    if head is None or options.model == "scratch":
        return False
    name, is_vision = find_weights(options.model)
    if is_vision:
        return False
    names = student.teacher_label_names
    config = AutoConfig.from_pretrained(name)
    old_names = config.id2label
    if config.model_type == ASTFrameConfig.model_type or set(old_names.values()) != set(names):
        return False
    with _without_warnings():
        old = ASTForAudioClassification.from_pretrained(name).classifier.state_dict()
    place = {label: index for index, label in old_names.items()}
    order = [place[label] for label in names]
    old["dense.weight"], old["dense.bias"] = old["dense.weight"][order], old["dense.bias"][order]
    head.load_state_dict(old)
    return True


def describe_teacher(
    options: FinetuneOptions, teacher: Teacher, student: Student, is_head_old: bool
) -> str:
    """What is learned from whom."""
    who = ", ".join(options.teacher) or "the dataset's column " + " and ".join(
        filter(None, (options.teacher_column, options.teacher_embedding_column))
    )
    lesson = student.lesson
    what = []
    if lesson.share:
        how = "a head of its own" if student.teacher_head is not None else "the same head"
        if is_head_old:
            how = "the start's head"
        what.append(f"{len(teacher.label_names)} labels through {how}, share {lesson.share:g}")
    if student.projection is not None:
        what.append(f"embeddings of {teacher.embedding_size}, weight {lesson.embedding_weight:g}")
    return f"Teacher: {who}: {'; '.join(what) or 'nothing to learn'}"


def describe_data(data: LabelledAudio) -> str:
    if not data.label_names:
        return (
            f"{data.train_clips} clips without labels to train on, {data.evaluation_clips} to "
            "evaluate on"
        )
    names = shown(", ".join(data.label_names[:10])) + (" …" if len(data.label_names) > 10 else "")
    return (
        f"{data.train_clips} clips to train on, {data.evaluation_clips} to evaluate on, "
        f"{len(data.label_names)} classes: {names}"
    )


def describe_run(
    options: FinetuneOptions, data: LabelledAudio, model: nn.Module, extractor: ASTFeatureExtractor
) -> dict[str, Any]:
    """Dataset and model for the run's report."""
    parameters = list(model.parameters())
    return {
        "dataset": {
            "name": options.dataset,
            "labels": data.problem_type,
            "train_clips": data.train_clips,
            "evaluation_clips": data.evaluation_clips,
            "clips_per_class": {
                name: {"train": train, "evaluation": evaluation}
                for name, train, evaluation in zip(
                    data.label_names, data.train_counts, data.evaluation_counts, strict=False
                )  # none of data without labels
            },
        },
        "model": {
            "parameters": sum(parameter.numel() for parameter in parameters),
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "mean": float(extractor.mean),
            "std": float(extractor.std),
        },
    }


def describe_windows(
    options: FinetuneOptions, data: LabelledAudio, extractor: ASTFeatureExtractor
) -> tuple[int, str]:
    """How many clips are longer than the model's input, and what happens to them."""
    window_s = Collator(extractor, 0).window_s
    counted = count_long_clips(data.train, data.train_clips, window_s)
    text = describe_long_clips(
        *counted,
        data.train_clips,
        window_s,
        options.windows_per_clip,
        options.annotations is not None,
    )
    return counted[0], text


def frame_grid(model: Any, options: FinetuneOptions) -> FrameGrid | None:
    """A frame model's columns; None for a classifier."""
    config = model.config
    if config.model_type != ASTFrameConfig.model_type:
        return None
    return FrameGrid(config.time_stride, config.patch_shape[1], options.unmarked == "unknown")


def check_sharded(options: FinetuneOptions) -> None:
    """Refuse options that do not work if FSDP or DeepSpeed shards the weights over processes.

    Raises:
        ValueError: if there are any.
    """
    for option, off in (
        ("averaged_epochs", 1), ("ema_decay", 0.0), ("gradient_accumulation_steps", 1),
    ):  # fmt: skip
        if getattr(options, option) != off:
            raise ValueError(f"With FSDP or DeepSpeed --{option} must be {off}.")
    if options.has_teacher:
        raise ValueError("A teacher does not work with FSDP or DeepSpeed.")
    if options.trained == "lora":
        raise ValueError("--trained lora does not work with FSDP or DeepSpeed.")


def describe_device() -> str:
    """Says so if torch is built for GPUs but finds none; else empty."""
    if torch.version.cuda is None or torch.cuda.is_available():
        return ""
    return (
        f"Training on the CPU: this torch is built for CUDA {torch.version.cuda} but finds no GPU. "
        "If there should be one, check its driver; if not, torch's CPU build is gigabytes smaller."
    )


def precision(options: FinetuneOptions) -> str:
    """What --mixed_precision means on this machine: no, bf16 or fp16."""
    if options.mixed_precision != "auto":
        return options.mixed_precision
    if not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def start_model(
    options: FinetuneOptions, data: LabelledAudio
) -> tuple[ASTForAudioClassification, ASTFeatureExtractor]:
    """The model to fine-tune and its feature extractor, with the data's statistics if the start has
    none."""
    model: Any
    model, extractor = _load_model(options, data)
    if options.annotations is not None and model.config.model_type != ASTFrameConfig.model_type:
        model = ASTForAudioFrameClassification.from_classifier(model)
    if extractor is None:
        extractor = ASTFeatureExtractor(
            max_length=model.config.max_length, num_mel_bins=model.config.num_mel_bins
        )
        if options.mean is None or options.std is None:
            sounds = [row["audio"] for row in data.train.take(_MEASURED_CLIPS)]
            measured = measure_sounds(sounds, extractor.sampling_rate, extractor.num_mel_bins)
            if not measured.frames:
                raise ValueError(f"None of the sounds can be measured: {measured.unreadable[:1]}")
            extractor.mean, extractor.std = measured.mean, measured.std
    extractor.mean = extractor.mean if options.mean is None else options.mean
    extractor.std = extractor.std if options.std is None else options.std
    if options.bucket_batches:
        extractor.return_attention_mask = True  # pads to the longest in a batch
    return model, extractor


def _load_model(
    options: FinetuneOptions, data: LabelledAudio
) -> tuple[ASTForAudioClassification, ASTFeatureExtractor | None]:
    problem_type = data.problem_type
    if problem_type == "multi_label_classification" and options.loss == "cross_entropy":
        raise ValueError(
            "--loss cross_entropy needs one label per clip, but these have several. Omit it."
        )
    if options.loss == "binary_cross_entropy":
        problem_type = "multi_label_classification"
    labels = {
        "num_labels": len(data.label_names),
        "id2label": dict(enumerate(data.label_names)),
        "label2id": {name: index for index, name in enumerate(data.label_names)},
        "problem_type": problem_type,
    }
    # Anything not given comes from the checkpoint, or from the config's defaults for bare weights.
    geometry = {
        name: value
        for name in ("max_length", "num_mel_bins", "frequency_stride", "time_stride")
        if (value := getattr(options, name)) is not None
    }
    training: dict[str, Any] = {
        "time_patchout": options.time_patchout,
        "frequency_patchout": options.frequency_patchout,
        "label_smoothing": options.label_smoothing,
    }
    if options.window_pooling is not None:
        training["window_pooling"] = options.window_pooling
    if options.model == "scratch":
        size = {
            "hidden_size": options.hidden_size,
            "num_hidden_layers": options.num_hidden_layers,
            "num_attention_heads": options.num_attention_heads,
            "intermediate_size": 4 * options.hidden_size,
            # 1 / sqrt(fan-in). The config's 0.02 suits width 768; a narrow encoder that starts
            # there hardly learns in the first epochs.
            "initializer_range": options.hidden_size**-0.5,
        }
        return ASTForAudioClassification(ASTConfig(**size, **geometry, **labels, **training)), None
    name, is_vision = find_weights(options.model)
    if is_vision:
        config = vision_config(Path(name), **geometry, **labels, **training)
        return ASTForAudioClassification.from_vision_checkpoint(Path(name), config), None
    if not ASTConfig.from_pretrained(name).is_native:
        # For AST's descendants, strides and mel bins are the checkpoint's.
        geometry = {key: value for key, value in geometry.items() if key == "max_length"}
    model_class: Any = ASTForAudioClassification
    if options.annotations is not None:  # can also start from a classifier, with a new head
        model_class = ASTForAudioFrameClassification
    with _without_warnings():  # that the head is new; an incomplete encoder is an error
        model = model_class.from_pretrained(
            name, ignore_mismatched_sizes=True, **geometry, **labels, **training
        )
    return model, ASTFeatureExtractor.from_pretrained(
        name, max_length=model.config.max_length, num_mel_bins=model.config.num_mel_bins
    )


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Let transformers speak of errors only."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def find_weights(model: str) -> tuple[str, bool]:
    """Where the option's weights are, and whether they are a DeiT's or ViT's."""
    path = Path(model)
    if path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        return model, True  # bare weights, as from timm
    name = resolve_checkpoint(model)
    if AutoConfig.from_pretrained(name).model_type not in ("deit", "vit"):
        return name, False
    if not Path(name).is_dir():
        weights = ["config.json", "model.safetensors", "pytorch_model.bin"]
        name = snapshot_download(name, allow_patterns=weights)
    return name, True


def describe_start(options: FinetuneOptions) -> str:
    """Describes the weights that training starts from."""
    if options.model == "scratch":
        return "Start: random weights"
    if options.model == DEFAULT_MODEL:
        return (
            f"Start: {DEFAULT_MODEL}, a small model that comes with the commands. A larger one may "
            f"learn more: --model {_LARGER_START}"
        )
    return f"Start: {options.model}"


def choose_trained_weights(model: ASTForAudioClassification, options: FinetuneOptions) -> Any:
    """Freeze what `options.trained` excludes; with "lora", wrap the model with PEFT."""
    is_frame_model = model.config.model_type == ASTFrameConfig.model_type
    head = "frame_classifier" if is_frame_model else "classifier"
    if options.trained == "lora":
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ValueError("--trained lora needs PEFT: pip install peft") from error
        config = LoraConfig(
            r=options.lora_rank,
            lora_alpha=2 * options.lora_rank,
            target_modules=r".*encoder\.layer\..*(query|key|value|dense)",
            modules_to_save=[head],
        )
        return get_peft_model(model, config)
    prefix = {"all": "", "head": f"{head}.", "linear": f"{head}.dense."}[options.trained]
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(prefix)
    return model


def save_model(
    model: Any, extractor: ASTFeatureExtractor, folder: Path, weights: Batch | None = None
) -> None:
    """Save a checkpoint that loads anywhere: any adapters are merged into the weights.

    Args:
        weights: the model's, gathered, if it holds only a part of them itself.
    """
    if isinstance(model, Student):
        model = model.checkpoint()
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    model.save_pretrained(folder, state_dict=weights)
    extractor.save_pretrained(folder)
