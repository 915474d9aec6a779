"""Command lines from dataclasses: typed options, recipes, help in groups, errors in one line.

    @dataclass
    class Arguments(Options):
        sounds: list[str] = setting([], "audio files", positional="+")
        top_k: int = setting(3, "labels per row", at_least=1)

    run_command("ast-classify", Arguments, classify)

A field is an option of the same name, with underscores or dashes, and a key in recipes. Nothing
here imports torch or transformers, and a command's own file imports them only when it runs:
`--help` and errors about options are immediate.
"""

import argparse
import dataclasses
import difflib
import importlib
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from reprlib import Repr
from typing import Any, TypeVar

from .bundled import hub_configs_folder
from .shown import shown

_PACKAGE = "audio-spectrogram-transformer"
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")


def _brief(value: Any) -> str:
    """For messages: a few lines of YAML can stand for terabytes of text."""
    short = Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 200, 200
    return short.repr(value)


def setting(
    default: Any,
    help: str,  # noqa: A002
    *,
    group: str | None = None,
    choices: Iterable[str] | None = None,
    at_least: float | None = None,
    positional: str | None = None,
    parse: Callable[[str], Any] | None = None,
    metavar: str | None = None,
    aliases: Iterable[str] = (),
) -> Any:
    """A field of an `Options` class.

    Args:
        default: the default; a list is copied.
        help: its line in `--help`, which appends the default.
        group: its heading in `--help`; None: listed first, among the few that matter most.
        choices: the allowed values.
        at_least: the lowest allowed number.
        positional: an argument without a name: "1" for one, "?" for at most one, "+" for one or
            more, "*" for any number.
        parse: makes the value from a word, if the field's type is not enough; raises ValueError.
        metavar: placeholder for the value in `--help`.
        aliases: other names that command lines and recipes can use, not shown in `--help`.
    """
    metadata = {
        "help": help,
        "group": group,
        "choices": None if choices is None else tuple(choices),
        "at_least": at_least,
        "positional": positional,
        "parse": parse,
        "metavar": metavar,
        "aliases": tuple(aliases),
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Options:
    """Base of a command's options. Construction converts and checks the values.

    Raises:
        ValueError: for a value of the wrong type, below the minimum, or not among the choices.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            try:
                value = _checked(field, _kind(type(self), field), getattr(self, field.name))
            except ValueError as error:
                raise ValueError(f"--{field.name} {error}") from None
            setattr(self, field.name, value)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A field's type: `float | None` is an optional float, `list[str]` a list of strings."""

    of: type
    optional: bool
    is_list: bool


def _kind(options: type[Options], field: dataclasses.Field) -> _Kind:
    hint = typing.get_type_hints(options)[field.name]
    optional = False
    if isinstance(hint, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not types.NoneType]
        optional = len(members) < len(typing.get_args(hint))
        hint = members[0]
    is_list = typing.get_origin(hint) is list
    return _Kind(typing.get_args(hint)[0] if is_list else hint, optional, is_list)


def _checked(field: dataclasses.Field, kind: _Kind, value: Any) -> Any:
    """The value in the field's type; error messages are written to follow the option's name."""
    if value is None:
        if kind.optional:
            return None
        raise ValueError("needs a value.")
    if not kind.is_list:
        return _checked_item(field, kind, value)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"takes a list, got {_brief(value)}.")
    return [_checked_item(field, kind, item) for item in value]


def _checked_item(field: dataclasses.Field, kind: _Kind, value: Any) -> Any:
    rules = field.metadata
    if rules.get("parse") is not None:
        return rules["parse"](value) if isinstance(value, str) else value
    value = _converted(kind.of, value)
    choices, lowest = rules.get("choices"), rules.get("at_least")
    if choices is not None and value not in choices:
        raise ValueError(f"is {_brief(value)}{did_you_mean(str(value), choices)}")
    if lowest is not None and not value >= lowest:
        raise ValueError(f"must be at least {lowest}, got {value}.")
    return value


