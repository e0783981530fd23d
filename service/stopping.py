"""When the server is told to stop, which the app else learns once all answers have ended."""

import asyncio
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def told_to_stop(callback: Callable[[], None]) -> Generator[None]:
    """Have a function called in the event loop when a signal tells the server to stop.

    A server waits for the answers that are under way, and a stream of events has no end of its own.
    The server's handlers are called as ever. Where it has none, or runs in another thread than the
    main one, nothing is done.

    Args:
        callback: what is called.
    """
    loop = asyncio.get_running_loop()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def handle(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(callback)
        handler = before[signal.Signals(number)]
        assert callable(handler)
        handler(number, frame)

    wrapped = [number for number, handler in before.items() if callable(handler)]
    for number in wrapped:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in wrapped:
            if signal.getsignal(number) is handle:
                signal.signal(number, before[number])
