"""Log lines: one form for ours, the web server's and warnings, with the id of the request."""

import contextvars
import io
import json
import logging
import re
import sys
import traceback
from datetime import UTC, datetime
from typing import Any, Literal, TextIO, cast

import msgspec
import structlog
from structlog.typing import EventDict, ExcInfo, Processor, WrappedLogger

request_id_var: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "request_id", default=None
)
_encode = msgspec.json.Encoder(enc_hook=repr).encode
_requests = logging.getLogger("service.requests")
_FIELDS = "request_fields"  # the attribute of a request's record that has what it says
# What JSON may hold as it is, though terminals and programs take it for a control character, the
# end of a line, or a change of the direction of text.
_CONTROLS = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
# Of one field. Two such fields, escaped, keep a line below the 4096 bytes that several processes
# may write to one pipe without mixing them.
_FIELD_LIMIT = 256


def configure(log_format: Literal["auto", "json", "text"]) -> None:
    """Send all log lines of this process to its standard output, in one form.

    Args:
        log_format: one JSON object a line, or text for people; auto is text on a terminal. What
            clients send can forge no line in either, as control characters are escaped.
    """
    if log_format == "auto":
        log_format = "text" if sys.stdout.isatty() else "json"
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A letter that the terminal does not have must not cost the line.
        encoding = "utf-8" if log_format == "json" else None
        sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")
    last: list[Processor] = (
        [structlog.processors.format_exc_info, _to_json]
        if log_format == "json"
        else [
            _escape,
            structlog.dev.ConsoleRenderer(
                colors=sys.stdout.isatty(), pad_event_to=0, exception_formatter=_write_exception
            ),
        ]
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Formatter(last))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        # uvicorn writes a line for each request where that logger leads anywhere; ours says more.
        logger.handlers, logger.propagate = [], name != "uvicorn.access"
    logging.captureWarnings(True)
    # A process's own name, or a thread's, is looked up for every line unless these are off.
    logging.logProcesses = logging.logMultiprocessing = logging.logThreads = False


def request_line(**fields: Any) -> None:
    """Write down what became of a request; fields that are None are left out."""
    if _requests.isEnabledFor(logging.INFO):
        # Made by hand, as the logger would look for the caller's line first.
        record = logging.LogRecord(_requests.name, logging.INFO, "", 0, "request", None, None)
        record.__dict__[_FIELDS] = fields
        _requests.handle(record)


class _Formatter(structlog.stdlib.ProcessorFormatter):
    def __init__(self, last: list[Processor]) -> None:
        super().__init__(
            foreign_pre_chain=[
                structlog.stdlib.add_logger_name,
                structlog.stdlib.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                _add_request_id,
            ],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
        self._last = last

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] | None = record.__dict__.get(_FIELDS)
        if fields is None:
            return super().format(record)
        # Every request comes by here: what the chain above does, without its detours.
        now = datetime.fromtimestamp(record.created, UTC).replace(tzinfo=None)
        event: Any = {
            "event": record.msg,
            "logger": record.name,
            "level": "info",
            "timestamp": now.isoformat(timespec="microseconds") + "Z",
        }
        _add_request_id(None, "info", event)
        for key, value in fields.items():
            if value is None:
                continue
            if isinstance(value, str) and len(value) > _FIELD_LIMIT:
                value = value[:_FIELD_LIMIT] + "…"
            event[key] = round(value, 6) if isinstance(value, float) else value
        for process in self._last:
            event = process(None, "info", event)
        return cast(str, event)


def _add_request_id(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    if (request_id := request_id_var.get()) is not None:
        event["request_id"] = request_id
    return event


def _escape(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = _printable(value)
    return event


def _printable(text: str) -> str:
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _write_exception(stream: TextIO, exc_info: ExcInfo) -> None:
    """Write an exception so that no line of its message looks like one of the log."""
    for line in "".join(traceback.format_exception(*exc_info)).rstrip("\n").split("\n"):
        stream.write(f"\n    {_printable(line)}")


def _to_json(logger: WrappedLogger, name: str, event: EventDict) -> str:
    try:
        line = _encode(event).decode()
    except (UnicodeEncodeError, OverflowError):  # half of a character, as in names of files
        line = json.dumps(event, default=repr)
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", line)
