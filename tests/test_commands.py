"""Every command, started from another folder as a user starts it: --help, and a mistake in one line."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from common.files import PROJECT_ROOT

# A command → arguments that are wrong, of things that are not there or out of range.
COMMANDS = {
    ("joint.py",): ["--data.dataset=nowhere"],
    ("t2uv.py",): ["--training.t2uv.batchsize=1"],
    ("i2uv.py",): ["--resume", "nowhere", "--training.seed=-1"],
    ("infer_uv.py",): ["--prompt", "a man", "--checkpoint", "nowhere"],
    ("studio.py",): ["--port", "65536"],
    ("personalise.py",): ["--examples", "nowhere", "--name", "sks", "--class", "a man"],
    ("evaluate.py",): ["--limit", "0"],
    ("lora_utils.py", "export"): ["nowhere", "--format", "kohya", "--out", "lora"],
    ("-m", "models.publish"): ["--checkpoint", "nowhere", "--licence", "mit", "--out", "hub"],
    ("-m", "atlas_dataset.build_atlas_large"): ["--textures", "nowhere", "--out", "built"],
    ("atlas_dataset/build_atlas_large.py",): ["--textures", "procedural:2", "--views", "-1", "--out", "built"],
    ("render/render_turntable.py",): ["--texture", "nowhere.png", "--out", "turntable.gif"],
    ("-m", "embedded.pretrain"): ["--stage", "unet", "--out", "base"],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(command, "help" or "mistake") → (its result, the folder it ran in); a few at a time."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1"}

    def run(command: tuple[str, ...], arguments: list[str]):
        program = [*command] if command[0] == "-m" else [str(PROJECT_ROOT / command[0]), *command[1:]]
        folder = tmp_path_factory.mktemp("elsewhere")
        options = dict(cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        return subprocess.run([sys.executable, *program, *arguments], **options), folder

    with ThreadPoolExecutor(4) as pool:
        runs = {}
        for command, mistake in COMMANDS.items():
            runs[command, "help"] = pool.submit(run, command, ["--help"])
            runs[command, "mistake"] = pool.submit(run, command, mistake)
        return {key: future.result() for key, future in runs.items()}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(command, results):
    result, folder = results[command, "help"]
    assert result.returncode == 0 and result.stdout.startswith("usage: ") and result.stderr == ""
    assert not list(folder.iterdir())


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_mistake_is_one_line_and_writes_nothing(command, results):
    result, folder = results[command, "mistake"]
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert not list(folder.iterdir())


def test_help_of_training_waits_for_no_slow_import():
    run = "import runpy, sys\nsys.argv = ['joint.py', '--help']\ntry: runpy.run_path('joint.py', run_name='__main__')\n"
    command = [sys.executable, "-c", run + "finally: print('torch' in sys.modules, file=sys.stderr)"]
    result = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stderr == "False\n"
