"""The templates, and how figures, times and names are written in them."""

from __future__ import annotations

import functools
import re
from datetime import datetime
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from hvd_eurosat.run.status import span

if TYPE_CHECKING:
    from jinja2 import Environment


@functools.cache
def environment() -> Environment:
    """Of the templates: HTML is escaped, and a name that is not there is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    loader = PackageLoader("hvd_eurosat.run", "templates")
    made = Environment(
        loader=loader,
        autoescape=select_autoescape(["html", "css", "js"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "percent": percent,
        "span": span,
        "moment": moment,
        "number": "{:,}".format,
        "cell": cell,
        "breakable": breakable,
    }
    return made


def percent(share: float) -> str:
    """96.67 %."""
    return f"{100 * share:.2f} %"


def breakable(text: str) -> Markup:
    """A name that may be broken where its words meet: HerbaceousVegetation_12.jpg."""
    return Markup("<wbr>").join(re.split(r"(?<=[a-z])(?=[A-Z])|(?<=[_.-])", text))


def cell(text: object) -> str:
    """Any text, for a table in Markdown."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def moment(seconds: float) -> str:
    """A time for people, in this machine's zone."""
    return f"{datetime.fromtimestamp(seconds).astimezone():%d %B %Y, %H:%M %Z}".lstrip("0")


def between(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def shown(value: Any) -> str:
    """A value of the configuration as one would write it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
