"""Waiting for work: who else may end it, and what becomes of it then."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from starlette.types import Message

from app.api.deps import Attendance, gather
from app.errors import ClientGone, TimedOut
from app.middleware import RequestRecord


class Work:
    """Takes `seconds`, and notes that it was cancelled."""

    cancelled = False

    async def done(self, seconds: float) -> str:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return "done"


class Client:
    """Leaves when told to."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def receive(self) -> Message:
        await self.left.wait()
        return {"type": "http.disconnect"}


@pytest.fixture
async def client() -> Client:
    return Client()


@pytest.fixture
async def attendance(client: Client) -> AsyncIterator[Attendance]:
    attendance = Attendance(client.receive, RequestRecord("id", "generate"), 0.2)
    yield attendance
    attendance.end()


async def test_what_is_done_in_time_is_the_result(attendance: Attendance) -> None:
    assert [await attendance.wait_for(Work().done(seconds)) for seconds in (0.0, 0.01)] == ["done"] * 2


async def test_all_waits_together_have_the_requests_time(attendance: Attendance) -> None:
    work = Work()
    await attendance.wait_for(Work().done(0.1))
    with pytest.raises(TimedOut, match=r"longer than 0\.2 seconds"):
        await attendance.wait_for(work.done(0.15))
    assert work.cancelled


async def test_a_client_that_leaves_ends_the_wait(attendance: Attendance, client: Client) -> None:
    work = Work()
    asyncio.get_running_loop().call_later(0.02, client.left.set)
    with pytest.raises(ClientGone):
        await attendance.wait_for(work.done(30))
    assert work.cancelled


async def test_who_left_between_two_waits_gets_no_third(attendance: Attendance, client: Client) -> None:
    await attendance.wait_for(Work().done(0))
    client.left.set()
    await asyncio.sleep(0.01)
    with pytest.raises(ClientGone):
        await attendance.wait_for(Work().done(0))


async def test_a_task_goes_on_after_its_wait_was_ended(attendance: Attendance, client: Client) -> None:
    client.left.set()
    with pytest.raises(ClientGone):
        await attendance.wait_for(Work().done(30))
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()
    async with asyncio.timeout(1):
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("leaves", [False, True])
async def test_another_cancellation_is_one(attendance: Attendance, client: Client, *, leaves: bool) -> None:
    work = Work()
    waiting = asyncio.create_task(attendance.wait_for(work.done(30)))
    await asyncio.sleep(0.01)
    if leaves:
        client.left.set()
        await asyncio.sleep(0)  # the listener has woken up, the work has not
    waiting.cancel()
    with pytest.raises((asyncio.CancelledError, ClientGone)) as caught:
        await waiting
    assert work.cancelled
    assert leaves or caught.type is asyncio.CancelledError


async def test_a_failure_of_the_work_itself_leaves_no_cancellation_behind(
    attendance: Attendance, client: Client
) -> None:
    async def fail() -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            raise ZeroDivisionError from None

    asyncio.get_running_loop().call_later(0.02, client.left.set)
    with pytest.raises(ZeroDivisionError):
        await attendance.wait_for(fail())
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()
    await asyncio.sleep(0)


async def test_a_failure_among_several_ends_the_others_and_nothing_else(attendance: Attendance) -> None:
    async def fail() -> str:
        await asyncio.sleep(0.01)
        raise ZeroDivisionError

    work = Work()
    with pytest.raises(ZeroDivisionError):
        await attendance.wait_for(gather([work.done(30), fail(), fail()]))
    assert work.cancelled
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()
