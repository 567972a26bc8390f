"""`check_port`: is anybody there? Asked before libraries that would wait minutes for an answer."""

from __future__ import annotations

import socket

CONNECT_SECONDS = 10.0


def check_port(host: str, port: int) -> None:
    """Open and close a connection.

    Raises:
        OSError: Nobody answers.
    """
    socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
