"""A real server, honest clients beside it, and hostile clients that sign in properly and then do as they please.

One server for each module: every test has hostile keys of its own, and ends by seeing that the rounds of the honest
clients still close. Deadlines are half a minute and more, so a round that closes soon has waited for nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest


def _load(name: str) -> Any:
    """The module of that name beside this one."""
    spec = importlib.util.spec_from_file_location(f"hostile_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SPOILING, PROGRAMS = _load("spoiling"), _load("programs")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`door_fault`, `value_fault`: every way to spoil an update, and what is said of it."""
    for name, faults in (("door_fault", SPOILING.AT_THE_DOOR), ("value_fault", SPOILING.IN_THE_VALUES)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, list(faults.values()), ids=list(faults))


Attack = Callable[..., Awaitable[None]]


@pytest.fixture(scope="module")
def besiege(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """besiege(honest=1, **changes of the plan): a server and so many honest clients, at work."""
    all_made: list[Any] = []

    def begin(honest: int = 1, **changes: Any) -> Any:
        made = PROGRAMS.Besieged(tmp_path_factory.mktemp("besieged"), honest, **changes)
        all_made.append(made)
        made.begin()
        return made

    try:
        yield begin
        for made in all_made:
            for name in ("server", *made.names):
                assert "Traceback" not in made.log(name), made.log(name)[-5000:]
    finally:
        for made in all_made:
            made.end()


@pytest.fixture(scope="module")
def besieged(besiege: Callable[..., Any]) -> Any:
    """A star; a module that wants something else has a fixture of this name of its own."""
    return besiege()


HostileAt = Callable[[Any], AbstractAsyncContextManager[Any]]


@pytest.fixture
def hostile_at(tmp_path: Path) -> HostileAt:
    """hostile_at(besieged): a new hostile client that is connected."""

    @asynccontextmanager
    async def hostile(besieged: Any) -> AsyncIterator[Any]:
        made = PROGRAMS.Hostile(besieged, tmp_path)
        try:
            await made.connection.until_connected()
            yield made
        finally:
            await made.leave()

    return hostile


@pytest.fixture
def attack(besieged: Any, hostile_at: HostileAt) -> Iterator[Callable[..., None]]:
    """attack(what, 2): so many new hostile clients are connected, `what(one, two)` is done, and then all goes on."""

    def run(what: Attack, number: int = 1) -> None:
        async def whole() -> None:
            async with asyncio.timeout(PROGRAMS.LONG_S), contextlib.AsyncExitStack() as stack:
                await what(*[await stack.enter_async_context(hostile_at(besieged)) for _ in range(number)])

        asyncio.run(whole())

    yield run
    besieged.check_it_goes_on()


@pytest.fixture
def spoiling() -> Any:
    """The module of that name."""
    return SPOILING


@pytest.fixture
def reason_of(besieged: Any) -> Callable[[Any, Any], Awaitable[str]]:
    """Why the ledger says that a hostile client's assignment did not count."""

    async def reason(hostile: Any, work: Any) -> str:
        row = await asyncio.to_thread(besieged.work_of, work.assignment.round, hostile.key)
        assert not row["counted"]
        said = str(row["reason"])
        assert str(besieged.place) not in said, "the ledger names a path of the server's disk"
        return said

    return reason


@pytest.fixture
def last_word() -> Callable[[Any], Awaitable[str]]:
    """Why the server has ended the session."""

    async def word(hostile: Any) -> str:
        try:
            await asyncio.wait_for(asyncio.shield(hostile.ended), 10)
        except TimeoutError:
            raise AssertionError("the session was not ended") from None
        except Exception as error:  # noqa: BLE001 - whatever it is, it is compared
            return re.sub(r"^the server ended the session: ", "", str(error))
        return ""

    return word
