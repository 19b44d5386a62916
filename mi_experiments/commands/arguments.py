"""The command line as Hydra can read it: flags anywhere, and paths as people write them."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Quote, QuotedString

from mi_experiments.errors import InputError

PLAIN = re.compile(r"[^'\"\[\]{}()]*")
"""Values that are no quotes, lists, dictionaries or functions."""


def read_arguments(arguments: Sequence[str]) -> list[str]:
    """Return arguments that mean the same, in the order and with the quotes that Hydra needs.

    Raises:
        InputError: a flag is not known, or one of them would run code.
    """
    for argument in arguments:
        if any("\ud800" <= letter <= "\udfff" for letter in argument):
            shown = argument.encode(errors="backslashreplace").decode()
            raise InputError(f"{shown} is not valid Unicode: rename what it names, or link to it")
    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    args = parser.parse_intermixed_args(list(arguments))
    if args.experimental_rerun is not None:
        raise InputError("--experimental-rerun runs what a file holds: give resume=DIR")
    for name in ("config_dir", "config_path"):
        if (getattr(args, name) or "").startswith("~"):
            setattr(args, name, str(Path(getattr(args, name)).expanduser()))
    args.overrides = [quote_home(override) for override in args.overrides]
    try:
        unchanged = vars(parser.parse_args(list(arguments))) == vars(args)
    except InputError:
        unchanged = False
    return list(arguments) if unchanged else [*flags_of(parser, args), *args.overrides]


def refuse(message: str) -> NoReturn:
    """Say in one line what is wrong with the flags."""
    raise InputError(f"{message}: give KEY=VALUE, or a flag of mi-run --hydra-help")


def flags_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """Return the flags that parse to a namespace."""
    flags = []
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if action.option_strings and value not in (None, False):
            flag = action.option_strings[0]
            flags.append(flag if value is True else f"{flag}={value}")
    return flags


def quote_home(override: str) -> str:
    """Quote each value that begins with `~`, which Hydra's grammar has no place for."""
    key, equals, value = override.partition("=")
    if "~" not in value or not PLAIN.fullmatch(value):
        return override
    parts = [quote(part) if part.startswith("~") else part for part in value.split(",")]
    return f"{key}{equals}{','.join(parts)}"


def quote(text: str) -> str:
    """Return a text as Hydra reads it on the command line, whatever is in it."""
    return QuotedString(text, Quote.double).with_quotes()
