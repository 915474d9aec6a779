"""AST's descendants against their authors' own code, whose outputs are in golden/families."""

import argparse
import json
import math
import time
import urllib.request
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.torch import save_file
from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForAudioClassification
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from feature_extraction import (
    ASTFamilyFeatureExtractor,
    ASTFeatureExtractor,
    LogMel,
    load_audio,
)
from modeling_ast import (
    ASTAudioClassificationPipeline,
    ASTConfig,
    ASTForAudioClassification,
    ASTModel,
    attention_rollout,
    class_relevance,
    convert_checkpoint,
)
from modeling_ast.conversion_ast import CED_FEATURES, FAMILIES, KALDI_FEATURES, PASST_FEATURES
from modeling_ast.token_merging_ast import merge_tokens
from scripts.common.checkpoints import bundled_checkpoints, checkpoint_folder
from scripts.common.descendants import published_descendants
from scripts.convert import main
from scripts.publishing import fetching
from scripts.publishing.descendants import descendant_config
from scripts.training.options import FinetuneOptions
from scripts.training.with_accelerate import finetune

from .conftest import GOLDEN, TINY_MODEL, shared, tiny_model
from .sounds import write_class_folders

FAMILIES_GOLDEN = GOLDEN / "families"
HEADS = {"num_attention_heads": 3}  # of the golden models, 24 wide: not readable from weights
# Family, rows and columns, and what cannot be read from the weights, of each golden file.
KNOWN: dict[str, tuple[str, tuple[int, int], dict]] = {
    "passt_s10": ("PaSST", (12, 9), {}),
    "passt_s16_t12": ("PaSST", (8, 16), {"time_stride": 12}),
    "passt_one_token": ("PaSST", (9, 10), {}),
    "ced": ("CED", (4, 12), {}),
    "ced_token": ("CED", (4, 16), {}),
    "dasheng": ("Dasheng", (1, 50), {}),
    "ssast_patch": ("SSAST", (12, 12), {"family": "SSAST"}),
    "ssast_patch_pretrained": ("SSAST", (8, 10), {}),
    "ssast_frame": ("SSAST", (1, 99), {}),
    "ssast_frame_pretrained": ("SSAST", (1, 80), {}),
    "ssast_one_token": ("SSAST", (8, 13), {}),
    "ssast_one_token_pretrained": ("SSAST", (8, 10), {}),
    "audiomae": ("AudioMAE", (8, 8), {}),
    "audiomae_s10": ("AudioMAE", (12, 9), {}),
    "audiomae_pretrained": ("AudioMAE", (8, 8), {}),
}
by_name = pytest.mark.parametrize("name", KNOWN)


