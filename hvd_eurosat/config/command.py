"""argparse, whose mistakes are one line here, with what was perhaps meant."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a mistake without the usage text."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """End the program with status 2."""
        self.exit(2, f"error: {self.with_suggestion(message)} (--help lists all)\n")

    def with_suggestion(self, message: str) -> str:
        """argparse's message in one line, with the option that the first unknown one resembles."""
        message = " ".join(message.splitlines())
        unknown = re.match(r"unrecognized arguments:.*?(--[^\s=]+)", message)
        return message + (suggestion(unknown[1], self._option_string_actions) if unknown else "")


def suggestion(name: str, names: Iterable[str]) -> str:
    """The words ": did you mean NAME?" for one of `names`, or none.

    That is the same key of another section, or one that is nearly alike: dashes before a name do not count, and within
    it they are underscores.
    """
    known = {_bare(each): each for each in names}
    last = _bare(name).rpartition(".")[2]
    same = [each for each in known if each.rpartition(".")[2] == last]
    near = difflib.get_close_matches(_bare(name), same or known, 1, 0.0 if same else 0.8)
    return f": did you mean {known[near[0]]}?" if near else ""


def _bare(name: str) -> str:
    return name.lstrip("-").replace("-", "_")
