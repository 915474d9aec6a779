"""Command lines: dashes and underscores, recipes, checks, help, and no torch until it is needed."""

import dataclasses
import itertools
import json
import re
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from scripts.common.checkpoints import DEFAULT_MODEL
from scripts.common.options import Options, command_parser, parse_arguments, run_command, setting
from scripts.evaluation.options import EvaluateOptions
from scripts.inference.options import ClassifyOptions


@dataclasses.dataclass
class Toy(Options):
    sounds: list[str] = setting([], "sounds: files or folders", positional="+")
    top_k: int = setting(3, "labels per row", at_least=1)
    threshold: float | None = setting(None, "score that counts, e.g. 50 %", group="events")
    loss: str = setting("mean", "kind of loss", choices=("mean", "max"), group="events")
    overwrite: bool = setting(False, "replace what is there")
    formats: list[str] = setting(["csv"], "files to write", choices=("csv", "json"))


def toy(*words: str, recipes: bool = False) -> Toy:
    return parse_arguments("ast-toy", Toy, "A toy.", words, recipes)


def test_defaults_and_words():
    assert toy("a.wav") == Toy(sounds=["a.wav"])
    given_all = toy("a", "b", "--top_k", "5", "--overwrite", "--formats", "csv", "json")
    assert given_all == Toy(["a", "b"], 5, overwrite=True, formats=["csv", "json"])
    assert toy("a").formats is not toy("a").formats


@given(st.sampled_from(["--top_k 7", "--top-k 7", "--top-k=7", "--top_k=7"]))
def test_dashes_are_underscores(words):
    assert toy("a-b_c.wav", *words.split()) == Toy(["a-b_c.wav"], top_k=7)


def test_flags_are_set_and_unset(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("overwrite: true\ntop_k: '4'\nthreshold: 1e-4\n")
    assert toy(str(recipe), "a", recipes=True) == Toy(["a"], 4, 1e-4, overwrite=True)
    for words in (["--no_overwrite"], ["--no-overwrite"], ["--overwrite", "false"]):
        assert not toy(str(recipe), "a", *words, recipes=True).overwrite
    assert toy("a", "--overwrite=True").overwrite
    assert toy("--overwrite", "a") == Toy(["a"], overwrite=True)  # the sound is no value of it


def test_sounds_and_options_mix():
    assert toy("a", "--top_k", "2", "b") == Toy(["a", "b"], 2)


def test_words_after_two_dashes_are_sounds():
    assert toy("--top_k", "1", "--", "--odd-name.wav").sounds == ["--odd-name.wav"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "--top_k", "0"], "--top_k must be at least 1, got 0."),
        (["a", "--top_k", "1.5"], "--top_k must be a whole number, got '1.5'."),
        (["a", "--threshold", "high"], "--threshold must be a number, got 'high'."),
        (["a", "--loss", "maxx"], "--loss is 'maxx'. Did you mean 'max'? Known: mean, max."),
        (["a", "--formats", "csv", "xml"], "--formats is 'xml'. Known: csv, json."),
        ([], "Name sounds (see ast-toy --help)."),
    ],
)
def test_wrong_values_are_named(words, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        toy(*words)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": 1.5}, "--top_k must be a whole number, got 1.5"),
        ({"top_k": True}, "--top_k must be a whole number, got True"),
        ({"top_k": None}, "--top_k needs a value"),
        ({"top_k": float("nan")}, "--top_k must be a whole number"),
        ({"threshold": [1]}, "--threshold must be a number"),
        ({"overwrite": "perhaps"}, "--overwrite must be true or false, got 'perhaps'"),
        ({"formats": "csv"}, "--formats takes a list, got 'csv'"),
        ({"loss": {}}, "--loss must be a word"),
    ],
)
def test_values_from_python_and_yaml_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        Toy(**values)


@pytest.mark.parametrize("text", ["- a list", "top_k: [", "42", "top_k: &a [*a", "\x00"])
def test_a_broken_recipe_is_one_sentence(text, tmp_path):
    recipe = tmp_path / "broken.yaml"
    recipe.write_text(text)
    with pytest.raises(ValueError, match=r"broken\.yaml"):
        toy(str(recipe), "a", recipes=True)
    recipe.write_text("top_n: 3")
    with pytest.raises(ValueError, match=r"unknown option 'top_n'\. Did you mean 'top_k'"):
        toy(str(recipe), "a", recipes=True)
    recipe.write_text("{1: 2}")
    with pytest.raises(ValueError, match="unknown option 1"):
        toy(str(recipe), "a", recipes=True)


@pytest.mark.parametrize("option", [field.name for field in dataclasses.fields(Toy)])
def test_a_recipe_that_grows_is_named_in_short(option, tmp_path):
    """Twelve lines that stand for 10^12 words."""
    names = [*"abcdefghijk"]
    lines = ["- &a [x, x, x, x, x, x, x, x, x, x]"]
    for before, name in itertools.pairwise(names):
        lines.append(f"- &{name} [" + ", ".join(10 * [f"*{before}"]) + "]")
    values = yaml.safe_load("\n".join(lines))
    with pytest.raises(ValueError, match=f"^--{option} ") as raised:
        Toy(**{option: values[-1]})
    assert len(str(raised.value)) < 1000


