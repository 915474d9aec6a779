"""Other people's files are not trusted: pickles, configs, names, archives, code."""

import ast
import collections
import contextlib
import functools
import io
import itertools
import json
import pickle
import resource
import tarfile
from pathlib import Path

import pytest
import torch
from transformers import AutoFeatureExtractor, AutoProcessor, pipeline

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTConfig, ASTForAudioClassification
from modeling_ast.weights_ast import check_json_files
from scripts.data.sources import open_stream

from .conftest import REPOSITORY

PYTHON_FILES = [
    path
    for folder in ("modeling_ast", "feature_extraction", "scripts", "tests", "docs", "hub_configs")
    for path in (REPOSITORY / folder).rglob("*.py")
]


@functools.cache
def all_calls() -> dict[str, list[tuple[Path, ast.Call]]]:
    """The repository's calls, by the name of the function or method, with the file they are in."""
    found = collections.defaultdict(list)
    for path in PYTHON_FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                found[name].append((path, node))
    return found


def test_nothing_that_could_run_code_is_unpickled():
    calls = all_calls()
    loads = calls["load"] + calls["loads"]
    assert any(ast.unparse(call.func) == "torch.load" for _, call in loads)
    for path, call in loads:
        where, function = f"{path}:{call.lineno}", ast.unparse(call.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if function == "torch.load":
            assert options.get("weights_only") == "True", where
        assert function.split(".")[0] not in ("pickle", "dill", "joblib", "yaml"), where
        assert options.get("allow_pickle", "False") == "False", where
    for name in ("extractall", "extract", "unpack_archive"):
        assert name not in calls


def test_library_and_commands_never_trust_remote_code_by_themselves():
    keywords = [
        (path, keyword)
        for path, call in itertools.chain.from_iterable(all_calls().values())
        for keyword in call.keywords
        if keyword.arg == "trust_remote_code" and path.parent.name != "tests"
    ]
    for path, keyword in keywords:
        assert not isinstance(keyword.value, ast.Constant) or not keyword.value.value, path


def checkpoint(native_folder: Path, folder: Path, file: str = "config.json", **changes) -> Path:
    """A copy of a good checkpoint with some values of a file changed."""
    folder.mkdir(exist_ok=True)
    for source in native_folder.iterdir():
        (folder / source.name).write_bytes(source.read_bytes())
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **changes}))
    return folder


HUGE = 10**9
HOSTILE_CONFIGS = {
    "width": {"hidden_size": 3 * HUGE},
    "fitting width": {"hidden_size": 4800, "num_hidden_layers": 10},
    "layers": {"num_hidden_layers": HUGE},
    "narrow layers": {"num_hidden_layers": 2 * 10**6, "hidden_size": 3, "intermediate_size": 1},
    "mlp": {"intermediate_size": HUGE},
    "frames": {"max_length": HUGE},
    "frames, table of gigabytes": {"max_length": 999_999, "time_stride": 1, "frequency_stride": 1},
    "mel bins": {"num_mel_bins": HUGE},
    "patch": {"patch_size": HUGE, "max_length": HUGE, "num_mel_bins": HUGE},
    "labels": {"num_labels": HUGE},
    "labels beside names": {"num_labels": HUGE, "id2label": {"0": "a", "1": "b"}},
    "labels as text": {"num_labels": "1000000000"},
    "negative": {"num_hidden_layers": -1},
    "text for a number": {"hidden_size": "48"},
    "list for a number": {"time_stride": [10]},
    "nothing for a number": {"max_length": None},
    "number with a part": {"max_length": 128.5},
    "infinity": {"max_length": float("inf")},
    "names as a list": {"id2label": ["a", "b"]},
    "names of names": {"id2label": {"zero": "a"}},
    "name that is no text": {"id2label": {"0": {"a": 1}}},
    "name that steers a terminal": {"id2label": {"0": "\x1b]0;owned\x07", "1": "b"}},
    "name of two lines": {"id2label": {"0": "a\nb", "1": "b"}},
    "unknown activation": {"hidden_act": "../../evil"},
    "unknown dtype": {"dtype": "../../evil"},
    "a method's name": {"check": 1, "grid_shape": 1, "trained_grid": 1},
    "a layer's own config": {"per_layer_config": {"0": {"hidden_size": HUGE}}},
}


