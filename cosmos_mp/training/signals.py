"""Signals that end a run: noted when they come, obeyed between iterations."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT received, as a list that fills. A second SIGINT interrupts at once; SIGTERM never does: schedulers repeat it."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python delivers signals to the main thread alone
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def receive(number: int, frame: object) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    try:
        for number in before:
            signal.signal(number, receive)
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
