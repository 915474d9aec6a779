"""pipeline("audio-classification") on AST folders, and on other models' checkpoints."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
import transformers
from datasets import Audio, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AudioClassificationPipeline, pipeline
from transformers.models.audio_spectrogram_transformer import (
    feature_extraction_audio_spectrogram_transformer as native_features,
)
from transformers.models.audio_spectrogram_transformer import (
    modeling_audio_spectrogram_transformer as native,
)
from transformers.pipelines.pt_utils import KeyDataset

import modeling_ast
from feature_extraction import ASTFeatureExtractor, AudioDecodingError
from modeling_ast.windows_ast import KeptRows, cut_windows

from .conftest import REPOSITORY, tiny_native_config
from .sounds import write_parquet
from .test_audio import sparse_wav


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


@pytest.mark.parametrize("max_length", [64, 128, 1024])
def test_equals_stock_pipeline(tmp_path, max_length):
    """On clips of any length up to the model's, whose patch grid may or may not fill its frames."""
    model = native.ASTForAudioClassification(tiny_native_config(max_length=max_length)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(tmp_path)
    extractor = native_features.ASTFeatureExtractor(num_mel_bins=64, max_length=max_length)
    extractor.save_pretrained(tmp_path)
    stock = AudioClassificationPipeline(model=model, feature_extractor=extractor)
    ours = pipeline("audio-classification", model=str(tmp_path))
    whole = np.random.default_rng(0).standard_normal(max_length * 160 + 240).astype(np.float32)
    for samples in (5000, max_length * 160, len(whole)):
        clip = whole[:samples] * 0.1
        for options in ({"top_k": 2}, {"top_k": 5, "function_to_apply": "sigmoid"}):
            expected, found = stock(clip, **options), ours(clip, **options)
            assert [label["label"] for label in found] == [label["label"] for label in expected]
            assert_same(found, expected, tolerance=1e-4)
        assert_same(ours([clip, clip], batch_size=2, top_k=5)[1], stock(clip, top_k=5), 1e-4)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be a whole number from 1, or None for all, got 0"),
        ({"top_k": 2.5}, "top_k must be a whole number"),
        ({"hop_length_s": 1e-9}, "hop_length_s must be at least one frame, 0.01 s"),
        ({"hop_length_s": float("nan")}, "hop_length_s must be a positive number"),
        ({"chunk_length_s": float("inf")}, "chunk_length_s must be a positive number"),
        ({"return_timestamps": "word"}, "return_timestamps must be True or False, got 'word'"),
        ({"function_to_apply": "relu"}, "Invalid value for `function_to_apply`: relu"),
        ({"threshold": "high"}, "threshold must be a number or a dict .* got 'high'"),
        (
            {"threshold": {"LABEL_9": 0.5}},
            "Unknown label 'LABEL_9' in threshold. Known: LABEL_0, LABEL_1",
        ),
        ({"threshold": {"LABEL_1": None}}, "a dict of a number per label, got None"),
    ],
)
def test_wrong_arguments_are_errors(classifier, clip, options, message):
    with pytest.raises(ValueError, match=message):
        classifier(clip, **options)


def test_thresholds(classifier, clip):
    every = classifier(clip)  # best first
    middle = every[2]["score"]
    assert classifier(clip, threshold=middle) == every[:3]
    assert classifier(clip, threshold=middle, top_k=2) == every[:2]
    # By name: the other labels are left out.
    wanted = {every[1]["label"]: 0.0, every[4]["label"]: 0.0, every[0]["label"]: 1.0}
    assert classifier(clip, threshold=wanted) == [every[1], every[4]]
    answer = classifier(clip, threshold=2, return_timestamps=True)
    assert answer["labels"] == answer["windows"][0]["labels"] == []


