"""The dashboard's assets: only its own, under a policy that allows nothing else."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import manyhands.ui.dashboard

STATIC = Path(manyhands.ui.dashboard.__file__).parent / "static"


def get(address: str, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
    try:
        with urllib.request.urlopen(
            urllib.request.Request(address, headers=headers or {}), timeout=5
        ) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


@pytest.mark.parametrize(
    "path", ["/", "/runs/anything", "/assets/run.js", "/assets/dashboard.css", "/assets/nothing"]
)
def test_policy_on_every_answer(still: str, path: str) -> None:
    status, headers, _ = get(still + path)
    assert status == (404 if path.endswith("nothing") else 200)
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == "'self'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


def test_every_asset_that_a_page_names_is_there(still: str) -> None:
    for page in ("/", "/runs/x"):
        _, _, body = get(still + page)
        names = re.findall(r'(?:href|src)="(/assets/[^"]+)"', body.decode())
        assert len(names) >= 3
        for name in names:
            assert get(still + name)[0] == 200


def test_no_way_out_of_the_directory(still: str) -> None:
    for name in ("../router.py", "..%2frouter.py", "%2e%2e/router.py"):
        assert get(f"{still}/assets/{name}")[0] in (404, 307)


def test_unchanged_assets_are_not_sent_again(still: str) -> None:
    _, headers, _ = get(f"{still}/assets/run.js")
    status, _, body = get(f"{still}/assets/run.js", {"If-None-Match": headers["etag"]})
    assert (status, body) == (304, b"")


def test_assets_name_nothing_outside_and_never_make_markup_of_text() -> None:
    for path in STATIC.iterdir():
        text = path.read_text(encoding="utf-8")
        outside = set(re.findall(r"https?://[^\s\"')]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not outside, path.name
        if path.suffix == ".js":
            code = re.sub(r"//.*", "", text)
            for dangerous in (
                "innerHTML",
                "outerHTML",
                "insertAdjacentHTML",
                "document.write",
                "eval(",
                "new Function",
            ):
                assert dangerous not in code, f"{path.name} uses {dangerous}"
