"""Every code block of README and docs is executed, the notebook too; the site is built strictly.

A page's blocks run in order, in a folder that holds what the pages speak of: recordings, a dataset, a
finished run. A tiny model stands in for those on the Hub, and options after the page's own make
training short. What is not ours to run (`hf`, Slurm) is checked by bash for its syntax.
"""

import configparser
import importlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import ViTConfig, ViTModel

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTConfig, ASTForAudioClassification

from .conftest import REPOSITORY, TINY_MODEL, tiny_model
from .sounds import tone, write_parquet

FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
NOTEBOOKS = sorted((REPOSITORY / "docs").rglob("*.ipynb"))
HUB_MODEL = "MIT/ast-finetuned-audioset-10-10-0.4593"
RUN = "runs/my_sounds/checkpoint"
STAND_INS = {
    HUB_MODEL: "tiny",
    "path/to/deit_tiny": "vit",
    "CHECKPOINT": RUN,
    "/data/recordings": "recordings",
    "/data/results": "results",
}
TINY_INPUT = "--max_length 128 --num_mel_bins 64 --num_workers 0"
SHORT = f"--num_epochs 1 {TINY_INPUT} --time_patchout 0 --overwrite true"
# Given after a page's own options.
SHORTER = {
    "ast-finetune": SHORT,
    "ast-finetune-accelerate": SHORT,
    "ast-benchmark": f"--plain_epochs 1 --ours='--num_epochs 1 {TINY_INPUT} --time_patchout 0'",
    "ast-push-to-hub": "--dry-run",
}
# Of full size, as only the Hub has it; tests/test_hub_configs.py converts one.
REFUSED = {"--variant": "is not ast-audioset-10-10-0.4593: its hidden_size is 64"}
NOT_OURS = ("hf", "optimum-cli")


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, code) of a page's fenced blocks."""
    return [
        (language.strip(), "\n".join(line.removeprefix(indent) for line in code.splitlines()))
        for indent, language, code in FENCE.findall(page.read_text(encoding="utf-8"))
    ]


def with_stand_ins(code: str) -> str:
    for name, stand_in in STAND_INS.items():
        code = code.replace(name, stand_in)
    return code


@pytest.fixture(scope="module")
def commands() -> dict[str, str]:
    """Console command -> module:function."""
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    lines = config["options.entry_points"]["console_scripts"].strip().splitlines()
    pairs = (line.replace("ast_scripts", "scripts").split("=") for line in lines)
    return {name.strip(): target.strip() for name, target in pairs}


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """What the pages speak of."""
    folder = tmp_path_factory.mktemp("docs")
    recording = tone(1000.0, seed=0, seconds=2)
    soundfile.write(folder / "recording.mp3", recording, 16000)
    soundfile.write(folder / "recording.wav", recording, 16000)
    soundfile.write(folder / "an_hour.flac", np.tile(recording, 3), 16000)
    for number, name in enumerate(("recordings/a.wav", "recordings/b.ogg")):
        (folder / name).parent.mkdir(exist_ok=True)
        soundfile.write(folder / name, tone(1000.0, seed=number, seconds=2), 16000)
    for name, pitch in {"crane": 3000.0, "heron": 300.0}.items():
        for number in range(1, 6):
            path = folder / "my_sounds" / name / f"{number:03d}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, tone(pitch, seed=number), 16000)
    for fold in range(1, 6):
        write_parquet(folder / "esc10" / f"fold{fold}.parquet", 2, seed=fold, fold=fold)

    torch.manual_seed(0)
    extractor = ASTFeatureExtractor(num_mel_bins=64, max_length=128)
    tiny_model().save_pretrained(folder / "tiny")
    extractor.save_pretrained(folder / "tiny")
    for run, names in ((RUN, ("crane", "heron")), ("esc10", ("high", "low", "mid"))):
        if run == "esc10":
            continue
        for name in (run, "runs/fold1/checkpoint", "runs/fold2/checkpoint"):
            labels = {"id2label": dict(enumerate(names)), "num_labels": len(names)}
            tiny_model(**labels).save_pretrained(folder / name)
            extractor.save_pretrained(folder / name)
    ViTModel(
        ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64,
                  image_size=32)
    ).save_pretrained(folder / "vit")  # fmt: skip
    original = {**TINY_MODEL, "hidden_size": 64, "num_attention_heads": 1, "num_labels": 3}
    for name, length, mel_bins in (
        ("my_ast.pth", 200, 64),
        ("audioset_10_10_0.4593.pth", 1024, 128),
    ):
        config = ASTConfig(**{**original, "max_length": length, "num_mel_bins": mel_bins})
        state = ASTForAudioClassification(config).to_original_state_dict()
        torch.save(state, folder / name)
    (folder / "names.json").write_text(json.dumps(["bird", "wind", "speech"]))
    (folder / "hub_configs").symlink_to(REPOSITORY / "hub_configs")
    return folder


