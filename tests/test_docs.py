"""Every code block of README and docs is executed, the notebook too; the site is built strictly.

A page's blocks run in order, in a folder that holds what the pages speak of: recordings, a dataset,
a finished run. A tiny model stands in for those on the Hub, and options after the page's own make
training short. What is not ours to run (`hf`, Slurm) is checked by bash for its syntax.
"""

import ast
import configparser
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import ViTConfig, ViTModel

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTConfig, ASTForAudioClassification

from .conftest import GOLDEN, REPOSITORY, TINY_MODEL, tiny_model
from .sounds import PITCHES, tone, write_parquet

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
    "/data/results": "results_of_many",
    # Golden files stand in for the authors': their heads cannot be read from a width of 24.
    **{
        f"ast-convert {file}": f"ast-convert {file} --num_attention_heads 3"
        for file in ("audiotransformer_tiny_mAP_4814.pt", "my_passt.pt", "finetuned_ssast.pth")
    },
    '("audiotransformer_tiny_mAP_4814.pt")': '("audiotransformer_tiny_mAP_4814.pt", '
    "num_attention_heads=3)",
}
TINY_INPUT = "--max_length 128 --num_mel_bins 64 --num_workers 0"
SHORT = f"--num_epochs 1 {TINY_INPUT} --time_patchout 0 --overwrite true"
# Given after a page's own options.
SHORTER = {
    "ast-finetune": SHORT,
    "ast-finetune-accelerate": SHORT,
    "ast-benchmark": f"--plain_epochs 1 --ours='--num_epochs 1 {TINY_INPUT} --time_patchout 0'",
    "ast-dataset-stats": "--num_workers 0",
    "scripts.mix_clips": "--mixtures_per_fold 2",
    "ast-export-onnx": "--variants int8",
    "ast-push-to-hub": "--dry_run",
}
# Of full size, as only the Hub has it; tests/test_hub_configs.py converts one.
REFUSED = {
    "audioset_10_10_0.4593.pth": "is not ast-audioset-10-10-0.4593: its num_hidden_layers is 1",
    "passt-s-kd-ap.486.pt": "looks like PaSST. Its position table has 8 rows",
    "--model ced-tiny": "The weights of ced-tiny could not be fetched",  # there is no network
}
NOT_OURS = ("hf", "jupyter", "optimum-cli")


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
    """What the pages refer to."""
    folder = tmp_path_factory.mktemp("docs")
    recording = tone(1000.0, seed=0, seconds=2)
    soundfile.write(folder / "recording.mp3", recording, 16000)
    soundfile.write(folder / "recording.wav", recording, 16000)
    soundfile.write(folder / "an_hour.flac", np.tile(recording, 3), 16000)
    marks = ["file,start,end,label"]
    for number, name in enumerate(("a.wav", "b.ogg", "c.wav", "d.wav", "e.wav", "f.wav")):
        label, pitch = (("crane", 3000.0), ("heron", 300.0))[number % 2]
        marks.append(f"{name},0,2,{label}")
        for place in ("recordings", "more_recordings"):
            (folder / place).mkdir(exist_ok=True)
            soundfile.write(folder / place / name, tone(pitch, seed=number, seconds=2), 16000)
    columns = "Selection\tBegin Time (s)\tEnd Time (s)\tLabel"
    for line in marks[1:]:
        name, start, end, label = line.split(",")
        table = folder / "raven" / f"{name}.Table.1.selections.txt"
        table.parent.mkdir(exist_ok=True)
        table.write_text(f"{columns}\n1\t{start}\t{end}\t{label}\n")
    shutil.copytree(folder / "recordings", folder / "new")
    (folder / "marks.csv").write_text("\n".join(marks))
    soundfile.write(folder / "call.wav", tone(3000.0, seed=9, seconds=5), 16000)
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
    birds, pitches = ("crane", "heron"), tuple(PITCHES)
    for run, names in {
        "my_sounds": birds,
        "fold1": birds,
        "fold2": birds,
        "esc10": pitches,
    }.items():
        labels = {"id2label": dict(enumerate(names)), "num_labels": len(names)}
        labels["label2id"] = {name: index for index, name in enumerate(names)}
        tiny_model(**labels).save_pretrained(folder / "runs" / run / "checkpoint")
        extractor.save_pretrained(folder / "runs" / run / "checkpoint")
    ViTModel(
        ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64,
                  image_size=32)
    ).save_pretrained(folder / "vit")  # fmt: skip
    original = {**TINY_MODEL, "num_hidden_layers": 1}
    for name, width, length, mel_bins, labels in (
        ("my_ast.pth", 192, 200, 64, 3),
        ("audioset_10_10_0.4593.pth", 768, 1024, 128, 527),
    ):
        shape = {"max_length": length, "num_mel_bins": mel_bins, "num_labels": labels}
        shape |= {"hidden_size": width, "num_attention_heads": width // 64}
        config = ASTConfig(**{**original, **shape})
        state = ASTForAudioClassification(config).to_original_state_dict()
        torch.save(state, folder / name)
    for family, file in {
        "ced": "audiotransformer_tiny_mAP_4814.pt",
        "passt_s10": "my_passt.pt",
        "passt_s16_t12": "passt-s-kd-ap.486.pt",
        "ssast_patch": "finetuned_ssast.pth",
    }.items():
        shutil.copy(GOLDEN / "families" / f"{family}.pth", folder / file)
    (folder / "my_labels.json").write_text(json.dumps([f"label {n}" for n in range(7)]))
    (folder / "names.json").write_text(json.dumps(["bird", "wind", "speech"]))
    (folder / "hub_configs").symlink_to(REPOSITORY / "hub_configs")
    return folder


@pytest.fixture
def place(template, tmp_path, monkeypatch) -> Path:
    shutil.copytree(template, tmp_path / "place", symlinks=True, copy_function=os.link)
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
                words = [] if "$(" in words[0] else words[1:]
            if words:
                self.run_words(words)

    def run_words(self, words: list[str]) -> None:
        first = words[0]
        if first in self.commands:
            self.run_command(first, words[1:])
        elif "-m" in words and words[words.index("-m") + 1].startswith("ast_scripts."):
            at = words.index("-m") + 1  # torchrun, accelerate launch, srun torchrun
            module = words[at].replace("ast_scripts", "scripts")
            named = {v.split(":")[0]: k for k, v in self.commands.items()}
            self.run_command(named.get(module, module), words[at + 1 :])
        elif first == "make":
            for target in (word for word in words[1:] if "=" not in word):
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
        # A module that is no console command, such as mix_clips, is its own name.
        module, function = self.commands.get(name, f"{name}:main").split(":")
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
            if word in " ".join(arguments):
                assert status == 2, error
                assert message in error
                return
        assert status == 0, f"{name} {' '.join(arguments)}: {error}"


def _parameter(page: Path):
    # An ONNX export takes longer than all other pages together.
    marks = pytest.mark.slow if page.name == "deployment.md" else ()
    return pytest.param(page, id=str(page.relative_to(REPOSITORY)), marks=marks)


@pytest.mark.parametrize("page", map(_parameter, PAGES))
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
            assert language == "text", (
                f"{page}: a block in {language!r}, which nothing runs:\n{code}"
            )


@pytest.mark.parametrize(
    "script", sorted((REPOSITORY / "docs").glob("make_*.py")), ids=lambda p: p.stem
)
def test_what_makes_a_page_finds_what_it_imports(script):
    assert callable(importlib.import_module(f"docs.{script.stem}").main)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_blocks_say_their_language(page):
    """Without one, the slow test of a page has nothing to run."""
    assert {language for language, _ in blocks(page)} <= {"python", "sh", "bash", "text"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_finds_what_it_imports(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for found in ast.walk(ast.parse(code)):
        if isinstance(found, ast.ImportFrom) and found.module is not None:
            module = importlib.import_module(found.module)
            assert all(hasattr(module, name.name) for name in found.names), found.module


def test_readmes_tree_has_every_module_and_room():
    tree = (REPOSITORY / "README.md").read_text(encoding="utf-8").split("## What is where")[1]
    libraries = [REPOSITORY / "modeling_ast", REPOSITORY / "feature_extraction"]
    names = [path.name for folder in libraries for path in folder.glob("*_ast.py")]
    rooms = [path.parent.name + "/" for path in (REPOSITORY / "scripts").glob("*/__init__.py")]
    named = set(re.findall(r"[\w*-]+(?:\.py|/)", tree))
    missing = {*names, *rooms} - named
    assert not missing
    assert {name for name in named if name.endswith("_ast.py")} == set(names)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs_within_two_minutes(path, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MPLBACKEND")  # conftest's draws nothing
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    stored = nbformat.read(path, as_version=4)
    fresh = nbformat.read(path, as_version=4)
    began = time.monotonic()
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(fresh, timeout=120, kernel_name="python3", resources=where).execute()
    assert time.monotonic() - began < 120
    for old, new in zip(stored.cells, fresh.cells, strict=True):
        # What the site shows is what the code gives: the same lines, the same number of pictures.
        assert _shown(old) == _shown(new), old.source


def _shown(cell) -> tuple[str, int]:
    """A cell's printed text, without the numbers, which differ between machines; its pictures."""
    outputs = cell.get("outputs", ())
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    return re.sub(r"[\d.]+", "#", printed), sum("data" in output for output in outputs)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built strictly: warnings of links, anchors and docstrings are errors."""
    pytest.importorskip("mkdocstrings")
    build, config = (
        pytest.importorskip("mkdocs.commands.build"),
        pytest.importorskip("mkdocs.config"),
    )
    folder = tmp_path_factory.mktemp("site")
    settings = config.load_config(str(REPOSITORY / "mkdocs.yml"), strict=True, site_dir=str(folder))
    settings.plugins.on_startup(command="build", dirty=False)
    build.build(settings)
    return folder


def test_site_has_every_public_name_and_command(site, commands):
    for package in ("modeling_ast", "feature_extraction"):
        page = (site / "reference" / f"{package}.html").read_text(encoding="utf-8")
        for name in importlib.import_module(package).__all__:
            assert f'id="{package}.{name}"' in page, name
    for command in commands:
        page = (site / "reference" / f"{command}.html").read_text(encoding="utf-8")
        assert f"usage: {command}" in page
        assert "--help" in page


def test_site_asks_no_other_host(site):
    """Pictures, styles, scripts and fonts come with it; only a reader's click leads elsewhere."""
    for page in [*site.rglob("*.html"), *site.rglob("*.css"), *site.rglob("*.svg")]:
        text = page.read_text(encoding="utf-8")
        asked = re.findall(
            r"""(?:\bsrc=|<link[^>]*\bhref=|url\()["']?((?:https?:)?//[^"')>\s]+)""", text
        )
        assert not asked, (page, asked)
