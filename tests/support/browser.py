"""Headless Chromium, and what holds for every page: the shared look, readable on a telephone."""

import contextlib
import re
import shutil
from pathlib import Path

import pytest
from selenium import webdriver

from pipeline.contract import pages

_FRAME = Path(pages.__file__).with_name("templates") / "frame.html"
_CUT = """
const texts = [...document.querySelectorAll("svg text")].filter((text) => {
  const inner = text.getBoundingClientRect(), outer = text.closest("svg").getBoundingClientRect();
  return inner.left < outer.left - 1 || inner.right > outer.right + 1
    || inner.top < outer.top - 1 || inner.bottom > outer.bottom + 1;
});
const names = "h1, h2, p, th, td, dd, dt, button, label, figcaption, .figure, pre";
const boxes = [...document.querySelectorAll(names)].filter(
  (box) => box.scrollWidth > box.clientWidth + 1);
const root = document.documentElement;
return [[...texts, ...boxes].map((place) => place.textContent), root.scrollWidth, innerWidth];
"""


@contextlib.contextmanager
def chromium():
    """Starts a browser, or skips the test on a machine without Chromium."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("chromium and chromedriver are not installed here")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


def set_width(browser, width):
    """Gives the browser a window of so many pixels; 400 are those of a telephone."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def assert_fits(browser, width):
    """The page that is open is not wider than its window, and no text in it is cut off."""
    cut, page, window = browser.execute_script(_CUT)
    assert window == width
    assert page <= width, f"the page has {page} pixels"
    assert cut == [], f"cut off: {cut}"


def assert_file_fits(*files):
    """Pages in files are readable in a narrow and in a wide window."""
    with chromium() as browser:
        for width in (400, 1200):
            set_width(browser, width)
            for file in files:
                browser.get(Path(file).absolute().as_uri())
                assert_fits(browser, width)


def assert_shared_look(text):
    """The style of a page is that of `frame.html`, and what it adds comes after it."""
    shared, style = (
        re.search(r"<style>\s*(.*?)\s*</style>", page, re.DOTALL)[1]
        for page in (pages.render(_FRAME, title=""), text)
    )
    assert style.startswith(shared)
    assert 'name="viewport"' in text
