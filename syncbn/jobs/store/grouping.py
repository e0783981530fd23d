"""Writes of several threads at the same time, brought to the disk in one go."""

import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from syncbn.errors import JobStoreError
from syncbn.jobs.store.database import Database

T = TypeVar("T")


@dataclass
class _Write(Generic[T]):
    """A write that a thread waits for."""

    work: Callable[[sqlite3.Connection], T]
    is_done: bool = False
    result: T | None = None
    errors: list[BaseException] = field(default_factory=list[BaseException])


class GroupedWrites:
    """Writes of which each is done as a whole or not at all, whatever becomes of the others.

    A disk takes milliseconds to say that something is on it, however much that is. While it does,
    other threads' writes gather, and the first of them takes the others along.

    Args:
        database: where they go.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._gathering = threading.Lock()
        self._turn = threading.Lock()
        self._waiting: list[_Write[Any]] = []

    def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Return what a function returns that writes, once that is on the disk.

        Raises:
            JobStoreError: the file cannot be written; or whatever the function raised, after which
                nothing is left of what it wrote.
        """
        mine = _Write(work)
        with self._gathering:
            self._waiting.append(mine)
        with self._turn:
            if not mine.is_done:  # by the thread that had its turn before
                with self._gathering:
                    together, self._waiting = self._waiting, []
                self._do(together)
        if mine.errors:
            raise mine.errors[0]
        return mine.result  # pyright: ignore[reportReturnType] -- which `work` has returned

    def _do(self, together: list[_Write[Any]]) -> None:
        try:
            with self._database.writing() as connection:
                for write in together:
                    _do_one(write, connection)
        except JobStoreError as error:  # of which nothing is on the disk
            for write in together:
                write.errors = [JobStoreError(str(error))]
        finally:
            for write in together:
                write.is_done = True


def _do_one(write: _Write[Any], connection: sqlite3.Connection) -> None:
    connection.execute("SAVEPOINT one")
    try:
        write.result = write.work(connection)
    except sqlite3.Error:  # a full disk, for one, has ended the transaction of all
        raise
    except Exception as error:
        write.errors.append(error)
        connection.execute("ROLLBACK TO one")
    connection.execute("RELEASE one")
