"""How command lines are read, where no schema does it: a mistake is one line, with what was perhaps meant."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors come without a screen of usage before them."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """End the program with status 2."""
        self.exit(2, f"error: {self.explained(message)} (--help lists all)\n")

    def explained(self, message: str) -> str:
        """argparse's message, with the argument that an unknown one is most like."""
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        return message + (likely(unknown[1], self._option_string_actions) if unknown else "")


def likely(name: str, names: Iterable[str]) -> str:
    """A question after the one of `names` that an unknown one resembles; "" if none does."""
    near = difflib.get_close_matches(name, list(names), 1)
    return f": did you mean {near[0]}?" if near else ""
