"""What docs/jobs.md shows of the client works."""

import re
import shlex
from collections import deque

import pytest

from syncbn.client.command import main
from tests.support.fake_jobs import FakeJobs, ended, running
from tests.support.processes import REPOSITORY

PAGE = (REPOSITORY / "docs" / "jobs.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [
    re.split(r" && |\)", line.partition("syncbn-jobs ")[2])[0]
    for language, code in BLOCKS
    if language == "bash"
    for line in code.splitlines()
    if "syncbn-jobs " in line
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_do_what_they_say(
    command: str, url: str, fake: FakeJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNCBN_URL", url)
    fake.looks["job1"] = deque([running(), ended("finished")])
    words = shlex.split(command.replace("$id", "job1"))
    if "$id" in command:
        fake.add()
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0


def test_python_runs(url: str, fake: FakeJobs, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = [code for language, code in BLOCKS if language == "py"]
    fake.looks["job1"] = deque([running() | ended("finished")])
    exec(code.replace("http://127.0.0.1:8000", url), {})
    assert capsys.readouterr().out == "finished {'val_accuracy': 0.97, 'val_loss': 0.1}\n"
    assert len(fake.jobs) == 7
