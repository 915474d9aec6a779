"""ASTFeatureExtractor: waveforms to the normalised log-mel spectrograms that AST takes.

waveforms       B x (samples,)  mono, at `sampling_rate`, full scale is -1..1
log-mel         B x (T, F)      `LogMel`, AST: Kaldi's filterbank, 100 frames per second
padded          (B, T, F)       with `padding_value`, before normalisation, as published
input_values    (B, T, F)       (x - mean) / (2 * std), or an affine map per mel bin
attention_mask  (B, T)          1 = sound, 0 = padding
"""

import math
from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.utils import logging

from .fbank_ast import LOG_FLOOR, LOWEST_FREQUENCY, PREEMPHASIS, LogMel
from .levels_ast import integer_error, integer_warning, level_error, level_warning, warn_once

logger = logging.get_logger(__name__)
# Settings that `transformers`' own extractor lacks, with the values it implies.
_FILTERBANK = {
    "win_length": None,
    "hop_length": None,
    "n_fft": None,
    "frequency_min": LOWEST_FREQUENCY,
    "frequency_max": None,
    "mel_scale": "kaldi",
    "preemphasis": PREEMPHASIS,
    "center": False,
    "periodic_window": False,
    "compression": "log",
    "mel_floor": LOG_FLOOR,
    "dynamic_range": None,
}
_NATIVE = {**_FILTERBANK, "remove_mean": False, "bin_scale": None, "bin_offset": None}

_MAX_VALUES = 1 << 28  # of one spectrogram: 1 GB
_LARGEST_STATISTIC = 1e6  # of log-mel values, which lie between -16 and 90


