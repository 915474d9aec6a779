"""The options of a fine-tuning run: a recipe's keys, the same for both commands."""

from dataclasses import dataclass

from ..common.arguments import setting
from ..common.options import did_you_mean


@dataclass
class FinetuneArguments:
    """Options of a run. Lengths in frames are of 10 ms.

    Raises:
        ValueError: at construction, for a word that is none of an option's choices.
    """

    dataset: str = setting("", "folder of class folders, Parquet or tar file(s), or a Hub dataset")
    dataset_config: str | None = setting(None, "configuration of the Hub dataset")
    audio_column: str = setting("audio", "column with the sound")
    label_column: str = setting(
        "label", "column with the class, a name or index, or a list of them"
    )
    label_separator: str | None = setting(None, "between several class names in one string")
    train_split: str = setting("train", "split to train on")
    evaluation_split: str | None = setting(None, "split to evaluate on")
    fold_column: str | None = setting(None, "column with the fold, instead of a split")
    evaluation_fold: str | None = setting(
        None, "the fold to evaluate on; the others train. 'all': each in turn"
    )
    evaluation_fraction: float = setting(0.2, "held out when there is no split and no fold")
    group_column: str | None = setting(
        None, "column with the speaker or recording: no group is in both parts"
    )
    max_corrupt: float = setting(
        0.0, "unreadable sounds to put up with: below 1 their share, otherwise their number"
    )

    model: str = setting(
        "MIT/ast-finetuned-audioset-10-10-0.4593",
        "start: an AST checkpoint (folder or Hub name), DeiT/ViT weights (file or folder), or "
        "'scratch' for random weights",
    )
    hidden_size: int = setting(192, "width, from scratch only")
    num_hidden_layers: int = setting(12, "depth, from scratch only")
    num_attention_heads: int = setting(3, "heads, from scratch only")
    max_length: int = setting(1024, "frames per clip: longer clips are cut, shorter ones padded")
    num_mel_bins: int = setting(128, "mel bins")
    frequency_stride: int = setting(10, "mel bins between patches")
    time_stride: int = setting(10, "frames between patches")
    mean: float | None = setting(None, "of the log-mel values; default: measured, or the model's")
    std: float | None = setting(None, "of the log-mel values; default: measured, or the model's")

    output_dir: str = setting("runs/ast", "run folder; an interrupted run in it goes on")
    overwrite: bool = setting(False, "replace a run in output_dir: a finished one, or one with "
                              "other options")  # fmt: skip
    num_epochs: int = setting(10, "passes over the training part")
    batch_size: int = setting(16, "clips that go through the model at once, per process")
    gradient_accumulation_steps: int = setting(
        1, "parts of batch_size clips per optimizer step: changes nothing but memory"
    )
    loss: str | None = setting(
        None, "cross_entropy or binary_cross_entropy; default: by the kind of labels"
    )
    trained: str = setting(
        "all", "weights: all, head (frozen encoder), linear (the last layer only: a probe), or "
        "lora (adapters through PEFT, and the head)"
    )  # fmt: skip
    lora_rank: int = setting(8, "of the adapters on query, key, value and the MLP")
    optimizer: str = setting("adamw", "adamw, or adam (weight decay as a part of the gradient)")
    learning_rate: float = setting(1e-4, "peak, after the warm-up")
    layer_decay: float = setting(1.0, "learning rate from each layer to the one before it")
    adam_beta1: float = setting(0.9, "decay of the mean of the gradients")
    adam_beta2: float = setting(0.999, "decay of the mean of their squares")
    weight_decay: float = setting(0.01, "on matrices only")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm; 0: never")
    warmup_ratio: float = setting(0.1, "share of the steps with a rising learning rate")
    warmup_steps: int = setting(0, "the same as a number of steps; 0: warmup_ratio counts")
    lr_scheduler_type: str = setting("cosine", "after the warm-up: cosine, linear, constant, step")
    lr_step_start: int = setting(5, "step schedule: epochs before the first drop")
    lr_step_epochs: int = setting(1, "step schedule: epochs from one drop to the next")
    lr_step_factor: float = setting(0.85, "step schedule: learning rate after a drop over before")
    averaged_epochs: int = setting(1, "the result is the mean of the weights after the last epochs")
    ema_decay: float = setting(0.0, "the result is a moving average of the weights, e.g. 0.999")
    best_metric: str | None = setting(
        None, "keep the epoch that is best by this, e.g. accuracy or loss; default: the last one"
    )
    early_stopping_epochs: int = setting(0, "stop after this many epochs without a new best; 0: no")
    mixup_rate: float = setting(0.0, "share of the clips mixed with another one of the batch")
    time_mask: int = setting(96, "SpecAugment: hide up to this many frames")
    frequency_mask: int = setting(24, "SpecAugment: hide up to this many mel bins")
    noise_level: float = setting(0.0, "add uniform noise of up to this many (double) deviations")
    filter_augment: float = setting(
        0.0, "FilterAugment: a random equaliser of up to this many decibels either way"
    )
    speed_perturbation: float = setting(
        0.0, "play clips faster and higher, or slower and lower, by up to this share, e.g. 0.1"
    )
    time_roll: int = setting(0, "shift clips in a circle by up to this many frames")
    time_patchout: int = setting(0, "patch columns dropped per clip: cheaper steps, less overfit")
    frequency_patchout: int = setting(0, "patch rows dropped per clip")
    label_smoothing: float = setting(0.0, "part of the target spread over all classes")
    balanced_sampling: bool = setting(False, "draw clips of rare classes more often")
    bucket_batches: int = setting(
        0, "group clips of so many steps by length, and pad to the longest instead of max_length"
    )
    shuffle_buffer: int = setting(1000, "clips that a random next one is drawn from")
    num_workers: int = setting(2, "processes that decode and featurise")
    mixed_precision: str = setting("auto", "auto (bf16 or fp16 on a GPU), no, bf16, fp16")
    seed: int = setting(0, "of weights, order and augmentation")
    save_steps: int = setting(500, "optimizer steps between checkpoints, besides every epoch's")
    report_to: str | None = setting(None, "tracker, e.g. tensorboard")

    def __post_init__(self) -> None:
        for option, choices in (
            ("loss", (None, "cross_entropy", "binary_cross_entropy")),
            ("trained", ("all", "head", "linear", "lora")),
            ("optimizer", ("adamw", "adam")),
            ("lr_scheduler_type", ("cosine", "linear", "constant", "step")),
            ("mixed_precision", ("auto", "no", "bf16", "fp16")),
        ):
            value = getattr(self, option)
            if value not in choices:
                words = [choice for choice in choices if choice]
                raise ValueError(f"--{option} is {value!r}{did_you_mean(str(value), words)}")
        for option in (
            "num_epochs", "batch_size", "gradient_accumulation_steps", "save_steps",
            "averaged_epochs", "lr_step_epochs", "lora_rank",
        ):  # fmt: skip
            if getattr(self, option) < 1:
                raise ValueError(f"--{option} must be at least 1, got {getattr(self, option)}.")
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
        if self.early_stopping_epochs and self.best_metric is None:
            raise ValueError(
                "--early_stopping_epochs needs --best_metric: what has to improve, e.g. accuracy."
            )
