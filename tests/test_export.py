"""ONNX files against PyTorch: logits, lengths, metadata, the pipeline and ast-classify on them."""

import contextlib
import io
import json
import logging
import re
import sys
import warnings

import numpy as np
import pytest
import soundfile
import torch

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTAudioClassificationPipeline, ASTConfig, ASTForAudioClassification
from modeling_ast.export_ast import VARIANTS, WaveformClassifier, export_onnx
from modeling_ast.onnx_ast import OnnxClassifier, OnnxModel
from scripts import classify
from scripts import export_onnx as command
from scripts.inference.onnx_files import export_and_check, features_of
from scripts.inference.options import ONNX_VARIANTS, ExportOptions

from .sounds import PITCHES, tone, write_parquet

RATE = 16000
# From below one frame (25 ms) to far beyond the model's length (1.28 s), 0.1 s and 20 s included.
LENGTHS = (1, 399, 400, 1600, 2799, 2800, 16000, 20720, 20880, 48000, 320000)


def tiny_model(num_hidden_layers=1, **settings) -> ASTForAudioClassification:
    config = ASTConfig(
        hidden_size=32,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_length=128,
        num_mel_bins=64,
        id2label=dict(enumerate(PITCHES)),
        label2id={name: index for index, name in enumerate(PITCHES)},
        **settings,
    )
    generator = torch.Generator().manual_seed(1)
    model = ASTForAudioClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def tiny_extractor(**settings) -> ASTFeatureExtractor:
    return ASTFeatureExtractor(num_mel_bins=64, max_length=128, **settings)


def sound(samples: int, clips: int = 1) -> np.ndarray:
    """(clips, samples): noise with a loud tone and an offset, hard for a filterbank."""
    random = np.random.default_rng(samples)
    t = np.arange(samples) / RATE
    noise = 0.03 * random.standard_normal((clips, samples))
    return (0.1 + 0.5 * np.sin(2 * np.pi * 440 * t) + noise).astype(np.float32)


@torch.no_grad()
def expected_logits(model, extractor, waveforms) -> np.ndarray:
    clips = [model(**features_of(extractor, w, model.config.patch_size)).logits for w in waveforms]
    return torch.cat(clips).numpy()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A checkpoint, the files that the command made from it, and what it printed."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("export")
    tiny_model().save_pretrained(folder / "checkpoint")
    tiny_extractor().save_pretrained(folder / "checkpoint")
    write_parquet(folder / "train.parquet", clips_per_class=2, fold=5)
    write_parquet(folder / "data" / "train-0.parquet", clips_per_class=1, fold=1)
    (folder / "train.parquet").rename(folder / "data" / "train-1.parquet")
    arguments = [str(folder / "checkpoint"), "--output", str(folder / "onnx")]
    arguments += ["--variants", "fp32", "int8", "spectrogram", "--repeats", "1"]
    arguments += ["--check", str(folder / "data")]
    arguments += ["--fold-column", "fold", "--evaluation-fold", "5"]
    printed, said = io.StringIO(), []
    listener = logging.Handler()
    listener.emit = said.append
    logging.getLogger("torch").addHandler(listener)
    with contextlib.redirect_stdout(printed), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", FutureWarning)
        with pytest.raises(SystemExit) as stopped:
            command.main(arguments)
    logging.getLogger("torch").removeHandler(listener)
    assert stopped.value.code == 0, printed.getvalue()
    # Not a word about torchvision, or what torch's next version will lack.
    assert [record.getMessage() for record in said] == []
    assert [str(w.message) for w in warned if w.category is FutureWarning] == []
    return folder, printed.getvalue()


def session(folder, variant):
    import onnxruntime

    return onnxruntime.InferenceSession(folder / "onnx" / VARIANTS[variant])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_one_graph_equals_extractor_and_model(masked, problem):
    model, extractor = (
        tiny_model(problem_type=problem),
        tiny_extractor(return_attention_mask=masked),
    )
    graph = WaveformClassifier(model, extractor)
    for samples in LENGTHS:
        waveform = sound(samples)
        with torch.no_grad():
            probabilities, logits = graph(torch.from_numpy(waveform))
        expected = torch.from_numpy(expected_logits(model, extractor, waveform))
        assert (logits - expected).abs().max() <= 1e-4, samples
        multi_label = problem == "multi_label_classification"
        scores = expected.sigmoid() if multi_label else expected.softmax(-1)
        torch.testing.assert_close(probabilities, scores, atol=1e-4, rtol=0)


