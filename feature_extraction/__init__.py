"""Sound in, log-mel spectrograms out: decoding, Kaldi's filterbank, the AST feature extractor."""

from .audio_ast import AudioDecodingError, audio_duration, load_audio, stream_audio
from .augmentation_ast import (
    add_noise,
    augmentation_generator,
    filter_augment,
    mixup,
    random_gain,
    roll,
    spec_augment,
    time_shift,
)
from .fbank_ast import LogMel, kaldi_fbank
from .feature_extraction_ast import ASTFamilyFeatureExtractor, ASTFeatureExtractor

__all__ = [
    "ASTFamilyFeatureExtractor",
    "ASTFeatureExtractor",
    "AudioDecodingError",
    "LogMel",
    "add_noise",
    "audio_duration",
    "augmentation_generator",
    "filter_augment",
    "kaldi_fbank",
    "load_audio",
    "mixup",
    "random_gain",
    "roll",
    "spec_augment",
    "stream_audio",
    "time_shift",
]
