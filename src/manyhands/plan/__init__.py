"""What a run is: the plan, its presets, what goes together, its hash, and the descriptor that a server signs.

The names below are loaded when they are first used: importing this package costs nothing, and never loads
torch or Hydra. `resolve` and `compose` are missing here because modules have these names: import them from
there.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from manyhands.plan.compatibility import check
    from manyhands.plan.compose import load_plan
    from manyhands.plan.descriptor import Material, Parameter, RunDescriptor
    from manyhands.plan.explain import describe, render
    from manyhands.plan.presets import PRESETS
    from manyhands.plan.resolve import dump_plan, new_run_id, plan_hash
    from manyhands.plan.safety import check_runnable
    from manyhands.plan.schema import Plan
    from manyhands.plan.signing import load_descriptor, sign_descriptor, verify_descriptor

_HOMES: Final = {
    "PRESETS": "presets",
    "Material": "descriptor",
    "Parameter": "descriptor",
    "Plan": "schema",
    "RunDescriptor": "descriptor",
    "check": "compatibility",
    "check_runnable": "safety",
    "describe": "explain",
    "dump_plan": "resolve",
    "load_descriptor": "signing",
    "load_plan": "compose",
    "new_run_id": "resolve",
    "plan_hash": "resolve",
    "render": "explain",
    "sign_descriptor": "signing",
    "verify_descriptor": "signing",
}

__all__ = [
    "PRESETS",
    "Material",
    "Parameter",
    "Plan",
    "RunDescriptor",
    "check",
    "check_runnable",
    "describe",
    "dump_plan",
    "load_descriptor",
    "load_plan",
    "new_run_id",
    "plan_hash",
    "render",
    "sign_descriptor",
    "verify_descriptor",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
