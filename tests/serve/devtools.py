"""A real browser without a window, told what to do by Chromium's DevTools protocol over a pair of pipes."""

import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from browser import FLAGS, NAMES

SECONDS = 60
# A browser reads commands from descriptor 3 and writes answers to descriptor 4.
START = """
import os, sys
pipes = [os.dup(int(number)) for number in sys.argv[1:3]]
for number, pipe in enumerate(pipes, 3):
    os.dup2(pipe, number)
    os.set_inheritable(number, True)  # also if it was that number already
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """An empty page of a new browser, with a profile in ``folder``."""

    def __init__(self, folder: Path, width: int, height: int) -> None:
        binary = next(filter(None, map(shutil.which, NAMES)), None)
        if binary is None:
            pytest.skip(f"there is no browser here: none of {', '.join(NAMES)}")
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        command = [sys.executable, "-c", START, str(theirs_in), str(theirs_out), binary, *FLAGS]
        command += ["--remote-debugging-pipe", f"--user-data-dir={folder}/profile", "about:blank"]
        self._process = subprocess.Popen(
            command, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._sent, self._session, self.events = b"", 0, None, []
        (target,) = (each for each in self("Target.getTargets")["targetInfos"] if each["type"] == "page")
        attached = self("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self(f"{domain}.enable")
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def __call__(self, method: str, **parameters: Any) -> Any:
        """The result of one of DevTools' methods."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._sent:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self.events.append(answer)

    def _read(self):
        while b"\0" not in self._buffer:
            assert select.select([self._from], [], [], SECONDS)[0], "the browser is silent"
            part = os.read(self._from, 1 << 20)
            assert part, "the browser ended"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript on the page."""
        found = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script: str) -> Any:
        """The value of an expression once it is true."""
        end = time.monotonic() + SECONDS
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)
        return value

    def choose(self, file: Path) -> None:
        """Choose a file in the page's field for files."""
        root = self("DOM.getDocument")["root"]["nodeId"]
        field = self("DOM.querySelector", nodeId=root, selector="input[type=file]")["nodeId"]
        self("DOM.setFileInputFiles", nodeId=field, files=[str(file)])

    @property
    def complaints(self) -> list[str]:
        """What the browser logged as errors: exceptions, and what the page's policy forbids."""
        self.run("0")  # so that what came before is read
        found = []
        for event in self.events:
            if event["method"] == "Runtime.exceptionThrown":
                found.append(event["params"]["exceptionDetails"]["text"])
            if event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                found.append(event["params"]["entry"]["text"])
        return found

    def close(self) -> None:
        """End the browser."""
        os.close(self._to)  # which ends it
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._from)