@pytest.fixture
def place(template, tmp_path, monkeypatch) -> Path:
    shutil.copytree(template, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(tmp_path / "place")
    gradio = pytest.importorskip("gradio")
    monkeypatch.setattr(gradio.Blocks, "launch", lambda *_, **__: None)  # else it never ends
    return tmp_path / "place"


class Shell:
    """Runs the lines of a block in this process."""

    def __init__(self, commands: dict[str, str], capture) -> None:
        self.commands = commands
        self.capture = capture

    def run(self, code: str) -> None:
        checked = subprocess.run(["bash", "-n"], input=code, text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr
        for line in with_stand_ins(code).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"\w+=", words[0]):  # variables of the environment
                words.pop(0)
            if words:
                self.run_words(words)

    def run_words(self, words: list[str]) -> None:
        first = words[0]
        if first in self.commands:
            self.run_command(first, words[1:])
        elif "-m" in words and words[words.index("-m") + 1].startswith("ast_scripts."):
            at = words.index("-m") + 1  # torchrun, accelerate launch, srun torchrun
            module = words[at].replace("ast_scripts", "scripts")
            (command,) = (k for k, v in self.commands.items() if v.split(":")[0] == module)
            self.run_command(command, words[at + 1 :])
        elif first == "make":
            for target in words[1:]:
                assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(), re.M)
        elif words[:2] == ["pip", "install"]:
            config = (REPOSITORY / "setup.cfg").read_text()
            for extra in re.findall(r"^\.\[(.*)\]$", words[2]):
                assert re.search(rf"^{extra} =$", config, re.M), f"no extra {extra}"
        else:
            assert first in NOT_OURS, f"do not know how to run {' '.join(words)}"

    def run_command(self, name: str, arguments: list[str]) -> None:
        arguments = [*arguments, *shlex.split(SHORTER.get(name, ""))]
        if name.startswith("ast-finetune") and "--model" not in arguments:
            arguments += ["--model", "tiny"]
        module, function = self.commands[name].split(":")
        main = getattr(importlib.import_module(module), function)
        before = signal.getsignal(signal.SIGTERM)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [name, *arguments])
            try:
                main()
                status = 0
            except SystemExit as ending:
                status = ending.code or 0
            finally:
                signal.signal(signal.SIGTERM, before)
        error = self.capture.readouterr().err
        for word, message in REFUSED.items():
            if word in arguments:
                assert status == 2, error
                assert message in error
                return
        assert status == 0, f"{name} {' '.join(arguments)}: {error}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_code_of_a_page_runs(page, place, commands, capsys):
    shell = Shell(commands, capsys)
    names: dict[str, object] = {}
    for language, code in blocks(page):
        if language == "python":
            code = with_stand_ins(code).replace("someone/my-sounds", RUN)
            exec(compile(code, str(page), "exec"), names)
        elif language in ("sh", "bash"):
            shell.run(code)
        else:
            assert language == "text", f"{page}: a block in {language!r}, which nothing runs:\n{code}"
