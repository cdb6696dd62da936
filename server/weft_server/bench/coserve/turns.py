"""Two processes that take turns on one machine: the generator leads, the trainer runs when it is let.

One byte at a time over a socket pair: GO lets the trainer run, STOP asks it to end its turn, YIELDED says
that it has, END that there are no more turns. The trainer looks at every linear layer, forward and backward,
the finest place that PyTorch's hooks offer, so that a turn ends soon after it should.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable

GO, STOP, YIELDED, END = b"g", b"s", b"y", b"e"


class GeneratorSide:
    """The generator's end: it has the machine whenever it does not give it away."""

    def __init__(self, fileno: int) -> None:
        """Takes over the descriptor of its end of the pair."""
        self._socket = socket.socket(fileno=fileno)

    def give_for(self, seconds: float) -> float:
        """Let the trainer run for `seconds`, and wait until it has stopped; returns how long that took."""
        if seconds <= 0.0:
            return 0.0
        began_s = time.monotonic()
        self._socket.sendall(GO)
        time.sleep(seconds)
        self._socket.sendall(STOP)
        if self._socket.recv(1) != YIELDED:
            raise ConnectionError("the trainer has gone away")
        return time.monotonic() - began_s

    def end(self) -> None:
        """No more turns in this window: the trainer ends its own."""
        self._socket.sendall(END)


class TrainerSide:
    """The trainer's end."""

    def __init__(self, fileno: int, synchronize: Callable[[], None]) -> None:
        """`synchronize` waits until the device has done what was issued."""
        self._socket = socket.socket(fileno=fileno)
        self._synchronize = synchronize
        self.is_over = True
        """Whether the generator has ended the window."""

    def begin(self) -> None:
        """A window begins: wait for the first turn."""
        self.is_over = False
        self._wait_for_turn()

    def pause_point(self) -> None:
        """Give the machine back if the generator wants it, and wait for the next turn or the end."""
        if self.is_over or not select.select([self._socket], [], [], 0.0)[0]:
            return
        self._synchronize()
        if self._socket.recv(1) == STOP:
            self._socket.sendall(YIELDED)
            self._wait_for_turn()
        else:
            self.is_over = True

    def _wait_for_turn(self) -> None:
        self.is_over = self._socket.recv(1) != GO
