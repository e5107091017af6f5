"""Lists of hosts, as people and launchers write them.

A line has one host or several, with spaces or commas between them. Each is a name, an address or a range of names
(node[01-04]), and may say how many ranks it takes: node1:8, `node1 8`, slots=8, cpu=8 or count=8, with spaces around
the = or not, and max_slots=8 beside it or alone. A name without a number takes one rank each time that it stands there,
which is how PBS, LSF and OAR write. Lines of Grid Engine (host, ranks, queue@host, processors) are understood as well.
# and // begin a comment. All else is refused by its line: nothing is taken for a host, or for one rank, by guess.

Sources: orte/util/hostfile/hostfile_lex.l and hostfile.c of Open MPI 4.1; sge_pe(5) of Grid Engine.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product

from hvd_eurosat.errors import UserError

WRITE = "write name:slots, or in a file: name slots=N"
SLOTS = ("slots", "cpu", "count")
MOST_SLOTS = {f"{a}{dash}{b}" for dash in "_-" for key in SLOTS for a, b in ((key, "max"), ("max", key))}
USERS = ("user", "username", "user_name", "user-name")
NAME = re.compile(r"(?![0-9]+$)[A-Za-z0-9][A-Za-z0-9._-]*")  # a bare number is one of slots
BETWEEN = re.compile(r"[\s,]+(?![^\[\]]*\])")  # words; not within a range's brackets
GRID_ENGINE = re.compile(r"(\S+)\s+([0-9]+)\s+\S+@\S+\s+\S+")
MOST = 100_000  # hosts, or slots of one: more is a slip of the pen


@dataclass(frozen=True)
class Host:
    """A host of a job and the ranks that it takes. here: it is this machine."""

    name: str
    slots: int
    here: bool = False


@dataclass(frozen=True)
class Mention:
    """A host where a line names it. slots: None without a number; adds: beside an earlier number, not against it."""

    name: str
    line: int
    slots: int | None = None
    most: int | None = None
    adds: bool = False


def parse(text: str, where: str, here: Callable[[str], bool]) -> list[Host]:
    """The hosts in the lines of a text, in the order in which it first names them.

    where: what the text is, for errors. here: whether a name or an address is this machine's, whose names are one
    host. Raises UserError, with the line's number where there are several, on what is not understood.
    """
    lines = text.splitlines()
    mentions: list[Mention] = []
    for number, line in enumerate(lines, start=1):
        try:
            mentions += _of_line(line, number, here)
        except ValueError as error:
            raise UserError(f"{where}{f', line {number}' if len(lines) > 1 else ''}: {error}") from None
    if not mentions:
        raise UserError(f"no host in {where}: {WRITE}")
    names = list(dict.fromkeys(mention.name for mention in mentions))
    with ThreadPoolExecutor(32) as pool:  # where a name server is slow, or silent
        own = dict(zip(names, pool.map(here, names), strict=True))
    hosts: dict[str, list[Mention]] = {}
    for mention in mentions:
        hosts.setdefault("" if own[mention.name] else mention.name.lower(), []).append(mention)
    return [Host(named[0].name, _slots(named, where), here=not key) for key, named in hosts.items()]


def _slots(named: list[Mention], where: str) -> int:
    """The ranks that all mentions of one host give it."""
    numbers = [mention.slots or mention.most for mention in named]
    if len(named) > 1 and any(numbers) and not all(mention.adds for mention in named):
        first, *others = dict.fromkeys(mention.name for mention in named)
        host = f"{first}{''.join(f', which is {other},' for other in others)}"
        lines = sorted({mention.line for mention in named})
        places = f" (lines {', '.join(map(str, lines))})" if len(lines) > 1 else ""
        raise UserError(f"{where}: host {host} is named twice{places}, with a number of slots: name it once")
    return sum(number or 1 for number in numbers)


def _of_line(line: str, number: int, here: Callable[[str], bool]) -> list[Mention]:
    """The hosts of a line. Raises ValueError."""
    content = re.split(r"#|//", line)[0].strip()
    if whole := GRID_ENGINE.fullmatch(content):
        return [replace(one, slots=_number(whole[2]), adds=True) for one in _hosts(whole[1], number, here)]
    found: list[Mention] = []
    group: list[Mention] = []  # what the next word may say more of
    apart = False  # a number stands apart from its host
    for word in filter(None, BETWEEN.split(re.sub(r"\s*=\s*", "=", content))):
        key, equals, value = word.partition("=")
        if equals or word.isdecimal():
            if not group:
                raise ValueError(f"'{word}' is no host: {WRITE}")
            key, value = (key.lower(), value) if equals else ("slots", word)
            group = [_with(one, key, value, word) for one in group]
            apart = True
        else:
            found += group
            group = _hosts(word, number, here)
    found += group
    without = [mention.name for mention in found if not mention.slots and not mention.most]
    if apart and without:
        raise ValueError(f"of which host is the number of slots? {without[0]} has none: {WRITE}")
    return found


def _with(host: Mention, key: str, value: str, word: str) -> Mention:
    """The host with one more fact. Raises ValueError."""
    if key in USERS:
        raise ValueError(f"'{word}': {_of_ssh(host.name)}")
    if key not in SLOTS and key not in MOST_SLOTS:
        raise ValueError(f"'{word}' is nothing that is known of a host: {WRITE}")
    field = "slots" if key in SLOTS else "most"
    if getattr(host, field):
        raise ValueError(f"'{word}': host {host.name} has a number of slots already")
    number = _number(value)
    host = replace(host, slots=number) if field == "slots" else replace(host, most=number)
    if host.slots and host.most and host.slots > host.most:
        raise ValueError(f"host {host.name} has {host.slots} slots, and at most {host.most}")
    return host


def _number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or not 0 < int(text) <= MOST:
        raise ValueError(f"'{text}' is no number of slots: {WRITE}")
    return int(text)


def _of_ssh(host: str) -> str:
    return f"the user of a host is for ~/.ssh/config to say: Host {host}, and below it User NAME"


def _hosts(word: str, line: int, here: Callable[[str], bool]) -> list[Mention]:
    """The hosts that a word names. Raises ValueError."""
    if "@" in word:
        raise ValueError(f"'{word}': {_of_ssh(word.rpartition('@')[2].partition(':')[0])}")
    if address := _ipv6(word):
        name, slots = address
        if not here(name):
            raise ValueError(f"'{word}': launchers know no IPv6 addresses: name it in /etc/hosts or ~/.ssh/config")
        return [Mention("localhost", line, _number(slots) if slots else None)]
    names, colon, slots = word.partition(":")
    keywords = {*SLOTS, *MOST_SLOTS}
    found = expand(names)
    if not all(NAME.fullmatch(name) and name.lower() not in keywords for name in found):
        raise ValueError(f"'{word}' is no host: {WRITE}")
    if colon and not re.fullmatch("0*[1-9][0-9]*", slots):
        raise ValueError(f"'{word}' is no host: {WRITE}")
    return [Mention(name, line, _number(slots) if colon else None) for name in found]


def _ipv6(word: str) -> tuple[str, str] | None:
    """Address and slots of ::1, [::1] and [::1]:2; None of anything else."""
    bracketed = re.fullmatch(r"\[([^\]]*)\](?::(.+))?", word)
    name, slots = (bracketed[1], bracketed[2] or "") if bracketed else (word, "")
    try:
        ipaddress.IPv6Address(name)
    except ValueError:
        return None
    return name, slots


def expand(names: str) -> list[str]:
    """node[01-02,7] as node01, node02, node7, and several brackets as all combinations, the last running fastest.

    Raises ValueError.
    """
    if not re.fullmatch(r"([^\[\]]|\[[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*\])+", names):
        raise ValueError(f"'{names}' is no host: {WRITE}, or a range: name[01-04]")
    parts: list[list[str]] = []
    count = 1
    for plain, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", names):
        parts.append([plain])
        if ranges:
            spans = [(first, last or first) for first, _, last in (one.partition("-") for one in ranges.split(","))]
            sizes = [int(last) - int(first) + 1 for first, last in spans]
            count *= sum(sizes)
            if min(sizes) < 1 or not 0 < count <= MOST:
                raise ValueError(f"'{names}' is a range of no hosts, or of more than {MOST:,}")
            parts[-1] = [f"{n:0{len(first)}}" for first, last in spans for n in range(int(first), int(last) + 1)]
    return ["".join(chosen) for chosen in product(*parts)]
