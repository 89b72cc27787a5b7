"""The dashboard of a real server in a real browser, from before the first client until the run is finished."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from manyhands.config import HOME_VARIABLE
from manyhands.ui.processes import Programs, free_port

pytestmark = pytest.mark.slow
Page = Any
RUN = "real-run"
SECONDS = 120  # to start programs on a busy machine
LIVE = "document.getElementById('link').dataset.state === 'live'"
PLAN = ["rounds.total=4", "rounds.snapshot_every=2", "task.parameters=10000", "task.delay_s=0.3"]


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    with Programs(tmp_path / "logs") as programs:
        yield programs


def test_a_run_from_the_first_client_to_the_end(
    page: Page, programs: Programs, tmp_path: Path, wait_for_answer: Callable[[str, float], None]
) -> None:
    address = f"127.0.0.1:{free_port()}"
    serve = ["server", "run", "--plan", "dummy", "--port", address.split(":")[1], "--run-id", RUN, *PLAN]
    programs.start("server", serve, {HOME_VARIABLE: str(tmp_path / "server")})
    wait_for_answer(f"http://{address}/api/runs", SECONDS)

    page.open(f"http://{address}/")
    page.wait("document.querySelectorAll('.run').length === 1")
    assert "Waiting" in page.text("#runs")
    page.open(page.value("document.querySelector('.run').href"))
    page.wait(f"{LIVE} && document.getElementById('clients').innerText.includes('Nobody has joined yet')")

    join = ["client", "train", "--run-id", RUN, "--server-addr", address, "--label", "one-hand"]
    programs.start("client", join, {HOME_VARIABLE: str(tmp_path / "client")})
    page.wait("document.getElementById('phase').innerText === 'Finished'", within_s=SECONDS)
    assert page.text("#rounds-done") == "4 of 4 rounds"
    assert "one-hand" in page.text("#clients")
    assert "joined" in page.text("#incidents")
    assert page.value("document.querySelectorAll('#ledger li').length") == 4
    assert page.value("document.querySelectorAll('#ledger .chip.bad').length") == 0
    assert "report no loss" in page.text("#chart")  # a dummy has none
    assert page.messages == []  # nothing thrown, nothing refused by the content security policy
    page.picture(tmp_path / "dashboard.png")
    with urllib.request.urlopen(f"http://{address}/api/runs/{RUN}", timeout=10) as answer:
        assert b'"finished"' in answer.read()  # and the page is no further than the server
    page.open("about:blank")  # so that it does not complain of a server that is gone to whoever comes next
