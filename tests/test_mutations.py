"""Mutated configs, extractor settings and ONNX files: each works or is refused with one sentence.

AST_MUTATIONS=1000 tries that many of each kind instead of the default's few.
"""

import json
import os
import random
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor, pipeline

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTConfig, ASTForAudioClassification
from modeling_ast.onnx_ast import OnnxClassifier
from modeling_ast.weights_ast import check_json_files

NUMBER = int(os.environ.get("AST_MUTATIONS", "40"))
SOUND = np.random.default_rng(0).uniform(-0.5, 0.5, 4000).astype(np.float32)
VALUES = [
    *(None, True, False, "", "a", "48", "../../x", "\x1b[2J", "a" * 100_000),
    *(-1, 0, 1, 2, 3, 7, 10**6, 2**31, 2**63, 10**400, -(10**9)),
    *(0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), -float("inf")),
    *([], [1], ["a", None], [[[]]], {}, {"0": "a"}, {"a": 1}, {"0": {"0": {}}}, [1] * 1000),
]
# Names with a meaning in a base class of config or extractor.
OTHER_NAMES = sorted(
    {*dir(ASTConfig()), *dir(ASTFeatureExtractor())}
    | {
        "auto_map",
        "custom_pipelines",
        "dtype",
        "torch_dtype",
        "quantization_config",
        "architectures",
    }
    | {"transformers_version", "task_specific_params", "feature_extractor_type", "processor_class"}
)


def mutated(content: dict, generator: random.Random) -> str:
    """The JSON text of settings with something wrong."""
    content = json.loads(json.dumps(content))
    kind = generator.randrange(10)
    if kind == 0:
        return json.dumps(generator.choice([[content], [], 5, None, "a", {"config": content}]))
    if kind == 1:
        text = json.dumps(content)
        place = generator.randrange(len(text))
        return generator.choice([text[:place], text[:place] + "\ufffd" + text[place + 1 :], ""])
    for _ in range(generator.choice([1, 1, 1, 2, 3])):
        names = sorted(content) if generator.random() < 0.7 else OTHER_NAMES
        name = generator.choice(names) if names else "a"
        if generator.random() < 0.1:
            content.pop(name, None)
        else:
            content[name] = generator.choice(VALUES)
    return json.dumps(content)


def check(what: str, use, *arguments) -> None:
    """Works, or is refused like a user's mistake: with a short, printable sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            use(*arguments)
    except (ValueError, OSError) as error:
        message = str(error)
        message.encode()
        assert message.strip(), what
        assert "\x1b" not in message, what
        # transformers' pipeline reports every class that it tried, with tracebacks.
        assert len(message) < 3000 or message.startswith("Could not load model"), what
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def classify(folder: Path) -> None:
    check_json_files(folder)
    pipeline("audio-classification", model=str(folder), device="cpu")(SOUND)


def featurise(folder: Path) -> None:
    ASTFeatureExtractor.from_pretrained(folder)(SOUND, 16000, return_tensors="pt")
    check_json_files(folder)
    AutoFeatureExtractor.from_pretrained(folder)


def load_and_save(folder: Path) -> None:
    ASTConfig.from_pretrained(folder).to_json_string()
    model = ASTForAudioClassification.from_pretrained(folder, ignore_mismatched_sizes=True)
    model(torch.randn(1, 128, 64))


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_mutated_settings(native_folder, tmp_path, file):
    folder = tmp_path / "checkpoint"
    shutil.copytree(native_folder, folder)
    content = json.loads((folder / file).read_text())
    for seed in range(NUMBER):
        text = mutated(content, random.Random(f"{file} {seed}"))
        (folder / file).write_text(text)
        what = f"{file} {seed}: {text[:1000]}"
        if file == "config.json":
            check(what, load_and_save, folder)
        else:
            check(what, featurise, folder)
        check(what, classify, folder)


def test_mutated_onnx_files(tmp_path, tiny_onnx):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    original = tiny_onnx.read_bytes()
    proto = onnx.load_from_string(original)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    for seed in range(NUMBER // 2):
        generator = random.Random(seed)
        kind = generator.choice(["bytes", "config", "preprocessor_config", "config"])
        if kind == "bytes":
            content = bytearray(original)
            for _ in range(generator.choice([1, 10, 100])):
                content[generator.randrange(len(content))] = generator.randrange(256)
            path.write_bytes(content[: generator.choice([len(content), len(content) // 2])])
        else:
            text = mutated(json.loads(metadata[kind]), generator)
            onnx.helper.set_model_props(proto, {**metadata, kind: text})
            path.write_bytes(proto.SerializeToString())
        check(f"{kind} {seed}", lambda: OnnxClassifier(path)(SOUND))
