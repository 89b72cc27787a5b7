"""The hosts' file: CeresTrain's own example as it stands, our names, and every fault with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from manyhands.errors import PlanError
from manyhands.hosts.hosts_file import chosen, host_named, hosts, read_hosts

SEED = """[
  {
    "HostName": "WSL",
    "UserName": "user2",
    "CeresTrainPyDir": "~/dev/CeresTrainPy",
    "PathToOutputFromHost": "/mnt/e/cout",
  },
    {
    "HostName": "server1",
    "UserName": "user1",
    "CeresTrainPyDir": "~/dev/CeresTrainPy",
    "PathToOutputFromHost": "/mnt/deve/cout",
    "DockerLaunchCommand": "docker exec -it upbeat_fermi",
  }
]
"""
OURS = """[
\t{"HostName": "server1", "Port": 2222, "IdentityFile": "~/.ssh/other", "WorkDir": "/data/mh", "Python": "python3.12",
\t "Environment": {"OMP_NUM_THREADS": 4}, "Devices": "0,2", "Address": "10.0.0.1",
\t "OverridePyTorchCompileMode": "max-autotune-no-cudagraphs", "DockerLaunchCommand": ""}
]"""


def written(directory: Path, text: str, name: str = "hosts.json") -> Path:
    (directory / name).write_text(text, encoding="utf-8")
    return directory / name


def test_the_file_that_people_have_is_read_as_it_is(tmp_path: Path) -> None:
    written(tmp_path, SEED, "CeresTrainHosts.json")
    found = hosts(tmp_path)
    assert list(found) == ["wsl", "server1"]
    server = found["server1"]
    assert (server.user_name, server.work_dir) == ("user1", "~/dev/CeresTrainPy")
    assert server.path_to_output_from_host == "/mnt/deve/cout"
    assert server.docker_launch_command == "docker exec -it upbeat_fermi"
    assert found["wsl"].docker_launch_command is None
    assert host_named("Wsl", tmp_path) is not None


def test_our_own_keys(tmp_path: Path) -> None:
    (server,) = read_hosts(written(tmp_path, OURS))
    assert (server.port, server.identity_file, server.python) == (2222, "~/.ssh/other", "python3.12")
    assert server.devices == (0, 2)
    assert server.environment == {"OMP_NUM_THREADS": "4"}
    assert (server.override_py_torch_compile_mode, server.address) == (
        "max-autotune-no-cudagraphs",
        "10.0.0.1",
    )
    assert server.docker_launch_command is None, "a program wrote an empty one"


def test_hosts_json_comes_before_the_other_file(tmp_path: Path) -> None:
    written(tmp_path, SEED, "CeresTrainHosts.json")
    written(tmp_path, OURS)
    assert hosts(tmp_path)["server1"].work_dir == "/data/mh"
    assert "wsl" in hosts(tmp_path)


def test_an_unknown_host_is_told_with_those_that_there_are(tmp_path: Path) -> None:
    written(tmp_path, SEED)
    with pytest.raises(
        PlanError, match=r"no host 'sever1' .* Did you mean 'server1'\? Known: server1, wsl\."
    ):
        host_named("sever1", tmp_path)
    with pytest.raises(PlanError, match="named twice"):
        chosen(["server1", "server1"], tmp_path)
    with pytest.raises(PlanError, match=r"there is no .*hosts.json with it yet; write one, as in"):
        host_named("server1", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[\n {"HostName": "a",\n  "Prot": 22}\n]', r"line 3: unknown key 'Prot'\. Did you mean 'Port'\?"),
        ('[\n {"HostName": "a",\n  "Port": "x"}\n]', r"line 3: 'Port' is 'x': expected a whole number"),
        ('[\n {"UserName": "a"}\n]', r"line 2: 'HostName' is missing"),
        ('[\n {"HostName": "a"},\n {"HostName": "a"}\n]', r"line 3: host 'a' is there already, at line 2"),
        ('[\n {"HostName": "a", "WorkDir": "x"}\n]', r"line 2.*WorkDir x: expected a path from / or ~"),
        ('[{"HostName": "a", "WorkDir": "/x",\n "CeresTrainPyDir": "/y"}]', r"line 2: .*says again what 'WorkDir'"),
        ('[\n {"HostName": "a",\n  "UserName" "b"}\n]', r"line 3: .*expected JSON"),
        ('{"HostName": "a"}', r"expected a list of hosts"),
        ('[\n\n "server1"\n]', r"line 3: expected a host"),
        ("", r"expected a list of hosts"),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        read_hosts(written(tmp_path, text))
