"""uvicorn's HTTP/1.1 protocol with bounds: how many connections, how slow a client may send, and read.

uvicorn itself times only the pause between two requests. A client that sends its head byte by byte, or
opens connections and says nothing, or asks for a stream and does not read it, would stay for ever.
"""

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

# Above the limit, as many connections again are taken on which probes are answered and all else is told to
# come back; what comes on top of those is closed without a word.
FACTOR = 2
_CLOSING_SECONDS = 1.0  # after the guard's own answer to a slow body
_MESSAGE = "this is not HTTP/1.1 as the server understands it"


class BoundedProtocol(H11Protocol):
    """A connection under watch. Make a subclass with the bounds for each server: `bounded`."""

    max_connections = 1000
    receive_seconds = 20.0
    read_seconds = 30.0

    _arrival: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

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
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self.conn.their_state
        super().data_received(data)
        if self.conn.their_state is not before or self._arrival is None:
            self._watch_arrival()

    def on_response_complete(self) -> None:
        if self.app_state.get("crowded"):
            self.transport.close()  # one answer each; the next may find room
        super().on_response_complete()
        self._watch_arrival()

    def _watch_arrival(self) -> None:
        """Time what is to come: a head, or a body. What is in is not timed, nor is an idle connection."""
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None
        if self.transport.is_closing() or self.timeout_keep_alive_task is not None:
            return
        seconds = {h11.IDLE: 0.0, h11.SEND_BODY: _CLOSING_SECONDS}.get(self.conn.their_state)
        if seconds is not None:
            self._arrival = self.loop.call_later(self.receive_seconds + seconds, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading = self.loop.call_later(self.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def send_400_response(self, msg: str) -> None:
        """In JSON like all others. Nothing can be said in the middle of an answer."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE) or self._answers():
            self.transport.abort()
            return
        body = json.dumps({"error": _MESSAGE, "error_type": "validation"}).encode()
        head = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        events = (h11.Response(status_code=400, headers=head), h11.Data(data=body), h11.EndOfMessage())
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()

    def _answers(self) -> bool:
        """Is a route at work on this connection? Two answers to one request would mix."""
        cycle: RequestResponseCycle | None = self.cycle  # none before the first request
        return cycle is not None and not cycle.response_complete


def bounded(max_connections: int, receive_seconds: float, read_seconds: float) -> type[BoundedProtocol]:
    """The protocol with its bounds, for uvicorn's `http`."""
    values = {
        "max_connections": max_connections,
        "receive_seconds": receive_seconds,
        "read_seconds": read_seconds,
    }
    return type("BoundedProtocol", (BoundedProtocol,), values)
