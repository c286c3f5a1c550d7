"""`run_tasks`: every task once, and nothing left running after an exception, wherever it comes from."""

import threading

import pytest

from kdecore.kernels import threads
from kdecore.kernels.threads import run_tasks


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(("tasks", "chunk"), [(0, 1), (1, 3), (7, 2), (100, 1)])
def test_every_task_runs_once(tasks, chunk, count):
    done, lock = [], threading.Lock()

    def work(first, last):
        with lock:
            done.extend(range(first, last))

    run_tasks(work, tasks, threads=count, chunk=chunk)
    assert sorted(done) == list(range(tasks))


def test_an_exception_in_any_thread_is_raised_and_ends_the_others():
    done, barrier = [], threading.Barrier(2)

    def work(first, last):
        if first < 2:
            barrier.wait()
        if first == 1:
            raise ValueError("task 1")
        done.append(first)

    with pytest.raises(ValueError, match="task 1"):
        run_tasks(work, 10_000, threads=2, chunk=1)
    assert len(done) < 9_999
    assert threading.active_count() == 1


def test_an_interrupt_while_waiting_ends_the_helpers_first(monkeypatch):
    started, release, after = threading.Event(), threading.Event(), []
    caller = threading.current_thread()

    def work(first, last):
        if threading.current_thread() is caller:
            started.wait()
        elif not started.is_set():
            started.set()
            release.wait()
        else:
            after.append(first)

    join, interrupted = threading.Thread.join, []

    def interrupt(thread, timeout=None):
        if not interrupted:
            interrupted.append(True)
            release.set()
            raise KeyboardInterrupt
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_tasks(work, 2, threads=2, chunk=1)
    assert threading.active_count() == 1


def test_no_thread_can_be_started(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    done = []
    monkeypatch.setattr(threads.threading.Thread, "start", refuse)
    run_tasks(lambda first, last: done.extend(range(first, last)), 10, threads=4, chunk=1)
    assert done == list(range(10))
