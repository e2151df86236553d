"""A person at a browser: headless Chromium, driven through Debian's chromedriver by the W3C's WebDriver protocol."""

import base64
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = "no Chromium with its chromedriver here (Debian: apt-get install chromium chromium-driver)"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver, section 12.1: the key of a reference to an element
OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]


@dataclass(frozen=True)
class Browser:
    """One window.

    Args:
        session: of a driver, as a client whose base is its address.
        downloads: where files go that the page offers.
    """

    session: httpx.Client
    downloads: Path

    def ask(self, method: str, path: str, **words: object) -> object:
        """One command of the protocol."""
        answer = self.session.request(method, path, json=words if method == "POST" else None)
        assert answer.status_code == 200, answer.json()["value"]["message"]
        return answer.json()["value"]

    def open(self, url: str) -> None:
        self.ask("POST", "url", url=url)

    def run(self, script: str, *args: object) -> object:
        """What a function's body returns."""
        return self.ask("POST", "execute/sync", script=script, args=args)

    def wait(self, script: str, seconds: float = 240) -> object:
        """What an expression comes to be, once that is true; it is looked at ten times a second."""
        end = time.monotonic() + seconds
        while not (value := self.run(f"return {script}")):
            assert time.monotonic() < end, f"not within {seconds} s: {script}\n{self.text('body')}"
            time.sleep(0.1)
        return value

    def click(self, css: str) -> None:
        self.ask("POST", f"element/{self._find(css)}/click")

    def type(self, css: str, text: str) -> None:
        """Keys for what has the focus after a click; a path for a file's input."""
        self.ask("POST", f"element/{self._find(css)}/value", text=text)

    def replace(self, css: str, text: str) -> None:
        """Type in place of what a field holds."""
        self.ask("POST", f"element/{self._find(css)}/clear")
        self.type(css, text)

    def drag(self, css: str, dx: int) -> None:
        """Take an element by its middle and let it go further right."""
        middle = {"type": "pointerMove", "x": 0, "y": 0, "origin": {ELEMENT: self._find(css)}}
        aside = {"type": "pointerMove", "x": dx, "y": 0, "origin": "pointer"}
        down, up = {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}
        way = [middle, down, aside, up]
        self.ask("POST", "actions", actions=[{"type": "pointer", "id": "mouse", "actions": way}])

    def text(self, css: str) -> str:
        """What can be read."""
        return str(self.ask("GET", f"element/{self._find(css)}/text"))

    def picture(self, path: Path, css: str = "") -> None:
        """The window, or one element, as PNG."""
        content = self.ask("GET", f"element/{self._find(css)}/screenshot" if css else "screenshot")
        path.write_bytes(base64.b64decode(str(content)))

    def asked_for(self) -> set[str]:
        """Addresses that were asked for since the last look."""
        events = [json.loads(e["message"])["message"] for e in self.ask("POST", "se/log", type="performance")]
        return {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}

    def _find(self, css: str) -> str:
        return self.ask("POST", "element", using="css selector", value=css)[ELEMENT]


@contextmanager
def browser(folder: Path, size: tuple[int, int] = (1280, 1000)) -> Iterator[Browser]:
    """A window with a profile of its own, closed at the end."""
    command = [DRIVER, "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as driver:
        try:
            started = next(line for line in driver.stdout if "successfully on port" in line)
            port = re.search(r"port (\d+)", started)[1]
            address = f"http://127.0.0.1:{port}/session"
            words = {"capabilities": {"alwaysMatch": _wishes(folder, size)}}
            made = httpx.post(address, json=words, timeout=120, trust_env=False).json()["value"]
            assert "sessionId" in made, made["message"]
            with httpx.Client(base_url=f"{address}/{made['sessionId']}", timeout=120, trust_env=False) as session:
                yield Browser(session, folder / "downloads")
                session.delete("")
        finally:
            driver.terminate()


def _wishes(folder: Path, size: tuple[int, int]) -> dict[str, object]:
    (folder / "downloads").mkdir(parents=True)
    args = [*OPTIONS, f"--window-size={size[0]},{size[1]}", f"--user-data-dir={folder / 'profile'}"]
    prefs = {"download.default_directory": str(folder / "downloads"), "download.prompt_for_download": False}
    return {
        "goog:chromeOptions": {"binary": CHROMIUM, "args": args, "prefs": prefs},
        "goog:loggingPrefs": {"performance": "ALL"},
    }
