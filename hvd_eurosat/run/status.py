"""status.json, a run's sign of life: what it says, and how another machine judges it. Needs no torch.

Rank 0 replaces the file whole every INTERVAL seconds (see signs). A rank that fails alone leaves failure.json beside
it, for rank 0 is then ended before it can say anything.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from hvd_eurosat.errors import UserError

STATUS, FAILURE = "status.json", "failure.json"
INTERVAL = 5.0  # seconds between two signs of life
STALE_SECONDS = 60.0  # without one the process is gone, or its machine
OUTLIVED = 30.0  # seconds that rank 0 lives on after a rank has failed: the job does
EXIT = {"failed": 1, "stale": 3}  # of `report status`; a run in any other state is as it should be: 0
Status = dict[str, Any]


def read_status(folder: Path, now: float | None = None) -> Status:
    """What status.json of a run says, judged at `now` (seconds since 1970). Its `state` may be stale or failed by then.

    Raises UserError where there is none, or it is damaged.
    """
    path = folder / STATUS
    try:
        status = dict(json.loads(path.read_bytes()))
        updated = float(status["updated"])
        state = str(status["state"])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; the folder of a run is wanted") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} is damaged") from None
    if state != "running":
        return status
    failure = read_failure(folder)
    if failure and updated < failure["time"] + OUTLIVED:  # else the others went on without that rank
        return status | {"state": "failed", "error": failure["error"], "updated": failure["time"]}
    silent = (time.time() if now is None else now) - updated
    return status | {"state": "stale"} if silent > STALE_SECONDS else status


def read_failure(folder: Path) -> dict[str, Any] | None:
    """The last words of the rank that failed first: its error, and when (seconds since 1970)."""
    try:
        failure = json.loads((folder / FAILURE).read_bytes())
        return {"error": str(failure["error"]), "time": float(failure["time"])}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def leave_failure(folder: Path, error: str) -> None:
    """A rank's last words, unless another has left its own before; without a word where the folder is not to be had."""
    try:
        with (folder / FAILURE).open("x") as file:
            json.dump({"error": error, "time": time.time()}, file)
    except OSError:
        return


def line(folder: Path, status: Mapping[str, Any]) -> str:
    """One line for people and scripts: name, state, and what there is to say of it."""
    parts = [f"{folder}: {status['state']}"]
    if status["state"] == "stale":
        parts[0] += f", no sign of life for {span(time.time() - status['updated'])}"
    if status.get("error"):
        parts[0] += f": {status['error']}"
    if "epoch" in status:
        parts.append(f"epoch {status['epoch']}/{status['epochs']}, step {status['step']}")
    for key, form in (
        ("loss", "loss {:.4f}"),
        ("images_per_second", "{:,.0f} images/s"),
        ("best_valid_accuracy", "best valid {:.2%}"),
        ("test_accuracy", "test {:.2%}"),
    ):
        if status.get(key) is not None:
            parts.append(form.format(status[key]))
    if status["state"] == "running" and status.get("seconds_left") is not None:
        parts.append(f"{span(status['seconds_left'])} left")
    return "  ".join(parts)


def exit_status(states: Sequence[str]) -> int:
    """Of `report status`: 1 if any run failed, else 3 if any is stale, else 0."""
    statuses = {EXIT.get(state, 0) for state in states}
    return next(status for status in (1, 3, 0) if status in statuses)


def span(seconds: float) -> str:
    """A length of time in the two units that matter: 40 s, 3 min 20 s, 2 h 5 min, 3 days 4 h."""
    rest = timedelta(seconds=max(0, round(seconds)))
    days, (hours, left) = rest.days, divmod(rest.seconds, 3600)
    minutes, left = divmod(left, 60)
    if days:
        return f"{days} day{'s' if days > 1 else ''} {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {left} s" if minutes else f"{left} s"


def counted(number: int, what: str) -> str:
    """1 step, 2,593 steps."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def plain(value: Any) -> Any:
    """For JSON, which has no nan or infinity: null in their place."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value
