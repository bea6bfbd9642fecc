"""No command asks the network for anything, though nobody has told the libraries to stay off it."""

import os
import subprocess
import sys

import pytest
from conftest import command_line

from common.files import PROJECT_ROOT

# Run before a command: whatever is looked up or connected to is written down and refused.
GUARD = """
import runpy, socket, sys

def refused(*asked, **options):
    with open({log!r}, "a") as log:
        log.write(f"{{asked}}\\n")
    raise OSError("no network")

socket.getaddrinfo = socket.socket.connect = socket.socket.connect_ex = refused
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture()
def asked_of_the_network(tmp_path):
    """Runs a script → what it asked of the network; the script must end well."""

    def run(script: str, *arguments: str) -> str:
        log = tmp_path / "asked.txt"
        environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
        command = [sys.executable, "-c", GUARD.format(log=str(log)), str(PROJECT_ROOT / script), *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment | {"PYTHONPATH": str(PROJECT_ROOT)},
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return log.read_text() if log.exists() else ""

    return run


def test_the_guard_notices(asked_of_the_network, tmp_path):
    script = tmp_path / "asks.py"
    script.write_text("import socket\ntry:\n    socket.create_connection(('example.org', 443))\nexcept OSError: pass\n")
    assert "example.org" in asked_of_the_network(script)


def test_training_asks_no_network(asked_of_the_network, make_config):
    cfg = make_config("training.joint.max_steps=1", "data.validation_textures=1", "output.sample_every=1")
    assert asked_of_the_network("joint.py", *command_line(cfg)) == ""


def test_inference_asks_no_network(asked_of_the_network, tmp_path):
    arguments = ("--prompt", "a man in red", "--steps", "1", "--export", "glb", "--out", tmp_path / "out")
    assert asked_of_the_network("infer_uv.py", *arguments) == ""
    assert list((tmp_path / "out").glob("*.glb"))


def test_evaluation_asks_no_network(asked_of_the_network, textures, tmp_path):
    arguments = ("--textures", textures, "--prompts", textures / "prompts.txt", "--out", tmp_path / "out")
    assert asked_of_the_network("evaluate.py", *arguments) == ""


def test_building_asks_no_network(asked_of_the_network, textures, mesh, tmp_path):
    arguments = ("--textures", textures, "--prompts", textures / "prompts.txt", "--body", f"obj:{mesh}", "--views", "1")
    script, out = "atlas_dataset/build_atlas_large.py", ("--out", tmp_path / "built", "--height", "32", "--width", "24")
    assert asked_of_the_network(script, *arguments, *out) == ""
