"""Two processes on one output folder: the second is refused with the owner's name; a killed owner leaves it free."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
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


def test_two_lists_of_textures_in_one_folder_end_as_one(checkpoint, tmp_path):
    """Each texture is whole and as a process alone makes it, and the manifest names it."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a man in red\na woman in green\na man in blue\n")
    command = [sys.executable, str(PROJECT_ROOT / "infer_uv.py"), "--prompts-file", str(prompts), "--checkpoint",
               str(checkpoint), "--size", "32", "--batch-size", "1", "--out"]  # fmt: skip
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert subprocess.run([*command, str(alone)], capture_output=True).returncode == 0
    both = [subprocess.Popen([*command, str(together)], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert process.communicate()[1].count("Traceback") == 0 and process.returncode == 0
    pictures = {path.name: np.asarray(Image.open(path)) for path in alone.glob("*.png")}
    assert len(pictures) == 3 and sorted(path.name for path in together.glob("*.png")) == sorted(pictures)
    assert all((np.asarray(Image.open(together / name)) == picture).all() for name, picture in pictures.items())
    lines = (together / "manifest.jsonl").read_text().splitlines()
    assert {json.loads(line)["file"] for line in lines} == set(pictures)
    assert not list(together.rglob(".*.partial"))
