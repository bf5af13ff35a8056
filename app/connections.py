"""uvicorn's HTTP/1.1 protocol with bounds: how many connections, how slow a client may send, and read.

uvicorn itself times only the pause between two requests. A client that sends its head byte by byte, or
opens connections and says nothing, or asks for a stream and does not read it, would stay for ever.
"""

import asyncio
import json

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app.bodies import BROKEN_BODY

# Above the limit, as many connections again are taken on which probes are answered and all else is told to
# come back; what comes on top of those is closed without a word.
FACTOR = 2
_MAX_HEAD_BYTES = 64 * 1024
_MAX_PIPELINED = 64  # requests of one connection that wait for their turn
_HEAD_SECONDS, _BODY_SECONDS = 0.0, 1.0  # on top of the limit; a slow body is first answered by the guard
_MESSAGE = "this is not HTTP/1.1 as the server understands it"


class BoundedProtocol(HttpToolsProtocol):
    """A connection under watch. Make a subclass with the bounds for each server: `bounded`."""

    max_connections = 1000
    receive_seconds = 20.0
    read_seconds = 30.0

    _arrival: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None
    _awaited: float | None = _HEAD_SECONDS  # what is to come now: a head, a body; None when all is in
    _n_head_bytes = 0
    _running: RequestResponseCycle | None = None  # `cycle` is the last of the pipeline
    _is_last = False  # what comes behind the requests that are in is not heard
    _is_muted = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        n_connections = len(self.connections)
        if n_connections > FACTOR * self.max_connections:
            transport.abort()
            return
        # The guard answers in the dialect's form; here is no request yet.
        self.app_state = {**self.app_state, "crowded": n_connections > self.max_connections}
        self._watch_arrival()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._arrival, self._reading):
            if timer is not None:
                timer.cancel()
        self._arrival = self._reading = None
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_last:
            return
        before = self._awaited, self.cycle
        self._n_head_bytes += len(data)
        self._unset_keepalive_if_required()
        self._feed(data)
        too_large = self._awaited == _HEAD_SECONDS and self._n_head_bytes > _MAX_HEAD_BYTES
        if too_large and not self.transport.is_closing():
            self.send_400_response(_MESSAGE)
        if (self._awaited, self.cycle) != before or self._arrival is None:
            self._watch_arrival()

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._decline(data[offer.args[0] :])
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response(_MESSAGE)

    def _decline(self, rest: bytes) -> None:
        """Stay with HTTP/1.1, whatever a client offers: some do with each request.

        The parser takes what follows the head for the other protocol. For a body there is a new one, which
        is told of the body's length alone.
        """
        framing = b"".join(b"%s: %s\r\n" % header for header in self._framing())
        if framing:
            self.parser = httptools.HttpRequestParser(self)
            self._is_muted = True
            self.parser.feed_data(b"POST / HTTP/1.1\r\n%s\r\n" % framing)
            self._is_muted = False
        self._feed(rest)

    def _framing(self) -> list[tuple[bytes, bytes]]:
        return [header for header in self.headers if header[0] in (b"content-length", b"transfer-encoding")]

    def on_message_begin(self) -> None:
        if self._is_muted:
            return
        self._awaited, self._n_head_bytes = _HEAD_SECONDS, 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._awaited == _HEAD_SECONDS:  # not what comes behind the body
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_muted:
            return
        n_hosts = sum(name == b"host" for name, _ in self.headers)
        if n_hosts > 1 or (n_hosts == 0 and self.parser.get_http_version() == "1.1"):
            raise ValueError("a request names one host")
        codings = {value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"}
        if codings - {b"chunked"}:
            raise ValueError("a body comes as it is, or in chunks")
        if len(self.pipeline) >= _MAX_PIPELINED:
            raise ValueError("too many requests in a row")
        super().on_headers_complete()
        self._awaited = _BODY_SECONDS
        if not self.pipeline:
            self._running = self.cycle

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade() and self._framing():
            return  # the body is still to come
        super().on_message_complete()
        self._awaited, self._n_head_bytes = _HEAD_SECONDS if self.cycle.response_complete else None, 0

    def on_response_complete(self) -> None:
        if self.app_state.get("crowded"):
            self.transport.close()  # one answer each; the next may find room
        if self.pipeline:
            self._running = self.pipeline[-1][0]
        super().on_response_complete()
        if self._awaited is None and self.cycle.response_complete:  # not with the next in its pipeline
            self._awaited = _HEAD_SECONDS
        self._watch_arrival()

    def _watch_arrival(self) -> None:
        """Time what is to come: a head, or a body, unless it waits for us; no idle connection."""
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None
        if self.transport.is_closing() or self.timeout_keep_alive_task is not None:
            return
        cycle: RequestResponseCycle | None = self.cycle
        if self._awaited == _HEAD_SECONDS and cycle is not None and not cycle.response_complete:
            return  # the beginning of the next request, whose turn is yet to come
        if self._awaited is not None and not self.flow.read_paused:
            seconds = self.receive_seconds + self._awaited
            self._arrival = self.loop.call_later(seconds, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading = self.loop.call_later(self.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def send_400_response(self, msg: str) -> None:
        """In JSON like all others. Nothing can be said in the middle of an answer: that is then the last."""
        cycle: RequestResponseCycle | None = self.cycle  # none before the first request
        in_body = self._awaited == _BODY_SECONDS
        if in_body and cycle is not None:  # whoever reads it refuses, in the path's own form
            cycle.scope["state"][BROKEN_BODY] = True
            cycle.more_body = False
            cycle.message_event.set()
        if cycle is not None and not cycle.response_complete:
            self._awaited, self._is_last, cycle.keep_alive = None, True, False
            return
        if in_body:
            self.transport.close()  # its answer is out
            return
        body = json.dumps({"error": _MESSAGE, "error_type": "validation"}).encode()
        head = "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()


def bounded(max_connections: int, receive_seconds: float, read_seconds: float) -> type[BoundedProtocol]:
    """The protocol with its bounds, for uvicorn's `http`."""
    values = {
        "max_connections": max_connections,
        "receive_seconds": receive_seconds,
        "read_seconds": read_seconds,
    }
    return type("BoundedProtocol", (BoundedProtocol,), values)
