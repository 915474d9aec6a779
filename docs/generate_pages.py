"""Pages of the site that are made from the code, a hook of MkDocs (see mkdocs.yml).

- for each library its public names, whose docstrings mkdocstrings renders;
- for each command of setup.cfg its docstring and what its `--help` prints;
- for each notebook its text, code, and the output that is stored in it.
"""

import base64
import configparser
import contextlib
import importlib
import inspect
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).parents[1]
# Not exported by the package, as they are needed by few, but documented.
MORE_NAMES = {"modeling_ast": ["onnx_ast.OnnxClassifier"], "feature_extraction": []}
_SUBCOMMANDS = re.compile(r"^commands:\n((?:  \w.*\n)+)", re.MULTILINE)
_FIELD = re.compile(r"^    (\w+): ([^=\n]+?) = (.+?)(?:  # (.+))?$", re.MULTILINE)


def commands() -> dict[str, str]:
    """Console command -> `module:function`, as setup.cfg has them."""
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    lines = config["options.entry_points"]["console_scripts"].strip().splitlines()
    pairs = (line.split("=") for line in lines)
    return {name.strip(): target.strip() for name, target in pairs}


def help_of(name: str, *words: str) -> str:
    """What `NAME WORDS --help` prints."""
    module, function = commands()[name].split(":")
    main = getattr(importlib.import_module(module.replace("ast_scripts", "scripts")), function)
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [name, *words, "--help"]),
        mock.patch.dict(os.environ, COLUMNS="96"),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        main()
    return printed.getvalue()


def command_page(name: str) -> str:
    module = commands()[name].split(":")[0].replace("ast_scripts", "scripts")
    text = inspect.getdoc(importlib.import_module(module)) or ""
    first = help_of(name)
    subcommands = _SUBCOMMANDS.search(first)
    options = first.replace(text, "").replace("\n\n\n", "\n")  # said once is enough
    parts = [f"# {name}\n", text, f"```text\n{options}```"]
    for line in subcommands[1].splitlines() if subcommands else ():
        word = line.split()[0]
        parts += [f"## {name} {word}\n", f"```text\n{help_of(name, word)}```"]
    return "\n\n".join(parts)


def library_page(package: str) -> str:
    module = importlib.import_module(package)
    parts = [f"# {package}\n", inspect.getdoc(module) or ""]
    for name in [*module.__all__, *MORE_NAMES[package]]:
        parts.append(f"::: {package}.{name}")
        if name.endswith("Config"):
            parts.append(fields_table(getattr(module, name)))
    return "\n\n".join(parts)


def fields_table(config: Any) -> str:
    """A config's own fields with the comments that say what they are."""
    rows = [
        f"| `{name}` | `{kind.replace('|', chr(92) + '|')}` | `{default}` | {note} |"
        for name, kind, default, note in _FIELD.findall(inspect.getsource(config))
    ]
    return "\n".join(["| field | type | default | |", "| --- | --- | --- | --- |", *rows])


def notebook_page(path: Path, name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text'])}```")
            elif "image/png" in output.get("data", ()):
                picture = f"{name}_{len(pictures) + 1}.png"
                pictures[picture] = base64.b64decode(output["data"]["image/png"])
                parts.append(f"![What the code above draws]({picture})")
        if source.startswith("# "):
            parts.append(f"[Download the notebook]({path.name}){{ download }}")
    return "\n\n".join(parts), pictures


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    sys.path.insert(0, str(REPOSITORY))
    reference = next(part["Reference"] for part in config.nav if "Reference" in part)
    reference.append({"Commands": [{name: f"reference/{name}.md"} for name in commands()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {package: library_page(package) for package in MORE_NAMES}
    pages.update({name: command_page(name) for name in commands()})
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    for path in sorted((REPOSITORY / "docs/notebooks").glob("*.ipynb")):
        text, pictures = notebook_page(path, path.stem)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files
