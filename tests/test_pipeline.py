"""pipeline("audio-classification") on AST folders, and on other models' checkpoints."""

import io

import numpy as np
import pytest
import soundfile
import torch
import transformers
from transformers import AudioClassificationPipeline, pipeline
from transformers.models.audio_spectrogram_transformer import (
    feature_extraction_audio_spectrogram_transformer as native_features,
)
from transformers.models.audio_spectrogram_transformer import (
    modeling_audio_spectrogram_transformer as native,
)
from transformers.pipelines.pt_utils import KeyDataset

import modeling_ast  # noqa: F401
from feature_extraction import AudioDecodingError


@pytest.fixture(scope="module")
def classifier(native_folder):
    return pipeline("audio-classification", model=str(native_folder), top_k=None)


@pytest.fixture(scope="module")
def clip():
    return np.random.default_rng(0).standard_normal(12000).astype(np.float32) * 0.1


def scores(labels):
    return {label["label"]: label["score"] for label in labels}


def assert_same(found, expected, tolerance=1e-5):
    assert scores(found) == pytest.approx(scores(expected), abs=tolerance)


def test_equals_stock_pipeline(native_folder, classifier, clip):
    stock = AudioClassificationPipeline(
        model=native.ASTForAudioClassification.from_pretrained(native_folder),
        feature_extractor=native_features.ASTFeatureExtractor.from_pretrained(native_folder),
    )
    for options in ({"top_k": 2}, {"top_k": 5, "function_to_apply": "sigmoid"}):
        expected, found = stock(clip, **options), classifier(clip, **options)
        assert [label["label"] for label in found] == [label["label"] for label in expected]
        assert_same(found, expected, tolerance=1e-4)


def test_any_source_gives_the_same(classifier, clip, tmp_path):
    expected = classifier(clip)
    path = tmp_path / "clip.wav"
    soundfile.write(path, clip, 16000, subtype="FLOAT")
    stereo = io.BytesIO()
    soundfile.write(stereo, np.stack([clip, clip], axis=1), 16000, format="FLAC", subtype="PCM_24")
    for source in (
        str(path),
        path.read_bytes(),
        stereo.getvalue(),
        torch.from_numpy(clip),
        {"array": clip, "sampling_rate": 16000},
        {"raw": clip, "sampling_rate": 16000},
        {"bytes": path.read_bytes(), "path": None},
    ):
        assert_same(classifier(source), expected)
    upsampled = np.repeat(clip, 2)
    assert len(classifier({"array": upsampled, "sampling_rate": 32000})) == 5


def test_lists_generators_and_datasets(classifier, clip):
    single = classifier(clip)
    rows = [{"audio": clip, "label": 0}] * 3
    for inputs in ([clip] * 3, (row["audio"] for row in rows), KeyDataset(rows, "audio")):
        outputs = list(classifier(inputs, batch_size=2))
        assert len(outputs) == 3
        for output in outputs:
            assert_same(output, single)


@pytest.mark.parametrize("masked", [False, True])
def test_long_sound_in_windows(native_folder, masked):
    classifier = pipeline("audio-classification", model=str(native_folder), top_k=None)
    classifier.feature_extractor.return_attention_mask = masked
    sound = np.random.default_rng(1).standard_normal(50000).astype(np.float32) * 0.1
    batched = classifier([sound, sound[:9000]], batch_size=4, return_timestamps=True)
    answer, short = batched
    windows = answer["windows"]
    model_length = 128 * 160 + 240  # 128 frames
    starts = np.arange(0, 50000 - model_length + model_length // 2, model_length // 2)
    assert [window["start"] for window in windows] == pytest.approx(starts[: len(windows)] / 16000)
    assert windows[-1]["end"] == 50000 / 16000
    assert short["windows"][0]["end"] == 9000 / 16000

    weights = []
    mean = dict.fromkeys(scores(answer["labels"]), 0.0)
    for window in windows:
        begin, end = round(window["start"] * 16000), round(window["end"] * 16000)
        # A window scores what its samples score on their own.
        assert_same(window["labels"], classifier(sound[begin:end]))
        weights.append(end - begin)
        for name, score in scores(window["labels"]).items():
            mean[name] += score * (end - begin)
    assert scores(answer["labels"]) == pytest.approx(
        {name: total / sum(weights) for name, total in mean.items()}, abs=1e-5
    )
    assert_same(classifier(sound), answer["labels"])


@pytest.mark.parametrize(("extra", "windows"), [(0, 1), (159, 1), (160, 2)])
def test_a_rest_without_a_frame_is_no_window(classifier, extra, windows):
    sound = np.random.default_rng(2).standard_normal(128 * 160 + 240 + extra)
    answer = classifier(sound.astype(np.float32), return_timestamps=True)
    assert len(answer["windows"]) == windows
    assert answer["windows"][-1]["end"] == len(sound) / 16000


def test_window_arguments(classifier):
    sound = np.zeros(32000, dtype=np.float32)
    answer = classifier(sound, chunk_length_s=0.5, hop_length_s=0.5, return_timestamps=True)
    assert [(w["start"], w["end"]) for w in answer["windows"]] == [
        (0.0, 0.5),
        (0.5, 1.0),
        (1.0, 1.5),
        (1.5, 2.0),
    ]
    with pytest.raises(ValueError, match=r"hop_length_s \(2\) is longer than chunk_length_s \(1\)"):
        classifier(sound, chunk_length_s=1, hop_length_s=2)
    with pytest.raises(ValueError, match="chunk_length_s must be a positive number"):
        classifier(sound, chunk_length_s=0)
    with pytest.raises(ValueError, match="Unknown argument 'chunk_lenght_s'"):
        classifier(sound, chunk_lenght_s=1)
    with pytest.raises(AudioDecodingError, match="No such file"):
        classifier("missing.wav")


def test_other_models_get_the_stock_behaviour(tmp_path, clip):
    config = transformers.Wav2Vec2Config(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(16, 16),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
        num_labels=3,
    )
    model = transformers.Wav2Vec2ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    ours = pipeline("audio-classification", model=str(tmp_path))
    stock = AudioClassificationPipeline(
        model=ours.model, feature_extractor=transformers.Wav2Vec2FeatureExtractor()
    )
    for options in ({}, {"top_k": 2}):
        assert_same(ours(clip, **options), stock(clip, **options))
    assert_same(ours([clip, clip[:8000]])[1], stock([clip, clip[:8000]])[1])