def converted(name: str, **options):
    return convert_checkpoint(
        FAMILIES_GOLDEN / f"{name}.pth", **{**HEADS, **KNOWN[name][2], **options}
    )


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(FAMILIES_GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


def encoder_of(model):
    return model.base_model


def close(ours: torch.Tensor, theirs: np.ndarray, atol: float) -> None:
    torch.testing.assert_close(ours, torch.from_numpy(theirs), atol=atol, rtol=0)


@by_name
@torch.no_grad()
def test_computes_what_the_authors_code_does(name):
    family, grid, _ = KNOWN[name]
    result = converted(name)
    model, extractor, kept = result.model, result.feature_extractor, golden(name)
    assert (result.family, model.config.trained_grid) == (family, grid)
    waveform = kept["waveform"] / np.float32(32768)
    lengths = {int(key.split("_")[-1]) for key in kept if key.split("_")[-1].isdigit()}
    for samples in lengths or {len(waveform)}:
        suffix = f"_{samples}" if lengths else ""
        inputs = extractor(waveform[:samples], extractor.sampling_rate, return_tensors="pt")
        # The three PaSSTs hear the same sounds: one file has the spectrograms.
        spectrograms = golden("passt_s10") if family == "PaSST" else kept
        if f"features{suffix}" in spectrograms:
            theirs = spectrograms[f"features{suffix}"][: model.config.max_length]
            close(inputs["input_values"][0, : len(theirs)], theirs, atol=1e-4)
            # Another processor's FFT rounds differently; from here on, theirs.
            inputs["input_values"][0, : len(theirs)] = torch.from_numpy(theirs)
        encoded = encoder_of(model)(**inputs)
        if f"logits{suffix}" in kept:
            close(model(**inputs).logits, kept[f"logits{suffix}"], atol=1e-5)
        if f"probabilities{suffix}" in kept:
            close(model(**inputs).logits.sigmoid(), kept[f"probabilities{suffix}"], atol=1e-6)
        if f"embedding{suffix}" in kept:
            close(encoded.pooler_output, kept[f"embedding{suffix}"], atol=1e-5)
        if f"tokens{suffix}" in kept:
            if lengths:  # without the padding, which has tokens of its own
                inputs = extractor(waveform[:samples], 16000, padding=False, return_tensors="pt")
                encoded = encoder_of(model)(inputs["input_values"])
            theirs = kept[f"tokens{suffix}"]
            close(encoded.last_hidden_state[0, : len(theirs)], theirs, atol=1e-5)
        if "patches" in kept:  # numbered column by column
            patches = model.patch_grid(encoded.last_hidden_state, model.config.max_length, 128)
            close(patches[0].transpose(0, 1).flatten(0, 1), kept["patches"], atol=1e-5)
            close(encoded.last_hidden_state[0, 0], kept["cls"], atol=1e-5)


@torch.no_grad()
def test_the_other_way_to_fine_tune_an_ssast_is_an_ast():
    kept = golden("ssast_patch")
    features = torch.from_numpy(kept["features"])[None]
    for options in ({"family": "SSAST", "pooling": "special_tokens"}, {"family": "AST"}):
        lengths = {"max_length": 128} if options["family"] == "AST" else {}
        result = converted("ssast_patch", **options, **lengths)
        close(result.model(features).logits, kept["logits_of_tokens"], atol=3e-5)  # epsilon
    assert result.model.config.is_native


@torch.no_grad()
def test_ceds_hub_layout_and_wrappers_of_names_change_nothing(tmp_path):
    state = torch.load(FAMILIES_GOLDEN / "ced.pth", weights_only=True)
    hub = {
        (n if n.startswith("outputlayer") else f"encoder.{n.replace('init_bn.1', 'init_bn')}"): t
        for n, t in state.items()
        if not n.startswith("front_end")
    }
    (tmp_path / "hub").mkdir()
    save_file(hub, tmp_path / "hub" / "model.safetensors")
    config = {"model_type": "ced", "num_heads": 3, "target_length": 201}
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    torch.save({"model": state, "epoch": 3}, tmp_path / "inside.pt")
    torch.save({f"module.{n}": t for n, t in state.items()}, tmp_path / "wrapped.pt")
    expected = converted("ced")
    for path, options, length in [
        (tmp_path / "hub", {}, 201),
        (tmp_path / "hub" / "model.safetensors", {}, 201),
        (tmp_path / "inside.pt", HEADS, 200),
        (tmp_path / "wrapped.pt", HEADS, 200),
    ]:
        result = convert_checkpoint(path, **options)
        assert (result.family, result.model.config.max_length) == ("CED", length)
        for name, tensor in expected.model.state_dict().items():
            assert torch.equal(result.model.state_dict()[name], tensor), name
        assert result.feature_extractor.bin_scale == expected.feature_extractor.bin_scale


def changed(path: Path, name: str, change) -> Path:
    """A golden model's weights after a change, in a file."""
    with torch.serialization.safe_globals([argparse.Namespace, type(path)]):
        content = torch.load(FAMILIES_GOLDEN / f"{name}.pth", weights_only=True)
    state = content.get("model", content)
    change(state)
    torch.save(state, path)
    return path


def test_geometries_that_no_published_model_has(tmp_path):
    def small_patches(state):
        state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][..., :8, :8].clone()

    path = changed(tmp_path / "small.pth", "audiomae", small_patches)
    config = convert_checkpoint(path, **HEADS).model.config
    assert (config.trained_grid, config.patch_shape, config.time_stride) == ((16, 4), (8, 8), 8)

    def twenty_seconds(state):
        state["time_new_pos_embed"] = torch.randn(1, 24, 1, 200)

    path = changed(tmp_path / "long.pth", "passt_s10", twenty_seconds)
    result = convert_checkpoint(path, **HEADS)  # their 200 columns, of which the last is not used
    assert (result.model.config.max_length, result.model.config.trained_grid[1]) == (2000, 199)
    assert "Taken for 20 s, a spectrum every 10 ms; for a file with stfthop" in result.notes[-1]


def test_what_a_config_beside_the_weights_says_counts(tmp_path):
    path = changed(tmp_path / "pytorch_model.bin", "ced", lambda _: None)
    config = {"num_heads": 3, "patch_stride": [16, 8]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert convert_checkpoint(path).model.config.time_stride == 8
    (tmp_path / "config.json").write_text(json.dumps({**config, "pooling": "dm"}))
    with pytest.raises(ValueError, match="Its pooling is 'dm', a mean of probabilities over time"):
        convert_checkpoint(path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "f_max": 7000}))
    with pytest.raises(
        ValueError, match=r"differ from those of 0 to 7000 Hz.* config\.json beside it"
    ):
        convert_checkpoint(path)


