"""How the ranks of an elastic job find together again: by the key-value server of horovodrun.

Horovod's own way, inside `hvd.init`, connects the ranks as soon as they have their places, and ends the whole process
when one of them is late (a new host still imports torch) or dies meanwhile. Here they connect once all are there.
"""

from __future__ import annotations

import os
import time
from http.client import HTTPConnection, HTTPException

from hvd_eurosat.errors import RunError

CONNECT_SECONDS = 10.0
START_SECONDS = 120.0  # from a new rank's place to its arrival
POLL_SECONDS = 0.1
PLACE = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")


def meet(again: bool) -> None:
    """Return when all ranks of the job are ready to connect, and this one's place is in HOROVOD_RANK and the like.

    again: it was in the job before, and needs a new place. Those who do not come in time are left out. Raises RunError
    when there is no place for it any more, or no launcher.
    """
    if again:
        _take_place()
    while not _all_come():
        _take_place()


def _all_come() -> bool:
    """Rank 0 looks for every rank, and the others for its word: few requests, also of many ranks."""
    rank, size = (int(os.environ[f"HOROVOD_{name}"]) for name in ("RANK", "SIZE"))
    _request("PUT", f"ready/{rank}")
    deadline = time.monotonic() + START_SECONDS
    awaited = range(1, size) if rank == 0 else ["all"]
    while any(_request("GET", f"ready/{name}") is None for name in awaited):
        if time.monotonic() > deadline:
            _request("DELETE", f"ready/{rank}")
            return False
        time.sleep(POLL_SECONDS)
    if rank == 0:
        _request("PUT", "ready/all")
    return True


def _take_place() -> None:
    """The launcher answers when every other rank has asked too, or has ended."""
    host, local_rank = os.environ["HOROVOD_HOSTNAME"], os.environ["HOROVOD_LOCAL_RANK"]
    wait = float(os.environ.get("HOROVOD_ELASTIC_TIMEOUT", 600))
    place = (_request("GET", f"rank_and_size/{host}:{local_rank}", wait) or b"-1").decode().split(",")
    if place[0] == "-1":
        raise RunError(f"the job goes on without {host}")
    os.environ.update({f"HOROVOD_{name}": value for name, value in zip(PLACE, place, strict=True)})


def _request(method: str, path: str, wait: float = CONNECT_SECONDS) -> bytes | None:
    """The server's answer, None where it has none."""
    address, port = (os.environ[f"HOROVOD_GLOO_RENDEZVOUS_{name}"] for name in ("ADDR", "PORT"))
    connection = HTTPConnection(address, int(port), timeout=CONNECT_SECONDS)
    try:
        connection.connect()
        connection.sock.settimeout(wait)
        connection.request(method, f"/{path}", body=b"1" if method == "PUT" else None)
        response = connection.getresponse()
        return response.read() if response.status == 200 else None
    except (OSError, HTTPException) as error:
        raise RunError(f"lost the launcher at {address}: {error}") from None
    finally:
        connection.close()
