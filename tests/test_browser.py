"""JupyterLab in a real browser: a notebook shows its diagram, runs, and its sliders move a picture.

Spoken to over WebDriver's plain HTTP, so nothing but a Chromium and its driver is needed.
"""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
DRIVER = shutil.which("chromedriver") or ""
MISSING = {
    "jupyterlab and ipywidgets (pip install '.[dev]')": all(
        importlib.util.find_spec(name) for name in ("jupyterlab", "ipywidgets")
    ),
    "Chromium and its chromedriver (Debian: apt-get install chromium chromium-driver)": (
        CHROMIUM and DRIVER
    ),
}
TO_INSTALL = " and ".join(name for name, found in MISSING.items() if not found)
pytestmark = pytest.mark.skipif(bool(TO_INSTALL), reason=f"install {TO_INSTALL}")
FLAGS = """
    headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking
    disable-component-update disable-sync no-proxy-server window-size=1400,1400
"""
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key that WebDriver gives elements
LEFT, RIGHT = "\ue012", "\ue014"  # arrow keys
TOKEN = "of-this-test"
DIAGRAM = Path(__file__).parents[1] / "notebooks" / "diagrams" / "training.svg"
SPACE = """
import torch
from torch import nn
from netspace_lite import Images, Nets, NetSpace, SpaceConfig
from netspace_lite.tutorial import figures
from netspace_lite.tutorial.explorer import explorer

figures.use_style()
torch.manual_seed(0)
images = Images(torch.randn(30, 4), torch.arange(30) % 3)
config = SpaceConfig(embedding=6, probes=8, weights=False, hidden=16)
nets = Nets(nn.Sequential(nn.Linear(4, 3)), torch.randn(9, 15))
space = NetSpace.for_zoos(nets, images.x, config)
explorer(space, torch.randn(9, 6), torch.arange(9.0), images)
"""
PICTURE = "return document.querySelector('.widget-output img, .jupyter-widgets img')?.src"


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def ask(url: str, body: dict | None = None, method: str | None = None):
    """JSON from a server of this machine, past any proxy."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=60) as answer:
        return json.load(answer)


def wait(probe, what: str, seconds: float = 300):
    """What ``probe()`` returns as soon as that is true; a server not up yet counts as not."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := probe():
                return found
        except urllib.error.URLError:
            pass
        time.sleep(0.3)
    pytest.fail(f"waited {seconds:.0f} s in vain for {what}")


@contextmanager
def process(*command, **options):
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet, **options) as started:
        try:
            yield
        finally:
            started.terminate()


class Browser:
    """A session of a headless Chromium: pages, scripts, keys."""

    def __init__(self, driver: str, profile):
        flags = [f"--{flag}" for flag in (*FLAGS.split(), f"user-data-dir={profile}")]
        options = {"binary": CHROMIUM, "args": flags}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self.at = f"{driver}/session/{ask(f'{driver}/session', wanted)['value']['sessionId']}"

    def open(self, url: str) -> None:
        ask(f"{self.at}/url", {"url": url})

    def script(self, code: str):
        return ask(f"{self.at}/execute/sync", {"script": code, "args": []})["value"]

    def press(self, selector: str, number: int, key: str) -> None:
        look = {"using": "css selector", "value": selector}
        element = ask(f"{self.at}/elements", look)["value"][number][ELEMENT]
        ask(f"{self.at}/element/{element}/value", {"text": key})

    def close(self) -> None:
        ask(self.at, method="DELETE")


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab whose files and settings are in ``tmp_path``."""
    port = free_port()
    options = [f"--ServerApp.port={port}", "--ServerApp.ip=127.0.0.1", "--allow-root"]
    options += [
        "--no-browser",
        f"--IdentityProvider.token={TOKEN}",
        f"--ServerApp.root_dir={tmp_path}",
    ]
    own = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_RUNTIME_DIR": "run",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "spaces",
        "IPYTHONDIR": "ipython",
    }
    settings = {name: str(tmp_path / "home" / folder) for name, folder in own.items()}
    command = sys.executable, "-m", "jupyterlab", "--expose-app-in-browser", *options
    address = f"http://127.0.0.1:{port}"
    with process(*command, env={**os.environ, **settings}):
        wait(lambda: ask(f"{address}/api/status?token={TOKEN}"), "JupyterLab")
        yield address


@pytest.fixture
def browser(tmp_path):
    port = free_port()
    with process(DRIVER, f"--port={port}"):
        driver = f"http://127.0.0.1:{port}"
        wait(lambda: ask(f"{driver}/status")["value"]["ready"], "chromedriver")
        session = Browser(driver, tmp_path / "profile")
        yield session
        session.close()


def test_a_slider_of_the_explorer_changes_the_picture(tmp_path, lab, browser):
    book = nbformat.v4.new_notebook()
    book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book.cells = [
        nbformat.v4.new_markdown_cell(f"![method]({DIAGRAM.name})"),
        nbformat.v4.new_code_cell(SPACE),
    ]
    nbformat.write(book, tmp_path / "explore.ipynb")
    shutil.copy(DIAGRAM, tmp_path)
    browser.open(f"{lab}/lab/tree/explore.ipynb?token={TOKEN}")
    width = "return document.querySelector('img[alt=method]')?.naturalWidth"
    wait(lambda: browser.script(width), "the diagram")
    ready = "return document.querySelector('.jp-NotebookPanel [data-status=idle]') !== null"
    wait(lambda: browser.script(ready), "the kernel")
    browser.script("window.jupyterapp.commands.execute('notebook:run-all-cells'); return true")
    before = wait(lambda: browser.script(PICTURE), "a picture under the sliders")
    browser.press(".noUi-handle", 2, RIGHT)  # from net, to net, position on the line
    wait(lambda: browser.script(PICTURE) not in (None, before), "another picture")
    browser.press(".noUi-handle", 2, LEFT)  # back to the left: the first net again
    wait(lambda: browser.script(PICTURE) == before, "the first picture again")