def test_training_state_beside_the_weights_is_not_run(tmp_path):
    """A Namespace of arguments is data; anything else that a pickle could build is refused."""
    with torch.serialization.safe_globals([argparse.Namespace, type(tmp_path)]):
        state = torch.load(FAMILIES_GOLDEN / "audiomae.pth", weights_only=True)
    assert isinstance(state["args"], argparse.Namespace)

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    state["args"] = Trap()
    torch.save(state, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match=r"Refused to read .*trap\.pth: .* could run any code"):
        convert_checkpoint(tmp_path / "trap.pth", **HEADS)
    assert not (tmp_path / "ran").exists()


def test_says_what_does_not_fit(tmp_path):
    path = tmp_path / "weights.pth"

    def error(change, **options) -> str:
        state = torch.load(FAMILIES_GOLDEN / "passt_s10.pth", weights_only=True)
        change(state)
        torch.save(state, path)
        with pytest.raises(ValueError, match=r"weights\.pth") as raised:
            convert_checkpoint(path, **{**HEADS, **options})
        return str(raised.value)

    def nothing(_):
        pass

    def only(state, *names):
        for name in set(state) - set(names):
            del state[name]

    unknown = error(lambda s: only(s, "norm.weight", "blocks.0.norm1.weight"))
    assert all(f"{family.name}: {family.looks_for}" in unknown for family in FAMILIES)
    assert "Found blocks.0.norm1.weight, norm.weight" in unknown
    assert "pass num_attention_heads" in error(nothing, num_attention_heads=None)
    assert "must be divisible by" in error(nothing, num_attention_heads=5)
    assert "12 rows, but frequency_stride=16 cuts" in error(nothing, frequency_stride=16)
    assert "12 rows, but no stride cuts num_mel_bins=64 into" in error(nothing, num_mel_bins=64)
    assert "max_length=96 to 105 would fit; got 500" in error(nothing, max_length=500)
    assert "lacks 'new_pos_embed'" in error(lambda s: s.pop("new_pos_embed"))
    missing = error(lambda s: s.pop("blocks.1.mlp.fc1.weight"))
    assert "it lacks audio_spectrogram_transformer.encoder.layer.1.intermediate" in missing
    scale = {"blocks.0.ls1.gamma": torch.ones(24)}
    assert "tensor 'blocks.0.ls1.gamma', which AST's layers lack" in error(
        lambda s: s.update(scale)
    )
    assert "7 labels, but 2 names" in error(nothing, id2label={0: "a", 1: "b"})
    with pytest.raises(ValueError, match="Unknown family 'beats'; expected one of PaSST, CED"):
        convert_checkpoint(path, family="beats")
    with pytest.raises(ValueError, match="positions for 64 patches of 16 mel bins x 16 frames"):
        converted("audiomae", frequency_stride=5)
    state = torch.load(FAMILIES_GOLDEN / "ced.pth", weights_only=True)
    state["front_end.0.mel_scale.fb"] *= 2
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"mel filters differ from those of 0 to 8000 Hz"):
        convert_checkpoint(path, **HEADS)


# --- Files of ours --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["passt_s10", "ced", "ssast_frame", "audiomae"])
@torch.no_grad()
def test_the_command_writes_what_the_pipeline_reads(name, tmp_path, capsys):
    """ast-convert, Auto classes, pipeline: weights bit-equal to the converted ones."""
    source, folder = FAMILIES_GOLDEN / f"{name}.pth", tmp_path / "out"
    with pytest.raises(SystemExit) as exit_:
        main([str(source), "--output", str(folder), "--num-attention-heads", "3"])
    assert exit_.value.code == 0
    assert f"{name}.pth is {KNOWN[name][0]}: width 24, 2 layers" in capsys.readouterr().out
    assert json.loads((folder / "config.json").read_text())["model_type"] == "ast-family"
    assert not [*folder.glob("*conversion*"), *folder.glob("checkpoint_files*")]
    expected = converted(name)
    model = AutoModelForAudioClassification.from_pretrained(folder).eval()
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    assert type(model) is ASTForAudioClassification
    assert type(extractor) is ASTFamilyFeatureExtractor
    assert extractor.to_dict() == expected.feature_extractor.to_dict() | {
        key: value for key, value in extractor.to_dict().items() if key == "auto_map"
    }
    kept = golden(name)
    waveform = kept["waveform"] / np.float32(32768)
    inputs = extractor(waveform, extractor.sampling_rate, return_tensors="pt")
    torch.testing.assert_close(
        model(**inputs).logits, expected.model(**inputs).logits, atol=1e-6, rtol=0
    )
    for key, tensor in expected.model.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    again = tmp_path / "again"
    model.save_pretrained(again)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert json.loads((again / "config.json").read_text())["model_type"] == "ast-family"

    pipe = transformers.pipeline("audio-classification", model=str(folder))
    assert type(pipe) is ASTAudioClassificationPipeline
    short = waveform[: extractor.filterbank.num_samples(model.config.max_length)]
    sound = {"array": short, "sampling_rate": extractor.sampling_rate}
    answer = {entry["label"]: entry["score"] for entry in pipe(sound, top_k=None)}
    inputs = extractor(short, extractor.sampling_rate, return_tensors="pt")
    scores = pipe.scores(model(**inputs).logits)[0]
    for label, score in answer.items():
        assert score == pytest.approx(float(scores[model.config.label2id[label]]), abs=1e-6)
    longer = {"array": np.tile(waveform, 3), "sampling_rate": extractor.sampling_rate}
    assert len(pipe(longer, return_timestamps=True)["windows"]) > 2


