"""Plans by Hydra: named configs, groups of choices and KEY=VALUE overrides, in Hydra's own grammar.

    name of a config      train, demo, mesh, dummy, or one in a directory of one's own
    GROUP=OPTION          task=dummy, optimizer=sgd, outer=nesterov, codec=int8: a file of a group; also those of the
                          engine (engine/settings.py), for a training: parallel=fsdp, logging=tensorboard
    KEY=VALUE             local.steps=10, preset=diloco, task.model.n_layer=2: a value; ~KEY: back to the
                          default; optimizer. and model. stand for local.optimizer. and task.model.

Hydra composes, the schema judges: the YAML here holds only what differs from its defaults, and what Hydra
composed goes through `resolve.resolve` like any plan file, so both give the same object. Unknown keys are
found there, with a suggestion. Hydra is imported by the first call only.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import yaml

from manyhands.config import did_you_mean
from manyhands.errors import PlanError
from manyhands.plan.choices import overlay
from manyhands.plan.resolve import read_plan_file, resolve, with_preset
from manyhands.plan.schema import Plan

_FREE_FORM: Final = re.compile(r"^(task\.(?:model|settings)\.)(.*)$")
_SHORT: Final = {"optimizer.": "local.optimizer.", "model.": "task.model."}
_ONE_AT_A_TIME = threading.Lock()  # Hydra keeps its state in a global


def compose(
    overrides: Sequence[str] = (), config_name: str = "train", config_dir: Path | str | None = None
) -> Plan:
    """The plan of a named config with overrides on top.

    config_dir: a directory of one's own; its configs and groups come before those of the package. Raises
    PlanError for an unknown config, group, option or key, for a malformed override and for whatever `resolve`
    refuses.
    """
    data = compose_data(overrides, config_name, config_dir)
    return resolve(data, where=f"config '{config_name}'" + (" with overrides" if overrides else ""))


def compose_data(
    overrides: Sequence[str] = (), config_name: str = "train", config_dir: Path | str | None = None
) -> dict[str, Any]:
    """As `compose`, but the plain data before presets and checks."""
    with _hydra(config_dir, config_name) as hydra:
        asked = _sorted_out(hydra, overrides)
        given = hydra.groups_of(config_name)
        inside = [o for o in asked.groups if _group_name(o) in given]
        data = hydra.composed(config_name, inside)
        return _apply(hydra, data, [o for o in asked.groups if o not in inside], asked)


def apply_overrides(
    data: Mapping[str, Any], overrides: Sequence[str], config_dir: Path | str | None = None
) -> dict[str, Any]:
    """Plain data of a plan with overrides on top; `data` is not changed. Raises PlanError as `compose`
    does."""
    with _hydra(config_dir) as hydra:
        asked = _sorted_out(hydra, overrides)
        return _apply(hydra, dict(data), asked.groups, asked)


def load_plan(path: Path | str, overrides: Sequence[str] = ()) -> Plan:
    """The plan of a YAML file, with KEY=VALUE overrides on top as `compose` takes them.

    Raises PlanError, naming the file, when it cannot be read or is not a valid plan.
    """
    data = read_plan_file(path)
    if overrides:
        data = apply_overrides(data, overrides)
    return resolve(data, where=str(path) + (" with overrides" if overrides else ""))


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Each combination of the values that sweep overrides name, as in optimizer.lr=1e-3,3e-4 seed=range(0,3).

    One list, of the overrides as they are, when none of them sweeps. Raises PlanError for a malformed one.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise PlanError(
            f"an override is not KEY=VALUE as Hydra reads it: {str(error).splitlines()[0]}"
        ) from None
    (batch,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [list(combination) for combination in batch]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """Overrides by what they do: choose a group's option, set a value, or take a key out."""

    groups: tuple[str, ...]
    values: tuple[str, ...]
    removals: tuple[str, ...]


def _apply(hydra: _Hydra, data: dict[str, Any], groups: Sequence[str], asked: _Asked) -> dict[str, Any]:
    """`data` with removals, then options of groups, then values on top; the preset lies below all of them."""
    for key in asked.removals:
        data = _without(data, key.split("."), key)
    over = hydra.composed(None, [o if o[0] in "+~" else f"+{o}" for o in groups]) if groups else {}
    if asked.values:
        over = overlay(over, hydra.composed(None, asked.values))
    if "preset" in over:
        data = {**data, "preset": over["preset"]}
    return overlay(with_preset(data), over)


def _sorted_out(hydra: _Hydra, overrides: Sequence[str]) -> _Asked:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    groups, values, removals = [], [], []
    for text in overrides:
        if "${" in text:
            raise PlanError(f"the override '{text}' is an interpolation: a plan has plain values.")
        text = _with_underscores(text)
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise PlanError(f"the override '{text}' is not KEY=VALUE as Hydra reads it: {reason}") from None
        key = override.key_or_group
        if not key:
            raise PlanError(f"the override '{text}' is not KEY=VALUE: the key is missing.")
        if override.is_sweep_override():
            raise PlanError(
                f"the override '{text}' names several values: a plan has one, and train --multirun tries each; a "
                "list is written [a,b]."
            )
        if key == "hydra" or key.startswith("hydra."):
            raise PlanError(
                f"the override '{text}' is a setting of Hydra, which plays no part here: leave it out."
            )
        if override.is_delete():
            removals.append(key)
        elif key.replace(".", "/") in hydra.groups:
            groups.append(text)
        else:
            values.append("++" + text.lstrip("+"))
    return _Asked(groups=tuple(groups), values=tuple(values), removals=tuple(removals))