def test_waveform_file_equals_pytorch(exported):
    folder, _ = exported
    model, extractor = tiny_model(), tiny_extractor()
    waveform_in = session(folder, "fp32")
    for samples in LENGTHS:
        for clips in (1, 3):
            waveforms = sound(samples, clips)
            expected = expected_logits(model, extractor, waveforms)
            logits, probabilities = waveform_in.run(
                ["logits", "probabilities"], {"waveform": waveforms}
            )
            assert np.abs(logits - expected).max() <= 1e-4, (samples, clips)
            np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert np.ptp(expected) > 0.1  # the logits do differ


def test_spectrogram_file_equals_pytorch(exported):
    folder, _ = exported
    model, spectrogram_in = tiny_model(), session(folder, "spectrogram")
    for frames in (16, 17, 100, 128, 129, 700):
        input_values = torch.randn(2, frames, 64)
        with torch.no_grad():
            expected = model(input_values).logits.numpy()
        (logits,) = spectrogram_in.run(["logits"], {"input_values": input_values.numpy()})
        assert np.abs(logits - expected).max() <= 1e-4, frames


def test_int8_keeps_filterbank_and_answers(exported):
    import onnx

    folder, _ = exported
    graph = onnx.load(folder / "onnx" / VARIANTS["int8"]).graph
    operators = [node.op_type for node in graph.node]
    assert operators.count("Conv") == 3  # spectrum, mel filters, patches: in float
    # Query, key, value, output, two of the MLP and the head; none of the filterbank.
    assert operators.count("MatMulInteger") == 7
    waveforms = sound(16000, 4)
    (expected,) = session(folder, "fp32").run(["logits"], {"waveform": waveforms})
    (logits,) = session(folder, "int8").run(["logits"], {"waveform": waveforms})
    assert 0 < np.abs(logits - expected).max() <= 0.1 * np.ptp(expected)


def test_metadata_say_what_a_user_must_know(exported):
    folder, _ = exported
    for variant in ("fp32", "int8", "spectrogram"):
        metadata = session(folder, variant).get_modelmeta().custom_metadata_map
        assert json.loads(metadata["labels"]) == list(PITCHES)
        assert metadata["sampling_rate"] == "16000"
        assert json.loads(metadata["config"])["max_length"] == 128


def test_command_prints_differences_accuracy_and_speed(exported):
    _, printed = exported
    for variant in ("fp32", "spectrogram"):
        (difference,) = re.findall(rf"{VARIANTS[variant]} +[\d.]+ +([\d.e+-]+)", printed)
        assert float(difference) <= 1e-4
    assert "6 clips of" in printed  # those of fold 5
    for case in ("PyTorch", "ONNX fp32", "ONNX int8"):
        assert re.search(rf"^{case} +[\d.]+", printed, re.MULTILINE), case
    assert re.search(r"accuracy drops by -?[\d.]+ points, [\d.]+ x as fast", printed)


# Whether a waveform-in file pads or masks is fixed on export.
@pytest.mark.parametrize(
    ("variant", "masked"), [("fp32", False), ("spectrogram", False), ("spectrogram", True)]
)
def test_pipeline_gives_the_same_answers(exported, variant, masked):
    folder, _ = exported
    extractor = tiny_extractor(return_attention_mask=masked)
    reference = ASTAudioClassificationPipeline(
        model=tiny_model(), feature_extractor=extractor, top_k=None
    )
    classifier = OnnxClassifier(folder / "onnx" / VARIANTS[variant], top_k=None)
    if masked:
        classifier.feature_extractor = extractor
    sounds = [sound(samples)[0] for samples in (50000, 900, 9000, 300)]
    options = {"return_timestamps": True, "batch_size": 3}
    for found, expected in zip(
        classifier(sounds, **options), reference(sounds, **options), strict=True
    ):
        assert len(found["windows"]) == len(expected["windows"])
        for ours, theirs in zip(
            [found, *found["windows"]], [expected, *expected["windows"]], strict=True
        ):
            assert ours.get("end") == theirs.get("end")
            scores = {entry["label"]: entry["score"] for entry in theirs["labels"]}
            assert {e["label"]: e["score"] for e in ours["labels"]} == pytest.approx(
                scores, abs=1e-4
            )


def test_ast_classify_without_pytorchs_model(exported, tmp_path, monkeypatch, capsys):
    folder, _ = exported
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(300.0, seed=0, seconds=3), RATE, subtype="FLOAT")
    best = {}
    for model in (folder / "checkpoint", folder / "onnx" / VARIANTS["fp32"]):
        if model.suffix == ".onnx":
            monkeypatch.setattr(
                ASTForAudioClassification, "__init__", lambda *_: pytest.fail("loaded")
            )
        with pytest.raises(SystemExit) as stopped:
            classify.main([str(path), "--model", str(model), "--json"])
        assert stopped.value.code == 0
        (result,) = json.loads(capsys.readouterr().out)
        best[model.suffix] = result["labels"][0]
    assert best[".onnx"]["label"] == best[""]["label"]
    assert best[".onnx"]["score"] == pytest.approx(best[""]["score"], abs=1e-4)


