"""From the command line of `manyhands train --host` to trainings on hosts.

--host a            one training on a
--host a,b          one training on both: their processes meet at the first
-m --host a --host b KEY=1,2,3    each combination on the host that is free next, in one table
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from manyhands.data.shards.manifest import MANIFEST
from manyhands.errors import DataError, ManyhandsError, PlanError, StorageError, WorkerError
from manyhands.hosts.agent import reached
from manyhands.hosts.beginning import Wish
from manyhands.hosts.hosts_file import Host, chosen
from manyhands.ui.live import choose_logs

if TYPE_CHECKING:
    from manyhands.engine.configuration import Configuration

Compose = Callable[[Sequence[str], str | None], "Configuration"]
"""The configuration of KEY=VALUE words and a directory here that has the manifest of the shards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class There:
    """What the command line says beside the configuration."""

    hosts: tuple[str, ...]
    directory: Path | None
    devices: tuple[int, ...] | None
    allowed: tuple[str, ...]
    logs: str | None
    shards: str | None
    upload: Path | None
    export: bool

    def train(self, compose: Compose, overrides: Sequence[str]) -> int:
        """One training; the exit code."""
        from manyhands.ui.host_training import train_on_hosts

        if len(self.hosts) > 1:
            raise click.UsageError(
                f"--host is given {len(self.hosts)} times: one training on several hosts is --host="
                f"{','.join(self.hosts)}; several trainings are -m KEY=1,2"
            )
        hosts = chosen(self.hosts[0].split(","))
        (configuration,) = self._composed(compose, [overrides], hosts[0])
        return train_on_hosts(hosts, self._wish(configuration), choose_logs(self.logs))

    def sweep(self, compose: Compose, overrides: Sequence[str]) -> int:
        """Each combination of values, one at a time on each host; the exit code of the first that failed."""
        from manyhands.plan.compose import sweep
        from manyhands.ui.host_sweep import sweep_on_hosts

        groups = [chosen(names.split(",")) for names in self.hosts]
        combinations = sweep(overrides)
        if self.directory is not None:
            raise click.UsageError("--directory is for one training: leave it out with --multirun")
        wishes = [self._wish(one) for one in self._composed(compose, combinations, groups[0][0])]
        if len({wish.directory for wish in wishes}) < len(wishes):
            raise click.UsageError(
                f"the trainings would share {wishes[0].directory}: leave run, run_id and --resume out with --multirun"
            )
        shown = [" ".join(c for c in combination if c not in overrides) for combination in combinations]
        return sweep_on_hosts(groups, list(zip(shown, wishes, strict=True)), choose_logs(self.logs))

    def _wish(self, configuration: Configuration) -> Wish:
        from manyhands.ui.plans import training_directory

        start = configuration.start
        if start.rank is not None or start.nodes is not None or start.master_addr is not None:
            raise click.UsageError(
                "rank, world_size, nodes and master_addr are for those started by hand: --host=a,b does that itself"
            )
        directory = training_directory(configuration, self.directory)
        plan, shards = configuration.plan, self._shards_there()
        if shards is not None:
            data = plan.data.model_copy(update={"shards": shards})
            configuration = replace(configuration, plan=plan.model_copy(update={"data": data}))
        return Wish(
            configuration=configuration,
            run=directory.resolve().name,
            directory=directory,
            allowed=self.allowed,
            devices=self.devices,
            export=self.export,
            docker=configuration.settings.exec.run_in_docker,
            paths=() if shards is None else (shards,),
            upload=self.upload,
        )

    def _shards_there(self) -> str | None:
        """As the host sees them from anywhere: what is relative, is to the home of who logs in."""
        if self.shards is None or self.shards.startswith(("/", "~")):
            return self.shards
        return f"~/{self.shards}"

    def _composed(self, compose: Compose, words: Sequence[Sequence[str]], host: Host) -> list[Configuration]:
        """Each with the task of the shards: that of the manifest here, or as the host has it.

        Whether the host trains in its container is known when they are composed; then it is the container's that
        counts. Raises what `_manifest` does.
        """
        if self.shards is None:
            return [compose(each, None if self.upload is None else str(self.upload)) for each in words]
        if self.upload is not None:
            raise click.UsageError(
                "--shards is a path on the host, --upload-shards one here: give one of the two"
            )
        faults: list[ManyhandsError] = []
        for docker in (False,) if host.docker_launch_command is None else (False, True):
            try:
                manifest = asyncio.run(_manifest(host, str(self._shards_there()), docker=docker))
            except (DataError, WorkerError) as fault:
                faults.append(fault)
                continue
            found = _composed_with(manifest, f"{host.host_name}:{self.shards}", compose, words)
            inside = any(one.settings.exec.run_in_docker for one in found)
            if docker or not inside or host.docker_launch_command is None:
                return found
        raise faults[0]


def _composed_with(
    manifest: str, where: str, compose: Compose, words: Sequence[Sequence[str]]
) -> list[Configuration]:
    """With the task of a manifest that lies elsewhere: what is wrong with it is said of `where`."""
    with tempfile.TemporaryDirectory(prefix="manyhands-shards-") as name:
        (Path(name) / MANIFEST).write_text(manifest, encoding="utf-8")
        try:
            return [compose(each, name) for each in words]
        except (DataError, PlanError, click.UsageError) as fault:
            said = fault.message if isinstance(fault, click.UsageError) else str(fault)
            raise type(fault)(said.replace(name, where)) from None


async def _manifest(host: Host, shards: str, *, docker: bool) -> str:
    """Of shards on a host. Raises DataError; WorkerError where nothing can be run there, or in its container."""
    async with reached(host, docker=docker) as there:
        try:
            return str((await there.ask("text", path=f"{shards}/{MANIFEST}", bytes=64 << 20))["text"])
        except StorageError as error:
            raise DataError(
                f"{error}: --shards is the directory as {host.host_name} sees it; send one of this machine with "
                "--upload-shards DIR"
            ) from None
