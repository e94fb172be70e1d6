"""A real headless Chromium, spoken to over its DevTools protocol: pages at any width, light and dark."""

import asyncio
import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
START_SECONDS, ANSWER_SECONDS, END_SECONDS = 120, 120, 60
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--disable-dev-shm-usage",
    "--hide-scrollbars", "--remote-debugging-port=0",
]  # fmt: skip
LOADED = "document.readyState === 'complete' && location.href"
FACTS = """(() => {
  const root = document.documentElement, width = root.clientWidth, box = e => e.getBoundingClientRect();
  const boxed = e => { for (let p = e.parentElement; p; p = p.parentElement)
    if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX)) return true; return false; };
  const name = e => `${e.tagName.toLowerCase()}.${e.className} ${(e.textContent || '').trim().slice(0, 40)}`;
  return {
    width, scroll_width: root.scrollWidth, title: document.title,
    overflowing: [...document.body.querySelectorAll('*')]
      .filter(e => box(e).right > width + 1 && !boxed(e)).map(name).slice(0, 5),
    images: [...document.images].map(e => [e.alt, e.complete && e.naturalWidth > 0, Math.round(box(e).width)]),
    tables: [...document.querySelectorAll('table')].map(e => Math.round(box(e).width)),
    background: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
  };
})()"""


@dataclass
class Seen:
    """What a page was like at one width and in one scheme."""

    facts: dict
    """By the page itself: widths in CSS pixels, images, colours."""
    said: list[str]
    """Errors and warnings of console, log and page."""
    requested: list[str]
    """Addresses, those within the page (data:) left out."""
    screenshot: bytes
    """PNG of the whole page."""


class Browser:
    """One that runs; a context manager."""

    def __enter__(self) -> "Browser":
        # Processes of its own may outlive it for a moment, and write there.
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        log = Path(self._profile.name, "log.txt")
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [CHROMIUM, *FLAGS, f"--user-data-dir={self._profile.name}/profile", "about:blank"],
                stdout=file, stderr=file, env={**os.environ, "HOME": self._profile.name},
            )  # fmt: skip
        told = Path(self._profile.name, "profile", "DevToolsActivePort")
        deadline = time.monotonic() + START_SECONDS
        while not (told.is_file() and "\n" in told.read_text()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise AssertionError(f"{CHROMIUM} does not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        self._port = int(told.read_text().splitlines()[0])
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=END_SECONDS)
        self._profile.cleanup()

    def look(self, page: Path, width: int, *, dark: bool = False) -> Seen:
        """Opens a file."""
        return asyncio.run(asyncio.wait_for(self._look(page, width, dark), ANSWER_SECONDS))

    async def _look(self, page: Path, width: int, dark: bool) -> Seen:
        async with aiohttp.ClientSession() as session:
            while (target := await self._page(session)) is None:  # it listens before it has one
                await asyncio.sleep(0.05)
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                return await Tab(socket).look(page, width, dark)

    async def _page(self, session: aiohttp.ClientSession) -> dict | None:
        async with session.get(f"http://127.0.0.1:{self._port}/json/list") as answer:
            return next((one for one in await answer.json() if one["type"] == "page"), None)


class Tab:
    """One tab: commands and their answers, and what it tells meanwhile."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket, self._number, self._told = socket, 0, []

    async def look(self, page: Path, width: int, dark: bool) -> Seen:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self._ask(f"{domain}.enable")
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self._ask("Emulation.setEmulatedMedia", features=scheme)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        await self._ask("Emulation.setDeviceMetricsOverride", **size)
        await self._ask("Page.navigate", url=page.absolute().as_uri())
        while not any(told["method"] == "Page.loadEventFired" for told in self._told):
            await self._hear()
        while await self._evaluate(LOADED) != page.absolute().as_uri():  # the event may be that of the page before it
            await asyncio.sleep(0.05)
        facts = await self._evaluate(FACTS)
        picture = await self._ask("Page.captureScreenshot", captureBeyondViewport=True)
        return Seen(facts, self._said(), self._requested(), base64.b64decode(picture["data"]))

    async def _evaluate(self, expression: str) -> Any:
        return (await self._ask("Runtime.evaluate", expression=expression, returnByValue=True))["result"].get("value")

    async def _ask(self, method: str, **parameters) -> dict:
        self._number += 1
        await self._socket.send_str(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while (message := await self._hear()).get("id") != self._number:
            pass
        assert "error" not in message, f"{method}: {message}"
        return message["result"]

    async def _hear(self) -> dict:
        message = json.loads((await self._socket.receive()).data)
        if "method" in message:
            self._told.append(message)
        return message

    def _said(self) -> list[str]:
        said = []
        for told in self._told:
            match told["method"], told["params"]:
                case "Runtime.consoleAPICalled", {"type": "error" | "warning" | "assert" as kind, "args": words}:
                    said.append(f"{kind}: {words}")
                case "Runtime.exceptionThrown", {"exceptionDetails": details}:
                    said.append(f"exception: {details}")
                case "Log.entryAdded", {"entry": {"level": "error" | "warning" as kind, "text": text}}:
                    said.append(f"{kind}: {text}")
        return said

    def _requested(self) -> list[str]:
        urls = [
            told["params"]["request"]["url"] for told in self._told if told["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith("data:")]
