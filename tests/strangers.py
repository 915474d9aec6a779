"""Scripts as somebody runs them who has `transformers` but not our packages.

    with Strangers({"HF_HUB_OFFLINE": "1"}) as strangers:
        lines = strangers.run(script, folder)

Each script gets a process of its own. It is forked from one that has imported `transformers`, which
takes seconds, and nothing of ours. Its Hugging Face cache is a folder in its working folder.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from .conftest import REPOSITORY

# -I: no current folder, no PYTHONPATH; and no finder of an editable install of ours.
_SERVER = f"""
import importlib.util, json, os, sys, traceback
sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]
sys.path = [p for p in sys.path if p != {str(REPOSITORY)!r}]
for name in ('modeling_ast', 'feature_extraction', 'ast_scripts'):
    assert importlib.util.find_spec(name) is None, name
import soundfile, torch
from transformers import AutoFeatureExtractor, AutoModel, pipeline
from transformers.models.audio_spectrogram_transformer import (
    feature_extraction_audio_spectrogram_transformer, modeling_audio_spectrogram_transformer
)
for line in sys.stdin:
    folder, script = json.loads(line)
    process = os.fork()
    if not process:
        os.chdir(folder)
        for number, name in ((1, 'stdout'), (2, 'stderr')):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        status = 0
        try:
            exec(compile(script, 'script', 'exec'), {{'__name__': '__main__'}})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitpid(process, 0)[1], flush=True)
"""


class Strangers:
    """See the module.

    Args:
        environment: variables besides this process's, for all scripts.
    """

    def __init__(self, environment: dict[str, str]):
        inherited = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
        self._server = subprocess.Popen(
            [sys.executable, "-I", "-c", _SERVER],
            env={**inherited, "OMP_NUM_THREADS": "1", **environment, "HF_HOME": "hf_home"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Strangers":
        return self

    def __exit__(self, *_) -> None:
        self._server.communicate()

    def run(self, script: str, folder: Path, with_package: bool = False) -> list[str]:
        """The lines a script prints in a folder, which is made if it is not there."""
        if with_package:
            script = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n{script}"
        folder.mkdir(exist_ok=True)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps([str(folder), script]) + "\n")
        self._server.stdin.flush()
        assert self._server.stdout.readline() == "0\n", (folder / "stderr").read_text()
        return (folder / "stdout").read_text().splitlines()