def test_names_of_audiosets_labels_come_by_themselves(tmp_path, capsys):
    source = FAMILIES_GOLDEN / "audiomae_s10.pth"
    with pytest.raises(SystemExit):
        main([str(source), str(tmp_path / "out"), "--num_attention_heads=3"])
    assert "527 labels: assumed to be AudioSet's" in capsys.readouterr().out
    config = ASTConfig.from_pretrained(tmp_path / "out")
    assert (config.id2label[0], config.id2label[526]) == ("Speech", "Field recording")
    assert config.problem_type == "multi_label_classification"


def test_weights_without_a_head_are_a_start(tmp_path, capsys):
    source = FAMILIES_GOLDEN / "ssast_frame_pretrained.pth"
    with pytest.raises(SystemExit):
        main([str(source), str(tmp_path / "out"), "--num-attention-heads=3"])
    assert "no classification head: use it as a starting point" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [
        "ASTModel"
    ]
    model = ASTForAudioClassification.from_pretrained(tmp_path / "out", num_labels=4)
    expected = converted("ssast_frame_pretrained").model
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.base_model.state_dict()[name], tensor), name
    from scripts.inference.torch_engine import load_classifier

    with pytest.raises(ValueError, match="has no classification head: fine-tune it"):
        load_classifier(str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_special_tokens", 1),
        ("pooling", "patches"),
        ("final_norm", "after_pooling"),
        ("final_norm", "none"),
        ("time_patch_size", 4),
        ("head_norm_eps", 1e-5),
        ("native_features", False),
    ],
)
def test_what_native_cannot_compute_is_written_as_another_type(field, value, tmp_path):
    model = tiny_model(**{field: value})
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "ast-family"
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is ASTConfig
    assert getattr(again, field) == value
    inputs = torch.randn(2, 128, 64)
    loaded = ASTForAudioClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(inputs).logits, model(inputs).logits)
    assert model.base_model.num_parameters() == model.config.num_encoder_parameters
    setattr(model.config, field, getattr(ASTConfig(), field))
    assert model.config.to_dict()["model_type"] == "audio-spectrogram-transformer"


