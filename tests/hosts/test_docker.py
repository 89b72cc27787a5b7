"""DockerLaunchCommand without its terminal, whatever else is in it."""

from __future__ import annotations

import pytest

from manyhands.errors import PlanError
from manyhands.hosts.docker import without_terminal


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("docker exec -it upbeat_fermi", "docker exec -i upbeat_fermi"),
        ("docker exec -t NAME", "docker exec -i NAME"),
        ("docker exec NAME", "docker exec -i NAME"),
        ("sudo -n docker exec --interactive --tty NAME", "sudo -n docker exec -i NAME"),
        ("/usr/bin/podman exec -itu root --workdir /w NAME", "/usr/bin/podman exec -i -u root --workdir /w NAME"),
        ("docker exec -it -e A=1 --env=B=2 NAME nice -n 5", "docker exec -i -e A=1 --env=B=2 NAME nice -n 5"),
        ("docker run -it --rm --gpus all image", "docker run -i --rm --gpus all image"),
    ],
)  # fmt: skip
def test_the_terminal_is_taken_out_and_the_rest_stays(command: str, words: str) -> None:
    assert without_terminal(command) == words.split()


@pytest.mark.parametrize(
    "command", ["docker", "docker exec", "docker exec -it", "exec NAME", "docker 'exec NAME"]
)
def test_what_enters_no_container_is_refused(command: str) -> None:
    with pytest.raises(
        PlanError, match=r"expected what enters a running container, as 'docker exec -it NAME'"
    ):
        without_terminal(command)
