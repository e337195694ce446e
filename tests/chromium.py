"""A headless Chromium for tests of pages, driven over its own protocol.

Its commands go through two pipes (`--remote-debugging-pipe`), so nothing is needed but the binary:
`apt-get install chromium-headless-shell` on Debian, which `.ci/run` does. With KD_SCREENSHOTS=DIR the pictures are kept.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.image import imread

BINARIES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BINARY = next((path for name in BINARIES if (path := shutil.which(name))), None)
START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
"""Chromium reads its commands from file descriptor 3 and answers on 4."""


class Browser:
    """One tab of a headless Chromium."""

    def __init__(self, profile: Path) -> None:
        read_commands, self.commands = os.pipe()
        self.answers, write_answers = os.pipe()
        flags = "headless no-sandbox disable-gpu disable-dev-shm-usage no-first-run remote-debugging-pipe"
        flags += f" disable-component-update disable-background-networking user-data-dir={profile}"
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                START,
                str(read_commands),
                str(write_answers),
                str(BINARY),
                *(f"--{flag}" for flag in flags.split(" ")),
                "about:blank",
            ],
            pass_fds=(read_commands, write_answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        self.buffer, self.number, self.session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and wait for its answer; events that come meanwhile are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    def wait_for(self, event: str) -> None:
        while not any(e.get("method") == event for e in self.events):
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            data = os.read(self.answers, 1 << 20)
            assert data, "the browser is gone"
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return dict(json.loads(message))

    def show(self, page: Path, *, width: int, dark: bool) -> None:
        """Load a file as a phone (width below 600) or a desk would."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        self.wait_for("Page.loadEventFired")

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression (the page itself has no script; the browser still has)."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self) -> np.ndarray:
        """Pixels of the whole page, `[height, width, 3]` in 0..1; kept as a file where KD_SCREENSHOTS says where."""
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"])
        if folder := os.environ.get("KD_SCREENSHOTS"):
            name = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split(" ")[0].replace("/", "_")
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / f"{name}.png").write_bytes(data)
        return np.asarray(imread(BytesIO(data)))[..., :3]

    def close(self) -> None:
        os.close(self.commands)
        self.process.kill()
        self.process.wait()
        os.close(self.answers)


def luminance(colour: np.ndarray) -> float:
    """Relative luminance of `[3]` sRGB in 0..1, WCAG 2.1."""
    linear = np.where(colour <= 0.03928, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(colours: tuple[str, str]) -> float:
    """Ratio of the luminances of two colours, `rgb(…)`; WCAG 2.1 asks for 4.5 between text and its ground."""
    one, other = (
        luminance(np.array([float(x) for x in c[c.index("(") + 1 : -1].split(",")[:3]]) / 255) for c in colours
    )
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)
