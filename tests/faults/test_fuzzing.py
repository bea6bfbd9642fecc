"""Every reader of others' files on damaged ones: it reads them or raises UserError, in one line, and does nothing else.

Each input follows from a reader's name and its number, so that what is met here can be met again.
"""

import contextlib
import io
import json
import os
import random
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from limits import bounded_memory
from mutations import (
    damaged_bytes,
    damaged_json,
    damaged_npz,
    damaged_pickle,
    damaged_picture,
    damaged_safetensors,
    damaged_text,
    damaged_torch_file,
    encoded,
)
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tally import IS_LONG, count

from atlas_dataset.dataset import INFO_FILE, ATLASLarge
from atlas_dataset.fits import read_fit
from atlas_dataset.prompts import read_prompts
from common.errors import UserError
from common.pictures import open_image
from config.configuration import DEFAULT_CONFIG, Aligner, load_config
from lora_utils import ADAPTER_FILE
from models.adapters import read_adapter
from models.checkpoints import STATE_FILE, load_aligner, load_state, save_config, saved_states
from models.conditioning import make_aligner
from models.lora_files import load_lora, read_layers
from models.settings import encode_described, read_settings
from render.bodies import read_obj
from render.smpl import read_amass, read_arrays
from render.uv_space import uv_mask
from training.caching import Cache

