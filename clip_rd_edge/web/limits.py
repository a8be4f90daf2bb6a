"""What a server spends on its clients: connections, time for a request to begin, and lines in its log."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

MAX_CONNECTIONS = 256
OPEN_FILES = 1024  # the usual limit of a process; a shell of macOS has 256
REQUEST_TIMEOUT_S = 10.0  # for the head of the first request to arrive
MAX_HEAD_BYTES = 64_000  # of a request; of what follows its body, too
MAX_AHEAD, MAX_AHEAD_BYTES = 64, 256_000  # requests that arrive before the answer to an earlier one, and their bytes
MAX_LOG_LINES, LOG_PERIOD_S = 20, 60.0


class LimitedProtocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type,unused-ignore]
    """One HTTP connection. One too many ends the oldest that waits for its client, never one that is being answered.

    So clients that hold connections open, or send their requests slowly, keep nobody out. Requests are parsed by
    httptools if it is installed, and by h11 otherwise, whose limit of a request's head and trailers is uvicorn's
    setting; httptools has none, and calls the methods that begin with `on_`. Neither limits what arrives before it is
    its turn, as uvicorn reads on while a request is answered.
    """

    in_fields = False  # whether header fields may follow: of the head, or after the last chunk of the body
    field_bytes = 0  # received since they began
    ahead_bytes = 0  # received since a request is being answered

    def connection_made(self, transport: Any) -> None:
        """Count the connection, and start to wait for its first request."""
        super().connection_made(transport)
        self.opened_at = time.monotonic()
        if len(self.connections) > connection_limit():
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
        self.in_fields, self.field_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Its head is complete. What is raised here ends the parsing, and the answer is 400."""
        self.in_fields = False
        if len(self.pipeline) >= MAX_AHEAD:
            raise OverflowError
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        """A chunk begins, or after the last one, trailers."""
        self.in_fields, self.field_bytes = True, 0

    def on_body(self, body: bytes) -> None:
        """A part of the body has arrived."""
        self.in_fields = False
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request has ended."""
        self.in_fields = False
        super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        """Parse what arrives; refuse fields without an end, and too much before the answer to an earlier request."""
        self.field_bytes += len(data) if self.in_fields else 0
        self.ahead_bytes = 0 if self.waits_for_client else self.ahead_bytes + len(data)
        super().data_received(data)
        if self.in_fields and self.field_bytes > MAX_HEAD_BYTES:
            self.send_400_response("The head of the request is too large.")
        elif self.ahead_bytes > MAX_AHEAD_BYTES:
            self.transport.abort()

    @property
    def waits_for_client(self) -> bool:
        """Whether no complete request is being answered."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def _end_without_request(self) -> None:
        if self.cycle is None:
            self.transport.abort()


def connection_limit() -> int:
    """Return how many connections are kept: with what else is open, fewer than files that this process may open.

    That limit is raised to OPEN_FILES where it may be: without a file for it, a connection cannot even be refused.
    """
    try:
        import resource
    except ImportError:  # Windows
        return MAX_CONNECTIONS
    unlimited = resource.RLIM_INFINITY
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == unlimited else min(hard, OPEN_FILES)
    if soft != unlimited and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return MAX_CONNECTIONS if soft == unlimited else min(MAX_CONNECTIONS, soft // 2)


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
