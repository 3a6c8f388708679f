"""What the user of `feather chat` says: a turn is a line, or a text of several lines that is pasted.

Terminals mark what is pasted if they are asked to ("bracketed paste"). They are asked as long as the chat lasts, also
while the model answers, and what has not been read at the end is thrown away: nothing of a pasted text ever gets to
the shell.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import select
import signal
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any, Protocol, TextIO

from featherweight.cli.interrupts import put_back
from featherweight.system.state import History

PROMPT = "you: "
LEAVE = "/exit"
BEGIN_MARKS, END_MARKS = "\x1b[?2004h", "\x1b[?2004l"
PASTE, PASTED = "\x1b[200~", "\x1b[201~"
QUIET = 0.05
"""Seconds without input after which nothing more is to be expected of a text that is being pasted."""


class Listener(Protocol):
    def listen(self) -> str | None:
        """What is said next, not blank; None at the end."""


@contextlib.contextmanager
def open_listener(history: History | None = None) -> Iterator[Listener]:
    """The terminal, or else lines from a pipe or file.

    history : what the arrow keys bring back, and what is said goes into; none if None
    """
    try:
        import termios
    except ImportError:  # Windows
        yield Lines()
        return
    try:
        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
    except (OSError, ValueError, termios.error):  # no terminal
        yield Lines()
        return
    out = sys.stdout if sys.stdout.isatty() else sys.stderr
    terminal = Terminal(number, out, history or History("chat", keep=False))

    def restore() -> None:
        terminal.write(END_MARKS)
        terminal.drop_input()
        termios.tcsetattr(number, termios.TCSADRAIN, before)

    def take(*_: object) -> None:
        mode = termios.tcgetattr(number)
        mode[3] &= ~(termios.ICANON | termios.ECHO)  # signals stay, so Ctrl-C is one
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        termios.tcsetattr(number, termios.TCSADRAIN, mode)
        terminal.write(BEGIN_MARKS)

    with put_back(restore), _when_continued(take):
        take()
        yield terminal


@contextlib.contextmanager
def _when_continued(action: Any) -> Iterator[None]:
    """Call `action` when the process goes on after Ctrl-Z: the shell has changed the terminal meanwhile."""
    try:
        before = signal.signal(signal.SIGCONT, action)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGCONT, before)


class Lines:
    """Lines of a pipe; one that ends in a backslash goes on in the next."""

    def listen(self) -> str | None:
        said = ""
        while True:
            try:
                line = input("" if said else PROMPT)
            except EOFError:
                return said.strip() or None
            if line.endswith("\\"):
                said += line[:-1] + "\n"
                continue
            said = (said + line).strip()
            if said:
                return None if said == LEAVE else said


class Terminal:
    """Reads keys and shows what they make of the line. Backspace, Ctrl-U and Ctrl-W delete, up and down bring back."""

    def __init__(self, number: int, out: TextIO, history: History) -> None:
        self._history = history
        self._place = 0  # in the history; behind its end is what is being typed
        self._draft = ""
        self._number, self._out = number, out
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._unread = ""  # of what the system has given
        self._escape = ""  # the beginning of an escape sequence
        self._pasting = False
        self._text = ""

    def write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()

    def listen(self) -> str | None:
        self._text = self._draft = ""
        self._place = len(self._history.entries)
        self.write(PROMPT)
        while True:
            if not self._unread:
                data = os.read(self._number, 65536)
                if not data:
                    return None
                self._unread = self._decoder.decode(data)
            while self._unread:
                key, self._unread = self._unread[0], self._unread[1:]
                if self._pasting or self._escape or key == "\x1b":
                    self._sequence(key)
                elif key == "\x04":
                    if not self._text:
                        self.write("\n")
                        return None
                elif key in "\r\n":
                    said = self._line()
                    if said is not None:
                        return None if said == LEAVE else said
                else:
                    self._edit(key)

    def _line(self) -> str | None:
        """Enter: what has been said, or None if there is more to come."""
        self.write("\n")
        if self._text.endswith("\\"):
            self._text = self._text[:-1] + "\n"
            return None
        said, self._text = self._text.strip(), ""
        if not said:
            self.write(PROMPT)
            return None
        self._history.add(said)
        return said

    def _sequence(self, key: str) -> None:
        """A key within an escape sequence or a pasted text. Sequences other than the marks of a text do nothing."""
        self._escape += key
        if self._pasting:
            if self._escape == PASTED:
                self._pasting, self._escape = False, ""
            elif not PASTED.startswith(self._escape):
                put, self._escape = self._escape, ""
                if put.endswith("\x1b"):  # perhaps the mark begins here
                    put, self._escape = put[:-1], "\x1b"
                self._insert("".join(c for c in put.replace("\r", "\n") if c in "\n\t" or c.isprintable()))
        elif self._escape == PASTE:
            self._pasting, self._escape = True, ""
        elif len(self._escape) > 1 and (self._escape[1] not in "[O" or (len(self._escape) > 2 and "@" <= key <= "~")):
            if self._escape in ("\x1b[A", "\x1bOA", "\x1b[B", "\x1bOB"):
                self._recall(-1 if key == "A" else 1)
            self._escape = ""

    def _recall(self, step: int) -> None:
        """An entry of the history in place of the line; behind the last one stands what was being typed."""
        entries = self._history.entries
        place = self._place + step
        if not 0 <= place <= len(entries):
            return
        if self._place == len(entries):
            self._draft = self._text
        self._place = place
        self._redraw(self._draft if place == len(entries) else entries[place])

    def _edit(self, key: str) -> None:
        if key in "\x7f\b":
            self._shorten(self._text[:-1])
        elif key == "\x15":
            self._shorten("")
        elif key == "\x17":
            self._shorten(self._text.rstrip()[: self._text.rstrip().rfind(" ") + 1])
        elif key == "\t" or key.isprintable():
            self._insert(key)

    def _insert(self, text: str) -> None:
        self._text += text
        self.write(text.replace("\t", " "))

    def _shorten(self, text: str) -> None:
        if not self._text:
            return
        gone, self._text = self._text[len(text) :], text
        if len(gone) == 1 and _width(gone) == 1 and self._rows(text + gone) == self._rows(text):
            self.write("\b \b")
            return
        self._redraw(text, text + gone)

    def _redraw(self, text: str, before: str | None = None) -> None:
        """Show another text in the place of the one that stands there."""
        above = self._rows(self._text if before is None else before) - 1
        self._text = text
        self.write((f"\x1b[{above}A" if above else "") + "\r\x1b[J" + PROMPT + text.replace("\t", " "))

    def _rows(self, text: str) -> int:
        """Rows of the screen that the prompt and a text take."""
        try:
            columns = max(2, os.get_terminal_size(self._out.fileno()).columns)
        except (OSError, ValueError):
            columns = 80
        return sum(1 + max(0, _width(line) - 1) // columns for line in (PROMPT + text).split("\n"))

    def drop_input(self) -> None:
        """Throw away what has been typed or pasted and not read."""
        import termios

        with contextlib.suppress(OSError, termios.error):
            for _ in range(200):
                if not select.select([self._number], [], [], QUIET)[0] or not os.read(self._number, 65536):
                    break
            termios.tcflush(self._number, termios.TCIFLUSH)


def _width(text: str) -> int:
    """Columns that a text takes on the screen."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
