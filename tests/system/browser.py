"""A headless Chromium, spoken to over two pipes in its own protocol: real clicks, real pictures, every console error.

https://chromedevtools.github.io/devtools-protocol
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe")
COMPLAINTS = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled", "Network.requestWillBeSent")


class Browser:
    """One page. complaints: exceptions, console messages, what was refused, and whatever was asked of the network."""

    def __init__(self, incoming: IO[bytes], outgoing: IO[bytes]) -> None:
        self._incoming, self._outgoing = incoming, outgoing
        self._number = 0
        self._session: str | None = None
        self.complaints: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._outgoing.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])

    def _next(self) -> dict[str, Any]:
        text = bytearray()
        while (letter := self._incoming.read(1)) not in (b"\0", b""):
            text += letter
        assert text, "the browser has ended"
        message: dict[str, Any] = json.loads(text)
        asked = message.get("params", {}).get("request", {}).get("url", "")
        if message.get("method") in COMPLAINTS and not asked.startswith(("data:", "file:")):
            self.complaints.append(message["params"])
        return message

    def open(self, page: Path, ready: str, width: int = 1280, height: int = 800) -> None:
        """Until the JavaScript expression `ready` is true of the page."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.ask("Page.navigate", url=page.resolve().as_uri())
        self.run(
            f"new Promise(done => {{ const look = () => ({ready}) ? done(true) : setTimeout(look, 50); look(); }})"
        )

    def run(self, expression: str) -> Any:
        """What a JavaScript expression is, waited for."""
        answer = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """mousePressed, mouseMoved, mouseReleased or mouseWheel at a place of the page."""
        self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1, **more)

    def click(self, x: float, y: float) -> None:
        """A click there."""
        self.mouse("mousePressed", x, y)
        self.mouse("mouseReleased", x, y)

    def picture(self, path: Path) -> None:
        """A PNG of what is seen."""
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser that has nothing of its user's."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        # It reads commands from descriptor 3 and answers on 4.
        program = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        words = ["bash", "-c", program, "-", str(shutil.which("chromium")), *FLAGS, f"--user-data-dir={home}"]
        process = subprocess.Popen(words, pass_fds=[theirs_in, theirs_out], stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            with os.fdopen(ours_in, "rb") as incoming, os.fdopen(ours_out, "wb", buffering=0) as outgoing:
                yield Browser(incoming, outgoing)
        finally:
            process.terminate()
            process.wait()
