"""A headless Chromium, driven by the DevTools protocol: for tests that look at pages as a reader's browser does."""

import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OPTIONS = (
    "--headless",
    "--no-sandbox",  # which root, in a container, cannot have
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-port=0",
)
PATIENCE = 60.0


def path() -> str | None:
    """Where Chromium is, if it is there: as Debian, and others, call it."""
    found = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    return next((where for name in found if name and (where := shutil.which(name))), None)


class Browser:
    """One page that is led from place to place, and all that it complains of and asks for on its way.

    ``complaints``: what scripts threw, what is written to the console as an error or a warning, what was not found.
    ``requests``: the addresses of everything that was loaded.
    """

    def __init__(self, socket: Any) -> None:
        self._socket, self._count = socket, 0
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> Any:
        """Call a method of the protocol, and return its result."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if hasattr(self, "_session"):
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(PATIENCE))
            if answer.get("id") == message["id"]:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self._heard(answer)

    def _heard(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(
                " ".join(str(x.get("value", x.get("description"))) for x in params["args"])
            )
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def open(self, url: str) -> None:
        """Go to an address, and wait until it is loaded."""
        self._loaded = False
        if "loaderId" not in self("Page.navigate", url=url):
            return  # another place on the same page
        until = time.monotonic() + PATIENCE
        while not self._loaded:
            if time.monotonic() > until:
                raise TimeoutError(f"{url} was not loaded in {PATIENCE:.0f} s")
            self._heard(json.loads(self._socket.recv(PATIENCE)))

    def run(self, script: str) -> Any:
        """What a JavaScript expression comes to in the page; a promise is waited for."""
        result = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")

    def size(self, width: int, height: int, dark: bool = False, phone: bool = False) -> None:
        """The window from here on, and which colours the system prefers."""
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, file: Path) -> None:
        """Write what is seen to a PNG."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def started() -> Iterator[Browser]:
    """A browser, with a profile of its own, which ends with the ``with`` block."""
    from websockets.sync.client import connect

    where = path()
    assert where is not None, "there is no Chromium"
    with tempfile.TemporaryDirectory(prefix="chromium", ignore_cleanup_errors=True) as profile:
        command = [where, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        ) as process:
            try:
                assert process.stderr is not None
                said: list[str] = []
                for line in process.stderr:
                    said.append(line)
                    if found := re.match(r"DevTools listening on (ws://\S+)", line):
                        break
                else:
                    raise RuntimeError(f"{where} did not start:\n{''.join(said)}")
                with connect(found[1], max_size=None, proxy=None) as socket:
                    yield Browser(socket)
            finally:
                process.terminate()
                process.wait(PATIENCE)