class ASTFeatureExtractor(SequenceFeatureExtractor):
    """Log-mel spectrograms for AST; arguments, defaults and file format are `transformers`' own.

    Args:
        feature_size: kept for the file format.
        sampling_rate: of the waveforms, in Hz.
        num_mel_bins: F.
        max_length: T that clips are padded or cut to, in frames (10 ms each in AST).
        padding_value: log-mel value of padding frames.
        do_normalize: subtract `mean`, divide by twice `std`.
        mean, std: of the training data's log-mel values; the defaults are AudioSet's.
        return_attention_mask: whether calls return the mask by default. Published checkpoints were
            trained without one and expect none.
        win_length, hop_length, n_fft, frequency_min, frequency_max: of the filterbank, see
            `LogMel`; the defaults are AST's.
        mel_scale, preemphasis, center, periodic_window: likewise.
        compression, mel_floor, dynamic_range: likewise.
        remove_mean: subtract each clip's mean first. Kaldi does so frame by frame anyway; the
            remaining rounding shows only in filters with hardly any energy.
        bin_scale, bin_offset: (F,) numbers each: `log-mel * scale + offset` instead of mean and
            std, like CED's batch normalisation of the spectrogram.

    `transformers`' own extractor computes what has AST's defaults. A file with others names
    `ASTFamilyFeatureExtractor`, so that plain `transformers` does not compute something else.
    """

    model_input_names = ["input_values", "attention_mask"]

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 16000,
        num_mel_bins: int = 128,
        max_length: int = 1024,
        padding_value: float = 0.0,
        do_normalize: bool = True,
        mean: float = -4.2677393,
        std: float = 4.5689974,
        return_attention_mask: bool = False,
        win_length: int | None = None,
        hop_length: int | None = None,
        n_fft: int | None = None,
        frequency_min: float = LOWEST_FREQUENCY,
        frequency_max: float | None = None,
        mel_scale: str = "kaldi",
        preemphasis: float = PREEMPHASIS,
        center: bool = False,
        periodic_window: bool = False,
        compression: str = "log",
        mel_floor: float = LOG_FLOOR,
        dynamic_range: float | None = None,
        remove_mean: bool = False,
        bin_scale: list[float] | None = None,
        bin_offset: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        for name in kwargs:  # they become attributes, and a file must not replace a method
            if name.startswith("__") or callable(getattr(type(self), name, None)):
                raise ValueError(f"An extractor has no setting {_shortened(name)}.")
        super().__init__(
            feature_size=feature_size,
            sampling_rate=sampling_rate,
            padding_value=padding_value,
            return_attention_mask=return_attention_mask,
            **kwargs,
        )
        self.num_mel_bins = num_mel_bins
        self.max_length = max_length
        self.do_normalize = do_normalize
        self.mean = mean
        self.std = std
        self.win_length = win_length
        self.hop_length = hop_length
        self.n_fft = n_fft
        self.frequency_min = frequency_min
        self.frequency_max = frequency_max
        self.mel_scale = mel_scale
        self.preemphasis = preemphasis
        self.center = center
        self.periodic_window = periodic_window
        self.compression = compression
        self.mel_floor = mel_floor
        self.dynamic_range = dynamic_range
        self.remove_mean = remove_mean
        self.bin_scale = bin_scale
        self.bin_offset = bin_offset
        self._check_settings()

    @classmethod
    def from_dict(cls, feature_extractor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in `transformers`.

        Raises:
            ValueError: for settings that no model could have; a file can come from anyone.
        """
        if not isinstance(feature_extractor_dict, dict):
            raise ValueError(
                "Not a feature extractor's file: expected a JSON object, got "
                f"{_shortened(feature_extractor_dict)}."
            )
        return super().from_dict(feature_extractor_dict, **kwargs)

    def _check_settings(self) -> None:
        """Raise ValueError for settings that no model could have: a file can come from anyone."""
        for name, least, most in (
            ("sampling_rate", 1000, 768_000),
            ("num_mel_bins", 1, 4096),
            ("max_length", 1, 1_000_000),
        ):
            value = getattr(self, name)
            is_whole = isinstance(value, Integral) and not isinstance(value, bool)
            if not (is_whole and least <= int(value) <= most):
                raise ValueError(
                    f"{name} must be a whole number from {least} to {most}, got "
                    f"{_shortened(value)}."
                )
        for name in ("mean", "std", "padding_value"):
            value = getattr(self, name)
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            if not (is_number and abs(value) <= _LARGEST_STATISTIC):
                raise ValueError(
                    f"{name} must be a number up to {_LARGEST_STATISTIC:g}, got "
                    f"{_shortened(value)}."
                )
        if self.max_length * self.num_mel_bins > _MAX_VALUES:
            raise ValueError(
                f"max_length={self.max_length} x num_mel_bins={self.num_mel_bins} must be at most "
                f"{_MAX_VALUES}: no model takes larger spectrograms."
            )
        if self.std < 1 / _LARGEST_STATISTIC:
            raise ValueError(
                f"std must be at least {1 / _LARGEST_STATISTIC:g}, got {_shortened(self.std)}."
            )
        for name in ("do_normalize", "return_attention_mask"):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                raise ValueError(
                    f"{name} must be true or false, got {_shortened(getattr(self, name))}."
                )
        for name in ("win_length", "hop_length", "n_fft"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Integral) and int(value) >= 1):
                raise ValueError(f"{name} must be a number of samples, got {value!r}.")
        for name in ("frequency_min", "frequency_max", "preemphasis", "mel_floor", "dynamic_range"):
            value = getattr(self, name)
            if not (isinstance(value, Real) or (value is None and _NATIVE[name] is None)):
                raise ValueError(f"{name} must be a number, got {value!r}.")
        self.filterbank  # noqa: B018  (checks its numbers)
        for name in ("bin_scale", "bin_offset"):
            values = getattr(self, name)
            if (values is None) != (self.bin_scale is None):
                raise ValueError("Give both bin_scale and bin_offset, or neither.")
            if values is not None and not (
                isinstance(values, (list, tuple))
                and len(values) == self.num_mel_bins
                and all(isinstance(v, Real) and math.isfinite(float(v)) for v in values)
            ):
                raise ValueError(
                    f"{name} must be one finite number for each of {self.num_mel_bins} mel bins."
                )

    @property
    def filterbank(self) -> LogMel:
        """The filterbank with these settings."""
        numbers = {name: getattr(self, name) for name in _FILTERBANK}
        return LogMel(int(self.sampling_rate), int(self.num_mel_bins), **numbers)

    @property
    def is_native(self) -> bool:
        """Whether `transformers`' own extractor computes the same values."""
        return all(getattr(self, name) == value for name, value in _NATIVE.items())

    def to_dict(self) -> dict[str, Any]:
        content = super().to_dict()
        for name, value in _NATIVE.items():
            if content.get(name) == value:
                content.pop(name, None)
        kind = ASTFeatureExtractor if self.is_native else ASTFamilyFeatureExtractor
        content["feature_extractor_type"] = kind.__name__
        return content

    def __call__(
        self,
        raw_speech: np.ndarray | Tensor | list,
        sampling_rate: int | None = None,
        padding: str | bool = "max_length",
        max_length: int | None = None,
        truncation: bool = True,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Featurise one clip or a batch.

        Args:
            raw_speech: one clip (samples,) or a batch, (B, samples) or a list of clips of any
                lengths; numpy, tensors on any device, or lists. Integer arrays are PCM and divided
                by their type's range; numbers in lists are taken as they are. A clip shorter than
                one frame (AST: 25 ms) is extended to one with silence.
            sampling_rate: of the clips; pass it, so that a wrong one is noticed.
            padding: "max_length": to `max_length` frames; "longest" or True: to the longest clip;
                False: none. As the third positional argument, it can also be "pt" or "np":
                `transformers`' extractor has `return_tensors` there.
            max_length: frames, not samples; default: the extractor's own.
            truncation: cut clips longer than `max_length` frames.
            return_attention_mask: None: yes for padding="longest", else the extractor's setting.
            return_tensors: "pt", "np", or None for a list with one array (T, F) per clip (a tensor,
                if tensors were given).

        Returns:
            `input_values` (B, T, F), float32, and optionally `attention_mask` (B, T). Tensors stay
            on their device.

        Raises:
            ValueError: if a clip or an argument is not as above; the message says what was passed,
                what was expected and what to do.
        """
        if sampling_rate is None:
            logger.warning_once(
                "ASTFeatureExtractor was called without sampling_rate: it cannot detect a clip "
                f"that is not at {self.sampling_rate} Hz."
            )
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"The clip has a sampling rate of {sampling_rate} Hz; this extractor needs "
                f"{self.sampling_rate} Hz. Resample it: load_audio(source, {self.sampling_rate})."
            )
        if padding in ("pt", "np") and return_tensors in (None, padding):
            padding, return_tensors = "max_length", "pt" if padding == "pt" else "np"
        padding = "longest" if padding is True else padding
        if padding not in ("max_length", "longest", False):
            raise ValueError(
                f"padding must be 'max_length', 'longest', True or False, got {padding!r}."
            )
        asked_length = max_length
        max_length = self.max_length if max_length is None else max_length
        if not isinstance(max_length, (int, np.integer)) or max_length < 1:
            raise ValueError(f"max_length must be a number of frames above 0, got {max_length!r}.")
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors must be 'pt', 'np' or None, got {return_tensors!r}.")

        waveforms = self._waveforms(raw_speech)
        filterbank = self.filterbank
        lengths = [filterbank.num_frames(len(waveform)) for waveform in waveforms]
        if truncation:
            longest_used = filterbank.samples_used(max_length)
            waveforms = [waveform[:longest_used] for waveform in waveforms]
            lengths = [min(length, max_length) for length in lengths]
        if padding == "max_length" and asked_length is not None:
            self._check_unit(asked_length, max(lengths))
        device = waveforms[0].device

        input_values: Tensor | list[Tensor]
        attention_mask: Tensor | list[Tensor]
        if padding is False:
            if return_tensors is not None and len(set(lengths)) > 1:
                raise ValueError(
                    f"The clips have {sorted(set(lengths))} frames and do not fit one tensor; use "
                    "padding='longest' or 'max_length', or return_tensors=None."
                )
            input_values = [
                self._normalize(self._log_mel(waveform, length))
                for waveform, length in zip(waveforms, lengths, strict=True)
            ]
            attention_mask = [torch.ones(n, dtype=torch.long, device=device) for n in lengths]
        else:
            frames = max(lengths) if padding == "longest" else max(max_length, *lengths)
            attention_mask = torch.arange(frames, device=device) < torch.tensor(
                lengths, device=device
            ).unsqueeze(1)  # (B, T)
            input_values = self._padded(waveforms, attention_mask)
            attention_mask = attention_mask.long()

        output = {"input_values": input_values}
        if return_attention_mask is None:
            return_attention_mask = self.return_attention_mask or padding == "longest"
        if return_attention_mask:
            output["attention_mask"] = attention_mask
        if return_tensors is None:
            gives_tensors = isinstance(_first_clip(raw_speech), Tensor)
            return BatchFeature(
                {
                    name: [x if gives_tensors else x.cpu().numpy() for x in values]
                    for name, values in output.items()
                }
            )
        stacked = {
            name: values if isinstance(values, Tensor) else torch.stack(values)
            for name, values in output.items()
        }
        if return_tensors == "np":
            return BatchFeature({name: values.cpu().numpy() for name, values in stacked.items()})
        return BatchFeature(stacked)

    def _check_unit(self, max_length: int, longest: int) -> None:
        """Refuse a `max_length` meant in samples, the unit of other extractors."""
        if max_length >= self.sampling_rate // 2 and max_length > 8 * longest:
            frames = max(1, self.filterbank.num_frames(max_length))
            shift_s = self.filterbank.frame_shift / self.sampling_rate
            raise ValueError(
                f"max_length={max_length} frames of {1000 * shift_s:g} ms are "
                f"{max_length * shift_s:g} s, but the longest clip has only {longest} frames. If "
                f"you meant samples, pass max_length={frames}; or omit it to use the model's, "
                f"{self.max_length}."
            )

    def load_audio(self, source: Any) -> np.ndarray:
        """Read a sound at this extractor's sampling rate: see `load_audio`."""
        from .audio_ast import load_audio  # only here: a trained model needs no audio decoder

        return load_audio(source, self.sampling_rate)

    def stream_audio(self, source: Any) -> Iterator[tuple[int, np.ndarray]]:
        """Read a sound of any length in blocks at this extractor's rate: see `stream_audio`."""
        from .audio_ast import stream_audio

        return stream_audio(source, self.sampling_rate)

    def _waveforms(self, raw_speech: np.ndarray | Tensor | list) -> list[Tensor]:
        """One clip or a batch as float32 tensors (samples,), finite, of at least one frame."""
        shortest = self.filterbank.shortest
        if isinstance(raw_speech, (np.ndarray, Tensor)):
            shape = tuple(raw_speech.shape)
            if len(shape) == 2 and shape[1] < shortest < shape[0]:
                raise ValueError(
                    f"Got an array of shape {shape}, which looks like stereo sound: (samples, "
                    "channels). Clips are mono: average the channels, array.mean(axis=1). A batch "
                    "is (clips, samples)."
                )
            if len(shape) not in (1, 2):
                raise ValueError(
                    f"Got an array of shape {shape}; expected one mono clip (samples,) or a batch "
                    "(clips, samples). Average the channels, or read the sound with load_audio."
                )
            batch = _as_floating(raw_speech, "The array")
            clips = list(batch) if batch.dim() == 2 else [batch]
        elif isinstance(raw_speech, (list, tuple)):
            is_batch = isinstance(_first_clip(raw_speech), (np.ndarray, Tensor, list, tuple))
            clips = [
                _as_floating(clip, f"Clip {index}")
                for index, clip in enumerate(raw_speech if is_batch else [raw_speech])
            ]
        else:
            raise ValueError(
                "Expected a clip or a batch of clips as array, tensor or list, got "
                f"{type(raw_speech).__name__}. Read files with load_audio."
            )
        if not clips:
            raise ValueError("Got an empty batch, expected at least one clip.")
        if len({clip.device for clip in clips}) > 1:
            raise ValueError(
                f"The clips are on {sorted({str(clip.device) for clip in clips})}; move them to "
                "one device."
            )
        for index, clip in enumerate(clips):
            if clip.dim() == 2 and len(clip) == 1:
                clips[index] = clip = clip[0]
            if clip.dim() != 1 or not len(clip):
                raise ValueError(
                    f"Clip {index} has shape {tuple(clip.shape)}; expected mono sound (samples,), "
                    "not empty. Average the channels of a stereo clip first: clip.mean(axis=0) "
                    "for (channels, samples)."
                )
            if self.remove_mean:
                clips[index] = clip = clip - clip.mean()
            if len(clip) < shortest:
                clips[index] = torch.nn.functional.pad(clip, (0, shortest - len(clip)))
        # The largest magnitude is NaN or infinite if any value is, and 7 times as fast to compute.
        for index, peak in enumerate(torch.stack([clip.abs().amax() for clip in clips]).tolist()):
            if wrong := level_error(peak):
                raise ValueError(
                    f"Clip {index} {wrong}. Repair it, for example with numpy.nan_to_num, or leave "
                    "it out."
                )
            warn_once(f"Clip {index}", level_warning(peak))
        return clips

    def _padded(self, waveforms: list[Tensor], attention_mask: Tensor) -> Tensor:
        """Normalised log-mel of all clips, padded where the mask (B, T) is False: (B, T, F).

        Padding is normalised like the rest, as in the training of the published checkpoints.
        """
        # On a CPU clip by clip, so that its spectra stay in the cache; on a GPU the kernel launches
        # of such a loop would dominate.
        on_cpu = attention_mask.device.type == "cpu"
        fill = self._fill_clip_by_clip if on_cpu else self._fill_together
        shape = (*attention_mask.shape, self.num_mel_bins)
        return fill(waveforms[0].new_full(shape, self.padding_value), waveforms, attention_mask)

    def _fill_clip_by_clip(
        self, features: Tensor, waveforms: list[Tensor], attention_mask: Tensor
    ) -> Tensor:
        filterbank = self.filterbank
        lengths = attention_mask.sum(dim=1).tolist()
        for row, waveform, length in zip(features, waveforms, lengths, strict=True):
            if filterbank.num_frames(len(waveform)) == length:
                filterbank(waveform, out=row[:length])
            else:
                row[:length] = self._log_mel(waveform, length)
            self._normalize(row)
        return features

    def _fill_together(
        self, features: Tensor, waveforms: list[Tensor], attention_mask: Tensor
    ) -> Tensor:
        filterbank = self.filterbank
        # Whole frames never include the silence added after their clip.
        extended = [filterbank.extend(waveform[None])[0] for waveform in waveforms]
        log_mel = filterbank.of_extended(pad_sequence(extended, batch_first=True))
        frames = min(log_mel.shape[1], features.shape[1])
        features[:, :frames] = filterbank.limit(log_mel[:, :frames], attention_mask[:, :frames])
        features.masked_fill_(~attention_mask[:, :, None], self.padding_value)
        return self._normalize(features)

    def _log_mel(self, waveform: Tensor, frames: int) -> Tensor:
        """(samples,) -> its first frames (frames, F); those at the cut see what follows it."""
        filterbank = self.filterbank
        log_mel = filterbank.of_extended(filterbank.extend(waveform[None]))[0, :frames]
        return filterbank.limit(log_mel)

    def _normalize(self, log_mel: Tensor) -> Tensor:
        if self.bin_scale is not None:
            scale, offset = (log_mel.new_tensor(v) for v in (self.bin_scale, self.bin_offset))
            return log_mel.mul_(scale).add_(offset)
        return log_mel.sub_(self.mean).div_(2 * self.std) if self.do_normalize else log_mel


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


class ASTFamilyFeatureExtractor(ASTFeatureExtractor):
    """`ASTFeatureExtractor` under a name that plain `transformers` does not know."""


def _first_clip(raw_speech: np.ndarray | Tensor | list) -> Any:
    """The first of a list of clips; anything but a list is returned itself."""
    if isinstance(raw_speech, (list, tuple)) and len(raw_speech):
        return raw_speech[0]
    return raw_speech


def _as_floating(clip: np.ndarray | Tensor | list, name: str) -> Tensor:
    """Numbers as float32; integer types are PCM, divided by their range."""
    if not isinstance(clip, Tensor):
        try:
            array = np.asarray(clip)
        except ValueError:  # a list of unequal lists
            array = np.empty(len(clip), dtype=object)
        if array.dtype.kind not in "fiu":
            raise ValueError(
                f"{name} holds {array.dtype}; expected numbers, one per sample. Pass clips of "
                "unequal length as a list of arrays, not as one array."
            )
        if isinstance(clip, (list, tuple)) or array.dtype.kind == "f":
            dtype = np.dtype(np.float32)  # integers in a list are values, not PCM
        else:
            dtype = array.dtype.newbyteorder("=")
        # What torch can share: contiguous, writable, in the machine's byte order.
        clip = torch.from_numpy(np.require(array, dtype, ["C", "W"]))
    if clip.dtype == torch.bool or clip.is_complex():
        raise ValueError(f"{name} holds {clip.dtype}; expected real numbers, one per sample.")
    if clip.is_floating_point():
        return clip.detach().float()
    limits = torch.iinfo(clip.dtype)
    if wrong := integer_error(limits.bits):
        raise ValueError(f"{name} {wrong}")
    half = 2.0 ** (limits.bits - 1)
    # Unsigned PCM is centred on the middle of its range, as in 8-bit WAV files.
    scaled = clip.float() / half - (1.0 if limits.min == 0 else 0.0)
    if limits.bits == 32 and scaled.numel():
        warn_once(name, integer_warning(32, float(scaled.abs().max())))
    return scaled


ASTFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
