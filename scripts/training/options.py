"""The options of a fine-tuning run, which are also a recipe's keys, the same for both commands."""

from dataclasses import dataclass

from ..common.checkpoints import DEFAULT_MODEL
from ..common.options import setting
from ..data.options import GROUP as SOUNDS
from ..data.options import AnnotatedOptions
from ..evaluation.metrics import METRICS

_MODEL = "the model"
_INPUT = "the model's input"
_TEACHER = "a teacher, and what to learn from it"
_OPTIMISATION = "optimisation"
_RESULT = "which weights are the result"
_AUGMENTATION = "augmentation and regularisation"
_RUNNING = "how it runs"


@dataclass
class FinetuneOptions(AnnotatedOptions):
    """Options of a run. Lengths in frames count 10 ms each.

    Raises:
        ValueError: at construction, for an invalid value or two that contradict each other.
    """

    dataset: str = setting(
        "", "folder of class folders, CSV, Parquet or tar file(s), or a Hub dataset", positional="?"
    )
    model: str = setting(
        DEFAULT_MODEL,
        "where to start: an AST checkpoint (folder, bundled or Hub name), DeiT/ViT weights (file, "
        "folder or Hub name), or 'scratch' for random weights",
    )
    output: str = setting(
        "runs/ast",
        "run folder; an interrupted run in it is resumed",
        metavar="FOLDER",
        aliases=["output_dir"],
    )
    num_epochs: int = setting(
        0, "passes over the training part; default: fewer, the more clips there are", at_least=0
    )
    batch_size: int = setting(
        0, "clips per forward pass and process; default: by the clips' number and length",
        at_least=0,
    )  # fmt: skip
    learning_rate: float = setting(1e-4, "peak, after the warm-up")
    head_learning_rate: float | None = setting(
        None,
        "the same for the head; default: ten times as high for new labels on a model that has "
        "learned from sound, else equal",
        group=_OPTIMISATION,
    )

    unmarked: str = setting(
        "background",
        "what unmarked parts of annotated recordings are",
        group=SOUNDS,
        choices=["background", "unknown"],
    )
    max_corrupt: float = setting(
        0.0,
        "unreadable sounds to tolerate: below 1 a share, otherwise a number",
        group=SOUNDS,
        at_least=0,
    )
    balanced_sampling: bool = setting(False, "draw clips of rare classes more often", group=SOUNDS)

    trained: str = setting(
        "all",
        "which weights to train: all, head (frozen encoder), linear (only the last layer: a "
        "probe), or lora (PEFT adapters, and the head)",
        group=_MODEL,
        choices=["all", "head", "linear", "lora"],
    )
    lora_rank: int = setting(
        8, "rank of the adapters on every matrix of the encoder", group=_MODEL, at_least=1
    )
    hidden_size: int = setting(192, "width, only from scratch", group=_MODEL, at_least=1)
    num_hidden_layers: int = setting(12, "depth, only from scratch", group=_MODEL, at_least=1)
    num_attention_heads: int = setting(3, "heads, only from scratch", group=_MODEL, at_least=1)

    max_length: int | None = setting(
        None,
        "frames per input: longer clips are read in windows, shorter ones padded; default: what "
        "the clips last, at most the checkpoint's",
        group=_INPUT,
        at_least=1,
    )
    windows_per_clip: int = setting(
        0,
        "random windows of a longer clip to use together in each epoch; default: 1, or of "
        "annotated recordings as many as cover them, at most 8",
        group=_INPUT,
        at_least=0,
    )
    window_pooling: str | None = setting(
        None,
        "how to combine the windows' scores of a longer clip: mean, max, or linear_softmax, in "
        "between; default: the model's own, or mean",
        group=_INPUT,
        choices=["mean", "max", "linear_softmax"],
    )
    num_mel_bins: int | None = setting(
        None,
        "mel bins; default, here and below: the checkpoint's, or AST's (128, 10, 10)",
        group=_INPUT,
        at_least=1,
    )
    frequency_stride: int | None = setting(
        None, "mel bins between patches", group=_INPUT, at_least=1
    )
    time_stride: int | None = setting(None, "frames between patches", group=_INPUT, at_least=1)
    mean: float | None = setting(
        None, "mean of the log-mel values; default: the model's, or measured", group=_INPUT
    )
    std: float | None = setting(
        None, "standard deviation of the same; default as for mean", group=_INPUT
    )

    teacher: list[str] = setting(
        [],
        "models that hear what the student hears (checkpoint folder, ONNX file, bundled or Hub "
        "name of any audio classifier; several: an ensemble), or Parquet files of stored answers, "
        "as ast-classify --logits writes them",
        group=_TEACHER,
    )
    teacher_column: str | None = setting(
        None, "column of the dataset with a teacher's logits", group=_TEACHER
    )
    teacher_embedding_column: str | None = setting(
        None, "column of the dataset with a teacher's embedding", group=_TEACHER
    )
    teacher_key: str | None = setting(
        None,
        "column that matches stored answers to the dataset; default: the sounds' names",
        group=_TEACHER,
    )
    teacher_labels: str | None = setting(
        None,
        "names of the labels of stored logits: a JSON list, or a bundled one such as audioset",
        group=_TEACHER,
        metavar="FILE",
    )
    teacher_activation: str | None = setting(
        None,
        "turns the teacher's logits into probabilities; default: its own, else sigmoid",
        group=_TEACHER,
        choices=["sigmoid", "softmax"],
    )
    teacher_share: float | None = setting(
        None,
        "the teacher's share of the loss; hard labels get the rest; default: 0.5, or 0.1 beside "
        "independent labels of the teacher's own; without labels: 1",
        group=_TEACHER,
    )
    teacher_temperature: float = setting(
        1.0, "logits are divided by it, for softer targets", group=_TEACHER
    )
    embedding_weight: float = setting(
        1.0, "weight of the loss on the teacher's embeddings, if it has any; 0: none",
        group=_TEACHER, at_least=0,
    )  # fmt: skip
    keep_teacher_head: bool = setting(
        False, "save the head for the teacher's labels, not the one for the data's",
        group=_TEACHER,
    )  # fmt: skip
    teacher_cache: bool = setting(
        False, "keep online teachers' answers to each crop in memory", group=_TEACHER
    )

    loss: str | None = setting(
        None,
        "default: by the kind of labels",
        group=_OPTIMISATION,
        choices=["cross_entropy", "binary_cross_entropy"],
    )
    gradient_accumulation_steps: int = setting(
        0,
        "parts of batch_size clips per optimizer step: only saves memory; default: 1, or as "
        "batch_size is chosen",
        group=_OPTIMISATION,
        at_least=0,
    )
    optimizer: str = setting(
        "adamw",
        "adam adds weight decay to the gradient",
        group=_OPTIMISATION,
        choices=["adamw", "adam"],
    )
    layer_decay: float = setting(
        1.0, "factor on the learning rate from each layer to the one below", group=_OPTIMISATION
    )
    adam_beta1: float = setting(0.9, "decay of the gradients' mean", group=_OPTIMISATION)
    adam_beta2: float = setting(0.999, "decay of their mean square", group=_OPTIMISATION)
    weight_decay: float = setting(0.01, "weight decay, only on matrices", group=_OPTIMISATION)
    max_grad_norm: float = setting(
        1.0, "clip gradients to this norm; 0: never", group=_OPTIMISATION
    )
    warmup_ratio: float = setting(
        0.1, "share of the steps in which the learning rate rises", group=_OPTIMISATION
    )
    warmup_steps: int = setting(
        0, "the same as a number of steps; 0: use warmup_ratio", group=_OPTIMISATION, at_least=0
    )
    lr_scheduler_type: str = setting(
        "cosine",
        "schedule after the warm-up",
        group=_OPTIMISATION,
        choices=["cosine", "linear", "constant", "step"],
    )
    lr_step_start: int = setting(
        5, "step schedule: epochs before the first drop", group=_OPTIMISATION, at_least=0
    )
    lr_step_epochs: int = setting(
        1, "step schedule: epochs from one drop to the next", group=_OPTIMISATION, at_least=1
    )
    lr_step_factor: float = setting(0.85, "step schedule: factor of each drop", group=_OPTIMISATION)

    averaged_epochs: int = setting(
        1, "average the weights after this many last epochs", group=_RESULT, at_least=1
    )
    ema_decay: float = setting(
        0.0, "moving average of the weights, e.g. 0.999; 0: none", group=_RESULT
    )
    best_metric: str | None = setting(
        None,
        "keep the epoch that is best by this metric; default: the last epoch",
        group=_RESULT,
        choices=METRICS,
    )
    early_stopping_epochs: int = setting(
        0, "stop after this many epochs without a new best; 0: never", group=_RESULT, at_least=0
    )

    mixup_rate: float = setting(
        0.0, "share of the clips to mix with another clip", group=_AUGMENTATION
    )
    time_mask: int | None = setting(
        None,
        "SpecAugment: mask up to this many frames; default: a fifth of a clip, at most 96; 0 with "
        "a frozen encoder",
        group=_AUGMENTATION,
        at_least=0,
    )
    frequency_mask: int | None = setting(
        None,
        "SpecAugment: mask up to this many mel bins; default: 3 of 16, at most 24; 0 with a frozen "
        "encoder",
        group=_AUGMENTATION,
        at_least=0,
    )
    time_roll: int = setting(
        0, "shift clips by up to this many frames, wrapping around", group=_AUGMENTATION, at_least=0
    )
    noise_level: float = setting(
        0.0,
        "add uniform noise of up to this many (double) deviations",
        group=_AUGMENTATION,
        at_least=0,
    )
    filter_augment: float = setting(
        0.0,
        "FilterAugment: a random equaliser of up to ± this many decibels",
        group=_AUGMENTATION,
        at_least=0,
    )
    speed_perturbation: float = setting(
        0.0,
        "play clips faster (and higher) or slower (and lower) by up to this share, e.g. 0.1",
        group=_AUGMENTATION,
    )
    time_patchout: int = setting(
        0,
        "patch columns to drop per clip: cheaper steps, less overfitting",
        group=_AUGMENTATION,
        at_least=0,
    )
    frequency_patchout: int = setting(
        0, "patch rows to drop per clip", group=_AUGMENTATION, at_least=0
    )
    label_smoothing: float = setting(
        0.0, "share of the target to spread over all classes", group=_AUGMENTATION
    )

    overwrite: bool = setting(
        False,
        "replace the run in the folder, finished or with other options",
        group=_RUNNING,
    )
    seed: int = setting(0, "random seed of weights, order and augmentation", group=_RUNNING)
    num_workers: int = setting(
        2, "processes that decode and featurise; 0: only this", group=_RUNNING, at_least=0
    )
    shuffle_buffer: int = setting(
        1000, "clips to draw the next one from", group=_RUNNING, at_least=0
    )
    bucket_batches: int = setting(
        0,
        "group the clips of this many steps by length, and pad to the longest instead of "
        "max_length; 0: do not",
        group=_RUNNING,
        at_least=0,
    )
    mixed_precision: str = setting(
        "auto",
        "auto: bf16 or fp16 on a GPU, no on a CPU",
        group=_RUNNING,
        choices=["auto", "no", "bf16", "fp16"],
    )
    save_steps: int = setting(
        500,
        "optimizer steps between saved states, in addition to each epoch's end",
        group=_RUNNING,
        at_least=1,
    )
    report_to: str | None = setting(None, "tracker, e.g. tensorboard", group=_RUNNING)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ema_decay and self.averaged_epochs > 1:
            raise ValueError(
                "--ema_decay and --averaged_epochs both average the weights; choose one."
            )
        if not 0 <= self.speed_perturbation < 1:
            raise ValueError(
                f"--speed_perturbation is a share below 1, e.g. 0.1; got {self.speed_perturbation}."
            )
        self._check_teacher()
        if self.bucket_batches and self.time_roll:
            raise ValueError("--time_roll would move sound into the padding of --bucket_batches.")
        if self.annotations is None:
            self.windows_per_clip = self.windows_per_clip or 1
        else:
            for option, off in (
                ("speed_perturbation", 0.0), ("time_roll", 0), ("time_patchout", 0),
                ("label_smoothing", 0.0),
            ):  # fmt: skip
                if getattr(self, option) != off:
                    raise ValueError(f"With --annotations, --{option} must be {off}.")
            if self.loss == "cross_entropy":
                raise ValueError("With --annotations labels can overlap: no --loss cross_entropy.")
        if self.early_stopping_epochs and self.best_metric is None:
            raise ValueError(
                "--early_stopping_epochs needs --best_metric, e.g. accuracy: what must improve."
            )

    @property
    def has_teacher(self) -> bool:
        return bool(self.teacher or self.teacher_column or self.teacher_embedding_column)

    def _check_teacher(self) -> None:
        if self.teacher and (self.teacher_column or self.teacher_embedding_column):
            raise ValueError("Give either --teacher or the columns of a teacher's answers.")
        if not self.has_teacher:
            for option in ("teacher_key", "teacher_labels", "keep_teacher_head", "teacher_cache"):
                if getattr(self, option):
                    raise ValueError(f"--{option} needs --teacher or --teacher_column.")
        elif self.annotations is not None:
            raise ValueError(
                "A teacher answers for whole clips, and --annotations makes a detector, which "
                "answers for every tenth of a second: train a classifier with the teacher first, "
                "and start the detector from it (--model)."
            )
        if self.teacher_share is not None and not 0 <= self.teacher_share <= 1:
            raise ValueError(f"--teacher_share is from 0 to 1, got {self.teacher_share:g}.")
        if not self.teacher_temperature > 0:
            raise ValueError(
                f"--teacher_temperature must be above 0, got {self.teacher_temperature:g}."
            )
