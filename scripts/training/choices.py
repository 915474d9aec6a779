"""What a run chooses from its data if the options do not say, so that a laptop can bear it.

    max_length                  frames: as long as the clips, at most the start's input
    windows_per_clip            of annotated recordings: as many as cover them
    batch_size, parts           clips per optimizer step by the number of clips, in parts that fit
                                a CPU's cache
    num_epochs                  more for fewer clips
    time_mask, frequency_mask   shares of the input; none if the encoder is frozen
    head_learning_rate          higher for new labels on an encoder that knows sound (as in SSAST's
                                code): at the encoder's own rate, the head lags behind

The choice depends only on data and options, so a resumed run chooses the same.
"""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from feature_extraction import ASTFeatureExtractor, AudioDecodingError, audio_duration
from modeling_ast import ASTConfig, ASTFrameConfig

from ..data.labelled import LabelledAudio
from .options import FinetuneOptions
from .start import find_weights

CHOSEN = (
    "max_length", "windows_per_clip", "batch_size", "gradient_accumulation_steps", "num_epochs",
    "time_mask", "frequency_mask", "head_learning_rate",
)  # fmt: skip
_LOOKED_AT = 200  # clips, for their length
_USUAL = 0.95  # share of the clips that fit into the input
_FRAME_S = 0.01
_MULTIPLE = 16  # frames: whole patches
_MOST_WINDOWS = 8  # of an annotated recording in a step
_TOKENS_AT_ONCE = 1024  # on a CPU, of a width of 192
_CLIPS_PER_STEP = ((1000, 8), (10_000, 16), (math.inf, 32))  # up to so many clips
_HEAD_FACTOR = 10  # on the learning rate
_EPOCHS, _FEWEST, _MOST = 120, 3, 30  # 120 over the square root of the clips


def choose(options: FinetuneOptions, data: LabelledAudio) -> FinetuneOptions:
    """The options, completed with what they leave to the run."""
    size, is_masked, gets_new_head = _start_geometry(options, data)
    lengths = clip_lengths(data)
    max_length = options.max_length
    heard = size.max_length
    if max_length is None and lengths:
        frames = math.ceil(float(np.quantile(lengths, _USUAL)) / _FRAME_S)
        heard = min(heard, _MULTIPLE * max(2, math.ceil(frames / _MULTIPLE)))
        # With masks, batches are only padded to their longest clip: nothing to choose.
        max_length = None if is_masked else heard
    is_frozen = options.trained in ("head", "linear")
    time_mask, frequency_mask = options.time_mask, options.frequency_mask
    if time_mask is None:
        time_mask = 0 if is_frozen else min(96, heard // 5)
    if frequency_mask is None:
        frequency_mask = 0 if is_frozen else min(24, 3 * size.num_mel_bins // 16)
    windows = options.windows_per_clip
    if not windows:
        usual = float(np.quantile(lengths, _USUAL)) / _FRAME_S if lengths else 0.0
        windows = min(_MOST_WINDOWS, max(1, math.ceil(usual / heard)))
    head_learning_rate = options.head_learning_rate
    if head_learning_rate is None and gets_new_head and not is_frozen:
        head_learning_rate = _HEAD_FACTOR * options.learning_rate
    clips = data.train_clips
    # A recording's label is one thing to learn from; marks are as many as it has windows.
    per_clip = windows if options.annotations is not None else 1
    step = next(n for most, n in _CLIPS_PER_STEP if clips * per_clip <= most)
    step = max(1, step // per_clip)
    parts, batch_size = options.gradient_accumulation_steps, options.batch_size
    if not batch_size:
        part = math.ceil(step / (parts or 1))
        if not parts:
            rows, columns = size.grid_shape(max(heard, size.patch_shape[1]), size.num_mel_bins)
            tokens = (rows - options.frequency_patchout) * (columns - options.time_patchout)
            tokens *= windows
            at_once = max(1, _TOKENS_AT_ONCE * 192 // (max(1, tokens) * size.hidden_size))
            part = step if torch.cuda.is_available() else min(step, at_once)
            parts = math.ceil(step / part)
        batch_size = math.ceil(step / parts)
    epochs = round(_EPOCHS / math.sqrt(clips * per_clip))
    return replace(
        options,
        max_length=max_length,
        windows_per_clip=windows,
        batch_size=batch_size,
        gradient_accumulation_steps=parts or 1,
        num_epochs=options.num_epochs or min(_MOST, max(_FEWEST, epochs)),
        time_mask=time_mask,
        frequency_mask=frequency_mask,
        head_learning_rate=head_learning_rate,
    )


def choices(options: FinetuneOptions, chosen: FinetuneOptions) -> dict[str, Any]:
    """What was chosen, by option."""
    before, after = asdict(options), asdict(chosen)
    return {name: after[name] for name in CHOSEN if before[name] != after[name]}


def describe_choices(choices: dict[str, Any], chosen: FinetuneOptions) -> str:
    """Shown at the start of a run; "" if there was nothing to choose."""
    words = []
    if "num_epochs" in choices:
        words.append(f"{chosen.num_epochs} epochs")
    if "batch_size" in choices:
        parts = chosen.gradient_accumulation_steps
        step = f"{chosen.batch_size * parts} clips in a step"
        words.append(step + (f", in parts of {chosen.batch_size}" if parts > 1 else ""))
    if chosen.max_length is not None and "max_length" in choices:
        words.append(f"{chosen.max_length} frames ({chosen.max_length * _FRAME_S:.2f} s) at once")
    if "windows_per_clip" in choices:
        words.append(f"{chosen.windows_per_clip} windows of a longer clip")
    if "head_learning_rate" in choices:
        words.append(f"the new head learns at {chosen.head_learning_rate:g}")
    if not words:
        return ""
    names = ", ".join(f"--{name}" for name in choices)
    return f"Chosen for these clips: {'; '.join(words)}. Otherwise: {names}"


def clip_lengths(data: LabelledAudio) -> list[float]:
    """Seconds of the first training clips whose headers tell."""
    lengths = []
    for row in data.train.take(_LOOKED_AT):
        try:
            lengths.append(audio_duration(row["audio"]) or 0.0)
        except AudioDecodingError:
            continue  # reported on decoding
    return [length for length in lengths if length > 0]


def _start_geometry(options: FinetuneOptions, data: LabelledAudio) -> tuple[ASTConfig, bool, bool]:
    """Shape and input of the run's start, whether padding is masked, and whether an encoder that
    knows sound gets a new head."""
    is_masked, gets_new_head = bool(options.bucket_batches), False
    config = ASTConfig(num_attention_heads=1)  # of pictures' weights, AST's own input
    if options.model == "scratch":
        config.hidden_size = options.hidden_size
    else:
        name, is_vision = find_weights(options.model)
        if not is_vision:
            config = ASTConfig.from_pretrained(name)
            extractor = ASTFeatureExtractor.from_pretrained(name)
            is_masked |= bool(extractor.return_attention_mask)
            gets_new_head = set(config.id2label.values()) != set(data.label_names)
            if options.annotations is not None:
                gets_new_head |= (
                    AutoConfig.from_pretrained(name).model_type != ASTFrameConfig.model_type
                )
        elif (Path(name) / "config.json").is_file():
            config.hidden_size = AutoConfig.from_pretrained(name).hidden_size
    for name in ("max_length", "num_mel_bins", "frequency_stride", "time_stride"):
        if (value := getattr(options, name)) is not None:
            setattr(config, name, value)
    return config, is_masked, gets_new_head
