"""No command asks the network for anything, though nobody has told the libraries to stay off it."""

import json
import os
import subprocess
import sys

import pytest
from conftest import command_line

from common.files import PROJECT_ROOT

# Calls of scripts, one after the other in one process; whatever is looked up or connected to is written down and
# refused.
GUARD = """
import json, runpy, socket, sys

def refused(*asked, **options):
    with open({log!r}, "a") as log:
        log.write(f"{{sys.argv[0]}}: {{asked}}\\n")
    raise OSError("no network")

socket.getaddrinfo = socket.socket.connect = socket.socket.connect_ex = refused
for script, *arguments in json.loads(sys.stdin.read()):
    sys.argv = [script, *arguments]
    sys.path[0] = {root!r}
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            sys.exit(f"{{script}} ended with {{end.code}}")
"""

A_STEP = ("max_steps=1", "batch_size=2", "effective_batch_size=2")


@pytest.fixture()
def asked_of_the_network(tmp_path):
    """Runs calls, each a script and its arguments, which must end well → what they asked of the network."""

    def run(*calls: tuple) -> str:
        log = tmp_path / "asked.txt"
        environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
        given = json.dumps([[str(PROJECT_ROOT / script), *map(str, arguments)] for script, *arguments in calls])
        command = [sys.executable, "-c", GUARD.format(log=str(log), root=str(PROJECT_ROOT))]
        done = subprocess.run(command, input=given, cwd=tmp_path, capture_output=True, text=True,
                              env=environment | {"PYTHONPATH": str(PROJECT_ROOT)})  # fmt: skip
        assert done.returncode == 0, done.stderr
        return log.read_text() if log.exists() else ""

    return run


def test_the_guard_notices(asked_of_the_network, tmp_path):
    script = tmp_path / "asks.py"
    script.write_text("import socket\ntry:\n    socket.create_connection(('example.org', 443))\nexcept OSError: pass\n")
    assert "example.org" in asked_of_the_network((script,))


def test_what_begins_with_nothing_asks_no_network(asked_of_the_network, make_config, textures, mesh, tmp_path):
    """Inference of the embedded checkpoint, three trainings from a base, textures measured, a data set, a turntable."""
    few = [f"training.{task}.{key}" for task in ("joint", "t2uv", "i2uv") for key in A_STEP]
    cfg = make_config(*few, "data.validation_textures=1", "output.sample_every=1")
    told, body = ("--textures", textures, "--prompts", textures / "prompts.txt"), ("--body", f"obj:{mesh}")
    sizes = ("--views", 1, "--height", 32, "--width", 24)
    assert not asked_of_the_network(
        ("infer_uv.py", "--prompt", "a man in red", "--fast", 1, "--export", "glb", "--out", tmp_path / "out"),
        *((script, *command_line(cfg)) for script in ("joint.py", "t2uv.py", "i2uv.py")),
        ("evaluate.py", *told, "--out", tmp_path / "evaluation"),
        ("atlas_dataset/build_atlas_large.py", *told, *body, *sizes, "--out", tmp_path / "built"),
        ("render/render_turntable.py", "--texture", textures / "0.png", *body, "--frames", 2, "--size", "32x24",
         "--out", tmp_path / "turntable.gif"),
    )  # fmt: skip
    assert list((tmp_path / "out").glob("*.glb")) and (tmp_path / "turntable.gif").is_file()


def test_what_begins_with_a_checkpoint_asks_no_network(asked_of_the_network, make_checkpoint, examples, tmp_path):
    checkpoint = make_checkpoint("model.lora.r=2", "model.lora.alpha=2")
    few = [f"--training.{task}.{key}" for task in ("personal", "fast") for key in A_STEP]
    assert not asked_of_the_network(
        ("lora_utils.py", "export", checkpoint, "--format", "kohya", "--out", tmp_path / "lora"),
        ("models/publish.py", "--checkpoint", checkpoint, "--licence", "mit", "--out", tmp_path / "hub"),
        ("personalise.py", "--examples", examples, "--name", "sks", "--class", "a man", "--base-checkpoint", checkpoint,
         "--out", tmp_path / "sks", *few, "--personal.seeds=1"),
        ("distill.py", "--checkpoint", checkpoint, *few),
    )  # fmt: skip
    assert (tmp_path / "sks" / "adapter.json").is_file() and (checkpoint / "fast" / "fast.json").is_file()
