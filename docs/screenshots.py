"""Make docs/images/ anew, from a real extraction: .venv/bin/python docs/screenshots.py

Needs Debian's chromium. The digits are extracted in a temporary folder by a Ray of their own; meanwhile Chromium is
shown the Ray dashboard, and the terminal view is drawn as `make watch` draws it. Names of this machine, its addresses
and its folders are replaced in the pages before a picture is taken.
"""

import asyncio
import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
from rich.console import Console
from rich.terminal_theme import MONOKAI

from infra.running_ray import dashboard_url, living_sessions, metrics_addresses, read_metrics
from infra.watch_source import Place, Status, machines
from infra.watch_view import picture, short_names

REPOSITORY = Path(__file__).resolve().parents[1]
IMAGES = REPOSITORY / "docs" / "images"
WIDTH, HEIGHT = 1280, 800
COLUMNS = 100
MAX_NBYTES = 300_000


class Page:
    """A tab of a headless Chromium, driven by its debugging protocol."""

    def __init__(self, socket_: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number = socket_, 0

    async def call(self, method: str, **parameters: object) -> dict:
        """One command and its answer."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            answer = await self._socket.receive_json(timeout=60)
            if answer.get("id") == self._number:
                return answer["result"]

    async def show(self, url: str, *, until: str, timeout_s: float = 60.0) -> None:
        """Open an address and wait until an expression of JavaScript is true."""
        await self.call("Page.navigate", url=url)
        end = time.monotonic() + timeout_s
        while not (await self.call("Runtime.evaluate", expression=until))["result"].get("value"):
            if time.monotonic() > end:
                raise TimeoutError(f"{url} does not show {until}")
            await asyncio.sleep(0.5)
        await asyncio.sleep(2.0)  # what fades in has come

    async def take(self, path: Path, hidden: dict[str, str], *, height: int | None = None) -> None:
        """Replace words in the page, and save a picture, of its upper part if a height is given."""
        script = f"""
            const hidden = {json.dumps(hidden)};
            const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            for (let node = walk.nextNode(); node; node = walk.nextNode())
                for (const [word, other] of Object.entries(hidden))
                    node.textContent = node.textContent.replaceAll(word, other);
        """
        await self.call("Runtime.evaluate", expression=script)
        part = {"clip": {"x": 0, "y": 0, "width": WIDTH, "height": height, "scale": 1}} if height else {}
        found = await self.call("Page.captureScreenshot", format="png", **part)
        save(path, base64.b64decode(found["data"]))


@asynccontextmanager
async def chromium() -> AsyncIterator[Page]:
    """A Chromium without a window."""
    program = shutil.which("chromium")
    if program is None:
        sys.exit("chromium is not installed: apt-get install chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0"]
        process = await asyncio.create_subprocess_exec(
            *(program, *options, f"--user-data-dir={profile}", f"--window-size={WIDTH},{HEIGHT}", "about:blank"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port_file = Path(profile) / "DevToolsActivePort"
            while not port_file.exists() or not port_file.read_text():
                await asyncio.sleep(0.1)
            port = port_file.read_text().split()[0]
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json") as reply:
                    tabs = await reply.json()
                url = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
                async with session.ws_connect(url, max_msg_size=2**26) as socket_:
                    page = Page(socket_)
                    await page.call(
                        "Emulation.setDeviceMetricsOverride",
                        **{"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False},
                    )
                    yield page
        finally:
            process.terminate()
            await process.wait()


def save(path: Path, data: bytes) -> None:
    """Keep a picture, if it is small."""
    if len(data) > MAX_NBYTES:
        raise ValueError(f"{path} has {len(data)} bytes, more than {MAX_NBYTES}")
    path.write_bytes(data)
    print(path.relative_to(REPOSITORY), len(data))


async def take_terminal(page: Page, statuses: list[Status], nodes: list[str], folder: Path, hidden: dict) -> None:
    """What `make watch` draws, as a picture of a terminal."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(picture(statuses, short_names(statuses), nodes, []))
    svg = console.export_svg(title="make watch STORE=data/stores/digits", theme=MONOKAI)
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # it would be fetched; the machine's own does
    svg = svg.replace("Fira Code", "DejaVu Sans Mono")
    width, height = (float(number) for number in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0])
    file = folder / "watch.html"
    file.write_text(f"<body style='margin:0'>{svg.replace('<svg', f'<svg width={WIDTH}', 1)}</body>")
    size = {"width": WIDTH, "height": round(height * WIDTH / width), "deviceScaleFactor": 1, "mobile": False}
    await page.call("Emulation.setDeviceMetricsOverride", **size)
    await page.show(file.as_uri(), until="document.querySelector('svg') !== null")
    await page.take(IMAGES / "watch.png", hidden)
    await page.call("Emulation.setDeviceMetricsOverride", **(size | {"height": HEIGHT}))


async def take_all(folder: Path, store: Path) -> None:
    """Wait until the extraction is at work, then take the pictures one after the other."""
    place, found = Place(str(store)), []
    while not any(status.document.get("busy") and status.document["images_done"] > 300 for status in found):
        await asyncio.sleep(1)
        found = [status for status in place.read() if status.living] if store.exists() else []
    (session,) = living_sessions()
    host, url = socket.gethostname(), dashboard_url(session)
    hidden = {
        f"{sys.executable} ": ".venv/bin/python ",
        f"{REPOSITORY}/": "",
        f"{folder}/": "",
        session.addresses[0].rpartition(":")[0]: "10.0.0.1",
    }
    async with chromium() as page:
        values, _ = read_metrics(metrics_addresses(None), "ray_")
        await take_terminal(page, found, machines(values), folder, hidden)
        hidden |= {host: "node-1", str(folder): "data"}
        await page.show(f"{url}/#/actors", until="document.body.innerText.includes('ALIVE')")
        await page.take(IMAGES / "ray-actors.png", hidden, height=400)


def main() -> None:
    """Extract, look, and put what was seen into docs/images/."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        os.environ |= {"RAY_TMPDIR": name, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        os.environ.pop("RAY_ADDRESS", None)
        extraction = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "extract", "--images", "digits", "--store", "data/stores/digits"],
            cwd=folder,
        )
        try:
            asyncio.run(take_all(folder, folder / "data/stores/digits"))
        finally:
            extraction.terminate()
            extraction.wait(60)


if __name__ == "__main__":
    main()
