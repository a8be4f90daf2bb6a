"""What a server spends on its clients: connections, time for a request to begin, and lines in its log."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

MAX_CONNECTIONS = 256  # well below the usual limit of 1,024 open files
REQUEST_TIMEOUT_S = 10.0  # for the head of the first request to arrive
MAX_HEAD_BYTES = 64_000  # of a request
MAX_LOG_LINES, LOG_PERIOD_S = 20, 60.0


class LimitedProtocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type,unused-ignore]
    """One HTTP connection. One too many ends the oldest that waits for its client, never one that is being answered.

    So clients that hold connections open, or send their requests slowly, keep nobody out. Requests are parsed by
    httptools if it is installed, and by h11 otherwise, whose limit of a request's head is uvicorn's setting; httptools
    has none, and calls the methods that begin with `on_`.
    """

    in_head = False  # whether a request has begun whose head is not complete
    head_bytes = 0  # received of it since

    def connection_made(self, transport: Any) -> None:
        """Count the connection, and start to wait for its first request."""
        super().connection_made(transport)
        self.opened_at = time.monotonic()
        if len(self.connections) > MAX_CONNECTIONS:
            waiting = [connection for connection in self.connections if connection.waits_for_client]
            oldest = min(waiting, key=lambda connection: connection.opened_at)
            self.connections.discard(oldest)
            oldest.transport.abort()
        self.timer = asyncio.get_running_loop().call_later(REQUEST_TIMEOUT_S, self._end_without_request)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection; its timer would keep it in memory."""
        self.timer.cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """A request begins."""
        self.in_head, self.head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Its head is complete."""
        self.in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Parse what arrives; refuse a head without an end."""
        self.head_bytes += len(data) if self.in_head else 0
        super().data_received(data)
        if self.in_head and self.head_bytes > MAX_HEAD_BYTES:
            self.send_400_response("The head of the request is too large.")

    @property
    def waits_for_client(self) -> bool:
        """Whether no complete request is being answered."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def _end_without_request(self) -> None:
        if self.cycle is None:
            self.transport.abort()


class LogLimit(logging.Filter):
    """Lets MAX_LOG_LINES records pass in LOG_PERIOD_S; the next one after that says how many did not."""

    def __init__(self) -> None:
        super().__init__()
        self._period_began, self._lines = time.monotonic(), 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is written."""
        now = time.monotonic()
        if now - self._period_began > LOG_PERIOD_S:
            left_out = self._lines - MAX_LOG_LINES
            self._period_began, self._lines = now, 0
            if left_out > 0:
                record.msg, record.args = f"{record.getMessage()} ({left_out:,} lines before were left out)", ()
        self._lines += 1
        return self._lines <= MAX_LOG_LINES
