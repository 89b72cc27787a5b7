"""From the command line of `manyhands train --host` to trainings on hosts.

--host a            one training on a
--host a,b          one training on both: their processes meet at the first
-m --host a --host b KEY=1,2,3    each combination on the host that is free next, in one table
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from manyhands.errors import DataError, StorageError
from manyhands.hosts.agent import reached
from manyhands.hosts.beginning import Wish
from manyhands.hosts.hosts_file import Host, chosen
from manyhands.ui.live import choose_logs

if TYPE_CHECKING:
    from manyhands.engine.configuration import Configuration

MANIFEST = "manifest.json"

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
        with self._shards_from_here(hosts[0]) as manifest:
            wish = self._wish(compose(overrides, manifest), self.directory)
        return train_on_hosts(hosts, wish, choose_logs(self.logs))

    def sweep(self, compose: Compose, overrides: Sequence[str]) -> int:
        """Each combination of values, one at a time on each host; the exit code of the first that failed."""
        from manyhands.plan.compose import sweep
        from manyhands.ui.host_sweep import sweep_on_hosts

        groups = [chosen(names.split(",")) for names in self.hosts]
        combinations = sweep(overrides)
        if self.directory is not None:
            raise click.UsageError("--directory is for one training: leave it out with --multirun")
        with self._shards_from_here(groups[0][0]) as manifest:
            wishes = [
                (
                    " ".join(c for c in combination if c not in overrides),
                    self._wish(compose(combination, manifest), None),
                )
                for combination in combinations
            ]
        return sweep_on_hosts(groups, wishes, choose_logs(self.logs))

    def _wish(self, configuration: Configuration, directory: Path | None) -> Wish:
        from manyhands.ui.host_training import directory_for

        start = configuration.start
        if start.rank is not None or start.nodes is not None or start.master_addr is not None:
            raise click.UsageError(
                "rank, world_size, nodes and master_addr are for those started by hand: --host=a,b does that itself"
            )
        directory = directory_for(configuration, directory)
        plan = configuration.plan
        if self.shards is not None:
            data = plan.data.model_copy(update={"shards": self.shards})
            configuration = replace(configuration, plan=plan.model_copy(update={"data": data}))
        return Wish(
            configuration=configuration,
            run=directory.resolve().name,
            directory=directory,
            allowed=self.allowed,
            devices=self.devices,
            export=self.export,
            docker=configuration.settings.exec.run_in_docker,
            paths=() if self.shards is None else (self.shards,),
            upload=self.upload,
        )

    @contextlib.contextmanager
    def _shards_from_here(self, host: Host) -> Iterator[str | None]:
        """A directory here with the manifest of the shards: that of --upload-shards, or for a while a copy of the
        host's."""
        if self.shards is None:
            yield None if self.upload is None else str(self.upload)
            return
        if self.upload is not None:
            raise click.UsageError(
                "--shards is a path on the host, --upload-shards one here: give one of the two"
            )
        with tempfile.TemporaryDirectory(prefix="manyhands-shards-") as name:
            (Path(name) / MANIFEST).write_text(asyncio.run(_manifest(host, self.shards)), encoding="utf-8")
            yield name


async def _manifest(host: Host, shards: str) -> str:
    """Of shards on a host. Raises DataError."""
    async with reached(host) as there:
        try:
            return str((await there.ask("text", path=f"{shards}/{MANIFEST}", bytes=64 << 20))["text"])
        except StorageError as error:
            raise DataError(
                f"{error}: --shards is the directory as {host.host_name} sees it; send one of this machine with "
                "--upload-shards DIR"
            ) from None
