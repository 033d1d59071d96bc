"""Headless Chromium, driven by its DevTools protocol over two pipes."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Tab:
    """One tab, with the messages of its console."""

    page: Path

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = os.fdopen(to_browser, "wb", buffering=0), os.fdopen(from_browser, "rb")
        self._n_sent, self._session = 0, ""
        self.console: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """Send a command, and return its result."""
        self._n_sent += 1
        message = {"id": self._n_sent, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._read())
            if answer.get("id") == self._n_sent:
                assert "error" not in answer, answer
                return answer["result"]
            if answer["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                self.console.append(json.dumps(answer["params"]))

    def evaluate(self, script: str) -> Any:
        """Run JavaScript, which may await, and return its value as JSON has it."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def open(self, path: Path, width: int, height: int = 900, scheme: str = "light") -> None:
        """Open a page in a window of this size, and wait until its ``data-ready`` is set."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=path.resolve().as_uri())
        is_ready = self.evaluate(
            "new Promise((done) => { setTimeout(() => done(false), 300000); const look = () => document.documentElement"
            "?.dataset.ready === 'true' ? done(true) : setTimeout(look, 20); look(); })"
        )
        assert is_ready, self.console

    def close(self) -> None:
        """Close the pipes, which ends the browser."""
        self._to.close()
        self._from.close()

    def _read(self) -> bytes:
        content = bytearray()
        while (byte := self._from.read(1)) not in (b"\0", b""):
            content += byte
        assert byte, "Chromium has ended"
        return bytes(content)


@contextmanager
def tab(profile: Path) -> Iterator[Tab]:
    """Start a browser without a network, whose own files are in a folder; it ends with the context."""
    to_browser, from_test = os.pipe()
    from_browser, to_test = os.pipe()

    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--no-first-run",
        "--remote-debugging-pipe",
    ]
    options += [f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    # The browser reads from descriptor 3 and writes to 4.
    shell = ["bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{to_test}', "bash", str(PROGRAM), *options, "about:blank"]
    process = subprocess.Popen(
        shell,
        pass_fds=(to_browser, to_test),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(to_browser)
    os.close(to_test)
    opened = None
    try:
        opened = Tab(from_test, from_browser)
        yield opened
    finally:
        if opened is not None:
            opened.close()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
