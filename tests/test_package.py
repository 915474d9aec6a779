"""What is installed: the wheel's contents, every file of hub_configs, the console commands."""

import configparser
import importlib
import json
import re
import subprocess
import sys
import zipfile

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from packaging.version import Version

from scripts.common.bundled import read_label_names
from scripts.training.options import FinetuneOptions

from .conftest import REPOSITORY

HUB_CONFIGS = REPOSITORY / "hub_configs"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: building leaves files behind
    subprocess.run(
        ["git", "clone", "--quiet", "--depth", "1", f"file://{REPOSITORY}", str(source)], check=True
    )
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    built = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_wheel_adds_three_packages_only(wheel):
    top_level = {name.split("/")[0] for name in wheel.namelist()}
    metadata = {name for name in top_level if name.endswith(".dist-info")}
    assert top_level - metadata == {"modeling_ast", "feature_extraction", "ast_scripts"}
    names = set(wheel.namelist())
    for package, folder in (
        ("modeling_ast", "modeling_ast"),
        ("feature_extraction", "feature_extraction"),
        ("ast_scripts", "scripts"),
        ("ast_scripts/hub_configs", "hub_configs"),
    ):
        tracked = subprocess.run(
            ["git", "ls-files", folder], capture_output=True, text=True, cwd=REPOSITORY, check=True
        ).stdout.split()
        for file in tracked:
            assert f"{package}/{file.removeprefix(folder + '/')}" in names, file


def test_wheel_requires_the_chosen_packages(wheel):
    metadata = next(name for name in wheel.namelist() if name.endswith("METADATA"))
    text = wheel.read(metadata).decode()
    required = set(re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", text, re.MULTILINE))
    assert required >= {"transformers", "torch", "datasets", "librosa", "evaluate", "accelerate"}
    assert {"train", "export", "demo", "dev"} <= set(
        re.findall(r"^Provides-Extra: (\w+)", text, re.MULTILINE)
    )
    assert "Requires-Python: >=3.10" in text


def test_console_commands_exist():
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    commands = config["options.entry_points"]["console_scripts"].strip().splitlines()
    for line in commands:
        command, target = (part.strip() for part in line.split("="))
        module, function = target.split(":")
        module = importlib.import_module(module.replace("ast_scripts", "scripts"))
        assert callable(getattr(module, function)), command


def test_every_hub_config_is_used():
    for path in HUB_CONFIGS.rglob("*"):
        if path.is_dir() or "__pycache__" in path.parts or path.name == "__init__.py":
            continue
        if path.parent.name == "recipes":
            recipe = yaml.safe_load(path.read_text())
            assert set(recipe) <= set(FinetuneOptions.__dataclass_fields__), path
        elif path.parent.name == "labels":
            assert len(read_label_names(path.stem)) >= 35
        elif path.parent == HUB_CONFIGS:
            assert path.name in {
                "model_card_template.md",  # tests/test_model_card.py
                "published_checkpoints.yaml",  # tests/test_hub_configs.py
                "sources.yaml",  # tests/test_model_card.py
                "descendant_card_template.md",  # tests/test_hub_configs.py
                "published_descendants.yaml",  # tests/test_hub_configs.py
            }
        elif (path.parent / "config.json").is_file():  # tests/test_hub_configs.py
            allowed = {"config.json", "preprocessor_config.json", "README.md", "model.safetensors"}
            assert path.name in allowed or path.suffix == ".png", path
        elif path.parent.name == "accelerate":
            config = load_config_from_file(str(path))  # refuses unknown keys
            assert config.distributed_type == path.stem.upper()
        elif path.parent.name == "label_matches":
            known = read_label_names(path.stem.split("_in_")[1])
            for names in json.loads(path.read_text()).values():
                assert set(names) <= set(known), path
        elif path.parent.name in ("space", "web", "pool"):
            continue  # test_demo.py, test_web.py, test_pool.py
        else:
            pytest.fail(f"{path} is used by no test")


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    return config


def requirements() -> dict[str, str]:
    """Package -> lowest version, all extras included."""
    options = setup_cfg()
    wanted = options["options"]["install_requires"]
    wanted += "".join(options["options.extras_require"].values())
    return dict(re.findall(r"^([\w-]+)(?:>=([\d.]+))?$", wanted, re.MULTILINE))


def pins(file: str) -> dict[str, list[str]]:
    """Package -> versions of a constraints file (several, by the version of Python)."""
    found: dict[str, list[str]] = {}
    for line in (REPOSITORY / file).read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split(" ;")[0].split("==")
            found.setdefault(name.lower().replace("_", "-"), []).append(version.strip())
    return found


def test_pinned_set_covers_the_requirements():
    pinned = pins("constraints.txt")
    for name in requirements():
        assert name.lower().replace("_", "-") in pinned, name


def test_lowest_set_is_admitted_by_setup_cfg():
    """`make lowest` regenerates it after a bound is raised."""
    pinned = pins("constraints-lowest.txt")
    for name, lowest in requirements().items():
        if lowest:
            (version,) = pinned[name.lower().replace("_", "-")]
            assert Version(version) >= Version(lowest), name


def test_python_versions_are_stated_alike():
    config = setup_cfg()
    prefix = "Programming Language :: Python :: 3."
    classifiers = config["metadata"]["classifiers"].split("\n")
    minors = [int(line.removeprefix(prefix)) for line in classifiers if line.startswith(prefix)]
    first, last = f"3.{minors[0]}", f"3.{minors[-1]}"
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert config["options"]["python_requires"] == f">={first}"
    assert config["mypy"]["python_version"] == first
    assert (
        f'target-version = "py{first.replace(".", "")}"'
        in (REPOSITORY / "pyproject.toml").read_text()
    )
    for page in ("README.md", "CONTRIBUTING.md"):
        assert f"Python {first} to {last}" in (REPOSITORY / page).read_text(), page
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())
    matrix = workflow["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["python"] == [f"3.{minor}" for minor in minors]
    assert {"python": first, "constraints": "constraints-lowest.txt"} in matrix["include"]


def test_workflow_calls_make_targets_that_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    targets = [step["run"].split()[1] for step in steps if "run" in step]
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_citation_has_this_version():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == setup_cfg()["metadata"]["version"]
    assert citation["license"] == setup_cfg()["metadata"]["license"]
