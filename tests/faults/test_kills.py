"""SIGKILL storms on the commands that make files: killed again and again, the same command ends with the same files.

Training and the builder have their own, benchmarks/kill_train.py and kill_build.py. These run in `make test-faults`
alone: each start of a command costs seconds.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
from conftest import command_line
from safetensors.torch import load_file
from tally import IS_LONG, count

from common.files import PROJECT_ROOT

KILLS, ERRORS = 5, "errors.txt"
LAUNCH = """
import sys
sys.path.insert(0, {root!r})
from evaluation import measuring
for name in ("view_features", "compare_renders"):
    whole = getattr(measuring, name)
    setattr(measuring, name, lambda *given, whole=whole: whole(*given, side=64))
from evaluate import main
main()
"""
pytestmark = pytest.mark.skipif(not IS_LONG, reason="minutes: make test-faults runs it")


def start(command: list, out: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT_ROOT)}
    with (out.parent / ERRORS).open("wb") as errors:  # no pipe: nobody reads one while it is waited for a file
        return subprocess.Popen(
            [sys.executable, *map(str, command)], env=environment, stdout=subprocess.DEVNULL, stderr=errors,
            start_new_session=True, cwd=out.parent,
        )  # fmt: skip


def finish(process: subprocess.Popen, out: Path) -> None:
    assert process.wait() == 0, (out.parent / ERRORS).read_text(errors="replace")[-3000:]


def files_since(folders: list[Path], since: float) -> bool:
    for folder in folders:
        for path in folder.rglob("*"):
            try:
                if path.is_file() and path.stat().st_mtime >= since:
                    return True
            except FileNotFoundError:
                return True
    return False


def contents(out: Path, ending: str) -> dict[str, bytes]:
    """Of files, their bytes; of weights their tensors', since safetensors writes metadata in no fixed order."""
    paths = [path for path in sorted(out.rglob(f"*{ending}")) if not path.name.startswith(".")]
    return {str(path.relative_to(out)): content_of(path) for path in paths if path.is_file()}


def content_of(path: Path) -> bytes:
    return safetensors.torch.save(load_file(path)) if path.suffix == ".safetensors" else path.read_bytes()


def storm(make_command, work: Path, watched, ending: str, name: str) -> tuple[Path, Path]:
    """make_command(out) → a command line; watched(out): folders it writes into. → both folders, whole and killed."""
    whole, killed, moments = work / "whole" / "out", work / "killed" / "out", random.Random(0)
    for out in (whole, killed):
        out.parent.mkdir()
    process, began = start(make_command(whole), whole), time.time()
    while process.poll() is None and not files_since(watched(whole), began):
        time.sleep(0.005)
    first = time.time()
    finish(process, whole)
    took, kills = time.time() - first, 0
    for _ in range(KILLS):
        process, began = start(make_command(killed), killed), time.time()
        while process.poll() is None and not files_since(watched(killed), began):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, took / 2))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    finish(start(make_command(killed), killed), killed)
    same = contents(whole, ending) == contents(killed, ending)
    count(kills=kills, lost=int(not same))
    print(f"{name}: killed {kills} times, {len(contents(whole, ending))} files the same: {same}")
    assert kills and contents(whole, ending) and same
    return whole, killed


def test_caches(make_config, tmp_path):
    def command(out: Path) -> list:
        cfg = make_config(f"data.cache_dir={out}", f"output.out_dir={out}", f"output.log_dir={out}")
        return [PROJECT_ROOT / "joint.py", "--cache-only", *command_line(cfg)]

    storm(command, tmp_path, lambda out: [out / "encoded"], ".safetensors", "caches")


def test_batches_of_textures(checkpoint, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a man in red, {number}\n" for number in range(24)))

    def command(out: Path) -> list:
        return [PROJECT_ROOT / "infer_uv.py", "--checkpoint", checkpoint, "--prompts-file", prompts, "--size", "64",
                "--batch-size", "1", "--out", out]  # fmt: skip

    whole, killed = storm(command, tmp_path, lambda out: [out], ".png", "textures")
    lines = [(out / "manifest.jsonl").read_text().splitlines() for out in (whole, killed)]
    named = [{json.loads(line)["file"] for line in of_run} for of_run in lines]
    count(lost=int(named[0] != named[1]))
    assert named[0] == named[1] and len(named[0]) == 24


def test_evaluations(checkpoint, dataset_dir, tmp_path):
    launch = tmp_path / "launch.py"
    launch.write_text(LAUNCH.format(root=str(PROJECT_ROOT)))

    def command(out: Path) -> list:
        return [launch, "--checkpoint", checkpoint, "--data", dataset_dir, "--task", "t2uv", "--out", out]

    storm(command, tmp_path, lambda out: [out / "textures"], ".png", "evaluations")


def test_personalisations(make_checkpoint, examples, tmp_path):
    checkpoint = make_checkpoint("model.lora.r=2", "model.lora.alpha=2")

    def command(out: Path) -> list:
        quick = ("personal.measure_every=2", "personal.seeds=1", "personal.num_inference_steps=2",
                 "training.personal.max_steps=12", "output.save_every=1")  # fmt: skip
        return [PROJECT_ROOT / "personalise.py", "--examples", examples, "--name", "sks", "--class", "a man",
                "--base-checkpoint", checkpoint, "--out", out, *(f"--{setting}" for setting in quick)]  # fmt: skip

    storm(command, tmp_path, lambda out: [path for path in out.parent.glob(".*") if path.is_dir()], ".safetensors",
          "personalisations")  # fmt: skip