def test_a_model_that_merges_tokens(tmp_path):
    model, extractor = tiny_model(3, merged_tokens_per_layer=20), tiny_extractor()
    files = export_onnx(model, extractor, tmp_path, ["fp32"])
    file = OnnxModel(files["fp32"]).file
    for samples in (2800, 16000, 48000):  # 2800: fewer than 20 tokens
        waveforms = sound(samples, clips=3)
        expected = expected_logits(model, extractor, waveforms)
        np.testing.assert_allclose(file.run(waveforms), expected, atol=1e-5)
    model.config.merged_tokens_per_layer = 0
    assert np.abs(expected_logits(model, extractor, waveforms) - expected).max() > 3e-4


def test_impossible_wishes(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown variant 'fp8'; expected fp32, fp16, int8, spec"):
        export_onnx(tiny_model(), tiny_extractor(), tmp_path, ["fp8"])
    with pytest.raises(ValueError, match=r"No such checkpoint folder: \./nowhere"):
        export_and_check(ExportOptions(checkpoint="./nowhere", output=tmp_path))
    assert tuple(VARIANTS) == ONNX_VARIANTS


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package_says_what_to_install(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{package}.*pip install '\.\[export\]'"):
        export_and_check(ExportOptions(checkpoint="checkpoint", output=tmp_path))


def test_wrong_files(tmp_path, exported):
    import onnx

    with pytest.raises(ValueError, match="No such file"):
        OnnxModel(tmp_path / "missing.onnx")
    noise = tmp_path / "noise.onnx"
    noise.write_bytes(b"no model")
    with pytest.raises(ValueError, match="ONNX Runtime cannot read"):
        OnnxModel(noise)
    folder, _ = exported
    model = onnx.load(folder / "onnx" / VARIANTS["spectrogram"])
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "stranger.onnx")
    with pytest.raises(ValueError, match=r"has no config and no preprocessor_config"):
        OnnxModel(tmp_path / "stranger.onnx")


def test_damaged_files_are_one_line(tmp_path, exported):
    """Whatever is wrong: an answer, or a ValueError that names the file."""
    import onnx

    folder, _ = exported
    file = folder / "onnx" / VARIANTS["fp32"]
    path, clip = tmp_path / "damaged.onnx", sound(4000)[0]

    def without_logits(model):
        del model.graph.output[1]

    def other_input(model):
        (name,) = (entry.name for entry in model.graph.input)
        model.graph.input[0].name = "sound"
        for node in model.graph.node:
            node.input[:] = ["sound" if entry == name else entry for entry in node.input]

    def metadata(name, value):
        def edit(model):
            (entry,) = (entry for entry in model.metadata_props if entry.key == name)
            entry.value = value

        return edit

    values = ("", "null", "[]", "3", "{", '{"max_length": 0}', '{"num_mel_bins": null}')
    edits = [metadata(n, v) for n in ("config", "preprocessor_config") for v in values]
    for edit in (without_logits, other_input, *edits):
        model = onnx.load(file)
        edit(model)
        onnx.save(model, path)
        assert "damaged.onnx is damaged, or was not written" in str(complaint(path, clip))

    whole, random, answered = file.read_bytes(), np.random.default_rng(0), 0
    for number in range(30):
        damaged = bytearray(whole)
        for place in random.integers(0, len(whole) if number % 2 else 4000, 8):
            damaged[place] ^= 1 << int(random.integers(8))
        if number % 10 == 9:
            del damaged[int(random.integers(len(whole))) :]
        path.write_bytes(damaged)
        error = complaint(path, clip)
        assert error is None or "damaged.onnx" in error
        answered += error is None
    assert 0 < answered < 30


def complaint(path, clip) -> str | None:
    """The error about a file that cannot be used."""
    try:
        OnnxClassifier(path)(clip)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_and_masked_checkpoints(masked, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    model, extractor = tiny_model(), tiny_extractor(return_attention_mask=masked)
    files = export_onnx(model, extractor, tmp_path, ["fp32", "fp16", "int8"])
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in files.values()}
    waveform_in, half = OnnxModel(files["fp32"]), OnnxModel(files["fp16"])
    for samples in LENGTHS:
        waveforms = sound(samples, 2)
        expected = expected_logits(model, extractor, waveforms)
        logits = waveform_in(torch.from_numpy(waveforms)).logits.numpy()
        assert np.abs(logits - expected).max() <= 1e-4
        logits = half(torch.from_numpy(waveforms)).logits.numpy()
        assert np.abs(logits - expected).max() <= 0.02 * np.ptp(expected)