def test_spectrograms_of_others_are_written_without_a_native_class(tmp_path):
    ASTFeatureExtractor().save_pretrained(tmp_path / "native")
    written = json.loads((tmp_path / "native" / "preprocessor_config.json").read_text())
    assert written["feature_extractor_type"] == "ASTFeatureExtractor"
    assert not {"n_fft", "mel_scale", "bin_scale", "remove_mean"} & set(written)
    for features in (CED_FEATURES, PASST_FEATURES, KALDI_FEATURES, {"hop_length": 320}):
        extractor = ASTFeatureExtractor(**features)
        extractor.save_pretrained(tmp_path / "other")
        written = json.loads((tmp_path / "other" / "preprocessor_config.json").read_text())
        assert written["feature_extractor_type"] == "ASTFamilyFeatureExtractor"
        again = ASTFeatureExtractor.from_pretrained(tmp_path / "other")
        assert again.filterbank == extractor.filterbank
        assert all(getattr(again, key) == value for key, value in features.items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pooling": "max"}, "pooling must be one of special_tokens, patches, got 'max'"),
        ({"final_norm": "before"}, "final_norm must be one of before_pooling"),
        ({"num_special_tokens": 3}, "num_special_tokens must be 0, 1 or 2, got 3"),
        ({"num_special_tokens": 0}, "cannot pool them: set pooling='patches'"),
        ({"time_patch_size": 0}, "time_patch_size must be at least 1"),
        ({"time_patch_size": 2000}, "smaller than one patch of 2000 x 16"),
        ({"head_norm_eps": 0.0}, "head_norm_eps must be between 0 and 1"),
    ],
)
def test_numbers_of_no_encoder_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ASTConfig(**fields)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"mel_scale": "bark"}, "mel_scale must be one of kaldi, torchaudio, htk, got 'bark'"),
        ({"compression": "cubic"}, "compression must be one of log, log_offset, decibels"),
        ({"hop_length": 500}, "hop_length <= win_length <= n_fft <= 65536 must hold, got 500, 400"),
        ({"n_fft": 256}, "must hold, got 160, 400 and 256 samples"),
        ({"n_fft": 2**20}, "n_fft <= 65536"),
        ({"win_length": "400"}, "win_length must be a number of samples, got '400'"),
        ({"frequency_max": 9000.0}, "between 0 Hz and half the sampling rate of 16000 Hz"),
        ({"frequency_min": 9000.0}, "between 0 Hz and half"),
        ({"frequency_min": "low"}, "frequency_min must be a number, got 'low'"),
        ({"mel_floor": 0.0}, "mel_floor must be a number above 0"),
        ({"mel_floor": None}, "mel_floor must be a number, got None"),
        ({"preemphasis": 2.0}, "preemphasis must be from 0 to 1"),
        ({"dynamic_range": -1.0}, "dynamic_range must be above 0"),
        ({"bin_scale": [1.0] * 128}, "Give both bin_scale and bin_offset"),
        ({"bin_scale": [1.0], "bin_offset": [0.0]}, "one finite number for each of 128 mel bins"),
        (
            {"bin_scale": [math.nan] * 128, "bin_offset": [0.0] * 128},
            "bin_scale must be one finite number",
        ),
    ],
)
def test_numbers_of_no_filterbank_are_refused(settings_, message):
    with pytest.raises(ValueError, match=message):
        ASTFeatureExtractor(**settings_)


# --- Spectrograms ---------------------------------------------------------------------------------


def transformers_ced(waveform: np.ndarray) -> np.ndarray:
    """CED's decibels by `transformers.audio_utils`, whose "htk" is torchaudio's: (T, 64)."""
    filters = mel_filter_bank(257, 64, 0.0, 8000.0, 16000, norm=None, mel_scale="htk")
    return spectrogram(
        waveform,
        window_function(512, "hann"),
        frame_length=512,
        hop_length=160,
        fft_length=512,
        power=2.0,
        mel_filters=filters,
        mel_floor=1e-10,
        log_mel="dB",
        db_range=120.0,
    ).T


def transformers_passt(waveform: np.ndarray) -> np.ndarray:
    """PaSST's logarithms by the same: (T, 128)."""
    filters = mel_filter_bank(
        *(513, 128, 0.0, 15000.0, 32000),
        norm=None,
        mel_scale="kaldi",
        triangularize_in_mel_space=True,
    )
    filters[-1] = 0  # PaSST's Nyquist bin
    power = spectrogram(
        waveform[1:] - np.float32(0.97) * waveform[:-1],
        window_function(800, "hann", periodic=False),
        frame_length=800,
        hop_length=320,
        fft_length=1024,
        power=2.0,
        mel_filters=filters,
        mel_floor=0.0,
    )
    return np.log(power.T + 1e-5)