@pytest.mark.parametrize("changes", HOSTILE_CONFIGS.values(), ids=HOSTILE_CONFIGS)
def test_hostile_config_is_refused_before_memory_is_taken(native_folder, tmp_path, changes):
    folder = checkpoint(native_folder, tmp_path / "hostile", **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for load in (ASTForAudioClassification.from_pretrained, _make_pipeline):
        with pytest.raises(ValueError) as raised:  # noqa: PT011  (each has a message of its own)
            load(folder)
        assert "\x1b" not in str(raised.value)
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert taken < 200_000  # KiB; the smallest of these models would need gigabytes


def _make_pipeline(folder: Path):
    return pipeline("audio-classification", model=str(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_mel_bins": HUGE},
        {"max_length": HUGE},
        {"max_length": "128"},
        {"sampling_rate": HUGE},
        {"sampling_rate": 0},
        {"mean": "a"},
        {"std": 0},
        {"std": float("nan")},
        {"padding_value": None},
        {"num_mel_bins": True},
        {"num_mel_bins": 2**31},
        {"max_length": 10**6, "num_mel_bins": 4096},
        {"do_normalize": "no"},
        {"return_attention_mask": [1]},
        {"std": 1e-300},
        {"mean": 1e300},
    ],
)
def test_hostile_preprocessor_config_is_refused(native_folder, tmp_path, changes):
    folder = checkpoint(native_folder, tmp_path / "hostile", "preprocessor_config.json", **changes)
    name = next(iter(changes))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = "max_length=.* must be" if len(changes) > 1 else f"{name} must be"
    for load in (
        ASTFeatureExtractor.from_pretrained,
        AutoFeatureExtractor.from_pretrained,
        _make_pipeline,
    ):
        with pytest.raises(ValueError, match=message):
            load(folder)
    with pytest.raises(ValueError, match="Unrecognized processing class"):  # its own words
        AutoProcessor.from_pretrained(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize("name", ["__dict__", "__call__", "_waveforms", "stream_audio", "to_dict"])
def test_settings_do_not_replace_methods(native_folder, tmp_path, name):
    folder = checkpoint(
        native_folder, tmp_path / "hostile", "preprocessor_config.json", **{name: 1}
    )
    with pytest.raises(ValueError, match=f"An extractor has no setting '{name}'"):
        ASTFeatureExtractor.from_pretrained(folder)


@pytest.mark.parametrize(
    "content", ["[]", "null", '"a"', "{", '{"auto_map": 1}', '{"model_type": []}', "[" * 10**5]
)
def test_files_that_hold_no_settings(native_folder, tmp_path, content):
    """transformers does not expect any, so we check before it reads them."""
    for file in ("config.json", "preprocessor_config.json"):
        folder = checkpoint(native_folder, tmp_path / file)
        (folder / file).write_text(content)
        with pytest.raises(
            ValueError, match=r"\.json.*(not valid JSON|not a JSON object|must be an? )"
        ):
            check_json_files(folder)
        with pytest.raises((ValueError, OSError)):
            ASTConfig.from_pretrained(folder)


def test_largest_real_models_are_not_refused():
    """ViT-Huge at 30 s, and as many labels as a large ontology has."""
    ASTConfig(hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, max_length=3000)
    ASTConfig(num_labels=100_000)
    ASTConfig(id2label={0: "Crying, sobbing / ../../etc", 1: "کتاب\u200cها", 2: "🐓"})


def test_index_that_leaves_the_folder_is_refused(native_folder, tmp_path):
    folder = checkpoint(native_folder, tmp_path / "hostile")
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors")):
        index = {"metadata": {}, "weight_map": {"classifier.dense.bias": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"names files outside its folder: '.*secret"):
            ASTForAudioClassification.from_pretrained(folder)


def test_weights_of_another_model_or_damaged_are_refused(native_folder, tmp_path):
    folder = checkpoint(native_folder, tmp_path / "hostile", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"describes an encoder of .* they are not the same model"):
        ASTForAudioClassification.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        ASTForAudioClassification.from_pretrained(folder)


class _RunsCode:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


@pytest.mark.parametrize("new_format", [True, False])
def test_pickled_weights_cannot_run_code(native_folder, tmp_path, new_format):
    folder = checkpoint(native_folder, tmp_path / "hostile")
    (folder / "model.safetensors").unlink()
    content = {"classifier.dense.bias": _RunsCode(tmp_path / "trace")}
    if new_format:
        torch.save(content, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises((ValueError, OSError, pickle.UnpicklingError)):
        ASTForAudioClassification.from_pretrained(folder)
    assert not (tmp_path / "trace").exists()


def test_saved_weights_are_safetensors(native_folder, tmp_path):
    ASTForAudioClassification.from_pretrained(native_folder).save_pretrained(tmp_path)
    suffixes = {path.suffix for path in tmp_path.iterdir()}
    assert suffixes == {".json", ".py", ".safetensors"}


def test_code_of_a_folder_runs_only_when_asked(native_folder, tmp_path):
    """With our package and without it; in plain transformers the folder is native AST."""
    folder = checkpoint(
        native_folder,
        tmp_path / "hostile",
        auto_map={
            "AutoConfig": "evil.Config",
            "AutoModelForAudioClassification": "evil.Model",
        },
        attn_implementation="someone/kernel",
    )
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n")
    classifier = _make_pipeline(folder)
    assert classifier.model.config._attn_implementation == "sdpa"
    assert type(classifier.model).__module__.startswith("modeling_ast")
    assert not (tmp_path / "trace").exists()


def test_names_in_an_archive_write_nothing(tmp_path):
    """A tar's members are read in memory, whatever their names."""
    outside = tmp_path / "evil.wav"
    archive = tmp_path / "data" / "hostile.tar"
    archive.parent.mkdir()
    with tarfile.open(archive, "w") as tar:
        for name in ("../evil.wav", str(outside), "a/../../evil.wav"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"RIFF"))
    with contextlib.suppress(ValueError):  # what it makes of them is not the question
        list(open_stream(str(archive), "train"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "hostile.tar"]
