"""The README's commands, run as they stand, in order, as a newcomer would."""

import re
import socket
import sys

import pytest

from tests.support.processes import REPOSITORY, run

README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Run every bash block in one shell, in a directory that looks like a fresh clone."""
    clone = tmp_path_factory.mktemp("clone")
    (clone / "scripts").symlink_to(REPOSITORY / "scripts")
    (clone / ".venv").symlink_to(sys.prefix)
    (python,) = [code for language, code in BLOCKS if language == "python"]
    (clone / "example.py").write_text(python)
    commands = "\n".join(code for language, code in BLOCKS if language == "bash")
    commands = commands.replace(":8000", f":{(port := _free_port())}")
    commands = commands.replace("--port 8000", f"--port {port}")
    script = f"set -euo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n{commands}"
    result = run(["bash", "-c", script], clone, timeout_s=600)
    assert result.returncode == 0, result.stdout
    return result.stdout


def test_only_the_two_commands_run_elsewhere_are_not_run_here() -> None:
    others = [code for language, code in BLOCKS if language not in ("bash", "python")]
    (commands,) = others
    assert [line.split("#")[0].strip() for line in commands.splitlines()] == [
        "make demo",
        "make test",
    ]


@pytest.mark.long
def test_example_ends_with_the_same_statistics_on_both_ranks(output: str) -> None:
    statistics = re.findall(r"rank [01]: running variance (\d+\.\d+)", output)
    assert len(statistics) == 2
    assert statistics[0] == statistics[1]


@pytest.mark.long
def test_training_commands_leave_their_bundles(output: str) -> None:
    assert output.count("bundle written to") == 4
    assert "Groups and their choices" in output


@pytest.mark.long
def test_service_answers_as_the_readme_says(output: str) -> None:
    (label,) = re.findall(
        r'"name":"label","shape":\[1\],"datatype":"BYTES","data":\["(\d)"\]', output
    )
    assert f'here `"{label}"`' in README