def _converted(kind: type, value: Any) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, (str, int)) and str(value).lower() in _TRUE + _FALSE:
            return str(value).lower() in _TRUE
        raise ValueError(f"must be true or false, got {_brief(value)}.")
    if kind in (int, float):
        expected = "a whole number" if kind is int else "a number"
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError(f"must be {expected}, got {_brief(value)}.")
        try:
            number = float(value)
            whole = int(value) if kind is int else 0
        except (ValueError, OverflowError):
            raise ValueError(f"must be {expected}, got {_brief(value)}.") from None
        if kind is int and whole != number:
            raise ValueError(f"must be {expected}, got {_brief(value)}.")
        return whole if kind is int else number
    if kind in (str, Path):
        if not isinstance(value, (str, int, float, Path)) or isinstance(value, bool):
            raise ValueError(f"must be a word, got {_brief(value)}.")
        return kind(str(value))
    return value


def _aliases(options: type[Options]) -> dict[str, str]:
    """Aliases of the options -> the options' names."""
    return {
        alias: field.name
        for field in dataclasses.fields(options)
        for alias in field.metadata["aliases"]
    }


O = TypeVar("O", bound=Options)  # noqa: E741


class _Parser(argparse.ArgumentParser):
    """Accepts dashes for underscores, and suggests the option that was probably meant."""

    def __init__(self, options: type[Options], **kwargs: Any):
        super().__init__(**kwargs, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        self._options = options
        self._aliases = _aliases(options)
        self._flags = [
            field.name
            for field in dataclasses.fields(options)
            if _kind(options, field).of is bool and not field.metadata["positional"]
        ]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(list(self._spelt(words)), namespace)

    def _spelt(self, words: list[str]) -> Iterable[str]:
        """Rewrites `--top-k=3` as `--top_k=3` and `--overwrite false` as `--no_overwrite`."""
        index = 0
        while index < len(words):
            word = words[index]
            index += 1
            if not word.startswith("--"):
                yield word
                continue
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            name = self._aliases.get(name, name)
            if name in self._flags:
                if not equals and index < len(words) and words[index].lower() in ("true", "false"):
                    value = words[index]
                    index += 1
                yield f"--no_{name}" if value.lower() in _FALSE else f"--{name}"
            else:
                yield f"--{name}{equals}{value}"

    def error(self, message: str) -> typing.NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()
        if unknown[0] != message.split()[0] and unknown[0].startswith("--"):
            fields = dataclasses.fields(self._options)
            nameless = [field.name for field in fields if field.metadata["positional"]]
            known = [field.name for field in fields if field.name not in nameless]
            close = difflib.get_close_matches(unknown[0][2:], known, n=1)
            hint = f" Did you mean --{close[0]}?" if close else ""
            if unknown[0][2:] in nameless:
                hint = f" {unknown[0][2:].upper()} goes without a name."
            message = f"unknown option {unknown[0]}.{hint} See {self.prog} --help."
        self.exit(2, f"{self.prog}: error: {shown(message)}\n")


def command_parser(
    name: str, options: type[Options], description: str, recipes: bool = False
) -> argparse.ArgumentParser:
    """A command's parser; its result holds only the options that were given."""
    usage = [name]
    for field in dataclasses.fields(options):
        if field.metadata["positional"]:
            usage.append(_metavar(field, recipes))
    parser = _Parser(
        options,
        prog=name,
        usage=" ".join([*usage, "[--option value …]"]),
        description=description.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups: dict[str | None, Any] = {None: parser}
    for field in dataclasses.fields(options):
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        _add(groups[group], field, _kind(options, field), recipes)
    parser.add_argument("--version", action="version", version=_version(name))
    try:
        import shtab
    except ImportError:
        return parser
    shtab.add_argument_to(parser, "--print_completion")
    return parser


def _add(group: Any, field: dataclasses.Field, kind: _Kind, recipes: bool) -> None:
    rules = field.metadata
    words: dict[str, Any] = {"help": _help(field, kind)}
    if rules["positional"]:
        if recipes:
            words["help"] += "; may follow a recipe: a YAML file, or one of hub_configs/recipes"
        # Can be missing: the recipe may name it, and the command reports what is missing.
        group.add_argument(field.name, nargs="*", metavar=_metavar(field, recipes), **words)
        return
    if kind.of is bool:
        # Both, so that a command line can override a recipe; `--help` shows the one that differs
        # from the default.
        for name, action in ((field.name, "store_true"), (f"no_{field.name}", "store_false")):
            hidden = (action == "store_true") == (field.default is True)
            help_text = argparse.SUPPRESS if hidden else words["help"]
            group.add_argument(f"--{name}", dest=field.name, action=action, help=help_text)
        return
    if kind.is_list:
        words["nargs"] = "+"
    choices = rules["choices"]
    words["metavar"] = rules["metavar"] or (
        "{" + ",".join(choices) + "}" if choices else field.name.rsplit("_", 1)[-1].upper()
    )
    group.add_argument(f"--{field.name}", **words)


def _metavar(field: dataclasses.Field, recipes: bool) -> str:
    """The placeholder of a positional field in `--help`."""
    is_list = field.metadata["positional"] in "+*"
    word = field.metadata["metavar"] or field.name.removesuffix("s" if is_list else "").upper()
    return f"[RECIPE.yaml] {word}" if recipes else word + (" …" if is_list else "")


def _help(field: dataclasses.Field, kind: _Kind) -> str:
    """The option's line, with its default unless the line already mentions it."""
    text = field.metadata["help"].replace("%", "%%")
    default: Any = field.default
    if callable(field.default_factory):
        default = " ".join(map(str, field.default_factory()))
    if default is None or default == "" or isinstance(default, bool) or "efault" in text:
        return text
    if isinstance(default, float):
        default = f"{default:g}"
    return f"{text} ({str(default).replace('%', '%%')})"


def parse_arguments(
    name: str,
    options: type[O],
    description: str,
    argv: Sequence[str] | None = None,
    recipes: bool = False,
) -> O:
    """Parse a command line into an object of `options`.

    The command line overrides the recipe, which overrides the defaults.

    Args:
        name: the command, for messages.
        options: its options; positional fields take the arguments without a name.
        description: for `--help`.
        argv: the arguments; default: the process's own.
        recipes: whether a first argument that ends in .yaml is a recipe.

    Raises:
        ValueError: for a recipe that cannot be read or sets an unknown option, an invalid value, or
            an extra argument.
        SystemExit: for an unknown option, after one line on standard error; and after `--help` and
            `--version`.
    """
    line = list(sys.argv[1:] if argv is None else argv)
    plain: list[str] = []  # arguments after a lone `--`, even if they begin with a dash
    if "--" in line:
        line, plain = line[: line.index("--")], line[line.index("--") + 1 :]
    parsed = vars(command_parser(name, options, description, recipes).parse_intermixed_args(line))
    names = [field.name for field in dataclasses.fields(options)]
    given = {option: value for option, value in parsed.items() if option in names}
    places = [field for field in dataclasses.fields(options) if field.metadata["positional"]]
    words = [word for field in places for word in given.pop(field.name, [])] + plain
    values: dict[str, Any] = {}
    if recipes and words and Path(words[0]).suffix in (".yaml", ".yml"):
        values.update(read_recipe(words.pop(0), options))
    for field in places:
        if field.metadata["positional"] in "+*":
            if words:
                values[field.name], words = words, []
        elif words:
            values[field.name] = words.pop(0)
        if field.name not in values and field.metadata["positional"] not in "?*":
            raise ValueError(f"Name {field.metadata['help'].split(':')[0]} (see {name} --help).")
    if words:
        raise ValueError(f"Unexpected argument {words[0]!r} (see {name} --help).")
    return options(**{**values, **given})


def read_recipe(name: str, options: type[Options]) -> dict[str, Any]:
    """The settings of a recipe: a YAML file, or the name of one of the bundled recipes.

    Raises:
        ValueError: if there is no such recipe, or if it cannot be read or sets an unknown option.
    """
    import yaml

    recipes = hub_configs_folder() / "recipes"
    path = Path(name) if Path(name).is_file() else recipes / name
    if not path.is_file():
        known = ", ".join(sorted(recipe.name for recipe in recipes.glob("*.yaml")))
        raise ValueError(f"No recipe {name}: neither a file nor bundled ({known}).")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    # PyYAML's constructors let Python's own errors through, as for `!!int ""` or `!!timestamp x`.
    except (
        yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
        ValueError,
    ) as error:  # fmt: skip
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold `option: value` lines.")
    names = [field.name for field in dataclasses.fields(options)]
    aliases = _aliases(options)
    settings: dict[str, Any] = {}
    for key, value in recipe.items():
        option: Any = aliases.get(key, key)
        if option not in names:
            raise ValueError(
                f"{path} sets the unknown option {key!r}{did_you_mean(str(key), names)}"
            )
        settings[option] = value
    return settings


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f". {hint}Known: {', '.join(known)}."


@dataclasses.dataclass(frozen=True)
class Subcommand:
    """One of several subcommands: its options, its line in `--help`, and what runs it.

    Args:
        run: "module:function", imported when chosen; the module is relative to the commands'
            package.
    """

    options: type[Options]
    help: str
    run: str


def run_command(
    name: str,
    options: type[O],
    command: Callable[[O], int | None],
    argv: Sequence[str] | None = None,
    recipes: bool = False,
    resumes: Callable[[O], bool] | None = None,
) -> None:
    """Parse the command line, run the command and exit.

    `--help` shows the docstring of the command's module. A user's mistake (ValueError, OSError)
    ends in one line on standard error and exit status 2, Ctrl-C in 130. Where `resumes` says so of
    the options, that line tells that the same command resumes.
    """
    description = sys.modules[command.__module__].__doc__ or ""

    def run() -> int | None:
        arguments = parse_arguments(name, options, description, argv, recipes)
        try:
            return command(arguments)
        except KeyboardInterrupt:
            if resumes is None or not resumes(arguments):
                raise
            raise KeyboardInterrupt("run the same command again to resume") from None

    _end(name, run)


def run_subcommand(
    name: str,
    subcommands: dict[str, Subcommand],
    description: str,
    argv: Sequence[str] | None = None,
) -> None:
    """Like `run_command`, for the subcommand named by the first argument."""
    _end(name, lambda: call_subcommand(name, subcommands, description, argv))


def call_subcommand(
    name: str,
    subcommands: dict[str, Subcommand],
    description: str,
    argv: Sequence[str] | None = None,
) -> int | None:
    """Run the subcommand named by the first argument.

    Raises:
        ValueError: for an unknown subcommand, and as the subcommand itself.
    """
    first, *words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if first in ("-h", "--help"):
        width = max(map(len, subcommands))
        lines = [f"  {word:<{width}}  {command.help}" for word, command in subcommands.items()]
        print(f"usage: {name} COMMAND [--option value …]\n\n{description.strip()}\n")
        print("commands:", *lines, "", f"{name} COMMAND --help lists its options.", sep="\n")
        return 0
    if first == "--version":
        print(_version(name))
        return 0
    if first not in subcommands:
        raise ValueError(f"Unknown command {name} {first}{did_you_mean(first, subcommands)}")
    chosen = subcommands[first]
    arguments = parse_arguments(f"{name} {first}", chosen.options, chosen.help, words)
    module, function = chosen.run.split(":")
    package = __package__.rpartition(".")[0]
    return getattr(importlib.import_module(f"{package}.{module}"), function)(arguments)


def _end(name: str, command: Callable[[], int | None]) -> typing.NoReturn:
    """Run, and exit with a status."""
    try:
        status = command()
    except KeyboardInterrupt as stop:
        print(
            f"\n{name}: interrupted" + "".join(f"; {word}" for word in stop.args), file=sys.stderr
        )
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"{name}: error: {shown(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(2)
    except RecursionError:  # of json and yaml; nothing of ours is recursive
        print(f"{name}: error: a file is nested too deeply to be read.", file=sys.stderr)
        sys.exit(2)
    sys.exit(status or 0)


def _version(name: str) -> str:
    try:
        return f"{name} {version(_PACKAGE)}"
    except PackageNotFoundError:  # a checkout that is not installed
        return f"{name}, of a checkout"
