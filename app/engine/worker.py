"""The one thread that runs models, turn by turn over the lanes."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from app.engine.errors import Aborted, EngineError, StepFailed
from app.engine.lane import Handovers, Lane

log = logging.getLogger("app.engine")

STALL_SECONDS = 60.0


class DeviceWorker:
    """Models that each start their own parallel loops slow each other down; so one thread runs them all.

    What a turn produces crosses to the event loop in a single hand-over: where the next turn comes to a call
    that needs no interpreter, just before that. Else the event loop would take the interpreter from the turn
    that prepares the call, and have nothing to do during it.
    """

    def __init__(self, lanes: Sequence[Lane], stall_seconds: float = STALL_SECONDS) -> None:
        """A turn that takes longer than `stall_seconds` means that the device hangs."""
        self.lanes: list[Lane] = []  # replaced under the lock, never changed: the thread walks over it
        self._lock = threading.Lock()
        self._leaving: deque[tuple[Lane, asyncio.Future[None]]] = deque()
        self._wake = threading.Event()
        self._stall_seconds = stall_seconds
        self._held: Handovers = []  # of lanes that say when the interpreter is free
        self._telling: set[Lane] = set()
        self._stopping = False
        self._draining = False
        self._beat = time.monotonic()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        for lane in lanes:
            self.add(lane)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin taking turns; results are handed over on `loop`."""
        self._loop = loop
        self._thread.start()

    def add(self, lane: Lane) -> None:
        """From now on a lane has its turns."""
        lane.wake = self._wake.set
        if lane.tell_before_calls(self._release):
            self._telling.add(lane)
        with self._lock:
            lane.door.draining |= self._draining
            self.lanes = [*self.lanes, lane]

    async def remove(self, lane: Lane) -> None:
        """Take a lane out between two turns; what it still holds ends as aborted.

        Afterwards nothing here refers to it, so that its memory is free with its last reader.
        """
        lane.door.draining = True
        gone = asyncio.get_running_loop().create_future()
        self._leaving.append((lane, gone))
        self._wake.set()
        # Looked at again and again, because a thread that ends meanwhile answers no more.
        while self._thread.is_alive() and not gone.done():
            await asyncio.wait([gone], timeout=1.0)
        self._forget(lane)

    @property
    def fault(self) -> str | None:
        """Why nothing more is to be expected of this thread: it ended, it hangs, its device is gone."""
        if not self._thread.is_alive():
            return "the device thread has ended"
        silence = time.monotonic() - self._beat
        if silence > self._stall_seconds:
            return f"the device thread has not answered for {silence:.0f} seconds"
        broken = [lane.name for lane in self.lanes if lane.failures.broken]
        return f"the device answers no more ({', '.join(broken)})" if broken else None

    @property
    def alive(self) -> bool:
        """Does the thread run, has it begun a turn lately, and does the device still answer?"""
        return self.fault is None

    def begin_drain(self) -> None:
        """Every lane refuses new work from now on; what is accepted goes on."""
        with self._lock:
            self._draining = True
            for lane in self.lanes:
                lane.door.draining = True

    async def drained(self, timeout: float) -> bool:
        """Wait until all accepted work was handed its end; False if that takes over `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while any(lane.door.n_inside for lane in self.lanes):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    def stop(self) -> None:
        """End the thread after its present turn; what still waits or runs ends as aborted."""
        # Closed before the last look into the queues: nothing comes in that nobody would serve.
        self.begin_drain()
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while not self._stopping:
                self._beat = time.monotonic()
                # Cleared before looking: work that arrives during the turn sets it again.
                self._wake.clear()
                self._let_go()
                held = self._held
                busy = [self._turn(lane) for lane in self.lanes]  # every lane has its turn
                no_call = held and held is self._held
                if no_call or not any(lane.has_work() for lane in self.lanes if lane in self._telling):
                    self._release()
                if not any(busy):
                    self._wake.wait(timeout=1.0)
        finally:
            self.begin_drain()
            for lane in self.lanes:
                self._give_up(lane, lambda: Aborted("the service stopped"))

    def _let_go(self) -> None:
        while self._leaving:
            lane, gone = self._leaving.popleft()
            self._forget(lane)
            self._give_up(lane, Aborted)
            self._call(gone.set_result, None)

    def _forget(self, lane: Lane) -> None:
        with self._lock:
            self.lanes = [other for other in self.lanes if other is not lane]
        self._telling.discard(lane)

    def _turn(self, lane: Lane) -> bool:
        if not lane.has_work():
            return False
        if lane not in self._telling:  # its turn will not say when, and may be long
            self._release()
        try:
            handovers = lane.turn()
            if lane in self._telling:
                self._held += handovers
            else:
                self._hand_over(handovers)
        except Exception as error:  # the loop survives everything
            log.critical("lane %s broke", lane.name, exc_info=error)
            self._give_up(lane, StepFailed)
        return True

    def _give_up(self, lane: Lane, error: Callable[[], EngineError]) -> None:
        self._release()
        try:
            self._hand_over(lane.fail_all(error))
        except Exception as failure:
            log.critical("lane %s cannot be cleared", lane.name, exc_info=failure)

    def _release(self) -> None:
        held, self._held = self._held, []
        self._hand_over(held)

    def _hand_over(self, handovers: Handovers) -> None:
        if handovers:
            self._call(_complete, handovers)

    def _call(self, tell: Callable[[Any], None], what: Any) -> None:
        if self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(tell, what)
        except RuntimeError:  # the loop has closed: nobody is left to tell
            log.warning("a hand-over found no event loop")


def _complete(handovers: Handovers) -> None:
    for handover in handovers:
        try:
            handover.complete()
        except Exception as error:  # one receiver's trouble is not its neighbours'
            log.critical("a result could not be delivered", exc_info=error)
