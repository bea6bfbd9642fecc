"""A disk that is full at each kind of write: one line, nothing half-written, what was there stays; with room, it works.

The disk is a limit on the size of files (RLIMIT_FSIZE), which fails a write in its midst as a full disk does, in every
library; no root and no mount is needed.
"""

import contextlib
import io
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command_line
from PIL import Image
from tally import count

from atlas_dataset.building import build_dataset
from atlas_dataset.sources import HuggingFaceATLAS
from atlas_dataset.tables import open_parquet
from common.errors import UserError
from infer_uv import append_to_manifest, write_texture
from joint import main as joint_main
from lora_utils import LORA_FILE, export_lora, lora_parameters
from models.checkpoints import save_checkpoint
from models.publish import main as publish_main
from render.export import export_body
from render.rigs import load_rig
from render.turntable import save_turntable
from training.loop import train

resource = pytest.importorskip("resource")  # Windows has none


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """Inside, no file can grow beyond so many bytes; what is printed goes into none."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def contents(folder: Path) -> dict[str, bytes]:
    """What is in a folder but for locks, which are of processes, and empty."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture()
def write(request, tmp_path):
    """A kind's name → what writes it into tmp_path / "out"."""
    out, get = tmp_path / "out", request.getfixturevalue

    def checkpoint():
        cfg = get("make_config")()
        base, folder = get("base"), out / "joint" / "step-000002"
        if not lora_parameters(base.unet):
            get("checkpoint")
        return lambda: save_checkpoint(folder, cfg, "joint", 2, base, None, {"parameters": [torch.ones(5000)]})

    def cache():
        cfg = get("make_config")(f"data.cache_dir={out}")
        return lambda: train(cfg, "joint", cache_only=True)

    def data_set():
        textures, mesh = get("textures"), get("mesh")
        source = HuggingFaceATLAS(str(textures), textures / "prompts.txt")
        return lambda: build_dataset(source, f"obj:{mesh}", 2, out, 32, 24)

    def table_copy():
        files = sorted((get("dataset_dir") / "textures").glob("*.parquet"))
        return lambda: open_parquet(files, out)

    def texture():
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 4), np.uint8))
        return lambda: write_texture(out / "a.png", picture, {"prompt": "a man"})

    def manifest():
        out.mkdir()
        return lambda: append_to_manifest(out, {"prompt": "a man " * 2000})

    def body(suffix: str):
        rig, picture = load_rig(f"obj:{get('mesh')}"), Image.new("RGBA", (64, 64), "red")
        pose = rig.named_pose("rest", 0)
        return lambda: export_body(out / f"a{suffix}", rig, pose, picture)

    def turntable(name: str):
        frames = [torch.rand(3, 32, 24) for _ in range(3)]
        return lambda: save_turntable(frames, out / name)

    def export(layout: str):
        file = get("checkpoint") / LORA_FILE
        return lambda: export_lora(file, layout, out / "lora")

    kinds: dict[str, Callable] = {
        "a checkpoint": checkpoint, "a cache": cache, "a data set": data_set, "a copy of a table": table_copy,
        "a texture": texture, "a manifest": manifest, "a GLB": lambda: body(".glb"), "an OBJ": lambda: body(".obj"),
        "a USDZ": lambda: body(".usdz"), "a GIF": lambda: turntable("a.gif"), "a WebP": lambda: turntable("a.webp"),
        "frames": lambda: turntable("frames"),
        "kohya's LoRA": lambda: export("kohya"), "PEFT's LoRA": lambda: export("peft"),
    }  # fmt: skip
    return lambda kind: kinds[kind]()


KINDS = (
    "a checkpoint", "a cache", "a data set", "a copy of a table", "a texture", "a manifest", "a GLB", "an OBJ",
    "a USDZ", "a GIF", "a WebP", "frames", "kohya's LoRA", "PEFT's LoRA",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_one_line_and_nothing_half_written(kind, write, tmp_path):
    act, out = write(kind), tmp_path / "out"
    for size in (0, 100, 700):
        with room_for(size), pytest.raises(UserError) as error:
            act()
        assert re.search("File too large|cannot write", str(error.value)), str(error.value)
        count(disks_filled=1)
        partial = [name for name in contents(out) if name.rpartition("/")[2].startswith(".")] if out.exists() else []
        assert not partial, partial
    act()
    whole = contents(out)
    assert whole and max(map(len, whole.values())) > 700, "none of the limits was met"


@pytest.mark.parametrize("kind", ["a texture", "a GLB", "kohya's LoRA", "a checkpoint"])
def test_what_was_there_stays(kind, write, tmp_path):
    act, out = write(kind), tmp_path / "out"
    act()
    before = contents(out)
    with room_for(100), pytest.raises(UserError):
        act()
    count(disks_filled=1, lost=int(contents(out) != before))
    assert contents(out) == before


def test_a_log_that_cannot_be_written_costs_no_run(make_config, tmp_path, monkeypatch, capsys):
    from torch.utils.tensorboard import SummaryWriter

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    last = train(make_config("output.log_every=1"), "joint")
    count(disks_filled=1)
    assert last.name == "step-000003" and capsys.readouterr().err.count("training goes on without it") == 1


def test_a_training_command_on_a_full_disk(make_config, tmp_path, run_script):
    cfg = make_config("training.joint.max_steps=2", "output.save_every=1")
    assert run_script(joint_main, *command_line(cfg), "--cache-only")[0] == 0
    with room_for(20_000), contextlib.redirect_stderr(io.StringIO()) as printed:
        status, *_ = run_script(joint_main, *command_line(cfg))
    error = printed.getvalue()
    count(disks_filled=1)
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and "earlier checkpoints are whole" in lines[0], error
    assert not list((tmp_path / "checkpoints" / "joint").glob("*")), "nothing half-written"


def test_a_published_folder(checkpoint, tmp_path, run_script):
    with room_for(200), contextlib.redirect_stderr(io.StringIO()) as printed:
        status, *_ = run_script(publish_main, "--checkpoint", checkpoint, "--licence", "mit", "--out", tmp_path / "hub")
    error = printed.getvalue()
    count(disks_filled=1)
    assert status == 2 and error.splitlines()[-1].startswith("error: cannot write"), error
