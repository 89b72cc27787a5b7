"""The connection to a host: SSH as ssh itself is set up, or a shell of this machine, or of its WSL.

~/.ssh/config, the agent, ssh's keys and known_hosts are used as they are. Nobody is ever asked for a password or a
passphrase, and a host whose key is not known is refused: each such end has its own words and says what to do. A
`Connection` opens channels: a command on the host with its input and output.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import posixpath
import shlex
import shutil
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from manyhands.errors import IdentityError, PlanError, Refused, ServerUnreachable
from manyhands.hosts.hosts_file import WSL, Host

if TYPE_CHECKING:
    import asyncssh

CONNECT_S: Final = 15.0
SILENCE_S: Final = 30.0
"""So long sftp may do nothing."""
_FAST_CIPHERS: Final = ["aes128-gcm@openssh.com", "aes256-gcm@openssh.com"]
"""Several times faster here than what would be chosen; used where ~/.ssh/config names none."""
_KNOWN_TO_ALL: Final = "/etc/ssh/ssh_known_hosts"
_EXIT_S: Final = 2.0
_WINDOW, _PACKET = 16 << 20, 131072
"""Packets of four times what is usual: each costs the same here, and sshd sends them (its own limit is 256 KiB)."""


class Receiver(Protocol):
    """Who gets what comes through a channel."""

    def received(self, data: bytes) -> None: ...
    def complained(self, data: bytes) -> None: ...
    def may_write(self, may: bool) -> None: ...
    def exited(self, code: int) -> None: ...
    def closed(self, reason: str | None) -> None: ...


class Channel(Protocol):
    """A command on the host."""

    def write(self, data: bytes) -> None: ...
    def read_on(self, on: bool) -> None: ...
    def close(self) -> None: ...


class Connection(Protocol):
    async def open(self, command: str, receiver: Receiver) -> Channel: ...

    async def put(self, file: Path, path: str) -> bool:
        """A file to an absolute path of the host by sftp, its directories made; False where that cannot be done."""


def is_here(host: Host) -> bool:
    """Whether it is this machine, or the Linux inside it."""
    own = socket.gethostname().lower()
    return host.host_name == WSL or host.host_name.lower() in (own, own.partition(".")[0])


@contextlib.asynccontextmanager
async def connected(host: Host) -> AsyncIterator[Connection]:
    """While the block lasts. Raises ServerUnreachable, Refused (keys of either side), IdentityError, PlanError."""
    if is_here(host):
        shell = _Shell(_shell_of(host))
        try:
            yield shell
        finally:
            await shell.close()
        return
    connection = _Ssh(await _ssh(host))
    try:
        yield connection
    finally:
        connection.close()


# ---------------------------------------------------------------------------------------- ssh
async def _ssh(host: Host) -> asyncssh.SSHClientConnection:
    import asyncssh

    shown: list[tuple[str, int, asyncssh.SSHKey]] = []

    class Client(asyncssh.SSHClient):
        def validate_host_public_key(self, name: str, _address: str, port: int, key: asyncssh.SSHKey) -> bool:
            shown.append((name, port, key))
            return False

    try:
        given, options = await asyncio.to_thread(_options, host)
        async with asyncio.timeout(CONNECT_S):
            return await asyncssh.connect(**given, client_factory=Client)
    except asyncssh.HostKeyNotVerifiable as error:
        raise _unknown_key(host, shown, options, str(error)) from None
    except asyncssh.PermissionDenied:
        raise Refused(_wrong_key(host, options)) from None
    except asyncssh.KeyExchangeFailed as error:
        raise Refused(
            f"{host.host_name} and this machine have no way of encryption in common ({error.reason})"
        ) from None
    except (TimeoutError, OSError, asyncssh.Error) as error:
        reason = f"no answer within {CONNECT_S:.0f} s" if isinstance(error, TimeoutError) else str(error)
        raise ServerUnreachable(
            f"{host.host_name} cannot be reached at {_where(host, options)}: {reason}; see whether it is up, and "
            f"whether `ssh {_target(host)}` gets there"
        ) from None


def _options(host: Host) -> tuple[dict[str, Any], asyncssh.SSHClientConnectionOptions]:
    """What the hosts' file says, for asyncssh, and what comes of it on top of ~/.ssh/config. Reads files."""
    import asyncssh

    given: dict[str, Any] = {"host": host.host_name, "password_auth": False, "kbdint_auth": False}
    given |= {"keepalive_interval": 5, "keepalive_count_max": 3}
    if host.user_name is not None:
        given["username"] = host.user_name
    if host.port is not None:
        given["port"] = host.port
    if host.identity_file is not None:
        given["client_keys"] = [str(_key_file(host))]
    given["ignore_encrypted"] = True  # such a key is for the agent to use, as with ssh
    try:
        options = asyncssh.SSHClientConnectionOptions(
            **given, config=()
        )  # (): ~/.ssh/config; None would be none
        if options.encryption_algs == asyncssh.SSHClientConnectionOptions(config=None).encryption_algs:
            ciphers = [*_FAST_CIPHERS, *(name.decode() for name in options.encryption_algs)]
            given["encryption_algs"] = list(dict.fromkeys(ciphers))
        given["known_hosts"] = _known_hosts_there(options) or b""  # never None, which is any key at all
    except asyncssh.KeyImportError as error:
        raise IdentityError(f"{host.host_name}: a key of ssh cannot be read: {error}") from None
    except (OSError, ValueError, asyncssh.ConfigParseError) as error:
        raise IdentityError(f"{host.host_name}: what ssh is set up with cannot be read: {error}") from None
    return given, options


