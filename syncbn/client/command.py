"""The command `syncbn-jobs`: what a service of training jobs does, from a terminal."""

import io
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from syncbn.client.arguments import KEY, KEY_FILE, URL, parse
from syncbn.errors import JobError, ServerError, SubmissionError

_REFUSED, _BROKEN = 2, 5
# What a shell says of commands that these signals end.
_INTERRUPTED, _PIPE_CLOSED = 130, 141


def main(argv: Sequence[str] | None = None) -> None:
    """Ask the service as the command line says, and print the answer.

    Args:
        argv: its arguments; None: those of the process.

    Raises:
        SystemExit: with the codes that --help lists.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A letter that the terminal does not have must not cost the rest.
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = parse(argv)
    if arguments.version:
        from importlib.metadata import version

        print(version("syncbn"))
        return
    if arguments.command is None:
        parse(["--help"])
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except JobError as error:
        print(f"syncbn-jobs: {error}", file=sys.stderr)
        is_refusal = not isinstance(error, ServerError) or 400 <= (error.status or 0) < 500
        raise SystemExit(_REFUSED if is_refusal else _BROKEN) from None
    except KeyboardInterrupt:
        raise SystemExit(_INTERRUPTED) from None
    except BrokenPipeError:  # as by head
        _drop_output()
        raise SystemExit(_PIPE_CLOSED) from None
    except OSError as error:  # a full disk, most likely; the client has errors of its own
        _drop_output()
        print(f"syncbn-jobs: the output cannot be written: {error.strerror}", file=sys.stderr)
        raise SystemExit(_REFUSED) from None
    raise SystemExit(code)


def _drop_output() -> None:
    """Have what is left in the buffer not be written at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: Namespace) -> int:
    # Not earlier: HTTP takes a while to import, for which a mistyped option need not wait.
    from syncbn.client.blocking import JobsClient
    from syncbn.client.server import DEFAULT_URL
    from syncbn.client.subcommands import SUBCOMMANDS

    url = arguments.url or os.environ.get(URL) or DEFAULT_URL
    with JobsClient(url, _key(arguments), timeout_s=arguments.timeout) as client:
        return SUBCOMMANDS[arguments.command](client, arguments)


def _key(arguments: Namespace) -> str | None:
    """Return the key: of the command line, else of the environment, of which either may be a file.

    Raises:
        SubmissionError: the file cannot be read.
    """
    file: Path | None = arguments.key_file
    if arguments.key is not None:
        return arguments.key
    if file is None:
        if key := os.environ.get(KEY):
            return key
        if name := os.environ.get(KEY_FILE):
            file = Path(name)
    if file is None:
        return None
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SubmissionError(f"the key cannot be read from {file}: {error}") from None


if __name__ == "__main__":
    main()