@pytest.mark.parametrize("stock_default", [{}, {"function_to_apply": "softmax"}])
def test_problem_type_chooses_the_function(native_folder, clip, stock_default, monkeypatch):
    """Whatever the stock pipeline does by default: older ones apply softmax to any model."""
    stock = transformers.AudioClassificationPipeline._sanitize_parameters

    def sanitize(self, **arguments):
        return stock(self, **{**stock_default, **arguments})

    monkeypatch.setattr(transformers.AudioClassificationPipeline, "_sanitize_parameters", sanitize)
    classifier = pipeline("audio-classification", model=str(native_folder), top_k=None)
    raw = scores(classifier(clip, function_to_apply="none"))
    for problem_type, function in (
        ("single_label_classification", lambda x: np.exp(x) / sum(map(np.exp, raw.values()))),
        ("multi_label_classification", lambda x: 1 / (1 + np.exp(-x))),
        ("regression", lambda x: x),
    ):
        classifier.model.config.problem_type = problem_type
        expected = {label: function(x) for label, x in raw.items()}
        assert scores(classifier(clip)) == pytest.approx(expected, abs=1e-6)


def test_top_k_of_construction_is_kept(native_folder, clip):
    classifier = pipeline("audio-classification", model=str(native_folder), top_k=2)
    assert len(classifier(clip)) == 2
    assert len(classifier(clip, top_k=3)) == 3
    assert len(classifier(clip, function_to_apply="none")) == 2
    assert len(classifier(clip, top_k=None)) == 5


def test_columns_of_datasets(classifier, tmp_path):
    """We read stored sound ourselves, although `datasets` would decode it with torchcodec."""
    path = str(write_parquet(tmp_path / "train.parquet", 2))
    options = {"split": "train", "cache_dir": str(tmp_path)}
    dataset = load_dataset("parquet", data_files=path, **options).cast_column("audio", Audio())
    assert dataset.features["audio"].decode
    undecoded = dataset.cast_column("audio", Audio(decode=False))
    expected = [classifier(row["audio"]["bytes"]) for row in undecoded]
    assert len(expected) == 6

    column = classifier(dataset["audio"], batch_size=4)
    keyed = classifier(KeyDataset(dataset, "audio"), batch_size=4)
    streamed = classifier(dataset.to_iterable_dataset()["audio"])
    assert isinstance(column, list)
    for found in (column, list(keyed), list(streamed)):
        for labels, of_row in zip(found, expected, strict=True):
            assert_same(labels, of_row)


def test_tuples_and_nothing(classifier, clip):
    assert classifier([]) == []
    assert list(classifier(item for item in ())) == []
    one, two = classifier((clip, clip[:5000]))
    assert_same(one, classifier(clip))
    assert_same(two, classifier(clip[:5000]))


def test_a_masked_clip_shorter_than_a_patch(native_folder, clip):
    """Its only patch of 16 frames is the first one under any longer padding."""
    classifier = pipeline("audio-classification", model=str(native_folder), top_k=None)
    classifier.feature_extractor.return_attention_mask = True
    alone = classifier(clip[:300])
    assert_same(classifier([clip, clip[:300]], batch_size=2)[1], alone)


def test_windows_are_cut_from_blocks_as_from_the_whole():
    sound = np.arange(1000, dtype=np.float32)
    for block in (1, 7, 250, 1000):
        blocks = [(start, sound[start : start + block]) for start in range(0, 1000, block)]
        for length, hop, rest in ((100, 50, 10), (100, 100, 10), (300, 1, 1), (995, 5, 10)):
            windows = list(cut_windows(blocks, length, hop, rest))
            assert [start for start, _, _ in windows] == [hop * i for i in range(len(windows))]
            assert [last for _, _, last in windows] == [False] * (len(windows) - 1) + [True]
            for start, samples, _ in windows[:-1]:
                np.testing.assert_array_equal(samples, sound[start : start + length])
            start, samples, _ = windows[-1]
            np.testing.assert_array_equal(samples, sound[start:])
            assert len(samples) < length + rest


CLASSIFY_A_FILE = """
import re, sys
import torch
from transformers import pipeline
import modeling_ast
torch.set_num_threads(1)
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024
classifier = pipeline("audio-classification", model=sys.argv[1], batch_size=8)
options = {"chunk_length_s": float(sys.argv[4]), "hop_length_s": float(sys.argv[4])}
classifier(sys.argv[2], **options)
before = peak()
answer = classifier(sys.argv[3], return_timestamps=True, **options)
print(len(answer["windows"]), answer["windows"][-1]["end"], peak() - before, peak())
"""


