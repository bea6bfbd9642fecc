"""Ctrl-C, sent to a command and all its workers, as a terminal sends it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import command_line

from common.errors import INTERRUPTED, STOPPED
from common.files import PROJECT_ROOT

# Runs joint.py and sends a signal, once or twice, to its group of processes at a call of one of its functions.
STARTER = """
import importlib, os, sys
import training.loop
module, name, call, number, times = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
module = importlib.import_module(module)
original, calls = getattr(module, name), []

def interrupted(*args, **options):
    calls.append(name)
    if len(calls) == call:
        for _ in range(times):
            os.killpg(0, number)
    return original(*args, **options)

setattr(module, name, interrupted)
sys.argv = ["joint.py", *sys.argv[6:]]
if __name__ == "__main__":
    from joint import main
    main()
"""


def run_and_stop(place: str, call: int, arguments: list[str], number=signal.SIGINT, times=1):
    """joint.py, stopped at the call of place ("module:function") → its result."""
    starter = [sys.executable, "-c", STARTER, *place.split(":"), str(call), str(int(number)), str(times)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    pipes = dict(capture_output=True, text=True)
    return subprocess.run([*starter, *arguments], env=environment, timeout=300, start_new_session=True, **pipes)


@pytest.mark.parametrize(
    "place,call",
    [
        ("training.run:load_configured_base", 1),
        ("atlas_dataset.building:encode_image", 3),
        ("training.caching:_write", 2),
    ],
)
def test_before_the_first_step_it_is_one_line_and_what_was_built_is_whole_or_absent(place, call, make_config, tmp_path):
    overrides = ["data.num_workers=1", *(f"training.joint.{key}=1" for key in ("batch_size", "effective_batch_size"))]
    if "building" in place:
        overrides += ["data.dataset=procedural:2", "data.body=null", "data.views_per_texture=2"]
    arguments = [*command_line(make_config(*overrides)), "--cache-only"]
    result = run_and_stop(place, call, arguments)
    assert result.stderr == "stopped before the first step; nothing was trained\n"
    assert result.returncode == INTERRUPTED
    assert not (tmp_path / "checkpoints").exists() and not list((tmp_path / "cache").rglob("*.partial"))
    again = run_and_stop(place, 10**6, arguments)
    assert again.returncode == 0 and "image_tokens cached" in again.stdout, again.stderr
    shards = len(list((tmp_path / "cache" / "encoded").rglob("*.safetensors")))
    assert shards == 3, "a shard of each kind"


@pytest.mark.parametrize("number,times", [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGTERM, 2)])
def test_in_a_step_the_first_saves_and_the_second_ends_at_once(number, times, make_config, tmp_path):
    arguments = command_line(make_config("data.num_workers=1", "training.joint.max_steps=100000"))
    result = run_and_stop("training.loop:batch_losses", 3, arguments, number, times)
    assert result.stderr.strip().splitlines() == ["saving at the end of this step; once more to end at once"]
    assert result.returncode == (STOPPED if times == 1 else -number)
    checkpoints = [path.name for path in Path(tmp_path / "checkpoints").glob("joint/*")]
    assert checkpoints == (["step-000003"] if times == 1 else [])