def _key_file(host: Host) -> Path:
    path = Path(host.identity_file or "").expanduser()
    if not path.is_file():
        raise IdentityError(
            f"{host.host_name}: IdentityFile {host.identity_file} does not exist: make one with `ssh-keygen -t "
            f"ed25519 -f {host.identity_file}` and send its .pub to the host with ssh-copy-id"
        )
    return path


def _has_passphrase(file: Path) -> bool:
    import asyncssh

    try:
        asyncssh.read_private_key(file)
    except asyncssh.KeyEncryptionError:
        return True
    except (asyncssh.KeyImportError, OSError) as error:
        return "assphrase" in str(error)
    return False


def _unknown_key(
    host: Host,
    shown: list[tuple[str, int, asyncssh.SSHKey]],
    options: asyncssh.SSHClientConnectionOptions,
    said: str,
) -> Refused:
    """For a host that was never seen, and for one that shows another key than it used to."""
    if not shown:
        return Refused(f"{host.host_name} shows a key that is not to be trusted: {said}")
    name, port, key = shown[-1]
    fingerprint, file = key.get_fingerprint(), _known_hosts(options)[0]
    known = name if port == 22 else f"[{name}]:{port}"
    scan = f"ssh-keyscan -p {port} {name} >> {file}"
    if options.tunnel or options.proxy_command or options.host_key_alias:  # where keyscan would not find it
        scan = f"ssh -o StrictHostKeyChecking=ask {_target(host)} true"
    if not _has_other_key(options, name, port):
        return Refused(
            f"the key of {host.host_name} ({known}) is not known here; it is {fingerprint}. If that is the one that "
            f"`ssh-keygen -lf /etc/ssh/ssh_host_{_kind(key)}_key.pub` shows there, add it: {scan}"
        )
    return Refused(
        f"THE KEY OF {host.host_name} ({known}) HAS CHANGED: it is {fingerprint} now. Either the host was set up "
        f"anew, or another machine answers in its place. Ask who runs it, and only then: ssh-keygen -R "
        f"'{known}' -f {file} && {scan}"
    )


def _has_other_key(options: asyncssh.SSHClientConnectionOptions, name: str, port: int) -> bool:
    import asyncssh

    there = _known_hosts_there(options)
    return bool(there and asyncssh.match_known_hosts(there, name, "", port)[0])


def _known_hosts(options: asyncssh.SSHClientConnectionOptions) -> list[Path]:
    """The files of ~/.ssh/config, else ssh's own. Where none is named there (`none`, /dev/null), keys are held to
    ssh's own as well: nobody is trusted unseen."""
    named = options.known_hosts if isinstance(options.known_hosts, list) else []
    listed = [str(file) for file in named if str(file) != os.devnull] or ["~/.ssh/known_hosts"]
    return [Path(file).expanduser() for file in (*listed, _KNOWN_TO_ALL)]


def _known_hosts_there(options: asyncssh.SSHClientConnectionOptions) -> list[str]:
    return [str(file) for file in _known_hosts(options) if file.is_file()]


def _kind(key: asyncssh.SSHKey) -> str:
    algorithm = key.get_algorithm()
    return next((kind for kind in ("ed25519", "ecdsa", "rsa") if kind in algorithm), "*")


def _wrong_key(host: Host, options: asyncssh.SSHClientConnectionOptions) -> str:
    if host.identity_file is not None and _has_passphrase(_key_file(host)):
        return (
            f"{host.host_name} does not let {options.username} in: the key {host.identity_file} has a passphrase, "
            f"for which nobody is asked here, and no other key of the agent will do; give it to the agent once with "
            f"`ssh-add {host.identity_file}`"
        )
    asked = "its IdentityFile" if host.identity_file else "the keys of ~/.ssh and of the agent"
    file = host.identity_file or "~/.ssh/id_ed25519"
    return (
        f"{host.host_name} does not let {options.username} in with {asked}: send it the public key with `ssh-copy-id "
        f"-i {file}.pub {_target(host)}`, or name another IdentityFile or UserName (passwords are never asked for)"
    )


def _target(host: Host) -> str:
    """What one would type behind ssh."""
    port = f"-p {host.port} " if host.port else ""
    return port + (f"{host.user_name}@" if host.user_name else "") + host.host_name


def _where(host: Host, options: asyncssh.SSHClientConnectionOptions) -> str:
    return f"{options.host or host.host_name}:{options.port or host.port or 22}"


