"""Each job at most once, at its time, and never two passes of one job at once."""

import asyncio
from collections.abc import Awaitable, Callable

from cptjob_operator.edge.api_errors import Throttled
from cptjob_operator.identity import JobKey
from cptjob_operator.queue import Queue

A, B, C = (JobKey("team", name) for name in "abc")


def running(
    queue: Queue, work: Callable[[JobKey], Awaitable[float | None]], test: Awaitable[None]
) -> None:
    """Runs `test` while the queue runs `work`."""

    async def body() -> None:
        task = asyncio.create_task(queue.run(work))
        try:
            await asyncio.wait_for(test, timeout=60)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(body())


def test_wishes_for_one_job_are_one_pass() -> None:
    done: list[JobKey] = []
    over = asyncio.Event()
    queue = Queue()

    async def work(key: JobKey) -> None:
        done.append(key)
        if key == B:
            over.set()

    async def test() -> None:
        await over.wait()

    for _ in range(3):
        queue.add(A)
    queue.add(B)
    running(queue, work, test())
    assert done == [A, B]


def test_a_job_that_changes_during_its_pass_gets_another_one_after_it() -> None:
    under_way: list[int] = []
    active = 0
    over = asyncio.Event()
    queue = Queue()

    async def work(key: JobKey) -> None:
        nonlocal active
        active += 1
        under_way.append(active)
        if len(under_way) == 1:
            queue.add(A)
            queue.add(A)
            await asyncio.sleep(0.01)
        active -= 1
        if len(under_way) == 2:
            over.set()

    async def test() -> None:
        await over.wait()

    queue.add(A)
    running(queue, work, test())
    assert under_way == [1, 1]


def test_no_more_passes_than_the_limit_are_under_way() -> None:
    most = active = count = 0
    over = asyncio.Event()
    queue = Queue(limit=2)

    async def work(key: JobKey) -> None:
        nonlocal active, most, count
        active += 1
        most = max(most, active)
        await asyncio.sleep(0)
        active -= 1
        count += 1
        if count == 20:
            over.set()

    async def test() -> None:
        await over.wait()

    for number in range(20):
        queue.add(JobKey("team", str(number)))
    running(queue, work, test())
    assert most == 2


def test_a_namespace_whose_passes_are_slow_leaves_some_to_the_others() -> None:
    """And each of its own jobs gets its pass in the end, in their order."""
    slow = [JobKey("slow", f"{number:02}") for number in range(30)]
    done: list[JobKey] = []
    active = most = 0
    over, let = asyncio.Event(), asyncio.Event()
    queue = Queue(limit=4, share=3)

    async def work(key: JobKey) -> None:
        nonlocal active, most
        if key == A:
            let.set()
        else:
            active += 1
            most = max(most, active)
            await let.wait()
            active -= 1
        done.append(key)
        if len(done) == len(slow):  # one was forgotten
            over.set()

    async def test() -> None:
        while active < 3:
            await asyncio.sleep(0.01)
        queue.forget(slow[5])
        queue.add(A)
        await over.wait()

    for key in slow:
        queue.add(key)
    running(queue, work, test())
    assert (done[0], most) == (A, 3)
    assert done[1:] == [key for key in slow if key != slow[5]]


def test_what_waited_when_the_lease_went_gets_its_pass_when_it_comes_back() -> None:
    queue = Queue(limit=4, share=1)
    for key in (A, B, C):
        queue.add(key)
    begun, done = asyncio.Event(), list[JobKey]()

    async def hang(key: JobKey) -> None:
        begun.set()
        await asyncio.Event().wait()

    async def work(key: JobKey) -> None:
        done.append(key)

    async def test() -> None:
        first = asyncio.create_task(queue.run(hang))
        await begun.wait()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert queue.active == 0
        second = asyncio.create_task(queue.run(work))
        async with asyncio.timeout(10):
            while len(done) < 2:
                await asyncio.sleep(0.01)
        second.cancel()

    asyncio.run(test())
    assert done == [B, C]


def test_the_earliest_wish_holds() -> None:
    now = 0.0
    queue = Queue(clock=lambda: now)
    queue.add(A, 5.0)
    queue.add(A, 3.0)
    queue.add(A, 9.0)
    assert queue.depth() == 0
    now = 3.0
    assert queue.depth() == 1
    now = 4.5
    assert queue.age() == 1.5
    queue.forget(A)
    assert (queue.depth(), queue.age()) == (0, 0.0)


def test_a_failed_pass_waits_longer_each_time_whatever_happens_meanwhile() -> None:
    now = 0.0
    queue = Queue(clock=lambda: now)
    waits: list[float] = []

    async def fail(key: JobKey) -> None:
        raise ValueError("broken")

    async def test() -> None:
        nonlocal now
        for _ in range(6):
            queue.add(A)
            assert queue._ready()[0] == A
            queue._begin(A)
            await queue._one(A, fail)
            queue.add(A)  # an event comes in
            _, wait = queue._ready()
            assert wait is not None
            waits.append(wait)
            now += wait

    asyncio.run(test())
    assert all(0.1 * 2**n <= wait <= 0.2 * 2**n for n, wait in enumerate(waits)), waits


def test_what_happens_during_a_pass_that_fails_waits_too() -> None:
    queue = Queue(clock=lambda: 100.0)

    async def work(key: JobKey) -> None:
        queue.add(key)  # an event comes in
        raise ValueError("broken")

    async def test() -> None:
        queue.add(A)
        assert queue._ready()[0] == A
        queue._begin(A)
        await queue._one(A, work)
        key, wait = queue._ready()
        assert key is None
        assert wait is not None
        assert wait >= 0.1

    asyncio.run(test())


def test_wishes_for_a_far_time_are_not_kept_when_a_nearer_one_takes_their_place() -> None:
    month = 30 * 86_400.0
    queue = Queue(clock=lambda: 0.0)
    for _ in range(20_000):  # a job with a deadline, each time that something happens
        queue.add(A, month)
        queue.add(A)
        assert queue._ready()[0] == A
    queue.add(A, month)
    assert len(queue._heap) < 2_000
    assert queue._ready() == (None, month)


def test_a_broken_job_does_not_hold_up_others() -> None:
    done: list[JobKey] = []
    over = asyncio.Event()
    queue = Queue(limit=1)

    async def work(key: JobKey) -> None:
        if key == A:
            raise ValueError("broken")
        done.append(key)
        if len(done) == 2:
            over.set()

    async def test() -> None:
        await over.wait()

    for key in (A, B, C):
        queue.add(key)
    running(queue, work, test())
    assert done == [B, C]


def test_the_api_servers_own_wish_is_kept_to() -> None:
    queue = Queue(clock=lambda: 100.0)

    async def work(key: JobKey) -> None:
        error = Throttled("later")
        error.retry_after = 7.0
        raise error

    async def test() -> None:
        queue.add(A)
        assert queue._ready()[0] == A
        queue._begin(A)
        await queue._one(A, work)
        assert queue._ready() == (None, 7.0)

    asyncio.run(test())
