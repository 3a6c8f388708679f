"""Calls into the decoder that Ctrl-C ends at once: a thread makes them, the caller waits and can be interrupted."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from featherweight.errors import FeatherError

Result = TypeVar("Result")
LOOK = 0.05
"""Seconds between two looks at whether a signal has come: one that reaches another thread does not end the wait."""
_OVER = object()
_NOTHING = object()


class Task(Generic[Result]):
    """A call on its way from the caller to the worker and back."""

    def __init__(self, call: Callable[[Task[Result]], Result]) -> None:
        self.call: Callable[[Task[Result]], Result] | None = call
        self.result: Result | None = None
        self.error: BaseException | None = None
        self.cancelled = False
        self.messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def ask(self, message: object) -> bool:
        """In the worker: have the caller listen to a message; whether the call is to end."""
        if self.cancelled:
            return True
        self.messages.put(message)
        return self.answers.get()

    def run(self, halt: Callable[[bool], object]) -> None:
        """In the worker: make the call, unless it has been cancelled before or made already."""
        call, self.call = self.call, None
        if call is None:
            return
        try:
            halt(False)
            if not self.cancelled:  # set before `halt(True)` is called: it is seen here, or the halt comes after ours
                self.result = call(self)
        except BaseException as error:
            self.error = error
        finally:
            del call
            self.messages.put(_OVER)

    def next_message(self) -> object:
        try:
            return self.messages.get(timeout=LOOK)
        except queue.Empty:
            return _NOTHING


class Worker:
    """One thread for the calls of one decoder, made one after the other, also for several callers.

    `halt(True)` makes the call in progress end soon, `halt(False)` allows calls again.
    """

    def __init__(self, halt: Callable[[bool], object]) -> None:
        self._halt = halt
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._tasks: queue.SimpleQueue[Task[Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def close(self) -> None:
        """End the thread when it has done what it was given."""
        self._tasks.put(None)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until no other thread uses the decoder. FeatherError if this very thread does: in a callback."""
        if self._process != os.getpid():  # forked: the thread has stayed behind, and the lock may be held by another
            self._begin()
        if self._owner == threading.get_ident():
            raise FeatherError(
                "a model was used from within its own generation (by on_token, or in a signal handler): return True to "
                "end the generation and use the model then, or open it a second time"
            )
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None

    def run(self, call: Callable[[Task[Result]], Result], listen: Callable[[Any], object] | None = None) -> Result:
        """Have the thread make a call, and listen here to what it asks; true answers end it.

        Whatever interrupts the wait, Ctrl-C or an exception of `listen`, is raised here when the call has ended, soon:
        no memory is let go that it works on. Must be called in a turn.
        """
        task = Task(call)
        del call
        caught: BaseException | None = None
        sent = False
        while True:
            try:
                if caught is not None:
                    task.cancelled = True
                    self._halt(True)
                    task.answers.put(True)
                if not sent:
                    self._send(task)  # twice if the signal comes just now, which does no harm
                    sent = True
                message = task.next_message()
                if message is _OVER:
                    break
                if message is not _NOTHING and caught is None and listen is not None:
                    task.answers.put(bool(listen(message)))
            except BaseException as error:  # a second Ctrl-C changes nothing
                caught = caught or error
        if caught is not None:
            raise caught
        if task.error is not None:
            raise task.error
        return task.result  # type: ignore[return-value]

    def _send(self, task: Task[Any]) -> None:
        if self._thread is None:
            arguments = (self._tasks, self._halt)  # not the worker itself, which must not live for ever
            thread = threading.Thread(target=_serve, args=arguments, name="featherweight-decoder", daemon=True)
            thread.start()
            self._thread = thread
        self._tasks.put(task)


def _serve(tasks: queue.SimpleQueue[Task[Any] | None], halt: Callable[[bool], object]) -> None:
    while True:
        task = tasks.get()
        if task is None:
            return
        task.run(halt)
        del task
