"""Two processes that time the same calls take turns, so that they meet the same machine.

Times of two processes one after the other differ by what else ran meanwhile; on a busy machine by
more than a change of code does. Here both run at once and a referee lets one of them measure for
some milliseconds while the other waits, then the other. `measure` and `measure_cuda` ask for their
turn by themselves in a process that has a referee.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

REFEREE = "SORA_KERNELS_REFEREE"
"""Environment variable: number of the socket, inherited, that leads to the referee."""

_sockets: dict[str, socket.socket] = {}


@contextmanager
def turn() -> Iterator[None]:
    """Waits until it is this process's turn, and hands it on; at once where nobody referees."""
    number = os.environ.get(REFEREE)
    if number is None:
        yield
        return
    if number not in _sockets:
        _sockets[number] = socket.socket(fileno=int(number))
    mine = _sockets[number]
    mine.sendall(b"?")
    mine.recv(1)
    try:
        yield
    finally:
        mine.sendall(b".")


def referee(players: Sequence[socket.socket], first: int) -> list[int]:
    """Gives turns to two processes until both have ended; how many each has had.

    A turn begins when each of the two asks for one or has ended: what a process does outside its
    turns disturbs nobody.

    Raises:
        TimeoutError: a socket has a timeout and nothing came for so long.
    """
    turns, alive, asking, following = [0, 0], {0, 1}, set[int](), first
    while alive:
        for player in sorted(alive - asking):
            if players[player].recv(1):
                asking.add(player)
            else:
                alive.discard(player)
        if not asking:
            continue
        player = following if following in asking else 1 - following
        asking.discard(player)
        players[player].sendall(b"!")
        turns[player] += 1
        following = 1 - player
        if not players[player].recv(1):
            alive.discard(player)
    return turns
