"""To the Hub and back: a real HTTP round trip through a local server, errors, atomic pushes."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import _http
from transformers import Trainer, TrainingArguments, pipeline

from feature_extraction import ASTFeatureExtractor
from modeling_ast import (
    ASTConfig,
    ASTForAudioClassification,
    ASTForAudioFrameClassification,
    ASTFrameConfig,
    convert_checkpoint,
)
from scripts.common.bundled import hub_configs_folder
from scripts.inference.run import model_version
from scripts.publishing.repository import push, write_repository
from scripts.push_to_hub import main

from .conftest import GOLDEN, REPOSITORY, TINY_MODEL
from .hub_server import HubServer
from .strangers import Strangers

TOKEN = "hf_averysecrettoken"
LABELS = ["dog", "rooster", "rain", "clock_tick", "sneezing"]
MODEL_CODE = {
    *("configuration_ast.py", "modeling_ast.py", "patch_grid_ast.py", "pretrained_ast.py"),
    *("loss_ast.py", "patchout_ast.py", "token_merging_ast.py"),
    *("naming_ast.py", "versions_ast.py", "weights_ast.py"),
    "pooling_ast.py",
}
FEATURE_CODE = {"feature_extraction_ast.py", "fbank_ast.py", "audio_ast.py", "levels_ast.py"}
COMPLETE = MODEL_CODE | FEATURE_CODE | {"config.json", "preprocessor_config.json"}
COMPLETE |= {"model.safetensors", "README.md"}


@pytest.fixture(scope="module")
def run_folder(native_folder, tmp_path_factory) -> Path:
    """What a training command writes."""
    folder = tmp_path_factory.mktemp("my_sounds")
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}
    model = ASTForAudioClassification.from_pretrained(native_folder, **names)
    model.save_pretrained(folder / "checkpoint")
    ASTFeatureExtractor(num_mel_bins=64, max_length=128).save_pretrained(folder / "checkpoint")
    (folder / "arguments.yaml").write_text("dataset: sounds\nmodel: scratch\nseed: 0\n")
    record = {"epoch": 3, "evaluation_accuracy": 0.75, "evaluation_clips": 40, "seconds": 90.0}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "learning_curve.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "checkpoint" / "optimizer.bin").write_bytes(b"not for the Hub")
    return folder


@pytest.fixture(scope="module")
def server():
    with HubServer({TOKEN: "someone"}) as server:
        yield server


@pytest.fixture
def hub(server, monkeypatch):
    """Our own Hub, empty, which this process is logged in to."""
    for content in (server.repositories, server.storage, server.requests, server.failures):
        content.clear()
    address = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # knows another address
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


@pytest.fixture(scope="module")
def strangers(server):
    """Runs scripts against the server, without a token."""
    with Strangers(server.environment(None)) as strangers:
        yield strangers


def run_by_stranger(strangers, script: str, folder: Path, with_package: bool) -> list[str]:
    """The lines printed in a folder with a sound."""
    folder.mkdir()
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    soundfile.write(folder / "sound.wav", tone, 16000, subtype="FLOAT")
    return strangers.run(script, folder, with_package)


def examples(hub: HubServer, repo: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", hub.files(repo)["README.md"].decode(), re.DOTALL)


def test_a_stranger_loads_it_in_three_ways(hub, strangers, run_folder, tmp_path):
    """The card's own examples, each in a process with nothing in its cache and no token."""
    address = push(run_folder, "someone/my-sounds")
    commit = hub.repositories["someone/my-sounds"].refs["main"]
    assert address == f"{hub.url}/someone/my-sounds/commit/{commit}"
    files = hub.files("someone/my-sounds")
    assert set(files) == COMPLETE | {"learning_curve.png", ".gitattributes"}
    assert not any(TOKEN.encode() in content for content in files.values())
    weights = run_folder / "checkpoint" / "model.safetensors"
    assert files["model.safetensors"] == weights.read_bytes()
    # A second commit, so that a revision makes a difference.
    model = ASTForAudioClassification.from_pretrained(run_folder / "checkpoint")
    with torch.no_grad():
        model.classifier.dense.bias[2] += 100
    model.push_to_hub("someone/my-sounds")
    push(run_folder, "someone/with-pipeline", with_pipeline=True)
    plain, remote, packaged = examples(hub, "someone/my-sounds")
    for block in (plain, remote, packaged):
        assert len([line for line in block.splitlines() if line]) <= 10

    hub.requests.clear()
    script = plain + (
        "assert type(model).__module__.startswith('transformers.models.'), type(model)\n"
        "model = AutoModelForAudioClassification.from_pretrained('someone/my-sounds')\n"
    )
    assert (
        run_by_stranger(strangers, script, tmp_path / "plain", with_package=False)[0] == "rain 1.0"
    )
    downloads = [path for method, path, _ in hub.requests if method == "GET" and "storage" in path]
    assert len(downloads) == 1  # the second load takes the cache, by its ETag

    script = (
        remote.replace('"main"', f'"{commit}"')
        + f"""
assert type(model).__module__.startswith("transformers_modules."), type(model)
extractor.save_pretrained("again")
model.save_pretrained("again")
import os
print(sorted(os.listdir("again")))
from transformers import pipeline
name = "someone/with-pipeline"
try:
    pipeline("audio-classification", model=name)
    raise AssertionError("code of a stranger was run unasked")
except ValueError as error:
    assert "trust_remote_code" in str(error)
classifier = pipeline("audio-classification", model=name, trust_remote_code=True)
assert type(classifier).__name__ == "ASTAudioClassificationPipeline", type(classifier)
print(classifier("sound.wav", return_timestamps=True)["labels"][0]["label"])
classifier.model.save_pretrained("with_pipeline")
print("pipeline_ast.py" in os.listdir("with_pipeline"))
from transformers import AutoModelForAudioClassification
model = AutoModelForAudioClassification.from_pretrained({"someone/my-sounds"!r}, **remote)
"""
    )
    answer, again, *others = run_by_stranger(
        strangers, script, tmp_path / "remote", with_package=False
    )
    expected = pipeline("audio-classification", model=str(run_folder / "checkpoint"))(
        str(tmp_path / "plain" / "sound.wav")
    )[0]
    assert answer.split()[0] == expected["label"] != "rain"
    assert float(answer.split()[1]) == pytest.approx(expected["score"], abs=1e-5)
    assert set(eval(again)) == COMPLETE - {"README.md"}
    assert others == [expected["label"], "True"]

    lines = run_by_stranger(strangers, packaged, tmp_path / "packaged", with_package=True)
    assert lines[0].split()[0] == "rain"
    assert len(lines) == 3


