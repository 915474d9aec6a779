"""The original AST code's checkpoints: read, written, and refused if they do not fit."""

import json
import pickle

import numpy as np
import pytest
import torch

from modeling_ast import ASTConfig, ASTForAudioClassification
from scripts.common.bundled import read_label_names
from scripts.convert import main

from .conftest import GOLDEN, REPOSITORY, shared

GOLDEN_GEOMETRIES = {
    "original_t128_f10": {"max_length": 128},
    "original_t100_f12": {
        "max_length": 100,
        "num_mel_bins": 64,
        "frequency_stride": 12,
        "time_stride": 14,
    },
    "original_t96_f16": {"max_length": 96, "frequency_stride": 16, "time_stride": 16},
}


def load_golden(name: str, **changes) -> ASTForAudioClassification:
    settings = {"num_attention_heads": 3, **GOLDEN_GEOMETRIES[name], **changes}
    return ASTForAudioClassification.from_original_checkpoint(GOLDEN / f"{name}.pth", **settings)


def is_unused(name: str) -> bool:
    return name.startswith(("module.v.head.", "module.v.head_dist."))


@pytest.mark.parametrize("name", GOLDEN_GEOMETRIES)
def test_golden_logits(name):
    golden = np.load(GOLDEN / f"{name}.npz")
    with torch.no_grad():
        logits = load_golden(name)(torch.from_numpy(golden["input_values"])).logits
    assert np.abs(logits.numpy() - golden["logits"]).max() <= 5e-5


@pytest.mark.parametrize("name", GOLDEN_GEOMETRIES)
def test_there_and_back_is_bit_equal(name):
    original = torch.load(GOLDEN / f"{name}.pth", weights_only=True)
    back = load_golden(name).to_original_state_dict()
    assert set(back) == {key for key in original if not is_unused(key)}
    for key, tensor in back.items():
        assert torch.equal(tensor, original[key]), key


def test_names_without_module(tmp_path):
    original = torch.load(GOLDEN / "original_t128_f10.pth", weights_only=True)
    torch.save({k.removeprefix("module."): v for k, v in original.items()}, tmp_path / "plain.pth")
    plain = ASTForAudioClassification.from_original_checkpoint(
        tmp_path / "plain.pth", max_length=128, num_attention_heads=3
    )
    for key, tensor in plain.to_original_state_dict().items():
        assert torch.equal(tensor, original[key])


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (384, 6), (768, 12)])
def test_every_size_of_the_original(width, heads, tmp_path):
    config = ASTConfig(
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=64,
        num_hidden_layers=1,
        max_length=64,
        num_mel_bins=32,
        num_labels=2,
    )
    state = ASTForAudioClassification(config).to_original_state_dict()
    torch.save(state, tmp_path / "model.pth")
    read = ASTForAudioClassification.from_original_checkpoint(
        tmp_path / "model.pth", max_length=64, num_mel_bins=32
    )
    assert read.config.num_attention_heads == heads
    assert read.config.layer_norm_eps == 1e-6
    with pytest.raises(ValueError, match=rf"num_attention_heads={heads * 2}, but .* have {heads} "):
        ASTForAudioClassification.from_original_checkpoint(
            tmp_path / "model.pth", max_length=64, num_mel_bins=32, num_attention_heads=heads * 2
        )


def test_wrong_geometry_is_named_with_what_would_fit():
    with pytest.raises(
        ValueError,
        match=r"positions for 144 patches, but frequency_stride=16, time_stride=16 cut "
        r"max_length=128 frames x num_mel_bins=128 into 8 rows x 8 columns = 64\..* "
        r"of these, frequency_stride=10, time_stride=10",
    ):
        load_golden("original_t128_f10", frequency_stride=16, time_stride=16)
    with pytest.raises(ValueError, match=r"with these strides, max_length=126 to 135 would fit"):
        load_golden("original_t128_f10", max_length=1024)
    with pytest.raises(ValueError, match="frequency_stride=12, time_stride=14 would fit"):
        load_golden("original_t100_f12", time_stride=12)
    with pytest.raises(ValueError, match="No strides fit: max_length or num_mel_bins must be"):
        load_golden("original_t96_f16", max_length=2000, frequency_stride=11)


