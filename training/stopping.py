"""Ctrl-C and SIGTERM, before the first step and during steps, in the main process and in its loaders' workers.

Imports nothing that takes time, so that a command can be stopped while it imports what does.
"""

import os
import signal
import sys
import threading
from contextlib import contextmanager

from common.errors import INTERRUPTED


@contextmanager
def before_the_first_step():
    """Inside, Ctrl-C is one line on stderr and exit status INTERRUPTED; a second one ends at once."""
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        print("stopped before the first step; nothing was trained", file=sys.stderr)
        sys.exit(INTERRUPTED)


class StopRequest:
    """Notes the first SIGTERM or Ctrl-C instead of ending at once; a second one ends at once.

    says_so: tells the person who pressed Ctrl-C what happens now.
    """

    def __init__(self, says_so: bool):
        self.requested, self.says_so = False, says_so

    def __enter__(self):
        self.earlier_handlers = {}
        if threading.current_thread() is threading.main_thread():  # only there can signals be handled
            for number in (signal.SIGTERM, signal.SIGINT):
                self.earlier_handlers[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame):
        self.requested = True
        for each in self.earlier_handlers:
            signal.signal(each, signal.SIG_DFL)
        if self.says_so:  # not by print, which the signal may have interrupted
            os.write(2, b"\nsaving at the end of this step; once more to end at once\n")

    def __exit__(self, *_):
        for number, handler in self.earlier_handlers.items():
            signal.signal(number, handler)


def leave_signals_to_the_main_process(worker: int) -> None:
    """A signal to a whole group of processes is the main one's to answer: the loader's workers go on until its step
    is done. Python ends them with SIGTERM too, at exit, so it must not be ignored for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # Windows has none, and ends a process without asking it
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))