def test_a_descendant_is_computed_by_our_code_or_not_at_all(hub, strangers, tmp_path):
    """Plain transformers refuses; with remote code or the package, it is the same."""
    converted = convert_checkpoint(GOLDEN / "families" / "ced.pth", num_attention_heads=3)
    folder = tmp_path / "checkpoint"
    converted.model.save_pretrained(folder)
    converted.feature_extractor.save_pretrained(folder)
    push(folder, "someone/ced")
    files = hub.files("someone/ced")
    assert set(files) == COMPLETE | {".gitattributes"}
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert len(examples(hub, "someone/ced")) == 2  # none for plain transformers

    without_code = json.loads((folder / "config.json").read_text())
    del without_code["auto_map"]
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps(without_code))
    refusals = f"""
from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForAudioClassification, pipeline
for load in (
    lambda: AutoModelForAudioClassification.from_pretrained("someone/ced", trust_remote_code=False),
    lambda: AutoFeatureExtractor.from_pretrained("someone/ced", trust_remote_code=False),
    lambda: pipeline("audio-classification", "someone/ced", trust_remote_code=False),
    lambda: AutoConfig.from_pretrained({str(tmp_path / "bare")!r}),
):
    try:
        load()
        print("loaded")
    except ValueError as error:
        text = str(error)
        print("trust_remote_code" in text, "`ast-family`" in text)
"""
    waveform = (0.3 * np.sin(0.1 * np.arange(20000))).astype(np.float32)
    inputs = converted.feature_extractor(waveform, 16000, return_tensors="pt")
    with torch.no_grad():
        expected = converted.model(**inputs).logits[0].tolist()
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    for module, options, start in (
        ("transformers_modules", {"trust_remote_code": True}, refusals),
        ("modeling_ast", {}, "import modeling_ast"),
    ):
        script = f"""
{start}
import numpy, torch
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification
torch.set_num_threads(1)
extractor = AutoFeatureExtractor.from_pretrained("someone/ced", **{options})
model = AutoModelForAudioClassification.from_pretrained("someone/ced", **{options}).eval()
waveform = (0.3 * numpy.sin(0.1 * numpy.arange(20000))).astype(numpy.float32)
inputs = extractor(waveform, 16000, return_tensors="pt")
with torch.no_grad():
    print(model(**inputs).logits[0].tolist())
print(type(model).__module__.partition(".")[0])
model.save_pretrained("again")
import hashlib, pathlib
print(hashlib.sha256(pathlib.Path("again/model.safetensors").read_bytes()).hexdigest())
"""
        lines = run_by_stranger(strangers, script, tmp_path / module, with_package=not options)
        if start == refusals:
            assert lines[:4] == ["True False"] * 3 + ["False True"]
            lines = lines[4:]
        assert eval(lines[0]) == pytest.approx(expected, abs=1e-6)
        assert lines[1:] == [module, weights]


