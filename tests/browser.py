"""A real browser for the tests of pages: headless Chromium. Without it, these tests are skipped with a message."""

import os
import shutil
from contextlib import contextmanager

import pytest
from helpers import DEADLINE

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"


def chromium():
    "Return the path of Chromium or Chrome, and skip the test without one"
    found = os.environ.get("CHROMIUM") or next((path for path in map(shutil.which, NAMES) if path), None)
    if not found:
        pytest.skip("needs a browser: install chromium, or name one in CHROMIUM")
    return found


def new_context(browser, **options):
    "Return a browser context with the timeout `DEADLINE`. Options are those of Playwright's `new_context`"
    context = browser.new_context(**options)
    context.set_default_timeout(1000 * DEADLINE)  # Navigation too
    return context


@contextmanager
def open_browser(**context):
    "Yield a new browser context. Arguments are those of Playwright's `new_context`"
    from playwright.sync_api import sync_playwright

    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=QUIET.split(), timeout=1000 * DEADLINE)
        try:
            yield new_context(browser, **context)
        finally:
            browser.close()


def watch(page, home):
    "Return two lists that a page fills: console errors and exceptions, and requests to other hosts than `home`"
    errors, outside = [], []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith((home, "data:", "blob:")) else outside.append(r.url))
    return errors, outside
