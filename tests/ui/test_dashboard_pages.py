"""The dashboard's pages in a real browser: the data is there, live, and names are text."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from conftest import Page, fake_server  # type: ignore[import-not-found]

RUN = "/runs/stdlib-gpt-3fa9c1"
HOSTILE = "<img src=x onerror=document.title='owned'>"
LIVE = "document.getElementById('link').dataset.state === 'live'"


@pytest.fixture
def run_page(page: Page, still: str) -> Page:
    page.open(still + RUN)
    page.wait(f"{LIVE} && document.querySelectorAll('#clients tbody tr').length === 4")
    return page
