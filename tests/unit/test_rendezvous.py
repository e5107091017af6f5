"""How the ranks of an elastic job meet, by a stand-in of horovodrun's key-value server."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hvd_eurosat.cluster import rendezvous
from hvd_eurosat.errors import RunError


class Server(BaseHTTPRequestHandler):
    """Keeps what is put into it."""

    store: dict[str, bytes]

    def do_GET(self) -> None:
        self.answer(self.store.get(self.path))

    def do_PUT(self) -> None:
        self.store[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(b"")

    def do_DELETE(self) -> None:
        self.store.pop(self.path)
        self.answer(b"")

    def answer(self, value: bytes | None) -> None:
        self.send_response(200 if value is not None else 404)
        self.send_header("Content-Length", str(len(value or b"")))
        self.end_headers()
        self.wfile.write(value or b"")

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """What the server holds. This process is rank 1 of 2, on host a."""
    Server.store = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever).start()
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "127.0.0.1")
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", str(server.server_port))
    monkeypatch.setenv("HOROVOD_HOSTNAME", "a")
    for name, value in zip(rendezvous.PLACE, (1, 2, 0, 1, 1, 2), strict=True):
        monkeypatch.setenv(f"HOROVOD_{name}", str(value))
    yield Server.store
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("rank", "awaited"), [(0, "1"), (1, "all")])
def test_a_rank_waits_for_the_late(
    rank: int, awaited: str, store: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOROVOD_RANK", str(rank))
    began = time.monotonic()
    threading.Timer(0.5, store.update, [{f"/ready/{awaited}": b"1"}]).start()
    rendezvous.meet(again=False)
    assert time.monotonic() - began >= 0.4
    assert {f"/ready/{rank}", "/ready/all"} <= set(store)


def test_who_does_not_come_is_left_out(store: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "START_SECONDS", 0.3)
    store["/rank_and_size/a:0"] = b"0,1,0,1,0,1"
    rendezvous.meet(again=False)
    assert os.environ["HOROVOD_SIZE"] == "1"
    assert set(store) == {"/rank_and_size/a:0", "/ready/0", "/ready/all"}


def test_a_host_that_was_left_out(store: dict[str, bytes]) -> None:
    store["/rank_and_size/a:0"] = b"-1,-1,-1,-1,-1,-1"
    with pytest.raises(RunError, match="the job goes on without a"):
        rendezvous.meet(again=True)


def test_the_launcher_is_lost(store: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", "1")
    with pytest.raises(RunError, match="lost the launcher at "):
        rendezvous.meet(again=True)
