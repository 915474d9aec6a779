"""`--help` of every command: its content and its speed."""

import configparser
import importlib
import re
import subprocess
import sys

import pytest

from .conftest import REPOSITORY


def commands() -> dict[str, str]:
    """Console command -> its module in the checkout."""
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    lines = config["options.entry_points"]["console_scripts"].strip().splitlines()
    pairs = (re.split(r"[=:\s]+", line.strip()) for line in lines)
    return {name: module.replace("ast_scripts", "scripts") for name, module, _ in pairs}


COMMANDS = commands()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_reader(name, capsys, monkeypatch):
    module = importlib.import_module(COMMANDS[name])
    main = module.main
    if getattr(module, "run_command", main).__module__ != "scripts.common.options":
        pytest.skip(f"{name} is not made of one Options class")
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ending:
        main(["--help"])
    assert ending.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {name} ")
    assert f"\n    {name} " in text, "no command to copy"
    first = text[text.index("\noptions:") :].split("\n\n")[0]
    shown = re.findall(r"^  (?:-\w, )?--(\w+)", first, re.MULTILINE)
    assert 2 <= len(set(shown) - {"help", "version", "print_completion"}) <= 10, shown
    assert "_dir" not in " ".join(re.findall(r"^  --(\w+)", text, re.MULTILINE))
    for option, line in re.findall(r"^  --(\w+).*?\n? +(\S.*)", text, re.MULTILINE):
        assert line.strip(), option


@pytest.mark.parametrize("name", ["ast-finetune", "ast-evaluate"])
def test_help_loads_no_model_library(name):
    script = (
        f"import sys\nfrom {COMMANDS[name]} import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert done.returncode == 0, done.stderr
