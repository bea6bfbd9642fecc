"""Two processes on one output folder: the second is refused with the owner's name; a killed owner leaves it free."""

import os
import signal
import subprocess
import sys

import pytest
from tally import count

from common.errors import UserError
from common.files import PROJECT_ROOT, owned
from training.loop import train

HOLD = """
import sys
from pathlib import Path
from common.files import owned
with owned(Path(sys.argv[1])):
    print("inside", flush=True)
    sys.stdin.read()
"""


@pytest.fixture()
def owner(tmp_path):
    """Another process that writes into out/joint."""
    folder = tmp_path / "out" / "joint"
    folder.mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], env=environment, **pipes)
    assert process.stdout.readline() == "inside\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_and_names_the_first(owner, make_config, tmp_path):
    cfg = make_config(f"output.out_dir={tmp_path / 'out'}", "training.joint.max_steps=1")
    with pytest.raises(UserError, match=rf"is being written by process {owner.pid} on .*choose another output.out_dir"):
        train(cfg, "joint")
    assert not list((tmp_path / "out" / "joint").iterdir())


def test_who_was_killed_holds_nothing(owner, tmp_path):
    folder = tmp_path / "out" / "joint"
    with pytest.raises(UserError, match="is being written"), owned(folder):
        pass
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with owned(folder):
        count(kills=1)
    with owned(folder):
        pass


def test_other_folders_are_others(owner, tmp_path):
    with owned(tmp_path / "out" / "t2uv"), owned(tmp_path / "elsewhere"):
        pass
