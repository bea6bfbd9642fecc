"""How many cores other processes keep busy, and how many threads are left to compute with."""

import sys

import pytest
import torch

from common import processes


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")
def test_what_the_system_tells_grows_while_this_process_computes():
    own, all_processes = processes._busy_seconds()
    while processes._busy_seconds()[0] < own + 0.2:
        pass
    assert processes._busy_seconds()[1] > all_processes + 0.1


def test_what_this_process_computes_itself_is_not_counted(monkeypatch):
    told = iter([(1.0, 50.0), (1.1, 50.6)])
    monkeypatch.setattr(processes, "_busy_seconds", lambda: next(told))
    assert processes.busy_cores(0.25) == pytest.approx(2.0)


def test_threads_are_as_many_as_cores_are_left(threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(processes.os, "cpu_count", lambda: 4)
    torch.set_num_threads(4)
    monkeypatch.setattr(processes, "busy_cores", lambda: 1.1)
    processes.leave_busy_cores()
    assert torch.get_num_threads() == 3
    monkeypatch.setattr(processes, "busy_cores", lambda: 9.0)
    processes.leave_busy_cores()
    assert torch.get_num_threads() == 1


def test_what_the_user_asked_for_stays(threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(processes, "busy_cores", lambda: 9.0)
    processes.leave_busy_cores()
    assert torch.get_num_threads() == threads
