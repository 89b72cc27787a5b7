"""The exception tree: exit codes, and the drawing of them in the module's docstring."""

import re

import pytest

from manyhands import errors
from manyhands.errors import Fenced, ManyhandsError, StorageError

ALL = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, ManyhandsError)
}
DRAWN = {
    name: int(code)
    for name, code in re.findall(r"^[\s│├└─]*(\w+)\s+(\d+)   ?\S", errors.__doc__ or "", re.MULTILINE)
}


def test_the_drawing_shows_every_class_with_its_exit_code() -> None:
    assert {name: error.exit_code for name, error in ALL.items()} == DRAWN


def test_exit_codes_differ_but_for_subclasses() -> None:
    direct = [error for error in ALL.values() if error.__base__ is ManyhandsError]
    codes = [error.exit_code for error in (ManyhandsError, *direct)]
    assert len(set(codes)) == len(codes)
    assert issubclass(Fenced, StorageError)
    assert Fenced.exit_code == StorageError.exit_code


@pytest.mark.parametrize("error", ALL.values(), ids=ALL)
def test_codes_are_ones_that_a_shell_can_show(error: type[ManyhandsError]) -> None:
    assert 1 <= error.exit_code <= 130
    assert error.exit_code not in (2, 126, 127)  # click's usage errors, and the shell's own
    with pytest.raises(ManyhandsError, match="what happened"):
        raise error("what happened")