def test_heads_that_cannot_be_known_are_asked_for():
    with pytest.raises(
        ValueError, match=r"Its width is 48; .*192 .3 heads.*pass num_attention_heads"
    ):
        load_golden("original_t128_f10", num_attention_heads=None)
    with pytest.raises(ValueError, match=r"hidden_size \(48\) must be divisible .*\(5\)"):
        load_golden("original_t128_f10", num_attention_heads=5)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a checkpoint of the original AST code: expected"):
        ASTForAudioClassification.from_original_checkpoint(
            GOLDEN / "deit224_3ch.pth", num_attention_heads=3
        )
    with pytest.raises(ValueError, match="No such checkpoint"):
        ASTForAudioClassification.from_original_checkpoint(tmp_path / "missing.pth")
    for content in (
        b"",
        b"no weights at all",
        (GOLDEN / "original_t96_f16.pth").read_bytes()[:999],
    ):
        (tmp_path / "broken.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"(?i)broken\.pth(: it is a pickle| was not written)"):
            ASTForAudioClassification.from_original_checkpoint(tmp_path / "broken.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list; expected a dict of tensors"):
        ASTForAudioClassification.from_original_checkpoint(tmp_path / "list.pth")


class _RunsCode:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, new_format):
    trace = tmp_path / "trace"
    content = {"module.v.cls_token": _RunsCode(trace)}
    if new_format:
        torch.save(content, tmp_path / "evil.pth")
    else:
        (tmp_path / "evil.pth").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match=r"could run any code its author put there.*open"):
        ASTForAudioClassification.from_original_checkpoint(tmp_path / "evil.pth")
    assert not trace.exists()


def convert(*arguments, status: int = 0) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    assert exit_.value.code == status


def test_audioset_names_there_and_back(tmp_path):
    convert(
        GOLDEN / "audioset_like_t1024.pth",
        tmp_path / "model",
        "--num-attention-heads=3",
        "--labels=audioset",
        "--problem-type=multi_label_classification",
    )
    model = ASTForAudioClassification.from_pretrained(tmp_path / "model")
    assert model.config.id2label[0] == "Speech"
    assert model.config.label2id["Speech"] == 0
    assert model.config.problem_type == "multi_label_classification"

    convert(tmp_path / "model", tmp_path / "new" / "back.pth")
    original = torch.load(GOLDEN / "audioset_like_t1024.pth", weights_only=True)
    back = torch.load(tmp_path / "new" / "back.pth", weights_only=True)
    assert sorted(back) == sorted(original)  # all that the original's strict load wants
    for key, tensor in back.items():
        expected = torch.zeros_like(original[key]) if is_unused(key) else original[key]
        assert torch.equal(tensor, expected), key


def test_convert_says_what_is_wrong(tmp_path, capsys):
    golden = GOLDEN / "original_t128_f10.pth"
    names = tmp_path / "labels.json"
    names.write_text(json.dumps(["a", "b"]))
    fits = ("--num-attention-heads=3", "--max-length=128")
    for arguments, message in [
        ((golden, tmp_path / "m", "--max-length=128"), "Its width is 48"),
        ((tmp_path / "none", tmp_path / "m.pth"), "No such file or folder"),
        ((tmp_path, tmp_path / "m.pth"), "has no config.json"),
        (
            (tmp_path, tmp_path / "m.pth", "--labels=esc50"),
            "--labels, --problem-type, --variant and the numbers",
        ),
        ((golden, names), "labels.json is a file; the second argument must be a folder"),
        ((golden, tmp_path / "m", *fits, f"--labels={names}"), "7 labels, but 2 names were given"),
        ((golden, tmp_path / "m", *fits, "--labels=esc"), "neither a file nor bundled"),
    ]:
        convert(*arguments, status=2)
        error = capsys.readouterr().err
        assert error.startswith("ast-convert: error: ")
        assert message in error
    names.write_text('[{"index": 1, "name": "b"}, {"index": 0, "name": "a"}]')
    assert read_label_names(str(names)) == ["a", "b"]
    names.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="must hold a JSON list of label names"):
        read_label_names(str(names))


@pytest.mark.parametrize("name", ["audioset", "esc50", "speech_commands_v2"])
def test_bundled_label_names_are_complete(name):
    bundled = json.loads((REPOSITORY / "hub_configs/labels" / f"{name}.json").read_text())
    original = json.loads(shared(f"labels/{name}.json").read_text())
    assert bundled == [entry["name"] for entry in original]
