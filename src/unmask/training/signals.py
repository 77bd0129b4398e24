"""Ctrl-C and SIGTERM as a wish to stop that the loop grants when it can."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_HEARD = b"\nstopping at the next step that can be saved; a second signal stops at once, unsaved\n"


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets. A second one finds the old handlers, and acts at once.

    Outside the main thread, where Python allows no handlers, the event is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def restore() -> None:
        for number, handler in before.items():
            if signal.getsignal(number) is hear:
                signal.signal(number, handler or signal.SIG_DFL)

    def hear(number: int, frame: object) -> None:
        stop.set()
        restore()
        os.write(2, _HEARD)  # print() may be what was interrupted, and cannot be entered twice

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        restore()


def end_in_peace() -> None:
    """Ignore SIGTERM from now on: this process is about to say why it ends, and torchrun, which sees it too, would end
    it before it has."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
