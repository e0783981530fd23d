"""Which exchange a GPU waits for: the host goes on, and NCCL ends a process without naming a layer.

An exchange on a GPU returns at once. If another rank never takes part, the GPU waits, until NCCL's
watchdog ends the process after the group's time-out. Shortly before, the flight record logs where.
"""

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from syncbn.mark import Mark, Marks

_log = logging.getLogger("syncbn")
# The host is no further ahead of a GPU than the GPU's queue is long, which is 1024 launches.
_REMEMBERED = 4096
# The share of the group's time-out after which the record says where a GPU waits.
_PATIENCE = 0.8


class FlightRecord:
    """The exchanges that one device has been given, and how far it has come with them.

    Args:
        slot: one int64 in memory of the host that the device can reach.
        period_s: how often to look.
    """

    def __init__(self, slot: Tensor, period_s: float = 1.0) -> None:
        self._slot = slot
        self._value = slot.numpy()  # the same memory
        self._period_s = period_s
        self._number = 0
        # By number: what the calling rank is doing, and how long the others may take.
        self._exchanges: OrderedDict[int, tuple[Callable[[], str], float]] = OrderedDict()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def depart(self, position: Callable[[], str], timeout_s: float) -> Marks:
        """Return what the device shall write around an exchange that it is about to be given.

        Args:
            position: says what this rank is doing, if that is ever asked.
            timeout_s: of the process group, in seconds.
        """
        with self._lock:
            self._number += 1
            number = self._number
            self._exchanges[number] = position, timeout_s
            if len(self._exchanges) > _REMEMBERED:
                self._exchanges.popitem(last=False)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._watch, name="syncbn-flight-record", daemon=True
                )
                self._thread.start()
        # Even while the device waits, odd once it does not.
        return Marks(Mark(self._slot, 2 * number), Mark(self._slot, 2 * number + 1))

    def _watch(self) -> None:
        seen, since, said = 0, time.monotonic(), False
        while True:
            time.sleep(self._period_s)
            value, now = int(self._value[0]), time.monotonic()
            if value != seen:
                seen, since, said = value, now, False
                continue
            with self._lock:
                exchange = self._exchanges.get(value // 2)
            if said or value % 2 == 1 or exchange is None:
                continue
            position, timeout_s = exchange
            if now - since >= _PATIENCE * timeout_s:
                said = True
                self._say(position, now - since, timeout_s)

    @staticmethod
    def _say(position: Callable[[], str], waited_s: float, timeout_s: float) -> None:
        try:
            where = position()
        except RuntimeError:  # the group has been destroyed: nobody waits
            return
        _log.error(
            "%s, and its device has waited there for the other ranks for %.0f of the %.0f s after "
            "which the process may be ended: a rank died, or did not call this layer",
            where,
            waited_s,
            timeout_s,
        )


_records: dict[torch.device, FlightRecord] = {}
# A forked child has no thread, and no device either.
os.register_at_fork(after_in_child=_records.clear)


def record_of(device: torch.device) -> FlightRecord | None:
    """Return the record of a device; None if it cannot be ahead of the host, or if nobody may look.

    A CUDA graph that is captured would write the numbers of its capture at each replay.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    record = _records.get(device)
    if record is None:
        with torch.inference_mode(False):  # or no mark could be written in place outside of it
            slot = torch.zeros(1, dtype=torch.int64, device="cpu").pin_memory()
        record = _records.setdefault(device, FlightRecord(slot))
    return record


def timeout_s_of(group: dist.ProcessGroup, device: torch.device) -> float:
    """Return how long the ranks of a group wait for each other, in seconds."""
    try:
        return group._get_backend(device).options._timeout.total_seconds()  # pyright: ignore[reportPrivateUsage] -- nothing public tells
    except (AttributeError, RuntimeError):
        return default_pg_timeout.total_seconds()