pytest.importorskip("resource")  # Windows has none
SHARE = float(os.environ.get("FUZZ_SHARE", 1 if IS_LONG else 0.0005))  # of the inputs of a long run
SECONDS = 20  # that an input may take on a busy machine
# Bytes of address space beyond what the process has. torch's and Python's readers ask for what a length of 32 bits
# says before they read it, and touch none of it.
ALLOWANCE = 6 << 30
OBJ = """# a square
mtllib square.mtl
v 0 0 0
v 1 0 0 1.0
v 1 1 0 0.5 0.5 0.5
v 0 1 0
vt 0 0
vt 1 0 0
vt 1 1
vt 0 1
vn 0 0 1
s off
f 1/1/1 2/2/1 3/3/1 \\
4/4/1
f -4/-4 -3/-3 -2/-2
"""
PROMPTS = {
    "txt": "a man in red\na woman in a green sweater\nuna mujer, años 20\n",
    "csv": 'file_name,prompt\n1.png,"a man, in red"\n2.png,a woman\n3.png,"a ""quoted"" child"\n',
    "jsonl": '{"file_name": "1.png", "prompt": "a man"}\n{"file_name": "2.png", "text": "b"}\n'
    '{"file_name": "3.png", "prompt": "c"}\n',
}
NAMES = ["1.png", "2.png", "3.png"]
OWN_FIT = {
    "body": "obj:x", "pose": [], "shape": [], "gender": "neutral", "azimuth": 10.0, "elevation": 3.0,
    "fov_degrees": 30.0, "fill": 0.8, "bottom": 0.0, "ambient": [0.4, 0.4, 0.4],
    "lights": [[0.5, 0.5, 0.5, 30.0, 20.0]],
}  # fmt: skip
SMPL_FIT = {
    "pose": [0.1] * 72, "betas": [0.0] * 10, "gender": "male", "orig_cam": [0.8, 0.8, 0.1, 0.1], "img_size": [64, 64],
}  # fmt: skip
HMR2_FIT = {
    "pred_smpl_params": {
        "global_orient": [[[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]],
        "body_pose": [[[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]] * 23,
        "betas": [0.0] * 10,
    },
    "pred_cam": [0.9, 0.0, 0.1],
    "box_center": [32.0, 32.0],
    "box_size": 60.0,
}
MOTION = {
    "poses": np.zeros((4, 156)), "betas": np.zeros(16), "gender": np.array("female"), "trans": np.zeros((4, 3)),
    "mocap_framerate": np.array(120.0),
}  # fmt: skip
PIECES = {
    "root_orient": np.zeros((4, 3)), "pose_body": np.zeros((4, 63)), "pose_hand": np.zeros((4, 90)),
    "mocap_frame_rate": np.array(30), "gender": np.array(b"male"), "betas": np.zeros(10),
}  # fmt: skip


@dataclass
class Target:
    """A reader: the name of its file, how one is made from random numbers, what reads it, inputs of a long run."""

    file: str
    make: Callable[[random.Random], bytes]
    read: Callable[[Path], object]
    inputs: int


def pictures() -> list[bytes]:
    """Small ones of every kind that is read, with what else they may hold."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8))
    alpha = Image.fromarray(rng.integers(0, 256, (9, 7, 4), np.uint8))
    exif, text = Image.Exif(), PngInfo()
    exif[0x0112] = 6
    text.add_text("a", "b")
    text.add_itxt("parameters", "{}", zip=True)
    forms = [
        (colour, "PNG", {"pnginfo": text}),
        (alpha, "PNG", {"exif": exif}),
        (colour.convert("P"), "PNG", {"transparency": 3}),
        (Image.fromarray(rng.integers(0, 65_536, (9, 7), np.uint16)), "PNG", {}),
        (colour, "JPEG", {"exif": exif}),
        (colour.convert("CMYK"), "JPEG", {}),
        (colour, "JPEG", {"progressive": True}),
        (alpha, "WEBP", {"lossless": True}),
        (colour, "WEBP", {}),
        (colour, "BMP", {}),
        (alpha, "TGA", {"compression": "tga_rle"}),
        (colour, "TIFF", {"compression": "tiff_lzw"}),
        (colour, "TIFF", {}),
        (colour.convert("P"), "GIF", {}),
    ]
    contents = []
    for image, kind, options in forms:
        file = io.BytesIO()
        image.save(file, kind, **options)
        contents.append(file.getvalue())
    return contents


def lora_seeds(base) -> list[tuple[dict, dict]]:
    """Tensors and metadata of a few makers' files for the tiny base."""
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    outputs, inputs = base.unet.get_submodule(layer).weight.shape
    down, up = torch.ones(4, inputs), torch.ones(outputs, 4)
    flat = f"lora_unet_{layer.replace('.', '_')}"
    saved = {"unet.r": 4, "unet.lora_alpha": 8, "unet.target_modules": ["to_q"], "unet.use_rslora": False,
             "unet.rank_pattern": {"to_q": 4}, "unet.alpha_pattern": {}}  # fmt: skip
    processor = layer.removesuffix(".to_q") + ".processor.to_q_lora"
    return [
        ({f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up},
         {"format": "pt", "lora_adapter_metadata": json.dumps(saved)}),
        ({f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(2.0),
          f"{flat}.dora_scale": torch.ones(outputs, 1)}, {"ss_network_dim": "4"}),
        ({f"{processor}.down.weight": down, f"{processor}.up.weight": up}, {}),
    ]  # fmt: skip


def table_folder(folder: Path, content: bytes) -> Path:
    """A built data set of two textures whose parquet file of textures is `content`."""
    (folder / "textures").mkdir(parents=True, exist_ok=True)
    (folder / INFO_FILE).write_text(json.dumps({"body": "anny", "complete": True, "views": 0}))
    (folder / "textures" / "shard-00000.parquet").write_bytes(content)
    return folder


def parquet_seed(folder: Path) -> bytes:
    pixels = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(pixels, "PNG")
    picture = {"bytes": pixels.getvalue(), "path": None}
    table = pyarrow.table({"texture": [picture, picture], "prompt": ["a", "b"], "texture_id": ["0", "1"]})
    pyarrow.parquet.write_table(table, folder / "seed.parquet")
    return (folder / "seed.parquet").read_bytes()


@pytest.fixture(scope="module")
def targets(tiny_base, mesh, tmp_path_factory):
    from models.base import load_base

    base, work = load_base(str(tiny_base)), tmp_path_factory.mktemp("seeds")
    config, seeds = DEFAULT_CONFIG.read_text(), pictures()
    loras = lora_seeds(base)
    aligner = make_aligner(Aligner(layers=1, heads=2), base).state_dict()
    described = {"num_inference_steps": 4, "sampler": "ddim", "guidance_scale": 3.0, "text_guidance": 3.0,
                 "image_guidance": 3.0, "negative_prompt": "", "img_weight": 0.5, "eta": 0.0, "strength": 0.6,
                 "size": 8, "seam_fix": True, "prompt": "a man", "images": [], "checkpoint": "x",
                 "overrides": []}  # fmt: skip
    shown = encode_described(Image.new("RGBA", (4, 4)), described)
    stored, fit_arrays = parquet_seed(work), {name: np.asarray(value) for name, value in SMPL_FIT.items()}
    adapter = {"word": "sks", "class_prompt": "a man", "base_checkpoint": "x", "base_weights": "y"}
    body = f"obj:{mesh}"
    resumed = load_config(DEFAULT_CONFIG)
    save_config(resumed, work / "config.yaml")
    state = {"parameters": [torch.zeros(2, 3)], "global_step": 3, "ema": None, "optimizer": {"state": {}}}

    def read_mesh(path: Path):
        uv_mask(read_obj(str(path)), 8)

    def resume(path: Path):
        folder = path.parent
        (folder / "config.yaml").write_bytes((work / "config.yaml").read_bytes())
        (folder / STATE_FILE).write_text('{"task": "joint", "global_step": 3}')
        load_state(folder, resumed, "joint")

    def find_states(path: Path):
        (path.parent / "step-000001").mkdir(exist_ok=True)
        path.replace(path.parent / "step-000001" / STATE_FILE)
        saved_states(path.parent)

    def read_table(path: Path):
        ATLASLarge(table_folder(path.parent / "set", path.read_bytes()), False, 8, cache_dir=str(path.parent / "cache"))
        for copy in (path.parent / "cache").iterdir():
            copy.unlink()

    def override(path: Path):
        load_config(DEFAULT_CONFIG, path.read_bytes().decode("utf-8", "surrogateescape").split("\n"))

    def fit(body: str):
        return lambda path: read_fit(path, body, 64, 64)

    def lora(rng):
        return damaged_safetensors(rng, *rng.choice(loras))

    keys = (
        "training.seed=1\ntraining.joint.max_steps=3\nmodel.lora.target_modules=[to_q, to_k]\ndata.render.fill=[0, 1]"
    )
    return {
        "OBJ meshes": Target("m.obj", lambda rng: encoded(rng, damaged_text(rng, OBJ)), read_mesh, 150_000),
        "OBJ bytes": Target("m.obj", lambda rng: damaged_bytes(rng, OBJ.encode()), lambda path: read_obj(str(path)),
                            100_000),
        "AMASS motions": Target("a.npz", lambda rng: damaged_npz(rng, rng.choice((MOTION, PIECES))), read_amass,
                                30_000),
        "pickled arrays": Target("a.pkl", lambda rng: damaged_pickle(rng, {"poses": np.zeros((2, 3)), "f": [1, "a"],
                                 "o": np.array([None, 1])}), read_arrays, 60_000),
        "own fits": Target("f.json", lambda rng: damaged_json(rng, OWN_FIT), fit(body), 20_000),
        "fits of others": Target("f.json", lambda rng: damaged_json(rng, rng.choice((SMPL_FIT, HMR2_FIT))),
                                 fit("smpl:nowhere"), 80_000),
        "fits as arrays": Target("f.npz", lambda rng: damaged_npz(rng, fit_arrays), fit("smpl:nowhere"), 20_000),
        "fits as pickles": Target("f.pkl", lambda rng: damaged_pickle(rng, fit_arrays), fit("smpl:nowhere"), 40_000),
        "LoRA files": Target("l.safetensors", lora, lambda path: read_layers(base, path), 30_000),
        "LoRA files put on": Target("l.safetensors", lora, lambda path: load_lora(base, path), 1_000),
        "LoRA pickles": Target("l.bin", lambda rng: damaged_torch_file(rng, rng.choice(loras)[0]),
                               lambda path: read_layers(base, path), 15_000),
        "aligners": Target("a.safetensors", lambda rng: damaged_safetensors(rng, aligner, {"heads": "2"}),
                           lambda path: load_aligner(path, Aligner(), base), 10_000),
        "aligner pickles": Target("a.pth", lambda rng: damaged_torch_file(rng, aligner),
                                  lambda path: load_aligner(path, Aligner(), base), 5_000),
        "states to resume": Target("training_state.pt", lambda rng: damaged_torch_file(rng, state), resume, 2_000),
        "states of steps": Target("s.json", lambda rng: damaged_json(rng, {"task": "joint", "global_step": 1,
                                  "written": 5.5}), find_states, 40_000),
        "caches": Target("c.safetensors", lambda rng: damaged_safetensors(rng, {"a": torch.ones(3), "b": torch.ones(2)}
                         ),
                         lambda path: Cache(path.parent), 50_000),
        "pictures": Target("p.png", lambda rng: damaged_picture(rng, rng.choice(seeds)),
                           lambda path: open_image(path.read_bytes()), 80_000),
        "settings in pictures": Target("s.png", lambda rng: damaged_picture(rng, shown), read_settings, 40_000),
        "settings": Target("s.json", lambda rng: damaged_json(rng, described), read_settings, 60_000),
        "configurations": Target("c.yaml", lambda rng: encoded(rng, damaged_text(rng, config)), load_config, 3_000),
        "overrides": Target("o.txt", lambda rng: damaged_text(rng, keys).encode("utf-8", "surrogateescape"), override,
                            2_000),
        "lines of prompts": Target("p.txt", lambda rng: encoded(rng, damaged_text(rng, PROMPTS["txt"])),
                                   lambda path: read_prompts(path, NAMES, 3, path.parent), 60_000),
        "tables of prompts": Target("p.csv", lambda rng: encoded(rng, damaged_text(rng, PROMPTS["csv"])),
                                    lambda path: read_prompts(path, NAMES, 3, path.parent), 60_000),
        "records of prompts": Target("p.jsonl", lambda rng: encoded(rng, damaged_text(rng, PROMPTS["jsonl"])),
                                     lambda path: read_prompts(path, NAMES, 3, path.parent), 60_000),
        "adapters": Target(ADAPTER_FILE, lambda rng: damaged_json(rng, adapter), lambda path: read_adapter(path.parent),
                           20_000),
        "rows": Target("t.parquet", lambda rng: damaged_bytes(rng, stored), read_table, 4_000),
    }  # fmt: skip


TARGETS = (
    "OBJ meshes", "OBJ bytes", "AMASS motions", "pickled arrays", "own fits", "fits of others", "fits as arrays",
    "fits as pickles", "LoRA files", "LoRA files put on", "LoRA pickles", "aligners", "aligner pickles",
    "states to resume", "states of steps", "caches", "pictures", "settings in pictures", "settings", "configurations",
    "overrides", "lines of prompts", "tables of prompts", "records of prompts", "adapters", "rows",
)  # fmt: skip


@contextlib.contextmanager
def quietly():
    """Readers' notes and libraries' warnings are not what is looked at here."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
        contextlib.redirect_stdout(nowhere),
        warnings.catch_warnings(),
        np.errstate(all="ignore"),
    ):
        warnings.simplefilter("ignore")
        yield


def too_slow(*_):
    raise TimeoutError(f"more than {SECONDS} s")


def fault_of(target: Target, path: Path, content: bytes) -> str | None:
    """What a reader did on this file that it should not; None where it read it or refused it in one line."""
    path.write_bytes(content)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        target.read(path)
    except UserError as error:
        said = str(error)
        if len(said) > 20_000 or "MemoryError" in said or "allocate" in said:
            return f"says {said[:300]!r}"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        ours = [step for step in traceback.extract_tb(error.__traceback__) if "/tests/" not in step.filename
                and "site-packages" not in step.filename and "/lib/python" not in step.filename]  # fmt: skip
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        return f"{type(error).__name__} at {place} ({Path(frame.filename).name}): {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


def fuzz(name: str, target: Target, folder: Path, inputs: int, start: int = 0) -> dict[str, int]:
    """Faults, each with the number of an input that has it."""
    faults: dict[str, int] = {}
    earlier = signal.signal(signal.SIGALRM, too_slow)
    with quietly(), bounded_memory(ALLOWANCE):
        for number in range(start, start + inputs):
            fault = fault_of(target, folder / target.file, target.make(random.Random(f"{name} {number}")))
            if fault:
                faults.setdefault(fault, number)
    signal.signal(signal.SIGALRM, earlier)
    return faults


@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_reads_or_refuses(name, targets, tmp_path):
    target = targets[name]
    inputs = max(20, int(SHARE * target.inputs))
    began = time.process_time()
    faults = fuzz(name, target, tmp_path, inputs)
    print(f"{name}: {inputs} inputs, {inputs / (time.process_time() - began):.0f} a second of a core")
    count(fuzz_inputs=inputs)
    assert not faults, "\n".join(f"input {number}: {fault}" for fault, number in faults.items())


def test_every_target_is_fuzzed(targets):
    assert set(targets) == set(TARGETS)
    assert sum(target.inputs for target in targets.values()) >= 1_000_000
