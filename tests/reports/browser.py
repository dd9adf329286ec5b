"""Headless Chromium over the W3C WebDriver protocol: JSON over HTTP to chromedriver, no package needed.

Debian: apt-get install chromium chromium-driver.
"""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's key of an element's id
OWN_PAGES = ("chrome://", "chrome-untrusted://")  # the new tab asks for some, at times late
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
 --disable-component-update --disable-sync --hide-scrollbars""".split()


class Browser:
    """A window; `folder` is its own profile. Leave it as a context manager."""

    def __init__(self, folder: Path, size: tuple[int, int] = (1280, 900)):
        chromium = (
            shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        )
        if not (chromium and shutil.which("chromedriver")):
            pytest.skip("no chromium with chromedriver: apt-get install chromium chromium-driver")
        self.driver = subprocess.Popen(
            ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        flags = [*FLAGS, f"--user-data-dir={folder}", f"--window-size={size[0]},{size[1]}"]
        options = {"binary": chromium, "args": flags}
        logs = {"performance": "ALL", "browser": "ALL"}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": logs}
        self.client = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self.base = ""
        try:
            self.base = f"http://127.0.0.1:{self._port()}/session"
            session = self._ask("", {"capabilities": {"alwaysMatch": wanted}})
        except BaseException:
            self.driver.kill()
            raise
        self.base += f"/{session['sessionId']}"

    def _port(self) -> str:
        """chromedriver chooses it and says so."""
        for line in self.driver.stdout:
            if "started successfully on port" in line:
                return line.rstrip(".\n").split()[-1]
        raise RuntimeError("chromedriver did not start")

    def _ask(self, path: str, content: Any = None, method: str | None = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.base + path, data, headers, method=method)
        try:
            with self.client.open(request, timeout=300) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as e:
            raise RuntimeError(json.load(e)["value"]["message"]) from None

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._ask("", method="DELETE")
        finally:
            self.driver.terminate()
            self.driver.wait(20)
            self.driver.stdout.close()

    def open(self, page: Path) -> None:
        """From the disk; returns when it is loaded."""
        self._ask("/url", {"url": page.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a JavaScript function returns."""
        return self._ask("/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, condition: str, seconds: float = 60) -> Any:
        """Until a JavaScript expression is true; its value."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(f"return {condition}"):
                return value
            time.sleep(0.05)
        raise AssertionError(f"never true: {condition}")

    def click(self, selector: str) -> None:
        element = self._ask("/element", {"using": "css selector", "value": selector})
        self._ask(f"/element/{element[ELEMENT]}/click", {})

    def slide(self, selector: str, value: float | str, number: int = 0) -> None:
        """Give the number-th input that the selector finds a value, as a user does."""
        script = "const input = document.querySelectorAll(arguments[0])[arguments[1]];"
        script += "input.value = arguments[2]; input.dispatchEvent(new Event('input'))"
        self.run(script, selector, number, value)

    def box(self, selector: str, number: int = 0) -> tuple[float, float, float, float]:
        """(left, top, width, height) of the number-th element that the selector finds, scrolled into the
        window."""
        script = "const e = document.querySelectorAll(arguments[0])[arguments[1]];"
        script += "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
        return tuple(self.run(script + "return [b.x, b.y, b.width, b.height]", selector, number))

    def point(self, x: float, y: float, press: bool = False) -> None:
        """Move the mouse to a place of the window; press: and click there."""
        actions = [{"type": "pointerMove", "x": round(x), "y": round(y), "duration": 20}]
        actions += [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}] if press else []
        self._ask("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": actions}]})

    def prefer(self, scheme: str) -> None:
        """ "light" or "dark", as the user's system says."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        command = {"cmd": "Emulation.setEmulatedMedia", "params": {"features": [feature]}}
        self._ask("/goog/cdp/execute", command)

    def picture(self, path: Path) -> Path:
        """The window as a PNG file."""
        path.write_bytes(base64.b64decode(self._ask("/screenshot")))
        return path

    def requests(self) -> list[str]:
        """The addresses of all that was asked for since the last call; those of the browser's own pages left
        out."""
        entries = [json.loads(e["message"])["message"] for e in self._ask("/se/log", {"type": "performance"})]
        urls = [e["params"]["request"]["url"] for e in entries if e["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith(OWN_PAGES)]

    def complaints(self) -> list[str]:
        """Errors and warnings on the console since the last call."""
        return [entry["message"] for entry in self._ask("/se/log", {"type": "browser"})]
