"""--speed: the way that is chosen, its cache, and 8-bit products on this processor."""

import json
import logging
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from transformers import pipeline

from feature_extraction import ASTFeatureExtractor
from modeling_ast import speed_ast
from modeling_ast.onnx_file_ast import OnnxFile
from modeling_ast.speed_ast import (
    SPEEDS,
    _largest_product,
    cache_folder,
    choose,
    export_merged,
    lost_points,
    made_up_sound,
    merging_layers,
    record_loss,
)
from scripts.benchmarks.options import SpeedOptions
from scripts.benchmarks.speed import benchmark_speed
from scripts.inference import options
from scripts.inference.options import ClassifyOptions, DemoOptions, ListenOptions
from scripts.inference.speed import sped_up

from .conftest import REPOSITORY, tiny_model


@pytest.fixture
def measured(native_folder, tmp_path, monkeypatch):
    """A checkpoint of which was measured: way -> (ms for a window, points lost)."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))

    def write(**ways: tuple[float, float]):
        folder = cache_folder(native_folder)
        folder.mkdir(parents=True, exist_ok=True)
        figures = {
            way: {"ms_per_window": ms, "lost_points": lost} for way, (ms, lost) in ways.items()
        }
        about = {"ways": figures, "sounds": "24 made-up sounds", "window_s": 1.3}
        (folder / "measured.json").write_text(json.dumps(about))
        return native_folder

    return write


def test_the_fastest_way_within_the_loss_is_chosen(measured):
    checkpoint = measured(exact=(100, 0), onnx=(80, 0), int8=(40, 1.2))
    fast, fastest = choose(checkpoint, "fast"), choose(checkpoint, "fastest")
    assert (fast.way, fastest.way) == ("onnx", "int8")
    assert fastest.file == cache_folder(checkpoint) / "model_int8.onnx"
    assert str(fastest) == (
        "8-bit weights in ONNX Runtime, 2.5 x as fast as exact here, 1.20 points lost on 24 "
        "made-up sounds."
    )
    assert "weights in ONNX Runtime would be 2.5 x as fast, but loses 1.20 points" in str(fast)
    # What labelled clips say takes the place of it.
    record_loss(checkpoint, {"int8": 0.25}, "80 clips of esc10")
    assert choose(checkpoint, "fast").way == "int8"
    assert "0.25 points lost on 80 clips of esc10" in str(choose(checkpoint, "fast"))


def test_tokens_are_merged_in_the_middle_of_a_model(tmp_path):
    assert merging_layers(12) == [3, 5, 7]
    model = tiny_model(num_hidden_layers=3)
    export_merged(
        model, ASTFeatureExtractor(num_mel_bins=64, max_length=128), tmp_path / "merged.onnx"
    )
    file = OnnxFile(tmp_path / "merged.onnx", 1)
    assert file.config["merged_tokens_per_layer"] == [60, 60, 0]
    assert model.config.merged_tokens_per_layer == 0
    assert [path.name for path in tmp_path.iterdir()] == ["merged.onnx"]


def test_tokens_are_merged_for_fastest_only(measured):
    checkpoint = measured(exact=(100, 0), int8=(40, 0), merged=(20, 0))
    assert choose(checkpoint, "fast").way == "int8"
    assert choose(checkpoint, "fastest").way == "merged"


def test_what_is_no_faster_is_not_chosen(measured):
    checkpoint = measured(exact=(100, 0), onnx=(99, 0), int8=(98, 0))
    choice = choose(checkpoint, "fastest")
    assert (choice.way, choice.file, choice.times_faster) == ("exact", None, 1.0)
    with pytest.raises(ValueError, match="exact, fast, fastest, got 'faster'"):
        choose(checkpoint, "faster")


def test_the_cache_is_that_of_weights_and_versions(native_folder, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(native_folder, copy)
    assert cache_folder(copy) == cache_folder(native_folder)
    monkeypatch.setattr(speed_ast, "version", lambda package: "0.1")
    other = cache_folder(copy)
    monkeypatch.undo()
    assert other != cache_folder(copy)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert cache_folder(copy) != cache_folder(native_folder)


def test_a_measurement_is_whole_or_not_there(native_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))

    def broken(checkpoint, folder):
        (folder / "model.onnx").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(speed_ast, "_measure", broken)
    with pytest.raises(KeyboardInterrupt):
        choose(native_folder, "fast")
    assert list(cache_folder(native_folder).parent.iterdir()) == []


def test_lost_points_are_what_the_best_label_is_short_of():
    exact = [{"a": 0.9, "b": 0.1}, {"a": 0.5, "b": 0.48}, {"a": 0.2, "b": 0.8}]
    other = [{"a": 0.7, "b": 0.3}, {"a": 0.4, "b": 0.60}, {"a": 0.3, "b": 0.7}]
    assert lost_points(exact, other) == pytest.approx(2 / 3)
    assert lost_points(exact, exact) == 0


def test_made_up_sounds_differ_and_stay_within_full_scale():
    sounds = [made_up_sound(16000, seed) for seed in range(4)]
    assert all(sound.shape == (16000,) and sound.dtype == np.float32 for sound in sounds)
    assert all(0 < np.abs(sound).max() < 2 for sound in sounds)
    levels = [float(np.sqrt((sound**2).mean())) for sound in sounds]
    assert max(levels) > 2 * min(levels)


def test_products_of_exported_weights_do_not_overflow():
    """7 bits, as `export_onnx` quantises, are exact on every processor; 8 need VNNI."""
    assert _largest_product(63) == 255 * 63 * 64
    assert _largest_product(-64) == 255 * -64 * 64
    assert speed_ast.products_saturate() == (_largest_product(127) != 255 * 127 * 64)


def test_the_commands_take_the_words_of_the_library():
    assert tuple(SPEEDS) == options.SPEEDS


def test_fastest_does_not_overlap_windows(measured, capsys):
    checkpoint = str(measured(exact=(100, 0), int8=(40, 0)))
    chosen = sped_up(ClassifyOptions(sounds=["a"], model=checkpoint, speed="fastest"))
    assert chosen.model.endswith("model_int8.onnx")
    assert chosen.hop_length_s == 1.3
    assert "--speed fastest: 8-bit weights" in capsys.readouterr().err
    asked = ClassifyOptions(sounds=["a"], model=checkpoint, speed="fastest", hop_length_s=0.5)
    assert sped_up(asked).hop_length_s == 0.5
    fast = sped_up(ClassifyOptions(sounds=["a"], model=checkpoint, speed="fast"))
    assert fast.hop_length_s is None
    assert sped_up(ListenOptions(model=checkpoint, speed="fastest")).hop_length_s == 1.0
    assert sped_up(DemoOptions(model=checkpoint, speed="fast")).model.endswith(".onnx")
    with pytest.raises(ValueError, match="names one already"):
        sped_up(ClassifyOptions(sounds=["a"], model="x.onnx", speed="fast"))


@pytest.mark.slow
def test_from_measuring_to_a_label_without_torch(native_folder, tmp_path, monkeypatch):
    """Measured once, then run by processes that never load torch; pipeline and command agree."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    sound = tmp_path / "sound.wav"
    soundfile.write(sound, made_up_sound(5 * 16000, 3), 16000)
    monkeypatch.setitem(SPEEDS, "fastest", 100.0)  # a tiny random model loses what it loses
    exact = pipeline("audio-classification", model=str(native_folder))
    faster = pipeline("audio-classification", model=str(native_folder), speed="fastest")
    scores = [{e["label"]: e["score"] for e in p(str(sound), top_k=None)} for p in (exact, faster)]
    assert scores[0].keys() == scores[1].keys()
    assert max(abs(scores[0][label] - scores[1][label]) for label in scores[0]) < 0.1
    choose(native_folder, "fastest")
    program = (
        "import sys\nfrom scripts.classify import classify\n"
        "from scripts.inference.options import ClassifyOptions\n"
        f"classify(ClassifyOptions(sounds=[{str(sound)!r}], model={str(native_folder)!r}, "
        "speed='fastest'))\n"
        "from modeling_ast.speed_ast import choose\n"
        f"if choose({str(native_folder)!r}, 'fastest').way != 'exact':\n"
        "    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "LABEL_" in done.stdout


def test_ways_are_compared_on_several_labelled_clips(measured, tiny_onnx, tmp_path, capsys):
    checkpoint = measured(exact=(100, 0), onnx=(80, 0), int8=(40, 0))
    for name in ("model.onnx", "model_int8.onnx"):
        shutil.copy(tiny_onnx, cache_folder(checkpoint) / name)
    for label in ("LABEL_0", "LABEL_1"):
        (tmp_path / "clips" / label).mkdir(parents=True)
        for seed in range(3):
            sound = tmp_path / "clips" / label / f"{seed}.wav"
            soundfile.write(sound, made_up_sound(16000, seed), 16000)
    benchmark_speed(
        SpeedOptions(
            checkpoint=str(checkpoint), dataset=str(tmp_path / "clips"), ways=["dynamic8"], timed=1,
            repeats=1, evaluation_fraction=0.7,
        )
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "ONNX Runtime, dynamic, 7-bit weights" in printed
    assert "points lost as estimated" in printed
    assert logging.getLogger().level == logging.WARNING  # not left silent
