"""The options of a fine-tuning run: a recipe's keys, the same for both commands."""

from dataclasses import dataclass

from ..common.checkpoints import DEFAULT_MODEL
from ..common.options import setting
from ..data.options import GROUP as SOUNDS
from ..data.options import AnnotatedOptions
from ..evaluation.metrics import METRICS

_MODEL = "the model"
_INPUT = "what the model hears"
_OPTIMISATION = "optimisation"
_RESULT = "which weights are the result"
_AUGMENTATION = "augmentation and regularisation"
_RUNNING = "how it runs"


@dataclass
class FinetuneOptions(AnnotatedOptions):
    """Options of a run. Lengths in frames are of 10 ms.

    Raises:
        ValueError: at construction, for an impossible value or two that contradict each other.
    """

    dataset: str = setting(
        "", "folder of class folders, CSV, Parquet or tar file(s), or a Hub dataset", positional="?"
    )
    model: str = setting(
        DEFAULT_MODEL,
        "start: an AST checkpoint (folder, bundled or Hub name), DeiT/ViT weights (file, folder or "
        "Hub name), or 'scratch' for random weights",
    )
    output: str = setting(
        "runs/ast",
        "run folder; an interrupted run in it is resumed",
        metavar="FOLDER",
        aliases=["output_dir"],
    )
    num_epochs: int = setting(10, "passes over the training part", at_least=1)
    batch_size: int = setting(
        16, "clips that go through the model at once, per process", at_least=1
    )
    learning_rate: float = setting(1e-4, "peak, after the warm-up")

    unmarked: str = setting(
        "background",
        "what annotated recordings are where nothing is marked",
        group=SOUNDS,
        choices=["background", "unknown"],
    )
    max_corrupt: float = setting(
        0.0,
        "unreadable sounds to put up with: below 1 their share, otherwise their number",
        group=SOUNDS,
        at_least=0,
    )
    balanced_sampling: bool = setting(False, "draw clips of rare classes more often", group=SOUNDS)

    trained: str = setting(
        "all",
        "which weights learn: all, head (frozen encoder), linear (the last layer only: a probe), "
        "or lora (adapters through PEFT, and the head)",
        group=_MODEL,
        choices=["all", "head", "linear", "lora"],
    )
    lora_rank: int = setting(
        8, "of the adapters on query, key, value and the MLP", group=_MODEL, at_least=1
    )
    hidden_size: int = setting(192, "width, from scratch only", group=_MODEL, at_least=1)
    num_hidden_layers: int = setting(12, "depth, from scratch only", group=_MODEL, at_least=1)
    num_attention_heads: int = setting(3, "heads, from scratch only", group=_MODEL, at_least=1)

    max_length: int | None = setting(
        None,
        "frames heard at once: longer clips are read in windows, shorter ones padded; default, "
        "here and below: the checkpoint's, or AST's (1024, 128, 10, 10)",
        group=_INPUT,
        at_least=1,
    )
    windows_per_clip: int = setting(
        1,
        "windows of a longer clip that are heard together, per epoch; one is drawn at random",
        group=_INPUT,
        at_least=1,
    )
    window_pooling: str | None = setting(
        None,
        "a longer clip's score from its windows': mean, max, or linear_softmax, between the two; "
        "default: the model's own, or mean",
        group=_INPUT,
        choices=["mean", "max", "linear_softmax"],
    )
    num_mel_bins: int | None = setting(None, "mel bins", group=_INPUT, at_least=1)
    frequency_stride: int | None = setting(
        None, "mel bins between patches", group=_INPUT, at_least=1
    )
    time_stride: int | None = setting(None, "frames between patches", group=_INPUT, at_least=1)
    mean: float | None = setting(
        None, "of the log-mel values; default: measured, or the model's", group=_INPUT
    )
    std: float | None = setting(
        None, "of the log-mel values; default: measured, or the model's", group=_INPUT
    )

    loss: str | None = setting(
        None,
        "default: by the kind of labels",
        group=_OPTIMISATION,
        choices=["cross_entropy", "binary_cross_entropy"],
    )
    gradient_accumulation_steps: int = setting(
        1,
        "parts of batch_size clips per optimizer step: changes nothing but memory",
        group=_OPTIMISATION,
        at_least=1,
    )
    optimizer: str = setting(
        "adamw",
        "adam: weight decay as a part of the gradient",
        group=_OPTIMISATION,
        choices=["adamw", "adam"],
    )
    layer_decay: float = setting(
        1.0, "learning rate from each layer to the one before it", group=_OPTIMISATION
    )
    adam_beta1: float = setting(0.9, "decay of the mean of the gradients", group=_OPTIMISATION)
    adam_beta2: float = setting(0.999, "decay of the mean of their squares", group=_OPTIMISATION)
    weight_decay: float = setting(0.01, "on matrices only", group=_OPTIMISATION)
    max_grad_norm: float = setting(
        1.0, "gradients are scaled down to this norm; 0: never", group=_OPTIMISATION
    )
    warmup_ratio: float = setting(
        0.1, "share of the steps with a rising learning rate", group=_OPTIMISATION
    )
    warmup_steps: int = setting(
        0, "the same as a number of steps; 0: warmup_ratio counts", group=_OPTIMISATION, at_least=0
    )
    lr_scheduler_type: str = setting(
        "cosine",
        "after the warm-up",
        group=_OPTIMISATION,
        choices=["cosine", "linear", "constant", "step"],
    )
    lr_step_start: int = setting(
        5, "step schedule: epochs before the first drop", group=_OPTIMISATION, at_least=0
    )
    lr_step_epochs: int = setting(
        1, "step schedule: epochs from one drop to the next", group=_OPTIMISATION, at_least=1
    )
    lr_step_factor: float = setting(
        0.85, "step schedule: learning rate after a drop over before", group=_OPTIMISATION
    )

    averaged_epochs: int = setting(
        1, "the mean of the weights after the last epochs", group=_RESULT, at_least=1
    )
    ema_decay: float = setting(
        0.0, "a moving average of the weights, e.g. 0.999; 0: none", group=_RESULT
    )
    best_metric: str | None = setting(
        None,
        "keep the epoch that is best by this; default: the last epoch",
        group=_RESULT,
        choices=METRICS,
    )
    early_stopping_epochs: int = setting(
        0, "stop after this many epochs without a new best; 0: never", group=_RESULT, at_least=0
    )

    mixup_rate: float = setting(
        0.0, "share of the clips mixed with another one of the batch", group=_AUGMENTATION
    )
    time_mask: int = setting(
        96, "SpecAugment: mask up to this many frames", group=_AUGMENTATION, at_least=0
    )
    frequency_mask: int = setting(
        24, "SpecAugment: mask up to this many mel bins", group=_AUGMENTATION, at_least=0
    )
    time_roll: int = setting(
        0, "shift clips in a circle by up to this many frames", group=_AUGMENTATION, at_least=0
    )
    noise_level: float = setting(
        0.0,
        "add uniform noise of up to this many (double) deviations",
        group=_AUGMENTATION,
        at_least=0,
    )
    filter_augment: float = setting(
        0.0,
        "FilterAugment: a random equaliser of up to this many decibels either way",
        group=_AUGMENTATION,
        at_least=0,
    )
    speed_perturbation: float = setting(
        0.0,
        "play clips faster and higher, or slower and lower, by up to this share, e.g. 0.1",
        group=_AUGMENTATION,
    )
    time_patchout: int = setting(
        0,
        "patch columns dropped per clip: cheaper steps, less overfitting",
        group=_AUGMENTATION,
        at_least=0,
    )
    frequency_patchout: int = setting(
        0, "patch rows dropped per clip", group=_AUGMENTATION, at_least=0
    )
    label_smoothing: float = setting(
        0.0, "part of the target spread over all classes", group=_AUGMENTATION
    )

    overwrite: bool = setting(
        False,
        "replace the run in the folder: a finished one, or one with other options",
        group=_RUNNING,
    )
    seed: int = setting(0, "of weights, order and augmentation", group=_RUNNING)
    num_workers: int = setting(
        2, "processes that decode and featurise; 0: this one", group=_RUNNING, at_least=0
    )
    shuffle_buffer: int = setting(
        1000, "clips that a random next one is drawn from", group=_RUNNING, at_least=0
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
        "optimizer steps between saved states, besides every epoch's",
        group=_RUNNING,
        at_least=1,
    )
    report_to: str | None = setting(None, "tracker, e.g. tensorboard", group=_RUNNING)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ema_decay and self.averaged_epochs > 1:
            raise ValueError(
                "--ema_decay and --averaged_epochs are two ways of averaging; choose one."
            )
        if not 0 <= self.speed_perturbation < 1:
            raise ValueError(
                f"--speed_perturbation is a share below 1, e.g. 0.1; got {self.speed_perturbation}."
            )
        if self.bucket_batches and self.time_roll:
            raise ValueError("--time_roll would move sound into the padding of --bucket_batches.")
        if self.annotations is not None:
            for option, off in (
                ("speed_perturbation", 0.0), ("time_roll", 0), ("time_patchout", 0),
                ("label_smoothing", 0.0),
            ):  # fmt: skip
                if getattr(self, option) != off:
                    raise ValueError(f"With --annotations, --{option} must be {off}.")
            if self.loss == "cross_entropy":
                raise ValueError(
                    "With --annotations several labels may be heard at once: no "
                    "--loss cross_entropy."
                )
        if self.early_stopping_epochs and self.best_metric is None:
            raise ValueError(
                "--early_stopping_epochs needs --best_metric: what has to improve, e.g. accuracy."
            )