def test_a_detector_travels(hub, strangers, tmp_path):
    """Its card's own examples: with the code in the repository, and with the package."""
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}
    config = ASTFrameConfig(**{**TINY_MODEL, "num_labels": len(LABELS)}, **names)
    model = ASTForAudioFrameClassification(config).eval()
    with torch.no_grad():
        model.frame_classifier.dense.bias[:] = torch.tensor(
            [-3.0, 3.0] + [-3.0] * (len(LABELS) - 2)
        )
    model.save_pretrained(tmp_path / "checkpoint")
    extractor = ASTFeatureExtractor(num_mel_bins=64, max_length=128)
    extractor.save_pretrained(tmp_path / "checkpoint")
    push(tmp_path / "checkpoint", "someone/detector")
    files = hub.files("someone/detector")
    weights = tmp_path / "checkpoint" / "model.safetensors"
    assert files["model.safetensors"] == weights.read_bytes()
    card = files["README.md"].decode()
    assert f"gives each of {len(LABELS)} kinds of sound a score every 0.1 s" in card
    assert "rejects the model type `ast-frame-classification`." in card

    remote, packaged = examples(hub, "someone/detector")  # none for plain transformers
    script = remote + "print(type(model).__module__.partition('.')[0], type(model).__name__)"
    answer, kind = run_by_stranger(strangers, script, tmp_path / "remote", with_package=False)
    assert answer == f"torch.Size([12, {len(LABELS)}]) {LABELS[1]}"
    assert kind == "transformers_modules ASTForAudioFrameClassification"
    (event,) = run_by_stranger(strangers, packaged, tmp_path / "packaged", with_package=True)
    start, end, label, score = event.split()
    assert (float(start), float(end), label) == (0.0, 1.0, LABELS[1])
    assert float(score) > 0.9


@pytest.mark.slow
def test_the_command_prints_the_commit_and_never_the_token(hub, run_folder):
    environment = {**os.environ, **hub.environment(TOKEN), "HF_DEBUG": "1"}
    environment["TRANSFORMERS_VERBOSITY"] = "debug"
    command = [sys.executable, "-m", "scripts.push_to_hub", str(run_folder), "someone/commanded"]
    pushed = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert pushed.returncode == 0, pushed.stderr
    commit = hub.repositories["someone/commanded"].refs["main"]
    assert pushed.stdout == f"Pushed {hub.url}/someone/commanded/commit/{commit}\n"
    assert "/api/repos/create" in pushed.stderr  # requests are logged
    assert TOKEN not in pushed.stderr


def test_parts_are_pushed_complete(hub, run_folder):
    checkpoint = run_folder / "checkpoint"
    ASTForAudioClassification.from_pretrained(checkpoint).push_to_hub("someone/parts")
    ASTFeatureExtractor.from_pretrained(checkpoint).push_to_hub("someone/parts")
    assert set(hub.files("someone/parts")) >= COMPLETE
    before = hub.files("someone/parts")["config.json"]
    ASTConfig.from_pretrained(checkpoint).push_to_hub("someone/config", private=True)
    assert set(hub.files("someone/config")) >= {
        "configuration_ast.py",
        "patch_grid_ast.py",
        "weights_ast.py",
    }
    assert hub.repositories["someone/config"].private
    assert hub.files("someone/parts")["config.json"] == before


