"""What a first call says and keeps: the line at a terminal, `kdecore warmup`, and functions that kernels call."""

import io
import threading

import numpy as np
import pytest

from kdecore.arrays.backend import unusable
from kdecore.compare import cli, warmup
from kdecore.kernels.attend_blocks.cpu import round_up
from kdecore.kernels.runtime import jit, notice


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and sets ``said`` when it is written to."""

    def __init__(self, terminal=True):
        super().__init__()
        self.terminal, self.said = terminal, threading.Event()

    def isatty(self):
        return self.terminal

    def write(self, text):
        super().write(text)
        self.said.set()
        return len(text)


@pytest.fixture(autouse=True)
def not_said(monkeypatch):
    monkeypatch.setattr(notice, "_SAID", threading.Lock())


def test_a_long_compilation_is_announced_while_it_runs_and_once_in_a_process(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(notice, "AFTER", 0.0)
    before = threading.active_count()
    compiled = jit._timed(lambda signature: stream.said.wait(60))
    assert compiled(None)
    assert compiled(None)
    assert stream.getvalue() == notice.LINE + "\n"
    assert threading.active_count() == before


def test_what_does_not_take_long_is_not_announced(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(notice, "AFTER", 3600.0)
    before = threading.active_count()

    def fail(signature):
        assert threading.active_count() == before + 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        jit._timed(fail)(None)
    assert threading.active_count() == before
    assert not stream.said.is_set()


@pytest.mark.parametrize("stream", [Terminal(terminal=False), None])
def test_nothing_waits_where_nobody_reads(monkeypatch, stream):
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(notice, "AFTER", 0.0)
    before = threading.active_count()
    with notice.notice():
        assert threading.active_count() == before
    assert stream is None or stream.getvalue() == ""


def test_a_closed_stream_is_no_terminal(monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stderr", closed)
    before = threading.active_count()
    with notice.notice():
        assert threading.active_count() == before


def test_a_helper_is_plain_python_outside_kernels():
    assert round_up(13, 8) == 16

    @jit.kernel()
    def rounded(numbers):
        for i in range(numbers.shape[0]):
            numbers[i] = round_up(numbers[i], 8)

    numbers = np.arange(20)
    rounded(numbers)
    assert numbers.tolist() == [round_up(i, 8) for i in range(20)]


def test_warmup_runs_every_method_and_says_where_kernels_are_kept(capsys):
    assert cli.main(["warmup"]) == 0
    *steps, last = capsys.readouterr().out.splitlines()
    names = [line.rpartition(":")[0] for line in steps]
    wanted = ["exact", "sortlsh", "hyper", "kdeformer", "treecode", "rtol=0.05"]
    wanted += [] if unusable("torch") else ["a training step in PyTorch"]
    assert names == [f"{name}, float32" for name in wanted]
    assert warmup.kept_in() in last


def test_an_unknown_dtype_is_refused_before_anything_is_compiled(capsys):
    assert cli.main(["warmup", "--dtypes", "float16"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "dtypes must be one of" in captured.err
    assert "float16" in captured.err


def test_where_no_folder_can_be_written_it_says_so(monkeypatch):
    monkeypatch.setattr(warmup, "FOLDERS", set())
    assert warmup.kept_in().startswith("No folder can be written")