def _with_underscores(text: str) -> str:
    """`-` in the keys of settings counts as `_`, as in every option; not in those of free-form mappings."""
    key, equals, value = text.partition("=")
    for short, whole in _SHORT.items():
        bare = key.lstrip("+~")
        if bare.startswith(short):
            key = key[: len(key) - len(bare)] + whole + bare.removeprefix(short)
    free = _FREE_FORM.match(key)
    key = free.group(1).replace("-", "_") + free.group(2) if free else key.replace("-", "_")
    return key + equals + value


def _without(data: Mapping[str, Any], path: Sequence[str], key: str) -> dict[str, Any]:
    if path[0] not in data:
        raise PlanError(f"the override '~{key}' takes out what is not there.{did_you_mean(path[0], data)}")
    rest = {name: value for name, value in data.items() if name != path[0]}
    if len(path) == 1:
        return rest
    below = data[path[0]]
    return {**data, path[0]: _without(below if isinstance(below, Mapping) else {}, path[1:], key)}


def _group_name(override: str) -> str:
    return re.split(r"[=@]", override.lstrip("+~"), maxsplit=1)[0]


# ------------------------------------------------------------------------------ Hydra
class _Hydra:
    """One initialized Hydra, and what is in its search path."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self._directories = directories
        self._search = (
            [f"hydra.searchpath=[{','.join(_quoted(d) for d in directories[1:])}]"] if directories[1:] else []
        )
        folders = {
            child.name
            for d in directories
            for child in d.iterdir()
            if child.is_dir() and child.name[0] not in "._"
        }
        self.groups = folders

    def composed(self, config_name: str | None, overrides: Sequence[str]) -> dict[str, Any]:
        from hydra import compose as hydra_compose
        from hydra.errors import HydraException
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            config = hydra_compose(config_name, overrides=[*self._search, *overrides])
            data = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            raise PlanError(self._in_words(config_name, str(error))) from None
        assert isinstance(data, dict)
        return {str(key): value for key, value in data.items()}

    def groups_of(self, config_name: str) -> set[str]:
        """The groups that a config's defaults list already chooses from."""
        from hydra.core.global_hydra import GlobalHydra
        from hydra.errors import HydraException
        from hydra.types import RunMode

        try:
            loader = GlobalHydra.instance().config_loader()
            defaults = loader.compute_defaults_list(config_name, self._search, RunMode.RUN).defaults
        except (HydraException, yaml.YAMLError) as error:
            raise PlanError(self._in_words(config_name, str(error))) from None
        return {str(Path(d.config_path).parent) for d in defaults if d.config_path and "/" in d.config_path}

    def _in_words(self, config_name: str | None, message: str) -> str:
        option = re.search(r"Could not find '(?P<group>[^']+)/(?P<option>[^'/]+)'", message)
        if option is not None:
            group, name = option["group"], option["option"]
            known = {f.stem for d in self._directories for f in (d / group).glob("*.yaml")}
            return f"{group} '{name}' does not exist.{did_you_mean(name, known)}"
        if message.startswith("Cannot find primary config") or f"'{config_name}'" in message:
            known = {f.stem for d in self._directories for f in d.glob("*.yaml")}
            if config_name is not None and config_name not in known:
                return f"there is no config '{config_name}'.{did_you_mean(config_name, known)}"
        return (f"config '{config_name}': " if config_name else "overrides: ") + " ".join(message.split())


@contextmanager
def _hydra(config_dir: Path | str | None, config_name: str | None = None) -> Iterator[_Hydra]:
    """Hydra set up for our directories alone; a Hydra application around us keeps its own."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    directories = [Path(str(files("manyhands") / "conf")).resolve()]
    if config_dir is not None:
        own = Path(config_dir).expanduser().resolve()
        if not own.is_dir():
            raise PlanError(f"there is no directory of configs {own}: expected one with YAML files.")
        # Hydra looks for a named config in the first directory only
        directories.insert(0 if config_name is None or (own / f"{config_name}.yaml").is_file() else 1, own)
    with _ONE_AT_A_TIME:
        instance = GlobalHydra.instance()
        around, instance.hydra = instance.hydra, None
        try:
            with initialize_config_dir(str(directories[0]), job_name="manyhands", version_base="1.3"):
                yield _Hydra(directories)
        finally:
            GlobalHydra.instance().hydra = around


def _quoted(directory: Path) -> str:
    return "'" + f"file://{directory}".replace("\\", "\\\\").replace("'", "\\'") + "'"