def test_trainer_pushes_complete(hub, run_folder, tmp_path):
    checkpoint = run_folder / "checkpoint"
    trainer = Trainer(
        ASTForAudioClassification.from_pretrained(checkpoint),
        TrainingArguments(tmp_path / "run", hub_model_id="someone/trained", report_to="none"),
        processing_class=ASTFeatureExtractor.from_pretrained(checkpoint),
    )
    trainer.push_to_hub()
    assert set(hub.files("someone/trained")) >= COMPLETE
    assert not any(TOKEN.encode() in content for content in hub.files("someone/trained").values())


@pytest.mark.parametrize("broken", ["PUT /storage", "POST .*/preupload/", "POST .*/commit/"])
def test_a_push_that_breaks_changes_nothing_and_can_be_repeated(hub, run_folder, broken, capsys):
    push(run_folder, "someone/broken")
    before = hub.files("someone/broken")
    model = ASTForAudioClassification.from_pretrained(run_folder / "checkpoint")
    with torch.no_grad():
        model.classifier.dense.bias += len(broken)
    changed = run_folder.parent / f"changed{len(broken)}"
    model.save_pretrained(changed)
    ASTFeatureExtractor.from_pretrained(run_folder / "checkpoint").save_pretrained(changed)
    for status in (503, 0):  # an answer that says so, and none at all
        hub.failures = [(broken, status)]
        assert pushing_fails([str(changed), "someone/broken"], capsys).endswith(
            "Nothing was committed; run the same command again."
        )
        assert hub.files("someone/broken") == before
    hub.failures = []
    push(changed, "someone/broken")
    weights = (changed / "model.safetensors").read_bytes()
    assert hub.files("someone/broken")["model.safetensors"] == weights


@pytest.mark.parametrize("broken", ["PUT /storage", "POST .*/commit/"])
def test_a_first_push_that_breaks_leaves_no_empty_repository(hub, run_folder, broken, capsys):
    hub.failures = [(broken, 503)]
    line = pushing_fails([str(run_folder), "someone/first"], capsys)
    assert line.endswith("Nothing was committed; run the same command again.")
    assert hub.repositories == {}
    hub.failures += [("DELETE /api/repos", 503)]
    line = pushing_fails([str(run_folder), "someone/first"], capsys)
    assert line.endswith("An empty someone/first was created and could not be deleted again.")
    hub.failures = []
    push(run_folder, "someone/first")
    assert set(hub.files("someone/first")) >= COMPLETE


