"""The package itself: what it offers, and that it costs nothing to import."""

import subprocess
import sys

import pytest

import manyhands.plan


@pytest.mark.parametrize("name", manyhands.plan.__all__)
def test_every_name_is_there(name: str) -> None:
    value = getattr(manyhands.plan, name)
    assert value.__module__.startswith("manyhands.plan") if hasattr(value, "__module__") else value


def test_what_is_offered_is_complete_and_nothing_else() -> None:
    assert sorted(manyhands.plan.__all__) == sorted(manyhands.plan._HOMES)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = manyhands.plan.nothing


def test_importing_is_cheap_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import manyhands.plan; took = time.perf_counter() - start\n"
        "print(took, *[m for m in ('torch', 'hydra', 'omegaconf', 'pydantic', 'transformers') if m in sys.modules])\n"
        "from manyhands.plan import Plan, load_plan, verify_descriptor, render\n"
        "print(*[m for m in ('torch', 'hydra', 'omegaconf', 'transformers', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    (took, *loaded), heavy = (line.split() for line in out.split("\n")[:2])
    assert loaded == []
    assert heavy == []
    assert float(took) < 0.15
