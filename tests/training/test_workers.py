"""Loaders' workers under each way of starting them, and what a platform may lack."""

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import command_line

from common.errors import exit_on_user_error, one_line_errors
from common.files import PROJECT_ROOT
from joint import main as joint_main
from tests.training.test_resume import at_step
from training.loop import open_batches
from training.run import set_up
from training.stopping import leave_signals_to_the_main_process

# As Windows has it: no module of this name, and no alarm. Other packages look for them elsewhere there.
ON_WINDOWS = """
import signal, sys
import torch.utils.tensorboard
import models.pipeline
sys.modules["resource"] = None
del signal.alarm
from training.loop import train
from training.monitoring import peak_memory
assert peak_memory(torch.device("cpu")) is None
"""


@pytest.fixture(params=["spawn", "forkserver"])
def start_method(request):
    """As macOS and Windows (spawn) and Linux from Python 3.14 (forkserver) start processes."""
    earlier = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(earlier, force=True)


def test_workers_that_do_not_fork_read_the_same_batches(start_method, make_config):
    """Cached tensors and renders made online; with spawn they build the caches too."""
    builders = 1 if start_method == "spawn" else 0
    views = ("data.views=online", "data.views_per_texture=2", "data.cache=all")
    run = set_up(make_config(*views, f"data.num_workers={builders}"), "joint")
    run.cfg.data.num_workers = 0
    expected = next(open_batches(run))
    run.dataset.decoded.clear()
    run.cfg.data.num_workers = 1
    batch = next(open_batches(run))
    assert batch.keys() == expected.keys() == {"posterior", "text_states", "image", "prompt", "texture_id"}
    assert batch.pop("prompt") == expected.pop("prompt")
    for key, value in batch.items():
        assert torch.equal(value, expected[key]), key


def test_training_does_without_what_windows_lacks():
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}
    command = [sys.executable, "-c", ON_WINDOWS]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_a_worker_without_an_alarm(monkeypatch):
    monkeypatch.delattr(signal, "alarm")
    earlier = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        leave_signals_to_the_main_process(0)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is earlier[signal.SIGTERM]
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_dies_while_it_hands_a_batch_over_is_one_line(error, capsys):
    with pytest.raises(SystemExit) as stop, exit_on_user_error(), one_line_errors():
        raise error
    last = capsys.readouterr().err
    assert stop.value.code == 2 and last.startswith("error: DataLoader worker") and last.count("\n") == 1


def test_a_worker_that_dies_is_one_line_and_costs_no_checkpoint(make_config, monkeypatch, run_script, tmp_path):
    def kill_workers():
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGKILL)

    at_step(monkeypatch, 4, kill_workers)
    steps = ("training.joint.max_steps=40", "output.save_every=2")
    status, _, error = run_script(joint_main, *command_line(make_config("data.num_workers=1", *steps)))
    last = error.splitlines()[-1]
    assert status == 2 and last.startswith("error: DataLoader worker") and "lower data.num_workers" in last, error
    assert (tmp_path / "checkpoints" / "joint" / "step-000002" / "training_state.pt").is_file()