def noise_and_tone(samples: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    tone = 0.3 * np.sin(np.arange(samples) * generator.uniform(0.01, 2))
    return (tone + generator.normal(0, 0.05, samples)).astype(np.float32)


SECOND = {  # atol in decibels and in natural logarithms: its filters are float64, ours float32
    "ced": (CED_FEATURES, 64, transformers_ced, 0.05),
    "passt": ({**PASST_FEATURES, "do_normalize": False}, 128, transformers_passt, 0.01),
}
by_a_second = pytest.mark.parametrize("name", SECOND)


def agrees_with_a_second(name: str, waveform: np.ndarray) -> None:
    features, mel_bins, theirs, atol = SECOND[name]
    extractor = ASTFeatureExtractor(num_mel_bins=mel_bins, max_length=1012, **features)
    rate = extractor.sampling_rate
    ours = extractor(waveform, rate, padding=False, return_tensors="np")["input_values"][0]
    np.testing.assert_allclose(ours, theirs(waveform), atol=atol, rtol=0)


@by_a_second
@settings(max_examples=5, deadline=None, derandomize=True)
@given(samples=st.integers(1100, 6000), seed=st.integers(0, 99))
def test_spectrograms_are_those_of_a_second_implementation(name, samples, seed):
    agrees_with_a_second(name, noise_and_tone(samples, seed))


@by_a_second
def test_spectrograms_of_recordings_are_too(name):
    table = parquet.read_table(shared("data/esc10/data/fold5.parquet"), columns=["audio"])
    rate = SECOND[name][0].get("sampling_rate", 16000)
    for row in (3, 41, 77):
        sound = load_audio(table["audio"][row].as_py()["bytes"], rate, offset=1, duration=0.3)
        agrees_with_a_second(name, sound)


FRONT_ENDS = {
    "ced": {**CED_FEATURES, "num_mel_bins": 64},
    "passt": PASST_FEATURES,
    "ssast": {**KALDI_FEATURES, "return_attention_mask": True},
    "bins": {"bin_scale": [0.5] * 128, "bin_offset": [1.0] * 128},
}


@pytest.mark.parametrize("name", FRONT_ENDS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 30000), min_size=1, max_size=3),
    max_length=st.integers(17, 60),
)
def test_a_clip_has_the_same_spectrogram_alone_and_in_a_batch(name, lengths, max_length):
    extractor = ASTFeatureExtractor(max_length=max_length, **FRONT_ENDS[name])
    clips = [noise_and_tone(length, seed) for seed, length in enumerate(lengths)]
    rate = extractor.sampling_rate
    batch = extractor(clips, rate, padding="longest", return_tensors="pt")
    waveforms = [torch.from_numpy(clip) for clip in clips]
    # What a GPU would do: all clips at once.
    if extractor.remove_mean:
        waveforms = [waveform - waveform.mean() for waveform in waveforms]
    shortest = extractor.filterbank.shortest
    waveforms = [
        torch.nn.functional.pad(w, (0, max(0, shortest - len(w))))[
            : extractor.filterbank.samples_used(max_length)
        ]
        for w in waveforms
    ]
    shape = (*batch["attention_mask"].shape, extractor.num_mel_bins)
    together = extractor._fill_together(
        torch.full(shape, float(extractor.padding_value)),
        waveforms,
        batch["attention_mask"].bool(),
    )
    torch.testing.assert_close(together, batch["input_values"], atol=1e-4, rtol=0)
    for row, clip in enumerate(clips):
        alone = extractor(clip, rate, padding=False, return_tensors="pt")["input_values"][0]
        frames = int(batch["attention_mask"][row].sum())
        assert frames == len(alone)
        assert torch.equal(batch["input_values"][row, :frames], alone)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    samples=st.integers(1, 100_000),
    center=st.booleans(),
    hop=st.integers(1, 400),
    preemphasis=st.sampled_from([0.0, 0.97]),
)
def test_frames_and_samples_are_counted_alike(samples, center, hop, preemphasis):
    bank = LogMel(hop_length=hop, center=center, preemphasis=preemphasis)
    frames = bank.num_frames(samples)
    if frames:
        assert bank.num_samples(frames) <= samples
        if samples < 4000:
            assert bank(torch.zeros(samples)).shape == (frames, 128)
        assert bank.num_frames(bank.num_samples(frames)) >= frames
        assert bank.num_frames(bank.num_samples(frames + 1)) >= frames + 1


# --- What the numbers do to the rest --------------------------------------------------------------

OTHERS = [
    {"num_special_tokens": 0, "pooling": "patches"},
    {"num_special_tokens": 1, "pooling": "patches", "final_norm": "after_pooling"},
    {"num_special_tokens": 1, "pooling": "special_tokens"},
    {"pooling": "patches", "patch_size": 64, "time_patch_size": 4, "time_stride": 2},
]
others = pytest.mark.parametrize("fields", OTHERS)


@others
@torch.no_grad()
def test_padding_never_matters(fields):
    model = tiny_model(**fields)
    lengths = (16, 40, 128)
    clips = [torch.randn(length, 64) for length in lengths]
    padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=9.0)
    mask = torch.arange(128) < torch.tensor(lengths)[:, None]
    together = model(padded, mask.long()).logits
    for row, clip in enumerate(clips):
        torch.testing.assert_close(together[row], model(clip[None]).logits[0], atol=2e-6, rtol=1e-5)