def test_an_unknown_option_ends_in_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        toy("a", "--top-n", "3")
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "ast-toy: error: unknown option --top_n. Did you mean --top_k? See ast-toy --help."
    ]
    with pytest.raises(SystemExit):
        toy("--sounds", "a")
    assert "unknown option --sounds. SOUNDS goes without a name." in capsys.readouterr().err


def test_help_shows_groups_and_defaults():
    text = command_parser("ast-toy", Toy, "A toy.").format_help()
    flat = " ".join(text.split())
    assert "A toy." in flat
    assert "labels per row (3)" in flat
    assert "score that counts, e.g. 50 %" in flat
    assert "files to write (csv)" in flat
    assert flat.index("--top_k") < flat.index("events:") < flat.index("--threshold")
    assert "{mean,max}" in flat
    assert "no_overwrite" not in flat
    assert flat.startswith("usage: ast-toy SOUND … [--option value …]")


def command(arguments: Toy) -> int:
    """Like one of our commands."""
    if arguments.top_k == 4:
        raise ValueError("No\nsuch file.")
    if arguments.top_k == 5:
        raise KeyboardInterrupt
    if arguments.top_k == 6:
        json.loads(100_000 * "[")
    return 1


@pytest.mark.parametrize(
    ("top_k", "status", "line"),
    [
        (3, 1, ""),
        (4, 2, "ast-toy: error: No such file."),
        (5, 130, "ast-toy: interrupted"),
        (6, 2, "ast-toy: error: a file is nested too deeply to be read."),
    ],
)
def test_run_command_ends_with_a_status(top_k, status, line, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command("ast-toy", Toy, command, ["a", "--top_k", str(top_k)])
    assert ended.value.code == status
    assert capsys.readouterr().err.strip() == line


@pytest.mark.parametrize("does", [True, False])
def test_ctrl_c_tells_what_resumes(does, capsys):
    words = ["a", "--top_k", "5"]
    with pytest.raises(SystemExit):
        run_command("ast-toy", Toy, command, words, resumes=lambda toy: does and toy.top_k == 5)
    told = capsys.readouterr().err.strip()
    assert told.endswith("interrupted; run the same command again to resume" if does else "rupted")


def test_version_and_completion(capsys):
    for words in (["--version"], ["--print_completion", "bash"]):
        with pytest.raises(SystemExit) as ended:
            toy(*words)
        assert not ended.value.code
        assert "toy" in capsys.readouterr().out


def test_options_need_no_torch():
    program = "import sys, scripts.common.options, scripts.data.options, scripts.common.bundled\n"
    program += "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "content",
    [
        b"top_k: !!int ''", b"top_k: !!bool x", b"top_k: !!timestamp x", b"? [a]\n: 1", b"\xff: 1",
        b"null: 1", b"1: 2", b"a: &a [*a]", b"[" * 3000, b"top_k: 1e999", b"- top_k", b"\x00",
        b"top_k: 0o9", b"top_k: .inf", b"top_k: {}", b"a: b: c",
        b"!!python/object/apply:os.abort []",
    ],
)  # fmt: skip
def test_a_damaged_recipe_is_a_users_mistake(tmp_path, content):
    recipe = tmp_path / "r.yaml"
    recipe.write_bytes(content)
    with pytest.raises(ValueError, match=r"r\.yaml|--top_k"):
        toy(str(recipe), "a.wav", recipes=True)


def test_other_names_of_an_option(tmp_path):
    @dataclasses.dataclass
    class Writes(Options):
        sound: str = setting("", "a sound", positional="?")
        output: str = setting("runs", "folder", aliases=["output_dir"])

    recipe = tmp_path / "r.yaml"
    recipe.write_text("output_dir: a\n")
    for words, folder in (
        ([str(recipe)], "a"),
        ([str(recipe), "--output-dir", "b"], "b"),
        (["--output_dir=c"], "c"),
        (["--output", "d"], "d"),
    ):
        assert parse_arguments("ast-toy", Writes, "", words, recipes=True).output == folder
    assert "output_dir" not in command_parser("ast-toy", Writes, "").format_help()


def test_the_threshold_depends_on_the_model():
    """The bundled general model rarely scores above a half."""
    for options in (ClassifyOptions(), EvaluateOptions(paths=[DEFAULT_MODEL, "sounds"])):
        assert options.threshold == 0.2
    assert ClassifyOptions(model="runs/mine").threshold == 0.5
    assert EvaluateOptions(paths=["runs/mine", "sounds"]).threshold == 0.5
    assert ClassifyOptions(threshold=0.4).threshold == 0.4
