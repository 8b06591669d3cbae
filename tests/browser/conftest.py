"""A real recorded run, a viewer of it, and a real chromium that looks at it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

import kvtrace
import kvtrace_recorder
from kvtrace import Trace
from kvtrace_recorder import demo
from kvtrace_viewer.replay import replay

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
#: Of a wait: a page takes ten seconds on a machine that has much else to do.
TIMEOUT_S = 120.0
TEXT = "The cache keeps keys and values. The cache evicts keys, and the values go with the keys."
NEW_TOKENS = 24


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything here, and skip it with the reason where there is no browser."""
    missing = [
        name for name, path in (("chromium", CHROMIUM), ("chromedriver", DRIVER)) if not path
    ]
    for item in items:
        if Path(__file__).parent not in Path(item.path).parents:
            continue
        item.add_marker(pytest.mark.browser)
        if missing:
            item.add_marker(
                pytest.mark.skip(reason=f"no {' and no '.join(missing)} on this machine")
            )


@pytest.fixture(scope="session")
def trace_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short real run of the bundled model, its replays, and a damaged trace."""
    root = tmp_path_factory.mktemp("traces")
    torch.set_num_threads(1)
    model, tokenizer = demo.load()
    batch = tokenizer(TEXT * 4, return_tensors="pt")
    with kvtrace_recorder.record(model, root / "run.kvtrace", tokenizer=tokenizer):
        model.generate(
            **batch, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
        )
    policies = ["full", "sliding_window", "streaming_llm", "h2o"]
    replay(kvtrace.open(root / "run.kvtrace"), policies, ["25%"], when="step")
    broken = root / "broken.kvtrace"
    broken.mkdir()
    (broken / "manifest.json").write_text("{")
    return root


@pytest.fixture(scope="session")
def trace(trace_root: Path) -> Trace:
    """The recorded run, read without the viewer."""
    return kvtrace.open(trace_root / "run.kvtrace")


Serve = Callable[[Path], str]


@pytest.fixture(scope="session")
def serve() -> Iterator[Serve]:
    """Start `kvtrace view` on a folder, on a free port; gives its address."""
    running: list[subprocess.Popen[str]] = []

    def start(root: Path) -> str:
        command = "import sys; from kvtrace.cli import main; sys.exit(main())"
        process = subprocess.Popen(
            [sys.executable, "-c", command, "view", str(root), "--port", "0"],
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("kvtrace viewer: http://127.0.0.1:"), line
        return line.split()[2]

    yield start
    for process in running:
        process.terminate()
        process.wait(TIMEOUT_S)
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="session")
def address(serve: Serve, trace_root: Path) -> str:
    """Address of a viewer of the recorded run."""
    return serve(trace_root)


@pytest.fixture(scope="session")
def empty_address(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Address of a viewer of an empty folder, and the folder."""
    folder = tmp_path_factory.mktemp("empty")
    return serve(folder), folder


class Browser:
    """A chromium window with what a test asks of it."""

    def __init__(self, profile: Path) -> None:
        self.downloads = profile / "downloads"
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--window-size=1440,1000",
            f"--user-data-dir={profile}",
        ):
            options.add_argument(flag)
        options.add_experimental_option(
            "prefs", {"download.default_directory": str(self.downloads)}
        )
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
        self.driver.set_page_load_timeout(TIMEOUT_S)

    def open(self, address: str) -> None:
        self.driver.get(address)

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def until(self, code: str, *arguments: Any) -> Any:
        """Wait until an expression is true; gives its value."""
        end = time.monotonic() + TIMEOUT_S
        while time.monotonic() < end:
            value = self.js(f"return {code}", *arguments)
            if value:
                return value
            time.sleep(0.05)
        shown = self.js("return document.body.innerText.slice(0, 3000)")
        address = self.js("return location.href")
        raise AssertionError(
            f"not within {TIMEOUT_S} s: {code}\n{self.errors()}\n{address}\n{shown}"
        )

    def find(self, selector: str) -> WebElement:
        self.until("document.querySelector(arguments[0])", selector)
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def click(self, selector: str) -> None:
        """Click an element once it has stayed at its place: what loads above it moves it."""
        self.find(selector)
        last = None
        for _ in range(100):
            now = self.js(
                "return document.querySelector(arguments[0]).getBoundingClientRect().top + scrollY",
                selector,
            )
            if now == last:
                break
            last = now
            time.sleep(0.3)
        self.find(selector).click()

    def text(self, selector: str) -> str:
        return str(self.js("return document.querySelector(arguments[0]).innerText", selector))

    def data(self, selector: str) -> dict[str, str]:
        """The data attributes of an element."""
        found: dict[str, str] = self.js(
            "return {...document.querySelector(arguments[0]).dataset}", selector
        )
        return found

    def hover(self, selector: str, x: float, y: float) -> None:
        """Move the pointer to a point of an element, from its upper left corner."""
        element = self.find(selector)
        size = element.size
        ActionChains(self.driver, duration=20).move_to_element_with_offset(
            element, int(x - size["width"] / 2), int(y - size["height"] / 2)
        ).perform()

    def query(self) -> str:
        """The query string of the address, once it has stayed the same for a moment."""
        last = ""
        for _ in range(100):
            now = str(self.js("return location.search"))
            if now == last:
                return now
            last = now
            time.sleep(0.3)
        raise AssertionError("the address keeps changing")

    def errors(self) -> list[str]:
        """What the console said that is an error, since the last time."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")  # type: ignore[no-untyped-call]
            if entry["level"] == "SEVERE"
        ]

    def requested(self) -> list[str]:
        """Addresses asked for since the last time."""
        found = []
        for entry in self.driver.get_log("performance"):  # type: ignore[no-untyped-call]
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                found.append(message["params"]["request"]["url"])
            elif message["method"] == "Network.webSocketCreated":
                found.append(message["params"]["url"])
        return found

    def close(self) -> None:
        self.driver.quit()


NewBrowser = Callable[[], Browser]


@pytest.fixture(scope="session")
def new_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewBrowser]:
    """Start a browser with an empty profile."""
    made: list[Browser] = []

    def start() -> Browser:
        made.append(Browser(tmp_path_factory.mktemp("profile")))
        return made[-1]

    yield start
    for browser in made:
        browser.close()


@pytest.fixture(scope="session")
def shared_browser(new_browser: NewBrowser) -> Browser:
    """The window that most tests use."""
    return new_browser()


@pytest.fixture
def browser(shared_browser: Browser) -> Iterator[Browser]:
    """A window; the test fails when its console shows an error or a request left this machine."""
    shared_browser.open("about:blank")
    shared_browser.errors()
    shared_browser.requested()
    yield shared_browser
    assert shared_browser.errors() == []
    outside = [
        url
        for url in shared_browser.requested()
        if not url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:", "about:"))
    ]
    assert outside == []
