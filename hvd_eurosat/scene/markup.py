"""Reading XML with suspicion: elements by name, and no document type, whose entities could grow without end."""

from __future__ import annotations

from collections.abc import Collection
from xml.parsers import expat

from hvd_eurosat.errors import UserError

MAX_BYTES = 16 << 20  # a product's metadata has 60,000
MAX_TEXT = 4096  # characters of an element
Element = tuple[str, dict[str, str], str]


def elements(data: bytes, path: str, wanted: Collection[str]) -> list[Element]:
    """The elements of these names: name without namespace, attributes, text. Raises UserError, which names the path."""
    found: list[Element] = []
    inside = False

    def refuse(*_: object) -> None:
        raise UserError(f"{path} is not safe: it has a DOCTYPE, which neither products nor VRTs have")

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal inside
        tag = tag.rpartition(":")[2]
        inside = tag in wanted
        if inside:
            found.append((tag, attributes, ""))

    def end(_: str) -> None:
        nonlocal inside
        inside = False

    def text(piece: str) -> None:
        if inside:
            tag, attributes, before = found[-1]
            found[-1] = tag, attributes, (before + piece)[:MAX_TEXT]

    if len(data) > MAX_BYTES:
        raise UserError(f"{path} has more than {MAX_BYTES:,} bytes, which is no such file")
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, ValueError, LookupError) as error:  # the last two: encodings that it does not know
        raise UserError(f"{path} is no whole XML file ({error})") from None
    return [(tag, attributes, words.strip()) for tag, attributes, words in found]
