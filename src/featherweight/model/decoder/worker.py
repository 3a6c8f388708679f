"""Calls into the decoder that Ctrl-C ends at once: a thread makes them, the caller waits and can be interrupted."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
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
        self.cancelled = self.over = False
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
            self.over = True
            self.messages.put(_OVER)

    def next_message(self) -> object:
        try:
            return self.messages.get(timeout=LOOK)
        except queue.Empty:
            return _NOTHING


class Worker:
    """One thread for the calls of one decoder, made one after the other, also for several callers.

    `halt(True)` makes the call in progress end soon, `halt(False)` allows calls again. Between any two instructions of
    the main thread a KeyboardInterrupt may come. So whatever is begun here can be begun again, and whoever comes next
    first sees to it that the last call is over.
    """

    def __init__(self, halt: Callable[[bool], object]) -> None:
        self._halt = halt
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock, self._running = threading.Lock(), threading.Lock()
        self._owner: int | None = None
        self._last: Task[Any] | None = None
        self._tasks: queue.SimpleQueue[Task[Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def close(self) -> None:
        """End the thread when it has done what it was given."""
        self._tasks.put(None)

    def turn(self) -> threading.Lock:
        """What to hold while using the decoder. FeatherError if this very thread uses it already: in a callback.

        The bare lock, since a `with` takes it and begins its body without a moment for signals in between.
        """
        if self._process != os.getpid():  # forked: the thread has stayed behind, and the lock may be held by another
            self._begin()
        if self._owner == threading.get_ident() and self._lock.locked():
            raise FeatherError(
                "a model was used from within its own generation (by on_token, or in a signal handler): return True to "
                "end the generation and use the model then, or open it a second time"
            )
        return self._lock

    def run_here(self, call: Callable[[], Result]) -> Result:
        """Make a call that is over at once without the thread: waking it can take longer. Must be called in a turn."""
        self._settle()
        self._halt(False)
        return call()

    def run(self, call: Callable[[Task[Result]], Result], listen: Callable[[Any], object] | None = None) -> Result:
        """Have the thread make a call, and listen here to what it asks; true answers end it. Must be called in a turn.

        Whatever interrupts the wait, Ctrl-C or an exception of `listen`, is raised here when the call has ended, which
        is soon.
        """
        self._settle()
        task = self._last = Task(call)
        del call
        try:
            self._owner = threading.get_ident()
            self._wait(task, listen)
        except BaseException:
            self._settle()
            raise
        finally:
            self._owner = None
        self._last = None
        if task.error is not None:
            raise task.error
        return task.result  # type: ignore[return-value]

    def _wait(self, task: Task[Any], listen: Callable[[Any], object] | None) -> None:
        self._send(task)
        while (message := task.next_message()) is not _OVER:
            if message is not _NOTHING and listen is not None:
                task.answers.put(bool(listen(message)))

    def _settle(self) -> None:
        """End the last call, if it is on its way still."""
        while self._last is not None and not self._last.over:
            try:
                self._last.cancelled = True
                self._halt(True)
                self._last.answers.put(True)
                self._send(self._last)  # if it was not sent; twice does no harm
                self._last.next_message()
            except KeyboardInterrupt:  # once more, while the first one is on its way to the user
                continue
        self._last = None

    def _send(self, task: Task[Any]) -> None:
        if self._thread is None or not self._thread.is_alive():
            arguments = (self._tasks, self._running, self._halt)  # not the worker, which must not live for ever
            thread = threading.Thread(target=_serve, args=arguments, name="featherweight-decoder", daemon=True)
            thread.start()
            self._thread = thread
        self._tasks.put(task)


def _serve(tasks: queue.SimpleQueue[Task[Any] | None], running: threading.Lock, halt: Callable[[bool], object]) -> None:
    """The thread. There can be a second one, if a signal came while the first was started; then they take turns."""
    while True:
        task = tasks.get()
        if task is None:
            tasks.put(None)
            return
        with running:
            task.run(halt)
        del task
