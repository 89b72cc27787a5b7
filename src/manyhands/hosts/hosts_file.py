"""The hosts that a person has: `hosts.json` in MANYHANDS_HOME, and a `CeresTrainHosts.json` there.

    [
      {
        "HostName": "server1",                     as ssh knows it; "wsl"; or this machine's own name
        "UserName": "user1",
        "WorkDir": "~/manyhands",                  or CeresTrainPyDir; runs and the environment lie there
        "PathToOutputFromHost": "/mnt/home/cout",  MANYHANDS_HOME of this machine, as the host has it mounted
      },
    ]

Trailing commas are read, since the form that people have contains them. Every fault is told with its line.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import yaml
from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic.alias_generators import to_pascal

from manyhands.config import Settings, did_you_mean, home, shown
from manyhands.engine.settings import CompileMode
from manyhands.errors import PlanError

FILES: Final = ("hosts.json", "CeresTrainHosts.json")
WSL: Final = "wsl"
_EXAMPLE: Final = '[{"HostName": "server1", "UserName": "user1", "WorkDir": "~/manyhands"}]'
_SPECIAL: Final = {"override_py_torch_compile_mode": "OverridePyTorchCompileMode"}


class Host(Settings):
    """One entry. The names in the file are those of the fields in Pascal case."""

    model_config = ConfigDict(
        alias_generator=lambda name: _SPECIAL.get(name, to_pascal(name)), validate_by_name=True
    )

    host_name: Annotated[str, Field(min_length=1, pattern=r"^[^\s,/]+$")]
    """What --host says: a name of ~/.ssh/config or of the network; `wsl`; or this machine's name."""
    user_name: str | None = None
    """null: as ~/.ssh/config says, else the name here."""
    work_dir: str = "~/manyhands"
    """A directory on the host: runs/ and, by `hosts setup`, venv/ lie in it."""
    path_to_output_from_host: str | None = None
    """Where the host has MANYHANDS_HOME of this machine mounted; then nothing has to be sent back."""
    docker_launch_command: str | None = None
    """Enters a running container on the host, as `docker exec -it NAME`."""
    override_py_torch_compile_mode: CompileMode | None = None
    """exec.compile on this host, whatever the configuration says."""
    port: Annotated[int, Field(ge=1, le=65_535)] | None = None
    """null: as ~/.ssh/config says, else 22."""
    identity_file: str | None = None
    """A private key; null: those of ~/.ssh/config, of the agent, or ssh's usual ones."""
    address: str | None = None
    """Where the other hosts of one training reach this one; null: the address at which ssh reaches it."""
    python: str | None = None
    """Python on the host; null: that of `hosts setup`, else python3."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of a training there."""
    devices: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Indexes of the host's GPUs to train on, where --devices says nothing; null: the first."""

    @field_validator("devices", mode="before")
    @classmethod
    def _as_typed(cls, value: Any) -> Any:
        """3 and "0,1" as on a command line, beside [0, 1]."""
        if isinstance(value, int) and not isinstance(value, bool):
            return (value,)
        return value.split(",") if isinstance(value, str) else value

    @field_validator("environment", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        """Numbers, as people write them: {"OMP_NUM_THREADS": 4}."""
        if not isinstance(value, dict):
            return value
        return {
            k: str(v) if isinstance(v, int | float) and not isinstance(v, bool) else v
            for k, v in value.items()
        }

    @field_validator("host_name")
    @classmethod
    def _wsl_in_any_case(cls, value: str) -> str:
        return WSL if value.lower() == WSL else value

    @model_validator(mode="after")
    def _path_of_the_work(self) -> Host:
        if not self.work_dir.startswith(("/", "~")):
            raise ValueError(f"WorkDir {self.work_dir}: expected a path from / or ~ on the host")
        return self


def hosts(directory: Path | None = None) -> dict[str, Host]:
    """All hosts by name, in the order of the files; of a name that both files have, that of hosts.json.

    Raises PlanError, naming file and line, for what is not a list of hosts. None at all is no fault.
    """
    found: dict[str, Host] = {}
    for name in FILES:
        path = (directory or home()) / name
        if path.is_file():
            for host in read_hosts(path):
                found.setdefault(host.host_name, host)
    return found


def host_named(name: str, directory: Path | None = None) -> Host:
    """The host of that name. Raises PlanError, which lists those that there are."""
    known = hosts(directory)
    wanted = WSL if name.lower() == WSL else name
    if wanted in known:
        return known[wanted]
    where = directory or home()
    if not known:
        raise PlanError(
            f"host '{name}' is not known: there is no {where / FILES[0]} with it yet; write one, as in {_EXAMPLE}"
        )
    files = [where / file for file in FILES if (where / file).is_file()]
    raise PlanError(
        f"there is no host '{name}' in {' or '.join(str(file) for file in files)}.{did_you_mean(name, known)}"
    )


def read_hosts(path: Path) -> list[Host]:
    """The hosts of one file. Raises PlanError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: {error}; expected JSON text, as in {_EXAMPLE}") from None
    try:  # YAML's flow form is JSON with trailing commas, and its nodes know their lines
        root = yaml.compose(text.replace("\t", " "), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise PlanError(f"{path}, line {line}: {error.problem}; expected JSON, as in {_EXAMPLE}") from None
    if not isinstance(root, yaml.SequenceNode):
        raise PlanError(f"{path}: expected a list of hosts, as in {_EXAMPLE}")
    found: dict[str, int] = {}
    result = []
    for node in root.value:
        host, line = _host(path, node), node.start_mark.line + 1
        if host.host_name in found:
            raise PlanError(
                f"{path}, line {line}: host '{host.host_name}' is there already, at line {found[host.host_name]}; "
                "give each a name of its own (a Host of ~/.ssh/config is one)"
            )
        found[host.host_name] = line
        result.append(host)
    return result


def names_in_the_file() -> dict[str, str]:
    """The names as people write them, by field."""
    return {name: str(field.alias) for name, field in Host.model_fields.items()}


def _host(path: Path, node: yaml.Node) -> Host:
    if not isinstance(node, yaml.MappingNode):
        raise PlanError(f"{path}, line {node.start_mark.line + 1}: expected a host, as in {_EXAMPLE[1:-1]}")
    lines = {key.value: key.start_mark.line + 1 for key, _ in node.value}
    known = {**{alias: alias for alias in names_in_the_file().values()}, "CeresTrainPyDir": "WorkDir"}
    data: dict[str, Any] = {}
    for key, value in _plain(node).items():
        name = next((k for k in known if k.lower() == str(key).lower()), None)
        at = f"{path}, line {lines.get(key, node.start_mark.line + 1)}"
        if name is None:
            raise PlanError(f"{at}: unknown key '{key}'.{did_you_mean(str(key), known)}")
        if known[name] in data:
            raise PlanError(f"{at}: '{key}' says again what '{known[name]}' says: leave one out")
        if value is not None and value != "":  # which leaves it out as well, where a program wrote it
            data[known[name]] = value
    where = f"{path}, line {node.start_mark.line + 1}"
    try:
        return Host.parse(data, where=where)
    except PlanError as error:
        raise PlanError(_with_line(str(error), where, path, lines)) from None


def _with_line(text: str, where: str, path: Path, lines: dict[str, int]) -> str:
    """The line of the key that is at fault, in the place of that of the host."""
    for key, line in lines.items():
        if f"'{key}" in text:
            return text.replace(where, f"{path}, line {line}", 1)
    return text


def _plain(node: yaml.Node) -> dict[str, Any]:
    loader = yaml.SafeLoader("")
    try:
        return dict(loader.construct_document(node))
    finally:
        loader.dispose()


def chosen(names: Iterable[str], directory: Path | None = None) -> list[Host]:
    """The hosts of a `--host=a,b`. Raises PlanError for one that is not known, or is named twice."""
    listed: Sequence[str] = list(names)
    twice = next((name for name in listed if listed.count(name) > 1), None)
    if twice is not None:
        raise PlanError(f"host '{twice}' is named twice in {shown(','.join(listed))}: name each once")
    return [host_named(name, directory) for name in listed]
