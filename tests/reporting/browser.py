"""A headless Chromium for tests of pages: fresh, offline, driven by selenium; tests are skipped where it is not installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def start(profile_directory: Path, width: int = 1200, height: int = 900) -> Iterator[Any]:
    """A driver that ends with the test.

    Args:
        profile_directory: empty directory for the browser's own files.
        width, height: of the window, in pixels.
    """
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("no Chromium with chromedriver here (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--no-first-run", "--hide-scrollbars",
        f"--user-data-dir={profile_directory}", f"--window-size={width},{height}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    try:
        yield driver
    finally:
        driver.quit()


def open_page(driver: Any, page: Path, *, dark: bool = False, width: int = 1200) -> None:
    """Open a file and wait until its script is done.

    Args:
        driver: a driver from `start`.
        page: the file.
        dark: what the system is said to prefer.
        width: of the screen, in pixels; below 500 as on a phone.
    """
    from selenium.webdriver.support.ui import WebDriverWait

    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    preferred = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preferred]})
    driver.get(page.resolve().as_uri())
    WebDriverWait(driver, 60, 0.05).until(lambda d: d.execute_script("return window.equipoise && window.equipoise.done"))