def pushing_fails(arguments: list[str], capsys) -> str:
    """The command's last line."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert TOKEN not in captured.out + captured.err
    (line,) = [line for line in captured.err.splitlines() if line.startswith("ast-push-to-hub")]
    return line.removeprefix("ast-push-to-hub: error: ")


def test_what_is_wrong_is_said_in_one_line(hub, run_folder, capsys, monkeypatch, tmp_path):
    for name in ("a/b/c", "someone/my sounds", "someone/a--b", "../up", "someone/x.git"):
        line = pushing_fails([str(run_folder), name], capsys)
        assert f"'{name}' is not a repository name; expected NAMESPACE/NAME" in line
    line = pushing_fails([str(run_folder), "other/x"], capsys)
    assert line.startswith("The token cannot write to other/x")
    hub.failures = [("POST /api/repos/create", 500)]
    line = pushing_fails([str(run_folder), "someone/x"], capsys)
    assert line.startswith("The Hub answered 500 to /api/repos/create. Nothing was committed")
    hub.failures = []
    push(run_folder, "someone/public")
    line = pushing_fails([str(run_folder), "someone/public", "--private"], capsys)
    assert line.startswith("someone/public exists and is public; --private does not change that")

    for bad in ("hf_wrong", "hf_wrong\u00fc"):
        monkeypatch.setenv("HF_TOKEN", bad)
        line = pushing_fails([str(run_folder), "someone/x"], capsys)
        assert bad not in line
        assert "token" in line
    monkeypatch.setenv("HF_TOKEN", "")
    for name in ("someone/x", "x"):
        line = pushing_fails([str(run_folder), name], capsys)
        assert line.startswith("No token: run `hf auth login`, or set HF_TOKEN.")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    line = pushing_fails([str(run_folder), "someone/x"], capsys)
    assert line.startswith("The Hub cannot be reached: ConnectError")
    assert pushing_fails([str(tmp_path), "someone/x"], capsys).startswith(
        f"{tmp_path} is not a complete checkpoint: no config.json (the model's shape"
    )


def test_a_name_alone_goes_to_the_own_namespace_and_private_stays_private(hub, run_folder):
    address = push(run_folder, "mine", private=True)
    assert address.startswith(f"{hub.url}/someone/mine/commit/")
    assert hub.repositories["someone/mine"].private


def test_a_token_in_a_file_is_not_published(hub, run_folder, capsys, tmp_path):
    checkpoint = run_folder / "checkpoint"
    model = ASTForAudioClassification.from_pretrained(checkpoint)
    model.config.dataset = f"https://someone:{TOKEN}@example.org"
    model.save_pretrained(tmp_path)
    ASTFeatureExtractor.from_pretrained(checkpoint).save_pretrained(tmp_path)
    line = pushing_fails([str(tmp_path), "someone/leak"], capsys)
    assert line == "config.json contains your token. Remove it: it would become public."
    assert hub.repositories == {}


def test_dry_run_sends_nothing(hub, run_folder, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SystemExit) as exit_:
        main([str(run_folder), "someone/my-sounds", "--dry-run", "--with-pipeline"])
    assert exit_.value.code == 0
    *files, ending = capsys.readouterr().out.splitlines()
    assert ending == "Would upload to someone/my-sounds; nothing was sent."
    assert {line.split()[1] for line in files} == COMPLETE | {
        "learning_curve.png",
        "pipeline_ast.py",
        "scores_ast.py",
        "frames_ast.py",
        "windows_ast.py",
    }
    assert hub.requests == []


def test_half_a_checkpoint_is_refused(run_folder, tmp_path):
    encoder = ASTForAudioClassification.from_pretrained(run_folder / "checkpoint")
    encoder.audio_spectrogram_transformer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint: no preprocessor_config\.json"):
        write_repository(tmp_path, tmp_path / "out", "someone/x")
    ASTFeatureExtractor(num_mel_bins=64, max_length=128).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"incomplete: classifier\..* are missing"):
        write_repository(tmp_path, tmp_path / "out", "someone/x")


def test_a_card_of_ones_own_stays(run_folder, tmp_path):
    checkpoint = run_folder / "checkpoint"
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    write_repository(run_folder, tmp_path / "first", "someone/x")
    text = (tmp_path / "first" / "README.md").read_text()
    (tmp_path / "README.md").write_text(
        text.replace("<!--", "Mine. <!-- not")[: text.index("<!--")]
    )
    write_repository(tmp_path, tmp_path / "second", "someone/x")
    assert (tmp_path / "second" / "README.md").read_text() == (tmp_path / "README.md").read_text()


def test_a_card_without_its_run_is_never_made_poorer(tmp_path):
    """The bundled checkpoint's card was written from a run that is not included."""
    bundled = hub_configs_folder() / "ast-tiny-esc10"
    files = write_repository(bundled, tmp_path, "someone/ten-sounds")
    text = (bundled / "README.md").read_text()
    assert (tmp_path / "README.md").read_text() == text.replace(
        '"ast-tiny-esc10"', '"someone/ten-sounds"'
    )
    assert "| dog" in text
    for picture in bundled.glob("*.png"):
        assert picture.relative_to(bundled) in files


@pytest.mark.parametrize("name", ["ast-tiny-audioset", "ast-tiny-esc10"])
def test_every_snippet_of_a_bundled_card_runs(strangers, tmp_path, name):
    bundled = hub_configs_folder() / name
    snippets = re.findall(r"```python\n(.*?)```", (bundled / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 2
    for number, snippet in enumerate(snippets):  # the first in plain transformers
        script, folder = snippet.replace(f'"{name}"', repr(str(bundled))), tmp_path / str(number)
        run_by_stranger(strangers, script, folder, with_package=bool(number))


def test_results_are_of_one_commit(hub, run_folder, tmp_path, monkeypatch):
    """A model replaced on the Hub is another one, with or without a network later."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    push(run_folder, "someone/replaced")
    refs = hub.repositories["someone/replaced"].refs
    before = model_version("someone/replaced")
    assert before == refs["main"]
    HfApi().upload_file(path_or_fileobj=b"new", path_in_repo="note", repo_id="someone/replaced")
    after = model_version("someone/replaced")
    assert after == refs["main"] != before
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_version("someone/replaced") == after
