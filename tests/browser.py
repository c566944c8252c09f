"""What a headless Chromium makes of a page: what it asks for, what it complains about, and how wide it is."""

import asyncio
import base64
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

START_S = 120.0
CHROMIUM = shutil.which("chromium")
_OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0")
# Not of the inner width: a phone widens its window to what is in it.
_MEASURE = """JSON.stringify({
  overflow: document.documentElement.scrollWidth - WIDTH,
  broken: [...document.images].filter(one => !one.complete || !one.naturalWidth).map(one => one.alt),
  images: document.images.length,
  covered: [...document.querySelectorAll('h1,h2,h3,p,figcaption,dd')].filter(
    one => one.getBoundingClientRect().right > WIDTH + 1).map(one => one.textContent.slice(0, 60)),
  height: document.documentElement.scrollHeight,
})"""


@dataclass(frozen=True, kw_only=True)
class Look:
    """One page at one width.

    Attributes:
        requests: Addresses that were asked for, besides data: and the page itself.
        complaints: Errors and warnings of console, scripts, network and security.
        overflow: By how many pixels the page is wider than the window.
        broken: Images that are not shown.
        n_images: All of them.
        covered: Beginnings of texts that go beyond the window.
        height: Of the whole page, pixels.
        picture: PNG of the part that was asked for.
    """

    requests: Sequence[str]
    complaints: Sequence[str]
    overflow: int
    broken: Sequence[str]
    n_images: int
    covered: Sequence[str]
    height: int
    picture: bytes


def look_at(page: Path, *, width: int, height: int, tall: bool = False) -> Look:
    """Open a file in a Chromium of its own; a picture of the window, or of the whole page if it is `tall`."""
    return asyncio.run(_look(page, width, height, tall))


async def _look(page: Path, width: int, height: int, tall: bool) -> Look:
    assert CHROMIUM is not None, "chromium is not installed"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            *(CHROMIUM, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            port = await _port(Path(profile) / "DevToolsActivePort")
            async with aiohttp.ClientSession() as session:
                url = await _tab(session, port)
                async with session.ws_connect(url, max_msg_size=2**28) as socket:
                    return await _Tab(socket).look(page, width, height, tall)
        finally:
            process.terminate()
            await process.wait()


async def _tab(session: aiohttp.ClientSession, port: str) -> str:
    """Where the first tab is driven; the browser listens before there is one."""
    end = time.monotonic() + START_S
    while True:
        async with session.get(f"http://127.0.0.1:{port}/json") as reply:
            for tab in await reply.json():
                if tab["type"] == "page":
                    return tab["webSocketDebuggerUrl"]
        assert time.monotonic() < end, "chromium has no tab"
        await asyncio.sleep(0.05)


async def _port(file: Path) -> str:
    end = time.monotonic() + START_S
    while not file.exists() or "\n" not in file.read_text():
        assert time.monotonic() < end, "chromium does not start"
        await asyncio.sleep(0.05)
    return file.read_text().split()[0]


class _Tab:
    """A tab, driven by its debugging protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number = socket, 0
        self._events: list[dict[str, Any]] = []

    async def look(self, page: Path, width: int, height: int, tall: bool) -> Look:
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self._call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        await self._call("Emulation.setDeviceMetricsOverride", **size)
        await self._call("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(await self._socket.receive_json(timeout=START_S))
        answer = await self._call("Runtime.evaluate", expression=_MEASURE.replace("WIDTH", str(width)))
        found = json.loads(answer["result"]["value"])
        clip = {"x": 0, "y": 0, "width": width, "height": found["height"] if tall else height, "scale": 1}
        shot = await self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return Look(
            requests=[
                url
                for event in self._events
                if event["method"] == "Network.requestWillBeSent"
                and not (url := event["params"]["request"]["url"]).startswith("data:")
                and url != page.resolve().as_uri()
            ],
            complaints=[json.dumps(event["params"])[:300] for event in self._events if _complains(event)],
            overflow=found["overflow"],
            broken=found["broken"],
            n_images=found["images"],
            covered=found["covered"],
            height=found["height"],
            picture=base64.b64decode(shot["data"]),
        )

    async def _call(self, method: str, **parameters: object) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            answer = await self._socket.receive_json(timeout=START_S)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._events.append(answer)


def _complains(event: dict[str, Any]) -> bool:
    if event["method"] == "Log.entryAdded":
        return event["params"]["entry"]["level"] in ("warning", "error")
    if event["method"] == "Runtime.consoleAPICalled":
        return event["params"]["type"] in ("warning", "error", "assert")
    return event["method"] in ("Runtime.exceptionThrown", "Network.loadingFailed")
