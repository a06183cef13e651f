"""Work in threads, and how it ends."""

import threading
import time

import pytest

from wavekv.errors import ConfigError
from wavekv.remote.transfer import Transfer


@pytest.mark.parametrize("jobs", [1, 3])
def test_results_are_in_order(jobs) -> None:
    assert Transfer(jobs, 0, None).run(lambda it: it * it, range(20)) == [i * i for i in range(20)]


def test_so_many_at_a_time() -> None:
    together = threading.Barrier(3)
    Transfer(3, 0, None).run(lambda _: together.wait(timeout=30), range(6))


def test_nothing_is_begun_after_a_failure() -> None:
    begun = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 2:
            raise OSError("two")

    with pytest.raises(OSError, match="two"):
        Transfer(1, 0, None).run(work, range(100))
    assert begun == [0, 1, 2]


def test_what_is_in_work_stops_at_its_next_chunk() -> None:
    transfer, both = Transfer(2, 0, None), threading.Barrier(2)

    def work(item: int) -> None:
        both.wait(timeout=30)
        if item == 1:
            raise OSError("one")
        while True:
            transfer.done(1)

    with pytest.raises(OSError, match="one"):
        transfer.run(work, range(2))


def test_progress_is_told_by_one_thread_at_a_time() -> None:
    busy = threading.Lock()
    told = []

    def progress(nbytes: int, total: int) -> None:
        assert busy.acquire(blocking=False)
        time.sleep(1e-4)  # lets another in, if any can be
        told.append((nbytes, total))
        busy.release()

    transfer = Transfer(4, 800, progress)
    transfer.run(lambda _: [transfer.done(2) for _ in range(50)], range(8))
    assert told == [(2, 800)] * 400


@pytest.mark.parametrize("jobs", [0, -1])
def test_jobs_are_positive(jobs) -> None:
    with pytest.raises(ConfigError, match=f"jobs must be 1 or more, got {jobs}"):
        Transfer(jobs, 0, None)
