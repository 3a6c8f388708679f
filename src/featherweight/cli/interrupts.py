"""Ctrl-C in the command: whatever it is doing, it ends within a fifth of a second with exit code 130.

Python looks at signals between two of its own instructions, so a long computation in C is not interrupted by itself. A
thread hears of the signal at once and ends the process if the main thread does not notice: every output is written
aside and renamed, so no moment is a wrong one to end at.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import FrameType

UNSEEN = 0.05
"""Seconds that the main thread has to notice the signal."""
UNWINDING = 1.0
"""Seconds that it has to end thereafter: somebody's code may have swallowed the exception."""
ANSWERING = 5.0
"""UNSEEN while the command goes on after a Ctrl-C; a second Ctrl-C ends it before."""
CODE = 130
SHOW_CURSOR = "\x1b[?25h"

current: ContextVar[Interrupts | None] = ContextVar("current", default=None)


class Interrupts:
    """Watches for SIGINT inside a `with`, if this is the main thread and nobody else has decided about the signal.

    A process that was started with the signal ignored, in the background of a script or by nohup, goes on ignoring it.
    """

    def __init__(self, last_words: str) -> None:
        self.last_words = last_words
        self.at_end: list[Callable[[], object]] = []  # what puts the terminal back
        self.answering = False
        self._noticed, self._over = threading.Event(), threading.Event()
        self._went_on = False
        self._active = False

    def __enter__(self) -> Interrupts:
        main = threading.current_thread() is threading.main_thread()
        if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler or os.name != "posix":
            return self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, self._notice)
        threading.Thread(target=self._watch, name="featherweight-interrupts", daemon=True).start()
        self._token = current.set(self)
        self._active = True
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if not self._active:
            return
        current.reset(self._token)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.close(self._write)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._went_on = self.answering
        self._noticed.set()
        raise KeyboardInterrupt

    def _watch(self) -> None:
        while byte := os.read(self._read, 1):
            if byte[0] != signal.SIGINT:
                continue
            last = time.monotonic() + (ANSWERING if self.answering else UNSEEN)
            while not self._noticed.wait(0.01):
                if time.monotonic() > last or select.select([self._read], [], [], 0)[0]:
                    self.end()
            self._noticed.clear()
            if not self._went_on and not self._over.wait(UNWINDING):
                self.end()
        os.close(self._read)

    def end(self) -> None:
        """End the process here and now, the terminal as it was."""
        for action in self.at_end:
            with contextlib.suppress(Exception):
                action()
        with contextlib.suppress(OSError):
            text = (SHOW_CURSOR + "\r\n" if os.isatty(2) else "") + self.last_words + "\n"
            os.write(2, text.encode())
        os._exit(CODE)


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """Ctrl-C in here raises KeyboardInterrupt, and the command goes on."""
    watch = current.get()
    if watch is None:
        yield
        return
    watch.answering = True
    try:
        yield
    finally:
        watch.answering = False


@contextlib.contextmanager
def put_back(action: Callable[[], object]) -> Iterator[None]:
    """Run `action` at the end, however it comes."""
    watch = current.get()
    if watch is not None:
        watch.at_end.append(action)
    try:
        yield
    finally:
        action()
        if watch is not None:
            watch.at_end.remove(action)
