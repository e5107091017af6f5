"""One typed configuration: defaults < recipe file (TOML or JSON) < environment < command line."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError
from pydantic_settings import CliSettingsSource, SettingsError

from hvd_eurosat.config import rmldnn
from hvd_eurosat.config.command import Parser, suggestion
from hvd_eurosat.config.jsonfile import read_json
from hvd_eurosat.config.schema import ENV_PREFIX, Config, Settings, current
from hvd_eurosat.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

S = TypeVar("S", bound=Settings)

METAVARS = {
    "Path": "PATH",
    "int": "N",
    "float": "X",
    "str": "TEXT",
    "bool": "true|false",
    "tuple[Path,...]": "PATH …",
    "tuple[int,...]": "N,N,…",
    "tuple[str,...]": "NAME,NAME,…",
    "tuple[float,...]": "X,X,…",
    "tuple[float,float]": "X,X",
    "tuple[float,float,float]": "X,X,X",
}


class _Parser(Parser):
    """Does not end the program: the ranks of a job check their command lines together."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.with_suggestion(message)} (--help lists every key)")


def load(argv: Sequence[str]) -> Config:
    """The configuration of a training run; `--help` prints every key and ends the program."""
    config = read(Config, argv, "train")
    if config.run.dir is not None:
        return config
    name = config.config.stem if config.config else "default"
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": Path("runs") / name})})


def read(schema: type[S], argv: Sequence[str], verb: str, **lists: Sequence[str]) -> S:
    """The settings that a command line asks for; `--help` prints every key and ends the program.

    lists: values of keys that take any text as it is, such as names of files. Raises UserError, naming the key, on
    anything unknown or of a wrong type.
    """
    parser = _Parser(
        prog=f"python -m hvd_eurosat.{verb}",
        usage=_usage(schema),
        description=inspect.cleandoc(schema.__doc__ or ""),
    )
    cli = CliSettingsSource[Parser](schema, root_parser=parser)
    _plainly(parser)
    _refuse_unknown_environment()
    flags = vars(parser.parse_args(list(argv)))
    values = _read_recipe(Path(flags["config"]), verb) if flags.get("config") else {}
    try:
        source = cli(parsed_args=flags)
    except SettingsError as error:
        raise UserError(f"{str(error).splitlines()[0]} (a list is written [1, 2, 3])") from None
    try:
        return schema(_cli_settings_source=source, **{**values, **lists})
    except ValidationError as error:
        raise UserError(_first_problem(error, parser)) from None
    except SettingsError:
        given = ", ".join(sorted(name for name in os.environ if name.startswith(ENV_PREFIX)))
        raise UserError(f"environment variables {given}: one is a list, which is written [1, 2, 3]") from None


def _usage(schema: type[Settings]) -> str:
    """What must be given, and how the rest is."""
    required = [f"--{name} …" for name, field in schema.model_fields.items() if field.is_required()]
    return " ".join(["%(prog)s [--config FILE]", *required, "[--KEY VALUE …]"])


def _plainly(parser: Parser) -> None:
    """Types and defaults in the words of a help page, where pydantic writes Python; no whole sections in JSON."""
    for action in parser._actions:
        if action.help == argparse.SUPPRESS:
            for name in action.option_strings:
                del parser._option_string_actions[name]
        action.metavar = METAVARS.get(str(action.metavar), action.metavar)
        for nothing in (" (default: None)", " (default: ())", " (default: )"):
            action.help = (action.help or "").replace(nothing, "")


def _read_recipe(path: Path, verb: str) -> dict[str, Any]:
    values = _read_file(path.expanduser())
    try:
        if rmldnn.is_rmldnn(values):
            return rmldnn.translate(values, verb)
    except ValueError as error:
        raise UserError(f"--config {path}: {error}") from None
    if not isinstance(values, dict) or "config" in values:
        raise UserError(f"--config {path}: expected sections {', '.join(_sections())}")
    return current(values)


def _read_file(path: Path) -> Any:
    if path.suffix == ".json":
        return read_json(path, "--config")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".toml":
            raise UserError(f"--config {path}: a recipe is a .toml or a .json file")
        return tomllib.loads(text)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except ValueError as error:  # the parser's error, and undecodable text
        raise UserError(f"--config {path}: {error}") from None


def _sections() -> list[str]:
    return [name for name in Config.model_fields if name != "config"]


def _refuse_unknown_environment() -> None:
    """pydantic reads the variables that it knows; a misspelt section would pass in silence."""
    for variable in sorted(os.environ):
        section = variable.removeprefix(ENV_PREFIX).lower().split("__")[0]
        if variable.startswith(ENV_PREFIX) and section not in _sections():
            raise UserError(f"environment variable {variable}: no such section; there are {', '.join(_sections())}")


def _first_problem(error: ValidationError, parser: Parser) -> str:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"--{key} is required"
    if problem["type"] == "extra_forbidden":
        keys = [option.removeprefix("--") for option in parser._option_string_actions]
        names = [*keys, *(key.partition(".")[0] for key in keys)]
        return f"unknown configuration key {key}{suggestion(key, names)} (--help lists every key)"
    return f"{key}: {message}, got {problem['input']!r}" if key else message
