"""The command syncbn-jobs: what it prints, and the codes that it ends with."""

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from syncbn.client.command import main
from tests.support import fake_jobs
from tests.support.fake_jobs import BREAK, FakeJobs, Fault, ended, running
from tests.support.processes import REPOSITORY, run

COMMAND = [sys.executable, "-m", "syncbn.client.command"]
DEADLINE_S = 60


@pytest.fixture
def jobs(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process; return its code, output and errors."""
    monkeypatch.setenv("SYNCBN_URL", url)
    for name in ("SYNCBN_API_KEY", "SYNCBN_API_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended_:
            main(words)
        output = capsys.readouterr()
        code = ended_.value.code
        assert isinstance(code, int)
        return code, output.out, output.err

    return call


def on_terminal(
    url: str, *words: str, columns: int = 100, interrupt_at: bytes = b""
) -> tuple[int, str]:
    """Run the command on a terminal; return its code, and what appeared.

    Args:
        url: of the service.
        *words: of the command.
        columns: of the terminal.
        interrupt_at: what has to appear before Ctrl-C is sent; empty: it is not.
    """
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "SYNCBN_URL": url, "PYTHONUTF8": "1"}
    for name in ("COLUMNS", "LINES"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [*COMMAND, *words],
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=its,
        stderr=its,
        # A shell has what it starts in the background ignore it, and so the command too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(its)
    said, deadline = b"", time.monotonic() + DEADLINE_S
    try:
        while time.monotonic() < deadline:
            if not select.select([ours], [], [], 1)[0]:
                continue
            try:
                part = os.read(ours, 1 << 16)
            except OSError:  # nobody writes any more
                break
            said += part
            if interrupt_at and interrupt_at in said:
                process.send_signal(signal.SIGINT)
                interrupt_at = b""
        return process.wait(DEADLINE_S), said.decode()
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_submit_takes_what_syncbn_train_takes(jobs: Any, fake: FakeJobs) -> None:
    code, out, err = jobs(
        *("submit", "norm=local", "--name", "x", "optim.lr=1e-3", "--retries", "2"),
        *("patience=null", "recalibrate=true", "model.depths=[1,2]", "data.set=10", "priority=5"),
    )
    assert (code, out, err) == (0, "job1\n", "")
    assert fake.sent[-1].json == {
        "name": "x",
        "choices": {"norm": "local"},
        "values": {
            "optim.lr": 0.001,
            "patience": None,
            "recalibrate": True,
            "model.depths": [1, 2],
            "data.set": "10",
        },
        "priority": 5,
        "retries": 2,
    }


def test_sweep_submits_every_combination(jobs: Any, fake: FakeJobs) -> None:
    words = ["norm=sync,local", "seed=range(3)", "epochs=2"]
    assert jobs("submit", "-m", *words, "--publish", "digits")[:2] == (0, "sweep1\n")
    assert fake.sent[-1].json == {
        "values": {"epochs": 2},
        "sweep": {"norm": ["sync", "local"], "seed": [0, 1, 2]},
        "publish": "digits",
    }
    assert len(fake.jobs) == 6


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("lr=0.1", "lr=0.1: there is no lr; did you mean optim.lr?"),
        ("norms=local", "norms=local: there is no norms; did you mean norm?"),
        ("+optim.lrr=1", "+optim.lrr=1: there is no optim.lrr; did you mean optim.lr?"),
        ("seed=1,2", "seed=1,2: has several values; -m submits one job for each"),
        ("optim.lr=-1", "optim.lr=-1: must be above 0 and at most 100"),
    ],
)
def test_mistyped_words_are_refused_with_what_was_meant(
    jobs: Any, fake: FakeJobs, word: str, said: str
) -> None:
    code, out, err = jobs("submit", word)
    assert (code, out) == (2, "")
    assert err.startswith(f"syncbn-jobs: {said}")
    assert fake.jobs == {}


def test_names_that_nothing_is_close_to_are_left_to_the_service(jobs: Any, fake: FakeJobs) -> None:
    assert jobs("submit", "zzz.www=1")[0] == 0
    assert fake.sent[-1].json == {"values": {"zzz.www": 1}}


def test_what_is_said_twice_is_refused(jobs: Any) -> None:
    code, _, err = jobs("submit", "name=x", "--name", "y")
    assert (code, err) == (2, "syncbn-jobs: name=x: --name is there too; leave one out\n")


def test_job_option_cannot_vary_in_a_sweep(jobs: Any) -> None:
    code, _, err = jobs("submit", "-m", "priority=1,2")
    assert code == 2
    assert "priority: is of all jobs of a sweep, and cannot vary in it" in err


def test_same_idempotency_key_submits_once(jobs: Any, fake: FakeJobs) -> None:
    for _ in range(2):
        assert jobs("submit", "--idempotency-key", "nightly")[1] == "job1\n"
    assert len(fake.jobs) == 1


def test_submission_that_nobody_starts_is_warned_of(
    jobs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fake_jobs.OPTIONS, "dispatcher", {"engine": "local", "alive": False})
    code, out, err = jobs("submit")
    assert (code, out) == (0, "job1\n")
    assert err.startswith("syncbn-jobs: warning: nobody starts jobs now; it waits until")


def test_list_is_a_table(jobs: Any, fake: FakeJobs) -> None:
    fake.add(owner="ben")
    fake.add(**running())
    fake.add(**running() | ended("failed", "rank 1 was killed\x1b[2J\n"))
    code, out, _ = jobs("list")
    lines = [line.split("  ") for line in out.splitlines()]
    titles = [cell.strip() for cell in lines[0] if cell]
    assert code == 0
    assert titles == [
        "id",
        "name",
        "state",
        "done",
        "left",
        "val_accuracy",
        "owner",
        "age",
        "reason",
    ]
    assert [line[0] for line in lines[1:]] == ["job3", "job2", "job1"]
    assert "failed" in out
    assert "10 %  8.1 s       97.00 %" in out
    assert out.splitlines()[1].endswith("rank 1 was killed [2J")


def test_list_of_one_owner_does_not_repeat_it(jobs: Any, fake: FakeJobs) -> None:
    fake.add()
    assert "anna" not in jobs("list")[1]


def test_list_may_be_narrowed_down(jobs: Any, fake: FakeJobs) -> None:
    fake.add()
    fake.add(state="lost", name="x")
    words = ["--state", "lost", "--state", "failed", "--name", "x", "--owner", "anna"]
    assert len(jobs("list", *words)[1].splitlines()) == 2
    assert ("state", "failed") in fake.sent[-1].query


def test_list_says_when_there_is_more(jobs: Any, fake: FakeJobs) -> None:
    for _ in range(5):
        fake.add()
    _, out, err = jobs("list", "--limit", "3", "--json")
    assert len(out.splitlines()) == 3
    assert err == "there are more than 3; --limit 0 lists all\n"
    assert len(jobs("list", "--limit", "0", "--json")[1].splitlines()) == 5
    code, out, err = jobs("list", "--limit", "-5")
    assert (code, out) == (2, "")
    assert err == "syncbn-jobs: --limit -5: must be 0 or more jobs, of which 0 lists all\n"


def test_json_is_a_document_a_line(jobs: Any, fake: FakeJobs) -> None:
    sweep = json.loads(jobs("submit", "-m", "seed=1,2", "--json")[1])
    assert (sweep["kind"], len(sweep["jobs"])) == ("sweep", 2)
    listed = [json.loads(line) for line in jobs("list", "--json")[1].splitlines()]
    assert [job["id"] for job in listed] == ["job2", "job1"]
    assert json.loads(jobs("show", "job1", "--json")[1])["state"] == "queued"
    assert json.loads(jobs("options", "--json")[1])["groups"]["norm"]["default"] == "sync"
    assert json.loads(jobs("compare", "job1", "job2", "--json")[1])["jobs"][1]["id"] == "job2"
    assert json.loads(jobs("cancel", "job1", "--json")[1])["state"] == "cancelled"


def test_show_tells_all_that_is_known(jobs: Any, fake: FakeJobs) -> None:
    fake.add(
        **running(),
        choices={"norm": "sync"},
        values={"epochs": 2},
        changed={"optim.lr": {"default": 0.1, "value": 0.05}},
        attempts=[
            {
                "number": 1,
                "started": 10,
                "ended": 85,
                "status": "failed",
                "reason_code": "rank_killed",
                "reason": "rank 1 was killed",
            }
        ],
        transitions=[{"state": "queued", "time": 5, "reason": "stored", "by": "anna"}],
    )
    code, out, _ = jobs("show", "job1")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "digits-cnn (job1), job 1 of anna"
    assert "state      running: training, step 12 of 120" in lines
    assert "progress   10 %, epoch 0.2 of 2, 900 images/s, 8.1 s left" in lines
    assert "metrics    val_accuracy 97.00 %, val_loss 0.1" in lines
    assert "changed    optim.lr=0.05 (default 0.1)" in lines
    assert any(line.endswith("1 min 15 s  rank 1 was killed") for line in lines)
    assert lines[-1].split()[2:] == ["queued", "anna", "stored"]


def test_actions_tell_where_the_job_is_then(jobs: Any, fake: FakeJobs) -> None:
    fake.add(**running())
    fake.add()
    code, out, _ = jobs("cancel", "job1", "job2")
    assert code == 0
    assert out.splitlines()[0].startswith("job1  digits-cnn  running, to be cancelled: training")
    assert out.splitlines()[1].startswith("job2  digits-cnn  cancelled")


def test_actions_on_a_sweep_are_on_those_of_its_jobs_that_allow_them(
    jobs: Any, fake: FakeJobs
) -> None:
    for state in ("finished", "failed", "lost"):
        actions = [] if state == "finished" else ["retry"]
        fake.add(state=state, sweep="sweep1", actions=actions)
    code, out, _ = jobs("retry", "sweep1")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["job2", "job3"]
    code, _, err = jobs("pause", "sweep1")
    assert code == 2
    assert "pause: none of the 3 jobs of sweep1 allows it now; they are finished, queued" in err


def test_resume_takes_new_values(jobs: Any, fake: FakeJobs) -> None:
    fake.add(**ended("finished") | {"actions": ["resume", "publish"]})
    assert jobs("resume", "job1", "epochs=20")[0] == 0
    assert fake.sent[-1].json == {"values": {"epochs": 20}}
    assert jobs("publish", "job1", "digits")[0] == 0
    assert fake.sent[-1].json == {"model": "digits"}


def test_unknown_job_is_refused(jobs: Any) -> None:
    for command in ("show", "watch", "cancel", "log", "compare"):
        code, out, err = jobs(command, "nobody")
        assert (code, out, err) == (2, "", "syncbn-jobs: there is no job nobody\n")


def test_log_is_printed_as_it_is(jobs: Any, fake: FakeJobs) -> None:
    fake.add(**ended("finished"))
    fake.logs["job1"] = "one\nμ\nthree".encode()
    assert jobs("log", "job1")[1] == "one\nμ\nthree"
    assert jobs("log", "job1", "--follow")[1] == "one\nμ\nthree"
    assert jobs("log", "job1", "--tail", "2")[1] == "μ\nthree"
    assert jobs("log", "job1", "--tail", "0")[1] == ""
    assert jobs("log", "job1", "--tail", "9", "--attempt", "1")[1] == "one\nμ\nthree"
    assert jobs("log", "job1", "--tail", "-1")[0] == 2


def test_log_does_nothing_to_a_terminal_but_appear(jobs: Any, fake: FakeJobs, url: str) -> None:
    fake.add(**ended("finished"))
    fake.logs["job1"] = "one\ttwo μ\n\x1b[2J\x1b]0;owned\x07 \u202ekcab\n".encode()
    code, said = on_terminal(url, "log", "job1")
    assert code == 0
    assert said == "one\ttwo μ\r\n\\x1b[2J\\x1b]0;owned\\x07 \\u202ekcab\r\n"
    assert "\x1b[2J" in jobs("log", "job1")[1]  # a file gets what is there


def test_comparison_tells_means_over_seeds(jobs: Any, fake: FakeJobs) -> None:
    fake.add(**running())
    fake.add(**running() | ended("finished"))
    code, out, _ = jobs("compare", "job1", "job2", "--by", "norm")
    assert code == 0
    assert out.splitlines()[2].split() == ["job2", "digits-cnn", "97.00", "%", "0.025", "n1"]
    assert out.splitlines()[5].split() == ["n0", "3", "95.00", "±", "1.00", "%"]
    assert fake.sent[-1].query == [("ids", "job1,job2"), ("by", "norm")]
    code, _, err = jobs("compare", "job1", "--metric", "val_acc")
    assert (code, err) == (
        2,
        "syncbn-jobs: --metric val_acc: is unknown; valid: val_accuracy, val_loss\n",
    )


def test_comparison_of_a_sweep_is_of_its_jobs(jobs: Any, fake: FakeJobs) -> None:
    jobs("submit", "-m", "seed=1,2")
    assert jobs("compare", "sweep1")[0] == 0
    assert fake.sent[-1].query == [("ids", "job1,job2")]


def test_options_are_told_by_group_and_key(jobs: Any) -> None:
    out = jobs("options")[1]
    assert "norm=sync       default  μ and σ of the whole batch" in out.splitlines()
    assert "optim.lr" not in out
    out = jobs("options", "optim")[1]
    assert (
        "optim.lr  number above 0 and at most 100; default 0.1  The highest learning rate." in out
    )
    assert "norm" not in out
    code, _, err = jobs("options", "nothing")
    assert code == 2
    assert "nothing: there is no such group or key; the groups are norm, optim" in err


@pytest.mark.parametrize(
    ("state", "code"), [("finished", 0), ("failed", 1), ("cancelled", 3), ("lost", 4)]
)
def test_watch_ends_as_the_job_does(jobs: Any, fake: FakeJobs, state: str, code: int) -> None:
    fake.add()
    fake.looks["job1"] = deque([{}, {}, running(1), ended(state, "why")])
    found, out, err = jobs("watch", "job1")
    assert (found, err) == (code, "")
    lines = out.splitlines()
    assert lines[0] == "job1  digits-cnn  queued: waits for 2 cores, 1 free; third in line"
    assert lines[1].startswith("job1  digits-cnn  running: training, step 1 of 120, val_acc")
    assert lines[2] == f"job1  digits-cnn  {state} after 1 min 02 s: why, val_accuracy 97.00 %"
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (["finished", "finished"], 0),
        (["lost", "failed", "finished"], 1),
        (["cancelled", "lost"], 4),
        (["cancelled", "finished"], 3),
    ],
)
def test_watched_sweep_ends_with_the_worst_of_its_jobs(
    jobs: Any, fake: FakeJobs, states: list[str], code: int
) -> None:
    for state in states:
        fake.add(**running() | ended(state) | {"sweep": "sweep1"})
    found, out, _ = jobs("watch", "sweep1")
    assert found == code
    assert len(out.splitlines()) == len(states)


def test_submit_may_watch(jobs: Any, fake: FakeJobs) -> None:
    fake.looks["job1"] = deque([running(), ended("failed")])
    code, out, _ = jobs("submit", "--watch")
    assert code == 1
    assert out.splitlines()[0] == "job1"
    assert out.splitlines()[-1].startswith("job1  digits-cnn  failed")


def test_watch_as_json_tells_every_change(jobs: Any, fake: FakeJobs) -> None:
    fake.add(**running())
    fake.looks["job1"] = deque([running(1), running(2), ended("finished")])
    told = [json.loads(line) for line in jobs("watch", "job1", "--json")[1].splitlines()]
    assert [(job["state"], job["progress"]["step"]) for job in told] == [
        ("running", 2),
        ("finished", 2),
    ]


def test_key_comes_from_the_command_line_a_file_or_the_environment(
    jobs: Any, fake: FakeJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.key = "a-key"
    file = tmp_path / "key"
    file.write_text("a-key\n")
    assert jobs("list")[0] == 2
    assert jobs("list", "--key", "a-key")[0] == 0
    assert jobs("--key-file", str(file), "list")[0] == 0
    monkeypatch.setenv("SYNCBN_API_KEY_FILE", str(file))
    assert jobs("list")[0] == 0
    monkeypatch.setenv("SYNCBN_API_KEY", "another")
    assert jobs("list")[0] == 2
    code, _, err = jobs("list", "--key-file", str(tmp_path / "none"))
    assert code == 2
    assert "the key cannot be read from" in err


def test_service_that_is_not_there_ends_with_a_code_of_its_own(jobs: Any, fake: FakeJobs) -> None:
    code, _, err = jobs("list", "--url", "http://127.0.0.1:9")
    assert code == 5
    assert "Is syncbn-serve running there?" in err
    fake.faults.extend([BREAK] * 4)
    assert jobs("list")[0] == 5
    fake.faults.append(Fault(200, b"<html>"))
    assert jobs("list")[0] == 5
    code, _, err = jobs("list", "--url", "host:8000")
    assert code == 2
    assert "url='host:8000' is not the address of a service" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lst"], "did you mean list?"),
        (["list", "--stat", "running"], "unknown: --stat"),
        (["watch", "a", "b"], "unknown: b"),
        (["submit", "a=1", "--name", "x", "b=2", "-q"], "unknown: -q"),
        (["list", "--key", "a", "--key-file", "b"], "not allowed with"),
    ],
)
def test_mistyped_command_lines_are_refused(jobs: Any, words: list[str], said: str) -> None:
    code, _, err = jobs(*words)
    assert code == 2
    assert said in err


def test_help_tells_the_exit_codes_and_version_the_version(
    jobs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ([], ["--help"]):
        code, out, _ = jobs(*words)
        assert code == 0
        assert "4  of these two: it was lost" in out
    main(["--version"])
    assert capsys.readouterr().out.strip()


def test_command_loads_neither_torch_nor_hydra(url: str) -> None:
    code = (
        "import sys\nfrom syncbn.client.command import main\ntry:\n    main(['options'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "heavy = ['torch', 'numpy', 'hydra', 'yaml', 'pydantic', 'fastapi', 'asyncio', 'tqdm']\n"
        "print(*[name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, "SYNCBN_URL": url},
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE_S,
    )
    assert result.stderr.split() == []


def test_output_that_nobody_reads_any_more_is_no_error(url: str, fake: FakeJobs) -> None:
    for _ in range(300):
        fake.add(name="x" * 100)
    command = f"{' '.join(COMMAND)} list --limit 0 --json | head -n 1; echo ${{PIPESTATUS[0]}}"
    result = run(["bash", "-c", command], REPOSITORY, SYNCBN_URL=url)
    first, code = result.stdout.splitlines()
    assert json.loads(first)["id"] == "job300"
    assert code == "141"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_said(url: str, fake: FakeJobs) -> None:
    fake.add()
    command = f"{' '.join(COMMAND)} list > /dev/full; echo $?"
    result = run(["bash", "-c", command], REPOSITORY, SYNCBN_URL=url)
    said = "syncbn-jobs: the output cannot be written: No space left on device\n"
    assert result.stdout == f"{said}2\n"


def test_letters_that_the_terminal_does_not_have_cost_nothing_else(
    url: str, fake: FakeJobs
) -> None:
    job = fake.add(**ended("finished"))
    fake.logs[job] = "before é after\n".encode()
    command = [*COMMAND, "log", job]
    result = run(command, REPOSITORY, SYNCBN_URL=url, PYTHONIOENCODING="ascii")
    assert result.stdout == "before \\xe9 after\n"


def test_terminal_gets_lines_that_fit_it(url: str, fake: FakeJobs) -> None:
    fake.add(name="a-name-that-goes-on-and-on-until-nobody-reads-it", **running())
    for columns in (40, 80, 120):
        code, said = on_terminal(url, "list", columns=columns)
        assert code == 0
        lines = said.splitlines()
        assert len(lines) == 2
        assert max(map(len, lines)) <= columns
    assert "a-name" in lines[1]


def test_terminal_is_told_what_was_submitted(url: str) -> None:
    code, said = on_terminal(url, "submit", "norm=sync")
    assert code == 0
    assert said.splitlines() == [
        "job1  digits-cnn  queued: waits for 2 cores, 1 free; third in line",
        "syncbn-jobs watch job1 shows how far it is",
    ]


def test_dispatcher_that_is_being_started_is_waited_for_on_a_terminal(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fake_jobs.OPTIONS, "dispatcher", None)
    started = threading.Timer(
        2, fake_jobs.OPTIONS.__setitem__, ("dispatcher", {"engine": "local", "alive": True})
    )
    started.start()
    code, said = on_terminal(url, "submit", "norm=sync")
    started.join()
    assert code == 0
    assert len(said.splitlines()) == 2  # and no warning
    monkeypatch.setitem(fake_jobs.OPTIONS, "dispatcher", None)
    code, said = on_terminal(url, "submit", "norm=sync")
    assert code == 0
    assert "warning: nobody starts jobs now" in said


def test_watch_draws_a_bar_on_a_terminal(url: str, fake: FakeJobs) -> None:
    fake.add(**running())
    fake.looks["job1"] = deque([{}, running(60), running(90), ended("finished")])
    code, said = on_terminal(url, "watch", "job1")
    assert code == 0
    assert "digits-cnn training  50 %|" in said
    assert "| 90/120, 8.1 s left, val_accuracy 97.00 %, 900 images/s" in said
    assert said.splitlines()[-1].endswith("finished after 1 min 02 s: val_accuracy 97.00 %")


def test_watch_draws_a_bar_for_each_job_of_a_sweep_and_for_all(url: str, fake: FakeJobs) -> None:
    for name in ("one", "two"):
        job_id = fake.add(**running(), sweep="sweep1", name=name)
        fake.looks[job_id] = deque([{}, running(60), ended("finished")])
    code, said = on_terminal(url, "watch", "sweep1")
    assert code == 0
    for text in ("2 jobs   0 %|", "0/2, 2 running", "one training  50 %|", "two training  50 %|"):
        assert text in said


def test_interrupt_leaves_the_job_running_and_says_so(url: str, fake: FakeJobs) -> None:
    fake.add(**running())
    code, said = on_terminal(url, "watch", "job1", interrupt_at=b"12/120")
    assert code == 130
    last = "job1 goes on; syncbn-jobs watch job1 looks again, and syncbn-jobs cancel job1 stops it"
    assert said.splitlines()[-1] == last
    assert "POST" not in " ".join(fake.paths())