class _Ssh:
    def __init__(self, connection: asyncssh.SSHClientConnection) -> None:
        self._connection = connection

    async def open(self, command: str, receiver: Receiver) -> Channel:
        import asyncssh

        class Session(asyncssh.SSHClientSession[bytes]):
            def data_received(self, data: bytes, datatype: int | None) -> None:
                (receiver.received if datatype is None else receiver.complained)(data)

            def pause_writing(self) -> None:
                receiver.may_write(False)

            def resume_writing(self) -> None:
                receiver.may_write(True)

            def exit_status_received(self, status: int) -> None:
                receiver.exited(status)

            def eof_received(self) -> bool:
                return False

            def connection_lost(self, exc: Exception | None) -> None:
                receiver.closed(None if exc is None else str(exc) or type(exc).__name__)

        try:
            channel, _ = await self._connection.create_session(
                Session, command, encoding=None, window=_WINDOW, max_pktsize=_PACKET
            )
        except (OSError, asyncssh.Error) as error:
            raise ServerUnreachable(f"the connection was lost: {error}") from None
        return _SshChannel(channel)

    async def put(self, file: Path, path: str) -> bool:
        import asyncssh

        clock = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(SILENCE_S) as limit, self._connection.start_sftp_client() as sftp:
                await sftp.makedirs(posixpath.dirname(path), exist_ok=True)
                await sftp.put(
                    str(file), path, progress_handler=lambda *_: limit.reschedule(clock() + SILENCE_S)
                )
        except (OSError, asyncssh.Error):
            return False
        return True

    def close(self) -> None:
        self._connection.abort()


class _SshChannel:
    def __init__(self, channel: asyncssh.SSHClientChannel[bytes]) -> None:
        self._channel = channel

    def write(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, which the receiver is told
            self._channel.write(data)

    def read_on(self, on: bool) -> None:
        (self._channel.resume_reading if on else self._channel.pause_reading)()

    def close(self) -> None:
        self._channel.close()


# ---------------------------------------------------------------------------------------- this machine
def _shell_of(host: Host) -> list[str]:
    if host.host_name != WSL:
        return ["sh", "-c"]
    program = shutil.which("wsl.exe")
    if program is None:
        raise PlanError(
            "host 'wsl' is the Linux inside Windows, and this machine has no wsl.exe"
            + (
                ""
                if sys.platform == "win32"
                else f" (it runs {sys.platform}): leave --host out to train here"
            )
        )
    user = [] if host.user_name is None else ["--user", host.user_name]
    return [program, *user, "--exec", "sh", "-c"]  # not `--`: a shell would expand what is meant for sh


class _Shell:
    """Commands of this machine, by a shell."""

    def __init__(self, shell: list[str]) -> None:
        self._shell = shell
        self._channels: list[_ShellChannel] = []

    async def open(self, command: str, receiver: Receiver) -> Channel:
        loop = asyncio.get_running_loop()
        try:
            transport, pipes = await loop.subprocess_exec(lambda: _Pipes(receiver), *self._shell, command)
        except OSError as error:
            raise ServerUnreachable(f"{shlex.join(self._shell)} cannot be started: {error}") from None
        self._channels.append(_ShellChannel(transport, pipes))
        return self._channels[-1]

    async def put(self, file: Path, path: str) -> bool:  # noqa: ARG002 - the protocol's
        return False

    async def close(self) -> None:
        for channel in self._channels:
            channel.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_EXIT_S):
                    await channel.pipes.exited.wait()


class _Pipes(asyncio.SubprocessProtocol):
    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self.exited = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.SubprocessTransport, transport)

    def process_exited(self) -> None:
        self._receiver.exited(self._transport.get_returncode() or 0)
        self.exited.set()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        (self._receiver.received if fd == 1 else self._receiver.complained)(data)

    def pause_writing(self) -> None:
        self._receiver.may_write(False)

    def resume_writing(self) -> None:
        self._receiver.may_write(True)

    def connection_lost(self, exc: Exception | None) -> None:
        self._receiver.closed(None if exc is None else str(exc))


class _ShellChannel:
    def __init__(self, transport: asyncio.SubprocessTransport, pipes: _Pipes) -> None:
        self._transport, self.pipes = transport, pipes

    def write(self, data: bytes) -> None:
        pipe = self._transport.get_pipe_transport(0)
        assert isinstance(pipe, asyncio.WriteTransport)
        pipe.write(data)

    def read_on(self, on: bool) -> None:
        pipe = self._transport.get_pipe_transport(1)
        if isinstance(pipe, asyncio.ReadTransport):
            (pipe.resume_reading if on else pipe.pause_reading)()

    def close(self) -> None:
        for number in (0, 1, 2):
            pipe = self._transport.get_pipe_transport(number)
            if pipe is not None:
                pipe.close()
        with contextlib.suppress(ProcessLookupError):
            self._transport.terminate()
        self._transport.close()
