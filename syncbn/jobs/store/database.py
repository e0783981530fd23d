"""The SQLite file in which jobs and what happened to them is kept."""

import sqlite3
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from syncbn.errors import JobStoreError

FILE = "jobs.sqlite"
VERSION = 1
# How long a write may wait for those of other processes.
_BUSY_TIMEOUT_S = 10.0

_SCHEMA = f"""
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    owner TEXT NOT NULL,
    state TEXT NOT NULL,
    reason_code TEXT,
    reason TEXT NOT NULL DEFAULT '',
    wanted TEXT,
    sweep TEXT,
    sweep_values TEXT NOT NULL DEFAULT '{{}}',
    spec TEXT NOT NULL,
    priority INTEGER NOT NULL,
    rank REAL,
    cores INTEGER NOT NULL,
    gpus INTEGER NOT NULL DEFAULT 0,
    device TEXT NOT NULL,
    attempt INTEGER NOT NULL DEFAULT 0,
    failures INTEGER NOT NULL DEFAULT 0,
    handle TEXT NOT NULL DEFAULT '',
    placement TEXT NOT NULL DEFAULT '{{}}',
    arguments TEXT NOT NULL DEFAULT '{{}}',
    published TEXT NOT NULL DEFAULT '[]',
    progress TEXT,
    objective REAL,
    submitted REAL NOT NULL,
    queued REAL,
    started REAL,
    ended REAL,
    archived INTEGER NOT NULL DEFAULT 0,
    size_bytes INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX jobs_state ON jobs (state, rank);
CREATE INDEX jobs_owner ON jobs (owner, state);
CREATE INDEX jobs_sweep ON jobs (sweep) WHERE sweep IS NOT NULL;
CREATE TABLE sweeps (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, owner TEXT NOT NULL, submitted REAL NOT NULL
);
CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    job TEXT NOT NULL,
    time REAL NOT NULL,
    kind TEXT NOT NULL,
    data TEXT NOT NULL
);
CREATE INDEX events_job ON events (job, number);
CREATE TRIGGER events_stay BEFORE UPDATE ON events
    BEGIN SELECT RAISE(ABORT, 'events are never rewritten'); END;
CREATE TRIGGER events_are_kept BEFORE DELETE ON events
    BEGIN SELECT RAISE(ABORT, 'events are never removed'); END;
CREATE TABLE requests (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    job TEXT NOT NULL,
    action TEXT NOT NULL,
    arguments TEXT NOT NULL,
    by TEXT NOT NULL,
    time REAL NOT NULL
);
CREATE TABLE submissions (
    owner TEXT NOT NULL,
    key TEXT NOT NULL,
    digest TEXT NOT NULL,
    jobs TEXT NOT NULL,
    time REAL NOT NULL,
    PRIMARY KEY (owner, key)
);
CREATE TABLE dispatcher (one INTEGER PRIMARY KEY CHECK (one = 1), about TEXT NOT NULL);
PRAGMA user_version = {VERSION};
"""


class Database:
    """A file of jobs, which any number of threads and processes may use at a time.

    Args:
        directory: of the store, which is made if it is not there.

    Raises:
        JobStoreError: it cannot be made or opened, or is of a later version.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / FILE
        self._of_thread = threading.local()
        self._all: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise JobStoreError(f"cannot make {directory}: {error.strerror}") from error
        try:
            self._prepare()
            self._inode = self._look_at_inode()
        except BaseException:
            # Whoever tries again and again would run out of descriptors, and connections that are
            # left open keep a file that takes the place of this one from being read.
            self.close()
            raise

    def is_replaced(self) -> bool:
        """Return whether another file has taken the place of the one that was opened.

        Raises:
            JobStoreError: there is none.
        """
        return self._look_at_inode() != self._inode

    @contextmanager
    def reading(self) -> Generator[sqlite3.Connection]:
        """Give the connection of this thread, for statements that read.

        Raises:
            JobStoreError: the file cannot be read.
        """
        with self._explained():
            yield self._connection()

    @contextmanager
    def writing(self, *, is_lasting: bool = True) -> Generator[sqlite3.Connection]:
        """Give the connection for statements of which all are done or none.

        Within another one of the same thread, it is a part of that.

        Args:
            is_lasting: whether all is on the disk afterwards, for which it waits milliseconds; else
                a power cut may undo it.

        Raises:
            JobStoreError: the file cannot be written, or others kept it for too long.
        """
        with self._explained():
            connection = self._connection()
            if connection.in_transaction:
                yield connection
                return
            connection.execute(f"PRAGMA synchronous = {'FULL' if is_lasting else 'NORMAL'}")
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                # Some errors, such as a full disk, have ended the transaction themselves.
                if connection.in_transaction:
                    with suppress(sqlite3.Error):
                        connection.execute("ROLLBACK")
                raise

    def changes(self) -> int:
        """Return a number that is another one after others have changed the file."""
        with self.reading() as connection:
            return connection.execute("PRAGMA data_version").fetchone()[0]

    def close(self) -> None:
        """Close the connections of all threads."""
        with self._lock:
            for connection in self._all:
                connection.close()
            self._all.clear()
        self._of_thread = threading.local()

    def _look_at_inode(self) -> tuple[int, int]:
        try:
            status = self.file.stat()
        except OSError as error:
            raise JobStoreError(
                f"{self.file}: {error.strerror}; put it or a copy there, or start again without it"
            ) from error
        return status.st_dev, status.st_ino

    def _connection(self) -> sqlite3.Connection:
        connection = getattr(self._of_thread, "connection", None)
        if connection is None:
            connection = sqlite3.connect(
                self.file,
                timeout=_BUSY_TIMEOUT_S,
                isolation_level=None,
                # Each is used by its own thread, and closed by whichever closes the store.
                check_same_thread=False,
            )
            try:
                connection.row_factory = sqlite3.Row
                connection.execute(f"PRAGMA busy_timeout = {round(_BUSY_TIMEOUT_S * 1000)}")
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA trusted_schema = OFF")
            except BaseException:
                connection.close()
                raise
            self._of_thread.connection = connection
            with self._lock:
                self._all.append(connection)
        return connection

    def _prepare(self) -> None:
        with self.reading() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            raise JobStoreError(
                f"{self.file} is of version {version}, which a later syncbn wrote; this one reads "
                f"up to {VERSION}"
            )
        if version == VERSION:
            return
        with self.writing() as connection:
            # Another process may have made it meanwhile.
            if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
                for statement in _statements(_SCHEMA):
                    connection.execute(statement)

    @contextmanager
    def _explained(self) -> Generator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorname", "")
            raise JobStoreError(f"{self.file}: {error}{_advice(code)}") from error


def _statements(script: str) -> list[str]:
    """Return the statements of a script; `executescript` would commit before each."""
    statements: list[str] = []
    text = ""
    for line in script.splitlines(keepends=True):
        text += line
        if sqlite3.complete_statement(text):
            statements.append(text.strip())
            text = ""
    return statements


def _advice(code: str) -> str:
    if code.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return (
            "; the file is damaged: stop the service, move it and its -wal and -shm files away, "
            "and start again with a copy or an empty store; the runs themselves are below work/"
        )
    if code.startswith("SQLITE_FULL"):
        return "; the disk is full: make room"
    if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return "; another process has kept it for too long: try again"
    if code.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return "; this user needs to write to it and to its directory"
    return ""