def classify_long_file(folder, model, minutes, chunk_length_s):
    """Windows, end, MB that a long file takes beyond one of 80 s, MB in all."""
    sparse_wav(folder / "short.wav", 16000, 80)
    sparse_wav(folder / "long.wav", 16000, minutes * 60)
    files = [str(folder / name) for name in ("short.wav", "long.wav")]
    done = subprocess.run(
        [sys.executable, "-c", CLASSIFY_A_FILE, str(model), *files, str(chunk_length_s)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    windows, end, growth, peak = map(float, done.stdout.split())
    return windows, end, growth, peak


NEEDS_PROC = pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="reads the peak from /proc"
)


@NEEDS_PROC
def test_memory_does_not_grow_with_the_file(native_folder, tmp_path):
    """An hour is 230 MB as a waveform."""
    windows, end, growth, _ = classify_long_file(tmp_path, native_folder, 60, 10)
    assert (windows, end) == (360, 3600)
    assert growth < 100


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3)), max_size=20))
def test_kept_rows_stay_what_they_were(batches):
    kept, rows, expected = KeptRows(), [], []
    for number, (count, columns) in enumerate(batches):
        batch = np.full((count, columns), number, np.float32) + np.arange(count)[:, None]
        rows += kept.keep(batch)
        expected += [row.copy() for row in batch]
        batch[:] = -1
    for (block, row), values in zip(rows, expected, strict=True):
        np.testing.assert_array_equal(block[row], values)


def test_room_for_rows_is_bounded():
    """One clip's takes no more than its own, and an endless stream's does not grow with it."""
    (block, _), *_ = KeptRows().keep(np.zeros((1, 527), np.float32))
    assert len(block) == 1
    kept = KeptRows()
    sizes = [kept.keep(np.zeros((8, 527), np.float32))[0][0].nbytes for _ in range(3000)]
    assert max(sizes) <= 4 << 20
    assert len(set(sizes)) < 10


def test_windows_scores_wait_together(native_folder, tmp_path, monkeypatch):
    """Each in memory of its own would pin what is freed around it, hundreds of MB of an hour."""
    classifier = pipeline("audio-classification", model=str(native_folder), batch_size=4)
    seen = []
    answer_of = type(classifier).postprocess

    def postprocess(self, windows, **kwargs):
        seen.extend(windows)
        return answer_of(self, windows, **kwargs)

    monkeypatch.setattr(type(classifier), "postprocess", postprocess)
    sparse_wav(tmp_path / "sound.wav", 16000, 600)
    classifier(str(tmp_path / "sound.wav"), chunk_length_s=5, hop_length_s=5)
    assert len(seen) == 120
    assert not any(isinstance(value, (torch.Tensor, np.ndarray)) for value in seen[0].values())
    assert len({id(window["logits"][0]) for window in seen}) <= 4


@NEEDS_PROC
@pytest.mark.slow
def test_two_hours_with_ast_tiny(tmp_path):
    model = modeling_ast.ASTForAudioClassification(
        modeling_ast.ASTConfig(
            hidden_size=192,
            num_attention_heads=3,
            intermediate_size=768,
            max_length=512,
            num_labels=527,
        )
    )
    model.save_pretrained(tmp_path)
    ASTFeatureExtractor(max_length=512).save_pretrained(tmp_path)
    windows, end, growth, peak = classify_long_file(tmp_path, tmp_path, 120, 5)
    assert (windows, end) == (1440, 7200)
    print(f"two hours: {growth:.0f} MB more than 80 s, {peak:.0f} MB in all")
    assert growth < 100
    assert peak < 1000


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
    clips = [clip, clip[:8000]]
    rows = [{"audio": clip} for clip in clips]
    for inputs in (
        lambda: clips,
        lambda: (clip for clip in clips),
        lambda: KeyDataset(rows, "audio"),
    ):
        for options in ({"batch_size": 2}, {"num_workers": 2}, {}):
            expected = list(stock(inputs(), **options))
            found = list(ours(inputs(), **options))
            assert len(found) == 2
            for one, other in zip(found, expected, strict=True):
                assert_same(one, other)
    # What the stock pipeline does not take or know, this one does not either.
    assert_same(ours(clip, chunk_length_s=0.1), stock(clip, chunk_length_s=0.1))
    for call in (ours, stock):
        with pytest.raises(ValueError, match="single channel"):
            call(np.stack([clip, clip]))
