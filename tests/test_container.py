"""The Dockerfile's instructions, as far as they can be run without Docker."""

import configparser
import http.server
import json
import re
import shlex
import subprocess
import sys
import threading

import pytest

from scripts.common.options import parse_arguments
from scripts.inference.options import DemoOptions

from .conftest import REPOSITORY

DOCKERFILE = (REPOSITORY / "Dockerfile").read_text().replace("\\\n", " ")
INSTRUCTIONS = [
    tuple(line.split(maxsplit=1))
    for line in DOCKERFILE.splitlines()
    if line.strip() and not line.startswith("#")
]


def of(kind: str) -> list[str]:
    return [words for name, words in INSTRUCTIONS if name == kind]


def test_it_is_pinned_and_runs_as_a_user():
    (base,) = of("FROM")
    assert re.fullmatch(r"python:3\.\d+\.\d+-\S+", base)
    assert of("USER")[-1] not in ("root", "0")
    # What is installed after torch is installed as constraints.txt has it.
    assert all("constraints.txt" in run for run in of("RUN") if run.startswith("pip install"))


def test_what_it_copies_is_there_and_not_left_out():
    ignored = (REPOSITORY / ".dockerignore").read_text().split()
    for words in of("COPY"):
        for name in words.split()[:-1]:
            assert (REPOSITORY / name).exists(), name
            assert name not in ignored


def test_a_new_volume_for_the_cache_belongs_to_the_user():
    """A folder that the image lacks would be root's."""
    names = [name for name, _ in INSTRUCTIONS]
    as_user = INSTRUCTIONS[names.index("USER") :]
    assert ("RUN", 'mkdir --parents "$HF_HOME"') in as_user
    (home,) = (words.removeprefix("HF_HOME=") for words in of("ENV") if "HF_HOME" in words)
    page = (REPOSITORY / "docs" / "deployment.md").read_text()
    (volume,) = re.findall(r"docker run .*-v ast_cache:(\S+)", page)
    assert home.startswith(volume + "/")


def test_its_commands_run(tmp_path):
    (install,) = (run for run in of("RUN") if "grep '^torch==' constraints.txt" in run)
    shown = subprocess.run(
        ["sh", "-c", install.replace("pip", "echo", 1)],
        env={"TORCH_INDEX": "https://index", "PATH": "/usr/bin:/bin"},
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert re.search(r"--index-url https://index torch==\d+\.\d+\.\d+$", shown.strip())
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    (extras,) = re.findall(r"'\.\[(.*)\]'", " ".join(of("RUN")))
    assert all(extra in config["options.extras_require"] for extra in extras.split(","))
    for run in of("RUN"):
        subprocess.run(["sh", "-n", "-c", run], check=True)


def test_it_serves_the_page():
    name, *arguments = json.loads(of("CMD")[-1])
    assert f"\n    {name} = " in (REPOSITORY / "setup.cfg").read_text()
    options = parse_arguments(name, DemoOptions, "", arguments)
    assert (options.host, [str(options.port)]) == ("0.0.0.0", of("EXPOSE"))


@pytest.mark.parametrize("is_up", [True, False])
def test_its_health_is_that_of_the_page(is_up, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_port
    if not is_up:
        server.shutdown()
        server.server_close()
    check = of("HEALTHCHECK")[0].partition(" CMD ")[2]
    for process, healthy in (("ast-demo\0--host", is_up), ("ast-classify\0/data", True)):
        (tmp_path / "cmdline").write_text(process)
        (tmp_path / "python").unlink(missing_ok=True)
        (tmp_path / "python").symlink_to(sys.executable)  # as in the container
        command = check.replace("/proc/1/cmdline", shlex.quote(str(tmp_path / "cmdline")))
        done = subprocess.run(
            ["sh", "-c", command.replace("7860", str(port))],
            env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
            capture_output=True,
            check=False,
        )
        assert (done.returncode == 0) == healthy, done.stderr
    server.server_close()
