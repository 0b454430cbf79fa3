"""A headless browser, by its debugging protocol over a pipe: no package, no port, no network."""

import base64
import json
import os
import shutil
import subprocess
import tempfile

import numpy as np

from nanoalign import UserError

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATH = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
    "--hide-scrollbars", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-extensions", "--force-color-profile=srgb",
)  # fmt: skip


PIXELS = """(async () => {
  const image = new Image();
  image.src = "data:image/png;base64,%s";
  await image.decode();
  const canvas = new OffscreenCanvas(image.width, image.height), context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const bytes = context.getImageData(0, 0, image.width, image.height).data, parts = [];
  for (let at = 0; at < bytes.length; at += 32768)
    parts.push(String.fromCharCode(...bytes.subarray(at, at + 32768)));
  return btoa(parts.join(""));
})()"""


class Browser:
    """One page of one browser. errors: what console and script complained of; requests: what it loaded."""

    def __init__(self):
        if not PATH:
            raise UserError(
                f"there is no browser: one of {', '.join(NAMES)} must be installed (make browser)."
            )
        self.profile = tempfile.mkdtemp()
        (to_read, self.to), (self.out, to_write) = os.pipe(), os.pipe()
        command = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        flags = [*FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", command, PATH, *flags], pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self.number, self.rest, self.session = 0, b"", None
        self.errors, self.requests, self.loaded = [], [], False
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def message(self) -> dict:
        while b"\0" not in self.rest:
            piece = os.read(self.out, 1 << 16)
            if not piece:
                raise RuntimeError("the browser has ended")
            self.rest += piece
        one, self.rest = self.rest.split(b"\0", 1)
        return json.loads(one)

    def hear(self, message: dict) -> None:
        name, found = message.get("method"), message.get("params", {})
        if name == "Runtime.exceptionThrown":
            self.errors.append(
                found["exceptionDetails"].get("exception", {}).get("description", "an exception")
            )
        elif name == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning"):
            self.errors.append(str(found["args"]))
        elif name == "Log.entryAdded" and found["entry"]["level"] == "error":
            self.errors.append(found["entry"]["text"])
        elif name == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])
        elif name == "Page.loadEventFired":
            self.loaded = True

    def ask(self, name: str, **parameters) -> dict:
        self.number += 1
        message = {"id": self.number, "method": name, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self.message()).get("id") != self.number:
            self.hear(answer)
        if "error" in answer:
            raise RuntimeError(f"{name}: {answer['error']['message']}")
        return answer["result"]

    def open(
        self, path: str, width: int = 1200, height: int = 900, dark: bool = False, still: bool = False
    ) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **metrics)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        features += [{"name": "prefers-reduced-motion", "value": "reduce"}] if still else []
        self.ask("Emulation.setEmulatedMedia", features=features)
        self.loaded, self.requests, self.errors = False, [], []
        self.ask("Page.navigate", url=f"file://{os.path.abspath(path)}")
        while not self.loaded:
            self.hear(self.message())

    def run(self, expression: str):
        """The value of an expression of JavaScript in the page."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description", "an exception"))
        return found["result"].get("value")

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def picture(self, clip: dict | None = None) -> bytes:
        """The page, or a part {"x", "y", "width", "height"} of it → a PNG file."""
        options = {"clip": {**clip, "scale": 1}} if clip else {}
        found = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True, **options)
        return base64.b64decode(found["data"])

    def pixels(self, png: bytes) -> np.ndarray:
        """A PNG file → (height, width, 3) bytes. On a page of its own: it leaves the one that is open."""
        self.ask("Page.navigate", url="about:blank")
        size = [int.from_bytes(png[at : at + 4], "big") for at in (16, 20)]
        raw = self.run(PIXELS % base64.b64encode(png).decode())
        return np.frombuffer(base64.b64decode(raw), np.uint8).reshape(size[1], size[0], 4)[..., :3]

    def close(self) -> None:
        try:
            self.session = None
            self.ask("Browser.close")
        except (RuntimeError, OSError):
            self.process.kill()
        self.process.wait(timeout=20)
        os.close(self.to)
        os.close(self.out)
        shutil.rmtree(self.profile, ignore_errors=True)
