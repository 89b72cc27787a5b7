"""`num > 0`: a column, or a column compared with a value, as a setting names it.

Numbers are compared as numbers. Text is only equal or not.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from manyhands.config import did_you_mean
from manyhands.data.tables import canonical, number_of
from manyhands.errors import DataError

_ORDERS: Final[Mapping[str, Callable[[float, float], bool]]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_SHAPE: Final = re.compile(r"^(?P<column>.+?)\s*(?P<sign>>=|<=|==|!=|>|<)\s*(?P<value>.+)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A column, and what its cells are compared with: nothing if `sign` is empty."""

    column: str
    sign: str = ""
    value: str = ""

    def holds(self, cell: str) -> bool:
        """Whether the comparison is true of a cell. Raises ValueError if a cell that is no number is to be
        ordered.
        """
        if self.sign in ("==", "!="):
            return (canonical(cell) == canonical(self.value)) == (self.sign == "==")
        try:
            return _ORDERS[self.sign](number_of(cell), number_of(self.value))
        except ValueError:
            raise ValueError(
                f"the column {self.column!r} has {cell!r}, which cannot be compared by "
                f"{self.sign} {self.value}: numbers were expected"
            ) from None


def parse_comparison(text: str, columns: Sequence[str], setting: str) -> Comparison:
    """What `setting` says; a column of just this name comes first. Raises DataError if there is no such column."""
    if text in columns:
        return Comparison(column=text)
    shape = _SHAPE.match(text.strip())
    name = shape["column"] if shape else text
    if name not in columns:
        raise DataError(
            f"{setting} is {text!r}, and the table has no column {name!r}.{did_you_mean(name, columns)}"
        )
    assert shape is not None
    value = shape["value"].strip("'\"")
    if shape["sign"] in _ORDERS:
        try:
            number_of(value)
        except ValueError:
            raise DataError(
                f"{setting} is {text!r}: {value!r} is no number; use == or != with text"
            ) from None
    return Comparison(column=name, sign=shape["sign"], value=value)