@others
def test_patchout_merging_and_explanations_go_with_it(fields):
    inputs = torch.randn(2, 128, 64)
    mask = torch.arange(128) < torch.tensor([128, 64])[:, None]
    model = tiny_model(**fields, time_patchout=2, unstructured_patchout=1).train()
    loss = model(inputs, mask.long(), labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    model = tiny_model(**fields)
    for relevance in (
        attention_rollout(model, inputs, mask.long()),
        class_relevance(model, inputs, 1, mask.long()),
    ):
        assert relevance.shape == (2, 64, 128)
        torch.testing.assert_close(relevance.sum(dim=(1, 2)), torch.ones(2), atol=1e-5, rtol=0)
        assert relevance[1, :, 64:].sum() == 0

    with torch.no_grad():
        whole = model(inputs, mask.long()).logits
        model.config.merged_tokens_per_layer = 4
        merged = model(inputs, mask.long()).logits
        alone = model(inputs[1:, :64]).logits
    assert not torch.equal(whole, merged)
    torch.testing.assert_close(merged[1:], alone, atol=1e-5, rtol=1e-4)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    count=st.integers(3, 20),
    merged=st.integers(1, 8),
    special=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_merging_keeps_the_mean_over_patches(count, merged, special, seed):
    torch.manual_seed(seed)
    config = ASTConfig(**TINY_MODEL, num_special_tokens=special, pooling="patches")
    model = ASTModel(config)
    tokens = torch.randn(2, special + count, 48)
    sizes = torch.ones(2, special + count)
    sizes[1, special + count // 2 + 1 :] = 0  # padding
    keys = torch.randn(2, 3, special + count, 16)
    fewer, new_sizes = merge_tokens(tokens, keys, sizes, merged, special)
    assert fewer.shape[1] < tokens.shape[1]
    torch.testing.assert_close(
        model.pool(fewer, new_sizes), model.pool(tokens, sizes), atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_another_geometry_fits_a_table_with_any_special_tokens(tmp_path):
    for number, fields in enumerate(OTHERS):
        folder = tmp_path / str(number)
        model = tiny_model(**fields)
        model.save_pretrained(folder)
        wider = ASTForAudioClassification.from_pretrained(folder, max_length=200).eval()
        special = model.config.num_special_tokens
        old = model.base_model.embeddings.position_embeddings
        new = wider.base_model.embeddings.position_embeddings
        assert torch.equal(new[:, :special], old[:, :special])
        assert new.shape[1] == special + math.prod(wider.config.trained_grid)
        same = ASTForAudioClassification.from_pretrained(folder, max_length=128).eval()
        inputs = torch.randn(1, 100, 64)
        torch.testing.assert_close(same(inputs).logits, model(inputs).logits)


def test_fine_tuning_starts_from_one_and_stays_one(tmp_path):
    result = converted("ced")
    result.model.save_pretrained(tmp_path / "ced")
    result.feature_extractor.save_pretrained(tmp_path / "ced")
    finetune(
        FinetuneOptions(
            dataset=str(write_class_folders(tmp_path / "sounds", 4)),
            model=str(tmp_path / "ced"),
            output=str(tmp_path / "run"),
            num_epochs=1,
            batch_size=4,
            max_length=48,
            time_mask=8,
            frequency_mask=2,
            time_patchout=1,
            num_workers=0,
        )
    )
    checkpoint = tmp_path / "run" / "checkpoint"
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "ast-family"
    config = ASTConfig.from_pretrained(checkpoint)
    assert (config.num_mel_bins, config.max_length, config.num_labels) == (64, 48, 3)
    extractor = ASTFeatureExtractor.from_pretrained(checkpoint)
    assert extractor.bin_scale == result.feature_extractor.bin_scale
    assert extractor.max_length == 48
    before = result.model.base_model.encoder.layer[0].attention.attention.query.weight
    after = ASTForAudioClassification.from_pretrained(checkpoint).base_model
    assert not torch.equal(after.encoder.layer[0].attention.attention.query.weight, before)


# --- By name --------------------------------------------------------------------------------------


def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "ast"


def test_a_name_without_a_network_says_what_to_download(monkeypatch, tmp_path, capsys):
    folder = cache(monkeypatch, tmp_path)
    for name, file, page in [
        ("ced-tiny", "model.safetensors", "https://huggingface.co/mispeech/ced-tiny"),
        ("passt-s-kd-p16-s10-ap486", "passt-s-kd-ap.486.pt", "https://github.com/kkoutini/PaSST"),
        ("audiomae-base-ap473", "finetuned.pth", "https://drive.google.com/file"),
    ]:
        started = time.perf_counter()
        with pytest.raises(ValueError, match="could not be fetched") as raised:
            checkpoint_folder(name)
        assert time.perf_counter() - started < 2
        assert f"Download {file} from {page}" in str(raised.value)
        assert f"put it into {folder / name}" in str(raised.value)
        assert str(raised.value).endswith(f"or a bundled one: {', '.join(bundled_checkpoints())}.")
    assert capsys.readouterr().err == ""  # one line: the error's
    assert checkpoint_folder("someone/ced-tiny") == "someone/ced-tiny"


def timm_names(model: ASTForAudioClassification) -> dict[str, torch.Tensor]:
    """The encoder's tensors as timm names them."""
    from modeling_ast.conversion_ast import ast_to_original

    prefix = "audio_spectrogram_transformer."
    state = {n: t for n, t in model.state_dict().items() if n.startswith(prefix)}
    return {
        name.removeprefix("module.v."): tensor for name, tensor in ast_to_original(state).items()
    }


def ced_file(model: ASTForAudioClassification) -> dict[str, torch.Tensor]:
    """A model under the names of CED's Hub repositories, its table as a sum of two."""
    state = {f"encoder.{name}": tensor for name, tensor in timm_names(model).items()}
    table = state.pop("encoder.pos_embed")[0].T.unflatten(1, model.config.trained_grid)
    state["encoder.time_pos_embed"] = table[None, :, :1].contiguous()
    state["encoder.freq_pos_embed"] = torch.zeros(1, table.shape[0], table.shape[1], 1)
    for name, value in (("weight", 0.1), ("bias", 0.2), ("running_mean", -30), ("running_var", 9)):
        state[f"encoder.init_bn.{name}"] = torch.full((64,), float(value))
    for ours, theirs in (("layernorm", "0"), ("dense", "1")):
        for kind in ("weight", "bias"):
            tensor = model.classifier.state_dict()[f"{ours}.{kind}"]
            state[f"outputlayer.{theirs}.{kind}"] = tensor
    return state


def test_a_name_is_fetched_converted_and_kept(monkeypatch, tmp_path, capsys):
    folder = cache(monkeypatch, tmp_path)
    config, _ = descendant_config("ced-tiny")
    model = ASTForAudioClassification(config)
    save_file(ced_file(model), tmp_path / "model.safetensors")
    monkeypatch.setattr(fetching, "can_reach", lambda _: True)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, file: str(tmp_path / file) * (repo != "")
    )
    found = checkpoint_folder("ced-tiny")
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "ced-tiny: fetching https://huggingface.co/mispeech/ced-tiny, converting it" in said
    assert "licence is apache-2.0" in said
    assert found == str(folder / "ced-tiny" / "checkpoint")
    assert [path.name for path in (folder / "ced-tiny").iterdir()] == ["checkpoint"]
    assert (Path(found) / "README.md").is_file()
    assert (Path(found) / "model.safetensors").stat().st_mode & 0o044 == 0o044  # for all users
    again = ASTForAudioClassification.from_pretrained(found)
    assert again.config.id2label == config.id2label
    assert torch.equal(again.classifier.dense.weight, model.classifier.dense.weight)
    extractor = ASTFeatureExtractor.from_pretrained(found)
    assert extractor.bin_scale == pytest.approx([0.1 / math.sqrt(9 + 1e-5)] * 64)
    assert extractor.bin_offset == pytest.approx([0.2 + 30 * 0.1 / math.sqrt(9 + 1e-5)] * 64)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)  # not asked again
    assert checkpoint_folder("ced-tiny") == found
    assert "ced-tiny" not in capsys.readouterr().err


def test_what_was_put_by_hand_is_taken(monkeypatch, tmp_path, capsys):
    folder = cache(monkeypatch, tmp_path) / "ced-tiny"
    folder.mkdir(parents=True)
    wrong = torch.load(FAMILIES_GOLDEN / "ced.pth", weights_only=True)
    save_file({n: t.contiguous() for n, t in wrong.items()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"Its position table has 12 columns: .* got 1012"):
        checkpoint_folder("ced-tiny")
    assert "fetching" not in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]


def test_an_address_is_downloaded_whole(monkeypatch, tmp_path):
    folder = cache(monkeypatch, tmp_path)
    source = tmp_path / "weights.pt"
    source.write_bytes(b"weights")
    name = next(n for n, c in published_descendants().items() if "url" in c)
    opened = urllib.request.urlopen
    monkeypatch.setattr(
        fetching.urllib.request, "urlopen", lambda *_, **__: opened(source.as_uri())
    )
    target = fetching.fetch_weights(name)
    assert target.read_bytes() == b"weights"
    assert list((folder / name).iterdir()) == [target]
    source.unlink()
    with pytest.raises(ValueError, match=r"could not be fetched: .*No such"):
        fetching.fetch_weights(name)
