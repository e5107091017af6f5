"""JSON from people: read with suspicion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hvd_eurosat.errors import UserError

MAX_BYTES = 16 << 20


def read_json(path: Path, what: str) -> Any:
    """What the file at path holds. Raises UserError, which begins with `what`, for whatever is not sound JSON."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{what} {path}: larger than {MAX_BYTES:,} bytes")
    try:
        return json.loads(data)
    except RecursionError:
        raise UserError(f"{what} {path}: nested too deeply") from None
    except ValueError as error:  # the parser's, and undecodable text
        raise UserError(f"{what} {path}: {error}") from None
