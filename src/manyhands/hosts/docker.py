"""Into a container on the host: DockerLaunchCommand as people have it, without the terminal that nobody has here.

`docker exec -it NAME` refuses to run where its input is no terminal, and what goes through a terminal is changed on
the way. So `t` is taken out of the options, `i` put in, and the rest stays as it was written: sudo, a path, podman.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Final

from manyhands.errors import PlanError

_ENTERING: Final = ("exec", "run")
_WITH_VALUE: Final = frozenset("eluwcmpvh")  # short options of exec and run that take a value: not clusters


def without_terminal(command: str) -> list[str]:
    """The words of a DockerLaunchCommand that enter a container with input and output as they are.

    Raises PlanError for a command that names no container.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise PlanError(f"DockerLaunchCommand {command!r}: {error}; {_EXPECTED}") from None
    at = next((i for i, word in enumerate(words) if word in _ENTERING), None)
    if at is None or at == 0 or at + 1 == len(words):
        raise PlanError(f"DockerLaunchCommand {command!r}: {_EXPECTED}")
    options, rest = _options(words[at + 1 :])
    if not rest:
        raise PlanError(f"DockerLaunchCommand {command!r} names no container: {_EXPECTED}")
    return [*words[: at + 1], "-i", *options, *rest]


_EXPECTED: Final = "expected what enters a running container, as 'docker exec -it NAME'"


def _options(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those before the container's name, without `t` and `i`, and what follows."""
    kept: list[str] = []
    index = 0
    while index < len(words) and words[index].startswith("-"):
        word = words[index]
        index += 1
        if word in ("--tty", "--interactive", "--tty=true", "--interactive=true"):
            continue
        if word.startswith("--"):
            kept.append(word)
            if "=" not in word and word not in ("--privileged", "--rm", "--init") and index < len(words):
                kept.append(words[index])
                index += 1
            continue
        letters = word[1:]
        value = next((i for i, letter in enumerate(letters) if letter in _WITH_VALUE), None)
        flags = letters if value is None else letters[:value]
        flags = flags.replace("t", "").replace("i", "")
        if value is None:
            kept += [f"-{flags}"] if flags else []
            continue
        kept.append(f"-{flags}{letters[value:]}")
        if value == len(letters) - 1 and index < len(words):  # its value is the next word
            kept.append(words[index])
            index += 1
    return kept, list(words[index:])
