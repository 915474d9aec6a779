"""One resolver of checkpoint names: folders, bundled names, Hub names, online and offline."""

import os
import socket
import subprocess
import sys
import time

import pytest
from huggingface_hub import constants

from scripts.common.checkpoints import (
    DEFAULT_MODEL,
    bundled_checkpoints,
    checkpoint_folder,
    resolve_checkpoint,
)

from .conftest import REPOSITORY

OFFLINE = "Without a network, give a checkpoint's folder or a bundled one: "


def test_bundled_names_and_folders(tmp_path, monkeypatch):
    assert resolve_checkpoint(DEFAULT_MODEL) == str(bundled_checkpoints()[DEFAULT_MODEL])
    monkeypatch.chdir(tmp_path)
    (tmp_path / DEFAULT_MODEL).mkdir()
    assert resolve_checkpoint(DEFAULT_MODEL) == DEFAULT_MODEL  # the user's own comes first
    assert checkpoint_folder("somebody/model") == "somebody/model"


@pytest.mark.parametrize("name", ["./nothing", "/no/such", "~/x", "a/b/c", "nowhere/", ""])
def test_paths_are_no_hub_names(name):
    with pytest.raises(ValueError, match=rf"No such checkpoint folder: {name}.*{DEFAULT_MODEL}"):
        resolve_checkpoint(name)


def test_offline_a_line_says_what_works():
    with pytest.raises(ValueError, match="the Hub cannot be reached") as error:
        resolve_checkpoint("somebody/unknown")
    assert OFFLINE + DEFAULT_MODEL in str(error.value)


def test_what_was_downloaded_is_found_offline(tmp_path):
    folder = tmp_path / "models--somebody--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_text("{}")
    resolved = subprocess.run(
        [sys.executable, "-c", "from scripts.common.checkpoints import resolve_checkpoint as r\n"
         "print(r('somebody/model'))"],
        env={"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, cwd=REPOSITORY, check=False,
    )  # fmt: skip
    assert resolved.stdout.strip() == str(folder / "snapshots" / "abc"), resolved.stderr


def never(*_, **__):
    time.sleep(5)
    raise OSError


@pytest.mark.parametrize("endpoint", ["http://localhost:{port}", "http://silent.invalid"])
def test_no_answer_takes_two_seconds_at_most(endpoint, monkeypatch):
    """A Hub that refuses, and a name whose lookup never ends."""
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        endpoint = endpoint.format(port=unused.getsockname()[1])
        if "silent" in endpoint:
            monkeypatch.setattr(socket, "create_connection", never)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(variable, raising=False)
        start = time.perf_counter()
        with pytest.raises(ValueError, match="the Hub cannot be reached"):
            resolve_checkpoint("somebody/unknown")
        assert time.perf_counter() - start < 2.5


def test_a_hub_that_answers_is_asked(monkeypatch):
    with socket.socket() as hub:
        hub.bind(("localhost", 0))
        hub.listen()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://localhost:{hub.getsockname()[1]}")
        assert resolve_checkpoint("somebody/model") == "somebody/model"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("finetune_accelerate", ["sounds/", "--model", "MIT/ast"]),
        ("evaluate", ["MIT/ast", "sounds/"]),
        ("classify", ["a.wav", "--model", "MIT/ast"]),
        ("classify", ["a.wav", "--model", "ced-tiny"]),  # of which we know where it is
        ("export_onnx", ["MIT/ast"]),
    ],
)
def test_commands_say_so_before_they_load_anything(command, words, tmp_path):
    script = (
        f"import sys\nfrom scripts.{command} import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit as ending:\n    status = ending.code\n"
        "sys.exit(99 if 'torch' in sys.modules else status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, check=False,
        env={**os.environ, "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert any(name in line for name in words)
    assert "cannot be reached" in line
    assert OFFLINE + DEFAULT_MODEL in line
