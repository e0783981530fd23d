"""How clusters are asked: not too often, and not for a while after they did not answer."""

import logging
import math
from collections.abc import Callable
from typing import Generic, TypeVar

from syncbn.errors import EngineError

T = TypeVar("T")

log = logging.getLogger(__name__)


class Listing(Generic[T]):
    """What a cluster has, by name, as it last said.

    Args:
        monotonic: returns seconds that never jump.
        poll_s: how old that may be.

    Attributes:
        known: what it said; None: that is not known any more.
    """

    def __init__(self, monotonic: Callable[[], float], poll_s: float) -> None:
        self.known: dict[str, T] | None = None
        self._monotonic = monotonic
        self._poll_s = poll_s
        self._asked_at = 0.0
        self._logged = ""

    def forget(self) -> None:
        """Have it asked anew, as something is being changed."""
        self.known = None

    def look(self, ask: Callable[[], dict[str, T]]) -> dict[str, T] | None:
        """Return what the cluster has; None if it does not say, which is logged once.

        Args:
            ask: asks the cluster, and raises EngineError if it does not answer.
        """
        now = self._monotonic()
        if self.known is None or now - self._asked_at >= self._poll_s:
            self.known = None
            try:
                self.known = ask()
            except EngineError as error:
                if str(error) != self._logged:
                    log.warning("%s", error)
                    self._logged = str(error)
                return None
            self._asked_at, self._logged = now, ""
        return self.known


class Silence:
    """That a cluster did not answer, after which nobody asks it for a while.

    Args:
        monotonic: returns seconds that never jump.
        quiet_s: how long.
    """

    def __init__(self, monotonic: Callable[[], float], quiet_s: float) -> None:
        self._monotonic = monotonic
        self._quiet_s = quiet_s
        self._until = -math.inf
        self._said = ""

    def check(self) -> None:
        """Raise EngineError with what was said, if it did not answer a short while ago."""
        if self._monotonic() < self._until:
            raise EngineError(self._said)

    def begin(self, said: str) -> EngineError:
        """Note that it did not answer, and return the error that says so."""
        self._until = self._monotonic() + self._quiet_s
        self._said = said
        return EngineError(said)
