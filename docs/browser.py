"""A headless Chromium, told what to do over a pipe (Chrome DevTools Protocol), for pictures and for tests of pages.

Debian's package chromium is enough; there is nothing else to install.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --hide-scrollbars "
    "--force-color-profile=srgb --remote-debugging-pipe"
)


class Browser:
    """Pages in one process. Messages are JSON that ends with a zero byte."""

    def __init__(self, program: str, folder: str) -> None:
        commands, answers = os.pipe(), os.pipe()
        # It reads from descriptor 3 and writes to 4, which may be these pipes' own: they are moved out of the way.
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (commands[0], answers[1])]
        line = f'exec "$0" {FLAGS} --user-data-dir="$1" about:blank 3<&{theirs[0]} 4>&{theirs[1]}'
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(
            ["bash", "-c", line, program, folder], pass_fds=theirs, stdout=quiet, stderr=quiet
        )
        for end in (commands[0], answers[1], *theirs):
            os.close(end)
        self._commands, self._answers = os.fdopen(commands[1], "wb"), os.fdopen(answers[0], "rb")
        self._numbers, self._rest = itertools.count(1), b""
        self.events: list[dict[str, Any]] = []

    def tell(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        """Send a command and return what it results in; events that come meanwhile are kept."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while True:
            answer = self._read()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])
            self.events.append(answer)

    def wait(self, method: str, session: str) -> None:
        """Until an event of this name has come."""
        while not any(e.get("method") == method and e.get("sessionId") == session for e in self.events):
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._answers.fileno(), 2**16)
            if not piece:
                raise RuntimeError("the browser has ended")
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(RuntimeError, OSError):
            self.tell("Browser.close")
        self.process.wait(30)
        self._commands.close()
        self._answers.close()


class Page:
    """A page that is loaded. complaints: errors that its scripts raised or the browser wrote on its console."""

    def __init__(self, browser: Browser, address: str, width: int, height: int, dark: bool) -> None:
        self._browser = browser
        target = browser.tell("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.tell(f"{domain}.enable")
        self.tell(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", features=[scheme])
        self.tell("Page.navigate", url=address)
        browser.wait("Page.loadEventFired", self._session)

    def tell(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command to this page."""
        return self._browser.tell(method, self._session, **parameters)

    def ask(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.tell("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def place(self, selector: str) -> tuple[float, float]:
        """The middle of an element, scrolled into view."""
        script = f"""(() => {{ const e = document.querySelector({json.dumps(selector)});
            e.scrollIntoView({{block: "center", behavior: "instant"}}); const b = e.getBoundingClientRect();
            return [b.x + b.width / 2, b.y + b.height / 2]; }})()"""
        x, y = self.ask(script)
        return x, y

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """mousePressed, mouseMoved, mouseReleased or mouseWheel at a place of the page."""
        self.tell("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def click_at(self, x: float, y: float) -> None:
        """As a mouse does."""
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, x, y, button="left", clickCount=1)

    def click(self, selector: str) -> None:
        """On the middle of an element."""
        self.click_at(*self.place(selector))

    def hover(self, selector: str) -> None:
        """Move the mouse onto an element."""
        self.mouse("mouseMoved", *self.place(selector))

    def press(self, key: str) -> None:
        """A key by its name."""
        code = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowRight": 39}[key]
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.tell("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def picture(self, path: Path, whole: bool = False) -> None:
        """What is seen, or the whole page, as PNG."""
        size = self.tell("Page.getLayoutMetrics")["cssContentSize" if whole else "cssVisualViewport"]
        width, height = (size["width"], size["height"]) if whole else (size["clientWidth"], size["clientHeight"])
        at = {"x": 0, "y": 0} if whole else {"x": size["pageX"], "y": size["pageY"]}
        clip = {**at, "width": width, "height": height, "scale": 1}
        found = self.tell("Page.captureScreenshot", format="png", captureBeyondViewport=whole, clip=clip)
        path.write_bytes(base64.b64decode(found["data"]))

    @property
    def complaints(self) -> list[str]:
        """So far."""
        found = []
        self.ask("0")  # what came before this has come
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            facts = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(facts["exceptionDetails"].get("exception", facts["exceptionDetails"])))
            if event["method"] == "Runtime.consoleAPICalled" and facts["type"] in ("error", "warning", "assert"):
                found.append(str(facts["args"]))
            if event["method"] == "Log.entryAdded" and facts["entry"]["level"] in ("error", "warning"):
                found.append(facts["entry"]["text"])
        return found


@contextlib.contextmanager
def browser(program: str = PROGRAM) -> Iterator[Browser]:
    """A browser for the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        made = Browser(program, folder)
        try:
            yield made
        finally:
            made.close()


def load(made: Browser, file: Path, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
    """A page from the disk."""
    return Page(made, file.resolve().as_uri(), width, height, dark)
