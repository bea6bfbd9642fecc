"""Two processes on the CPU (gloo), started as users start them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import command_line
from safetensors.torch import load_file
from test_training import scalars

from atlas_dataset.building import TEXTURES_PER_SHARD, build_dataset
from atlas_dataset.sources import HuggingFaceATLAS
from common.errors import UserError
from common.files import PROJECT_ROOT
from training.loop import train
from training.run import set_up

OPTIONS = (
    "training.joint.effective_batch_size=8",
    "training.joint.max_steps=4",
    "training.joint.learning_rate=1e-4",
    "training.joint.aligner_learning_rate=1e-4",
    "training.joint.condition_dropout=0.3",
    "training.ema_decay=0.9",
    "data.validation_textures=1",
    "output.log_every=1",
    "output.save_every=2",
    "output.validate_every=2",
)


def launch(*arguments: str | Path) -> subprocess.CompletedProcess:
    """accelerate launch, which starts two processes on the CPU too when it is told of many GPUs (--cpu starts one)."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launcher, "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture()
def one_thread():
    """As `launch` has it: sums in another order round differently, and where a gradient is rounding and nothing else,
    Adam, which divides it by its own size, makes a step of it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_two_processes_equal_one(make_config, tmp_path, one_thread):
    whole = train(make_config(*OPTIONS), "joint")
    folders = {"output.out_dir": "two", "output.log_dir": "logs2", "data.cache_dir": "cache2"}
    cfg = make_config(*OPTIONS, *(f"{key}={tmp_path / name}" for key, name in folders.items()))
    result = launch("joint.py", *command_line(cfg))
    assert result.returncode == 0, result.stderr
    assert "2 processes" in result.stdout and result.stdout.count("\ncheckpoint: ") == 1, "one of them prints"
    halves = tmp_path / "two" / "joint" / whole.name
    assert sorted(path.name for path in halves.parent.iterdir()) == ["step-000002", "step-000004"]
    for name in ("pytorch_lora_weights.safetensors", "aligner.safetensors"):
        one, two = load_file(whole / name), load_file(halves / name)
        assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-5
    first, second = scalars(tmp_path / "logs"), scalars(tmp_path / "logs2")
    for name in ("loss/t2uv", "loss/i2uv", "loss/align", "loss/combined", "gradient_norm", "val/t2uv", "val/i2uv"):
        assert first[name] and first[name] == pytest.approx(second[name], rel=1e-5), name
    assert len(list(Path(tmp_path / "cache2" / "encoded").glob("posterior-*/*.safetensors"))) == 1


def test_two_builders_write_the_rows_of_one(tmp_path, mesh, textures):
    (tmp_path / "many").mkdir()
    for index in range(TEXTURES_PER_SHARD + 2):
        shutil.copy(textures / f"{index % 4}.png", tmp_path / "many" / f"{index:02}.png")
    (tmp_path / "prompts.txt").write_text("\n".join(f"a man {index}" for index in range(TEXTURES_PER_SHARD + 2)))
    source = HuggingFaceATLAS(str(tmp_path / "many"), tmp_path / "prompts.txt")
    build_dataset(source, f"obj:{mesh}", 1, tmp_path / "one", 32, 24)
    sources = ("--textures", tmp_path / "many", "--prompts", tmp_path / "prompts.txt", "--body", f"obj:{mesh}")
    size = ("--views", "1", "--height", "32", "--width", "24")
    result = launch("-m", "atlas_dataset.build_atlas_large", *sources, *size, "--out", tmp_path / "two")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("34 textures and 34 renders") == 1 and "others are at work" in result.stdout
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 2 + 2 + 3
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_rows_are_shared_among_processes(make_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="effective_batch_size 4 is not a multiple of 12: batch_size 4 in each of 3"):
        set_up(make_config(), "joint")
