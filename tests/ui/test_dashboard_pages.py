"""The dashboard's pages in a real browser: the data is there, live, and names are text."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

RUN = "/runs/stdlib-gpt-3fa9c1"
HOSTILE = "<img src=x onerror=document.title='owned'>"
LIVE = "document.getElementById('link').dataset.state === 'live'"
LOST = "document.getElementById('link').dataset.state === 'lost'"
Page = Any
Server = Callable[..., AbstractContextManager[tuple[str, Any]]]


@pytest.fixture
def run_page(page: Page, still: str) -> Page:
    page.open(still + RUN)
    page.wait(f"{LIVE} && document.querySelectorAll('#clients tbody tr').length === 4")
    return page


def test_head_and_figures(run_page: Page) -> None:
    assert run_page.text("#name") == "stdlib-gpt"
    assert run_page.text("#phase") == "Training"
    assert "preset diloco" in run_page.text("#facts")
    assert run_page.text("#rounds-done") == "20 of 24 rounds"
    figures = run_page.text("#figures")
    assert "2.817" in figures  # validation loss of round 20
    assert "14,320" in figures  # tokens/s of four clients
    assert "checkpoints/round-16" in run_page.text("#footer")
    assert run_page.messages == []  # nothing thrown, nothing refused by the content security policy


def test_clients_table(run_page: Page) -> None:
    rows = run_page.value("[...document.querySelectorAll('#clients tbody tr')].map((r) => r.innerText)")
    assert "gpu-box" in rows[0]
    assert "70.6 MiB" in rows[0]
    assert "16 (1 not)" in rows[1]
    assert "unnamed" in rows[3]


def test_a_hostile_label_is_text_everywhere(run_page: Page) -> None:
    assert run_page.value("document.querySelectorAll('#clients .label')[2].textContent") == HOSTILE
    assert run_page.value("document.querySelectorAll('main img').length") == 0
    assert "owned" not in run_page.value("document.title")
    assert HOSTILE in run_page.value("document.getElementById('incidents').textContent")
    assert HOSTILE in run_page.value("document.getElementById('ledger').textContent")


def test_ledger_names_reasons(run_page: Page) -> None:
    ledger = run_page.text("#ledger")
    assert "refused: 3 values are not finite" in ledger
    assert "lost: no heartbeat for 30 s" in ledger
    assert run_page.value("document.querySelectorAll('#ledger li').length") == 20
    assert run_page.value("document.querySelector('#ledger .chip.bad em').textContent").startswith("lost")


def test_chart_has_curves_and_answers_the_keyboard(run_page: Page) -> None:
    assert run_page.value("document.querySelectorAll('#chart circle.validation').length") == 6
    assert run_page.value("document.querySelectorAll('#chart path.mean').length") == 1
    # One client was away for four rounds: its curve has a gap, hence two pieces; four clients make five.
    assert run_page.value("document.querySelectorAll('#chart path.client').length") >= 5
    run_page.value(
        "document.querySelector('#chart svg').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft'}))"
    )
    tip = run_page.text(".tip")
    assert "Round 20" in tip
    assert "2.817" in tip


def test_a_phone_does_not_scroll_sideways(page: Page, still: str) -> None:
    page.open(still + RUN, width=375, height=800)
    page.wait(f"{LIVE} && document.querySelectorAll('#clients tbody tr').length === 4")
    assert page.value("document.documentElement.scrollWidth") <= 375


def test_list_of_runs(page: Page, still: str) -> None:
    page.open(still + "/")
    page.wait("document.querySelectorAll('.run').length === 2")
    assert "Paused" in page.text("#runs")
    links = page.value("[...document.querySelectorAll('.run')].map((a) => a.getAttribute('href'))")
    assert RUN in links


def test_pause_shows_its_reason(page: Page, still: str) -> None:
    page.open(still + "/runs/mesh-night-77b2e0")
    page.wait(LIVE)
    page.wait("document.getElementById('reason').innerText.includes('Three rounds in a row')")


def test_unknown_run_is_said(page: Page, still: str) -> None:
    page.open(still + "/runs/nothing-here")
    page.wait("document.getElementById('lost').innerText.includes(\"no run 'nothing-here'\")")


def test_nothing_yet(page: Page, fake_server: Server) -> None:
    with fake_server("empty") as (address, _):
        page.open(address + RUN)
        page.wait(LIVE)
        page.wait("document.getElementById('clients').innerText.includes('Nobody has joined yet')")
        assert "begins with the first closed round" in page.value(
            "document.getElementById('chart').textContent"
        )


def test_live_then_connection_lost_then_back(page: Page, fake_server: Server) -> None:
    with fake_server("live") as (address, server):
        page.open(address + RUN)
        page.wait(LIVE)
        first = page.value("document.querySelectorAll('#ledger li').length")
        page.wait(f"document.querySelectorAll('#ledger li').length > {first} + 1")
        server.send_signal(signal.SIGKILL)
        page.wait(LOST)
        assert "Connection to the server lost" in page.text("#lost")
        assert page.text("#name") == "stdlib-gpt"  # what was there stays
        incidents = page.value("document.querySelectorAll('#incidents li').length")
    with fake_server("still", int(address.rpartition(":")[2])):
        page.wait(f"{LIVE} && document.getElementById('lost').hidden")
        page.wait("document.querySelectorAll('#ledger li').length === 20")
        # Everything came a second time, and is there once.
        assert page.value("document.querySelectorAll('#incidents li').length") == 8 > incidents


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_contrast(page: Page, still: str, dark: bool) -> None:
    """WCAG AA, 4.5 : 1, of every text in the page against the nearest painted background behind it."""
    page.open(still + RUN, dark=dark)
    page.wait(f"{LIVE} && document.querySelectorAll('#clients tbody tr').length === 4")
    assert page.value(CONTRAST) == []


CONTRAST = """
(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = (color) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => { for (let n = node; n; n = n.parentElement) {
      const color = rgba(getComputedStyle(n).backgroundColor); if (color[3] > 200) return color; }
    return [255, 255, 255, 255]; };
  const bad = [];
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some((c) => c.nodeType === 3 && c.textContent.trim());
    if (!own || !node.getClientRects().length) continue;
    const style = getComputedStyle(node);
    const front = rgba(node.ownerSVGElement ? style.fill : style.color);
    const [a, b] = [light(front), light(behind(node))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5)
      bad.push(`${node.className.baseVal ?? node.className} ${node.textContent.slice(0, 30)}`);
  }
  return bad;
})()
"""
