"""A build that is stopped says so in one line, leaves no process and no half-written file, and can go on."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from common.errors import STOPPED
from common.files import PROJECT_ROOT

WORKERS, SECONDS, TEXTURES = 2, 120, 4000


def wait_for(condition, process):
    until = time.monotonic() + SECONDS
    while not (answer := condition()):
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.02)
    return answer


def is_running(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def spawned_by(builder: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(builder.pid).children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.parametrize(
    "sent,to_group,when",
    [
        ("SIGTERM", False, "rendering"),
        ("SIGINT", True, "rendering"),
        ("SIGINT", True, "starting workers"),
        ("SIGKILL", False, "rendering"),
    ],
)
def test_a_stopped_builder_takes_its_workers_with_it(sent, to_group, when, mesh, textures, tmp_path):
    out, folder = tmp_path / "out", tmp_path / "many"
    folder.mkdir()
    for number in range(TEXTURES):
        os.link(textures / "0.png", folder / f"{number}.png")
    (tmp_path / "prompts.txt").write_text("a man\n" * TEXTURES)
    command = [sys.executable, "-m", "atlas_dataset.build_atlas_large", "--textures", folder, "--out", out]
    command += ["--prompts", tmp_path / "prompts.txt", "--body", f"obj:{mesh}", "--views", "3"]
    command += ["--height", "64", "--width", "48", "--workers", str(WORKERS)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=PROJECT_ROOT, start_new_session=True, **streams) as builder:
        try:
            workers = wait_for(lambda: spawned_by(builder), builder)
            if when == "rendering":
                wait_for(lambda: list(out.glob("renders/*.parquet")), builder)  # the first shard is whole
                workers = spawned_by(builder)
                assert len(workers) == WORKERS
            (os.killpg if to_group else os.kill)(builder.pid, getattr(signal, sent))
            _, error = builder.communicate(timeout=SECONDS)
            _, alive = psutil.wait_procs(workers, timeout=10)
            assert not [process for process in alive if is_running(process)]
        finally:
            if builder.poll() is None:
                os.killpg(builder.pid, signal.SIGKILL)
    if sent == "SIGKILL":
        assert builder.returncode == -signal.SIGKILL
        return
    assert builder.returncode == STOPPED
    lines = [line for line in error.replace("\r", "\n").splitlines() if line.strip() and "renders:" not in line]
    assert lines == ["stopped; the same command goes on after the last whole shard"]
    assert not list(out.rglob(".*.partial"))
    if when == "rendering":
        assert list(out.glob("renders/*.parquet")), "what was whole stays"
