"""The command line of `syncbn-jobs`; imports nothing that takes time."""

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

URL, KEY, KEY_FILE = "SYNCBN_URL", "SYNCBN_API_KEY", "SYNCBN_API_KEY_FILE"
ACTIONS = {
    "cancel": "have jobs write a checkpoint and end",
    "pause": "have jobs write a checkpoint and leave their cores to others",
    "retry": "have jobs that failed, were lost or cancelled go on from their last checkpoint",
    "archive": "put jobs that have ended away, out of the lists, and remove their checkpoints",
}

_DESCRIPTION = """\
Submit, watch and compare the training jobs of a service that syncbn-serve --jobs started."""

_EPILOG = f"""\
syncbn-jobs COMMAND --help tells more of each. Where a command takes the ID of a job, that of a
sweep stands for all of its jobs.

environment:
  {URL}           where the service is, as --url
  {KEY}       one of its keys; what stands on a command line others may see
  {KEY_FILE}  a file that holds it, as --key-file

exit codes:
  0  done; of watch, and of submit --watch: the job has finished
  1  of these two: it failed
  2  the command line is wrong, or the service refuses what it asks for
  3  of these two: it was cancelled
  4  of these two: it was lost, which is to say that it ended without a word
  5  the service cannot be reached, or does not work
  130  Ctrl-C; jobs go on
The jobs of a sweep count together: 1 if any failed, else 4 if any was lost, else 3 or 0.

examples:
  syncbn-jobs submit norm=local optim.lr=0.05 launch.nproc=2 epochs=2 --watch
  syncbn-jobs submit -m norm=sync,local seed=1,2,3 --name norms
  syncbn-jobs list --state running
  syncbn-jobs log k3v9x0q2ma --follow
  syncbn-jobs compare 8m2qk7d1xw --by norm.name"""


class _Parser(argparse.ArgumentParser):
    """Names what was meant when a word is mistyped."""

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if found is not None:
            close = difflib.get_close_matches(found[1], re.findall(r"[\w-]+", found[2]), n=1)
            message += f"; did you mean {close[0]}?" if close else ""
        super().error(message)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return what a command line says.

    Words may stand before, between and after options.

    Raises:
        SystemExit: with code 2 if it is wrong, with 0 after --help and --version.
    """
    parser = _parser()
    arguments, others = parser.parse_known_args(argv)
    options = [word for word in others if word.startswith("-")]
    if options or (others and not hasattr(arguments, "words")):
        parser.error(f"unknown: {' '.join(options or others)}; see {parser.prog} --help")
    if others:
        arguments.words += others
    defaults = {"url": None, "key": None, "key_file": None, "timeout": 30.0, "json": False}
    return argparse.Namespace(**{**defaults, **vars(arguments)})


def _parser() -> argparse.ArgumentParser:
    common = _common()
    parser = _Parser(
        "syncbn-jobs",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        parents=[common],
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=False, parser_class=_Parser
    )

    def add(name: str, help_: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=help_,
            description=help_[0].upper() + help_[1:] + ".",
            parents=[common],
            allow_abbrev=False,
        )

    _add_submit(add("submit", "submit a job, or with -m one for each combination of values"))
    _add_list(add("list", "list jobs, the newest first"))
    show = add("show", "tell all that is known of jobs")
    show.add_argument("words", nargs="+", metavar="ID")
    watch = add("watch", "show how far a job is until it has ended; Ctrl-C leaves it running")
    watch.add_argument("id", metavar="ID")
    _add_log(add("log", "print what the processes of a job printed"))
    for name, help_ in ACTIONS.items():
        add(name, help_).add_argument("words", nargs="+", metavar="ID")
    resume = add("resume", "have a paused or cancelled job go on, or a finished one for longer")
    resume.add_argument("id", metavar="ID")
    resume.add_argument(
        "words", nargs="*", metavar="KEY=VALUE", help="what changes, such as epochs=20"
    )
    publish = add("publish", "have a finished job's model served")
    publish.add_argument("id", metavar="ID")
    publish.add_argument(
        "model", nargs="?", metavar="MODEL", help="which it becomes a version of (default: as NAME)"
    )
    compare = add("compare", "show jobs side by side, and means over their seeds")
    compare.add_argument("words", nargs="+", metavar="ID")
    compare.add_argument(
        "--by",
        action="append",
        default=[],
        metavar="KEY",
        help="group by this key; may be repeated (default: all that differ but the seed)",
    )
    compare.add_argument("--metric", help="which one (default: val_accuracy, or what is in place)")
    options = add("options", "tell what may be submitted, and what is valid")
    options.add_argument(
        "words", nargs="*", metavar="NAME", help="a group, or the beginning of keys, such as optim"
    )
    return parser


def _common() -> _Parser:
    # Before and after the command; what is not said is absent, so that neither hides the other.
    common = _Parser(add_help=False, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    service = common.add_argument_group("service")
    service.add_argument("--url", help=f"where it is (default: {URL}, or http://127.0.0.1:8000)")
    key = service.add_mutually_exclusive_group()
    key.add_argument("--key", help=f"one of its keys (default: {KEY})")
    key.add_argument("--key-file", type=Path, metavar="FILE", help="a file that holds it")
    service.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="for its answers (default: 30)"
    )
    service.add_argument("--json", action="store_true", help="print a JSON document a line")
    return common


def _add_submit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="*",
        metavar="KEY=VALUE",
        help="as syncbn-train takes them: GROUP=CHOICE and KEY=VALUE; see syncbn-jobs options",
    )
    parser.add_argument(
        "-m",
        "--sweep",
        action="store_true",
        help="train all combinations of KEY=VALUE,VALUE and KEY=range(FIRST,END)",
    )
    parser.add_argument("--name", help="of the job (default: that of its data and model)")
    parser.add_argument(
        "--publish", metavar="MODEL", help="have what it trained served, as a version of MODEL"
    )
    parser.add_argument("--priority", type=int, help="from -100 to 100 (default: 0)")
    parser.add_argument(
        "--retries", type=int, help="how often it is started again after a failure that may pass"
    )
    parser.add_argument("--cores", type=int, help="how many it gets (default: one a replica)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="(default: auto)")
    parser.add_argument(
        "--idempotency-key",
        metavar="TEXT",
        help="submit nothing if that was submitted by the same text before",
    )
    parser.add_argument("--watch", action="store_true", help="and watch it until it has ended")


def _add_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--state", action="append", default=[], help="in this state; may be repeated"
    )
    parser.add_argument("--name", help="of this name")
    parser.add_argument("--sweep", metavar="ID", help="of this sweep")
    parser.add_argument("--text", help="with this text in what was submitted")
    parser.add_argument("--owner", help="of this owner")
    parser.add_argument("--archived", action="store_true", help="those that were put away")
    parser.add_argument(
        "--limit", type=int, default=50, metavar="N", help="at most so many; 0: all (default: 50)"
    )


def _add_log(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the job has ended")
    parser.add_argument("--attempt", type=int, metavar="N", help="of this attempt alone")
    parser.add_argument("--tail", type=int, metavar="N", help="from the last N lines on")
