"""`run_tasks` and `team`: every task once, and nothing left running after an exception, wherever it comes from."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import kdecore
from kdecore.arrays.errors import OptionError
from kdecore.kernels.runtime import threads
from kdecore.kernels.runtime.threads import run_tasks, team


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(("tasks", "chunk"), [(0, 1), (1, 3), (7, 2), (100, 1)])
def test_every_task_runs_once(tasks, chunk, count):
    done, lock = [], threading.Lock()

    def work(first, last):
        with lock:
            done.extend(range(first, last))

    with team(count):
        for _ in range(3):
            run_tasks(work, tasks, chunk=chunk)
    assert sorted(done) == sorted(3 * list(range(tasks)))
    assert threading.active_count() == 1


def test_as_many_threads_as_asked_for_work_together():
    """Each of three tasks waits for the other two."""
    barrier = threading.Barrier(3, timeout=60)
    with team(3):
        for _ in range(20):
            run_tasks(lambda first, last: barrier.wait(), 3, chunk=1)


def test_teams_do_not_nest_and_do_not_cross_threads():
    with team(2) as outer:
        with team(5) as inner:
            assert inner is outer
        found = []

        def elsewhere():
            with team(3) as other:
                found.append(other)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert found[0] is not outer
    with team(2) as later:
        assert later is not outer


def test_an_exception_in_any_thread_is_raised_and_ends_the_others():
    done, barrier = [], threading.Barrier(2)

    def work(first, last):
        if first < 2:
            barrier.wait()
        if first == 1:
            raise ValueError("task 1")
        done.append(first)

    with team(2):
        with pytest.raises(ValueError, match="task 1"):
            run_tasks(work, 10_000, chunk=1)
        assert len(done) < 9_999
        run_tasks(lambda first, last: done.append("after"), 1, chunk=1)
    assert done[-1] == "after"
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
            after.append(first)
        else:
            after.append(first)

    wait, interrupted = threading.Event.wait, []

    def interrupt(event, timeout=None):
        if started.is_set() and threading.current_thread() is caller and event is not started and not interrupted:
            interrupted.append(True)
            release.set()
            raise KeyboardInterrupt
        return wait(event, timeout)

    monkeypatch.setattr(threading.Event, "wait", interrupt)
    with team(2):
        with pytest.raises(KeyboardInterrupt):
            run_tasks(work, 2, chunk=1)
        assert interrupted
        assert len(after) == 1
    assert threading.active_count() == 1


def wait_for_helpers_to_end():
    """A helper that was not yet counted as alive when its team closed ends by itself: at once, but not before."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(timeout=60)
    assert threading.active_count() == 1


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("before", [True, False])
def test_an_interrupt_while_a_thread_starts_leaves_none(monkeypatch, count, before):
    start, interrupted = threading.Thread.start, []

    def interrupt(thread):
        if not before:
            start(thread)
        if len(interrupted) < count - 1:
            interrupted.append(thread)
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupt)
    done = []
    with pytest.raises(KeyboardInterrupt), team(count):
        run_tasks(lambda first, last: done.append(first), 100, chunk=1)
    assert interrupted
    wait_for_helpers_to_end()


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", ["join", "is_alive"])
def test_an_interrupt_while_the_team_ends_leaves_none(monkeypatch, count, name):
    real, interrupted = getattr(threading.Thread, name), []

    def interrupt(thread, *args):
        if len(interrupted) < 2:
            interrupted.append(thread)
            raise KeyboardInterrupt
        return real(thread, *args)

    done = []

    def call():
        with team(count):
            run_tasks(lambda first, last: done.append(first), 100, chunk=1)
            monkeypatch.setattr(threading.Thread, name, interrupt)

    with pytest.raises(KeyboardInterrupt):
        call()
    monkeypatch.undo()
    assert interrupted
    wait_for_helpers_to_end()
    assert sorted(done) == list(range(100))


def test_no_thread_can_be_started(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    done = []
    monkeypatch.setattr(threads.threading.Thread, "start", refuse)
    with team(4):
        run_tasks(lambda first, last: done.extend(range(first, last)), 10, chunk=1)
    assert done == list(range(10))


def inputs(n=700, d=16):
    return np.random.default_rng(0).standard_normal((3, 2, n, d), dtype=np.float32)


@pytest.mark.parametrize("method", ["exact", "sortlsh", "hyper"])
def test_no_result_depends_on_the_number_of_threads(method):
    outs = [kdecore.attention(*inputs(), method=method, budget=64, threads=count) for count in (1, 2, 7, None)]
    for out in outs[1:]:
        np.testing.assert_array_equal(out, outs[0])


def test_threads_are_as_many_as_asked_for_and_the_report_says_so(monkeypatch):
    started, start = [], threading.Thread.start

    def count(thread):
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", count)
    for asked in (1, 3):
        started.clear()
        _, report = kdecore.attention(*inputs(), method="sortlsh", budget=64, threads=asked, return_report=True)
        assert len(started) == asked - 1
        assert report.threads == asked
    assert kdecore.attention(*inputs(), return_report=True)[1].threads == threads.thread_count()


@pytest.mark.parametrize("asked", [0, -1, 1.5, "two"])
def test_a_wrong_number_of_threads_is_named(asked):
    with pytest.raises(OptionError, match="threads must be"):
        kdecore.attention(*inputs(), threads=asked)


def test_concurrent_callers_get_the_results_of_one():
    expected = kdecore.attention(*inputs(), method="sortlsh", budget=64)
    found = [None] * 8

    def call(i):
        found[i] = kdecore.attention(*inputs(), method="sortlsh", budget=64, threads=1 + i % 3)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(len(found))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for out in found:
        np.testing.assert_array_equal(out, expected)


FORK = """
import os
import numpy as np
import kdecore
q, k, v = np.random.default_rng(0).standard_normal((3, 2, 700, 16), dtype=np.float32)
expected = kdecore.attention(q, k, v, method="sortlsh", budget=64, threads=2)
child = os.fork()
found = kdecore.attention(q, k, v, method="sortlsh", budget=64, threads=2)
same = bool((found == expected).all())
if child == 0:
    os._exit(0 if same else 1)
_, status = os.waitpid(child, 0)
assert same and os.waitstatus_to_exitcode(status) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes_what_its_parent_does():
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=120)


def test_numba_num_threads_is_honoured():
    code = "from kdecore.kernels.runtime.threads import thread_count; print(thread_count(), thread_count(5))"
    environment = os.environ | {"NUMBA_NUM_THREADS": "1"}
    printed = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    ).stdout
    assert printed.split() == ["1", "5"]
