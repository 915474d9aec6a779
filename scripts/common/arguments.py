"""Command lines from dataclasses: options, a positional argument, YAML recipes, one-line errors."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

from .bundled import hub_configs_folder
from .options import did_you_mean

T = TypeVar("T")


def setting(default: Any, help: str) -> Any:  # noqa: A002
    """A dataclass field with a default and its line in `--help`."""
    return dataclasses.field(default=default, metadata={"help": help})


def parse_arguments(
    arguments_class: type[T], positional: str, description: str, argv: Sequence[str] | None = None
) -> T:
    """Read `COMMAND [RECIPE.yaml] [POSITIONAL] [--option value …]` into a dataclass.

    Options win over the recipe, the recipe over the dataclass's defaults.

    Args:
        arguments_class: a dataclass; its fields become options.
        positional: the field that an argument without a name fills.
        description: for `--help`.
        argv: the command line without the command; default: the process's own.

    Raises:
        ValueError: for a recipe that cannot be read or names an unknown field.
    """
    parser = HfArgumentParser(arguments_class, description=description)
    parser.add_argument(
        "positional",
        nargs="*",
        metavar=f"[RECIPE.yaml] {positional.upper()}",
        help=f"a recipe (a file, or one of hub_configs/recipes), and the same as --{positional}",
    )
    namespace = parser.parse_args(argv)
    fields: dict[str, Any] = {}
    words = list(namespace.positional)
    if words and Path(words[0]).suffix in (".yaml", ".yml"):
        names = [field.name for field in dataclasses.fields(arguments_class)]  # type: ignore[arg-type]
        fields.update(_read_recipe(words.pop(0), names))
    if words:
        fields[positional] = words.pop(0)
    if words:
        raise ValueError(f"Unexpected argument {words[0]!r} after the {positional}.")
    parser.set_defaults(**fields)
    namespace = parser.parse_args(argv)
    del namespace.positional
    return arguments_class(**vars(namespace))


def _read_recipe(name: str, field_names: list[str]) -> dict[str, Any]:
    recipes = hub_configs_folder() / "recipes"
    path = Path(name) if Path(name).is_file() else recipes / name
    if not path.is_file():
        known = ", ".join(sorted(recipe.name for recipe in recipes.glob("*.yaml")))
        raise ValueError(f"No recipe {name}: neither a file nor one of the bundled {known}.")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold `option: value` lines.")
    for key in recipe:
        if key not in field_names:
            raise ValueError(
                f"{path} sets the unknown option {key!r}{did_you_mean(key, field_names)}"
            )
    return recipe


def run_command(name: str, command: Callable[[], int | None]) -> None:
    """Run a command; a user's mistake ends in one line and exit status 2, Ctrl-C in 130."""
    try:
        status = command()
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    sys.exit(status or 0)
