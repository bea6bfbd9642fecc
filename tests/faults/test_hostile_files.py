"""Files that strangers made to run code, to fill the memory or to name what lies elsewhere: each is one line."""

import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from limits import bounded_memory
from PIL import Image
from safetensors.torch import save_file
from scipy.io import savemat
from tally import count

from atlas_dataset.building import verify_dataset
from atlas_dataset.dataset import INFO_FILE, ATLASLarge
from atlas_dataset.fits import read_fit
from atlas_dataset.prompts import read_prompts
from atlas_dataset.sources import HuggingFaceATLAS
from common.errors import UserError
from common.files import content_hash
from common.pictures import open_image, picture_files
from config.configuration import DEFAULT_CONFIG, Aligner, load_config, save_config
from evaluation.report import FEATURES, RESULTS, read_results
from infer_uv import file_name, is_done, list_jobs
from infer_uv import main as infer_main
from lora_utils import ADAPTER_FILE, LORA_FILE, export_lora, export_word
from models.adapters import _read_vector, read_adapter
from models.base import load_base
from models.checkpoints import CONFIG_FILE, RESUME_FILE, STATE_FILE, load_aligner, load_state, saved_states
from models.conditioning import prompt_pieces
from models.lora_files import load_lora
from models.settings import read_settings
from render.bodies import read_obj
from render.densepose import _read_table
from render.render_turntable import main as turntable_main
from render.smpl import read_amass, read_arrays, read_shapes
from training.caching import Cache, picture_keys

pytest.importorskip("resource")  # Windows has none
ALLOWANCE = 800_000_000  # bytes of address space that a reader may take beyond what the process has
DEEP = 10_000


@pytest.fixture()
def in_bounded_memory():
    """No reader may take more than ALLOWANCE: what would, gets a MemoryError, which no test here expects."""
    with bounded_memory(ALLOWANCE):
        yield


@pytest.fixture()
def refused(in_bounded_memory):
    """Calls a reader → what it says, one line that is about no lack of memory."""

    def call(read, *arguments) -> str:
        with pytest.raises(UserError) as error:
            read(*arguments)
        said = str(error.value)
        assert "\n" not in said and len(said) < 1500, said[:2000]
        assert not any(words in said.lower() for words in ("memoryerror", "allocate", "enough memory")), said
        count(hostile_refused=1)
        return said

    return call


# Pickles.


class Hostile:
    """Its pickle, when it is believed, makes a file."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def of_base(read):
    """A reader that needs a base, as one that is handed the fixtures."""
    return lambda path, request: read(path, request.getfixturevalue("base"))


def resume(path: Path, request):
    cfg = request.getfixturevalue("make_config")()
    save_config(cfg, path.parent / CONFIG_FILE)
    (path.parent / STATE_FILE).write_text(json.dumps({"task": "joint", "global_step": 1}))
    load_state(path.parent, cfg, "joint")


def read_base(path: Path, request):
    folder = path.parent / "base"
    shutil.copytree(request.getfixturevalue("tiny_base"), folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.copy(path, folder / "unet" / "diffusion_pytorch_model.bin")
    load_base(str(folder))


def read_evaluation(path: Path, request):
    (path.parent / RESULTS).write_text(json.dumps({"tasks": {}, "samples": []}))
    read_results(str(path.parent))


# The name of a file → what opens it.
READERS = {
    "SMPL.pkl": lambda path, request: read_arrays(path),
    "SMPL.npz": lambda path, request: read_arrays(path),
    "motion.npz": lambda path, request: read_amass(path),
    "fit.pkl": lambda path, request: read_fit(path, "anny", 64, 64),
    "fit.npz": lambda path, request: read_fit(path, "anny", 64, 64),
    "lora.bin": of_base(lambda path, base: load_lora(base, path)),
    "lora.pt": of_base(lambda path, base: load_lora(base, path)),
    "lora.safetensors": of_base(lambda path, base: load_lora(base, path)),
    "aligner.pth": of_base(lambda path, base: load_aligner(path, Aligner(), base)),
    "aligner.safetensors": of_base(lambda path, base: load_aligner(path, Aligner(), base)),
    RESUME_FILE: resume,
    "unet.bin": read_base,
    "sks.safetensors": lambda path, request: _read_vector(path.parent, "sks"),
    "shard.safetensors": lambda path, request: Cache(path.parent),
    FEATURES: read_evaluation,
}


def hostile_forms(name: str, trace: Path, path: Path):
    """Writes to path, one after another, each form in which a pickle may lie in such a file."""
    content = {"poses": Hostile(trace), "v_template": Hostile(trace)}
    if path.suffix == ".npz":
        np.savez(path, poses=np.array(Hostile(trace), dtype=object))
        yield
    for protocol in (0, 2, 5):
        path.write_bytes(pickle.dumps(content, protocol))
        yield
    if path.suffix not in (".npz", ".pkl"):
        torch.save(content, path)
        yield
        torch.save(content, path, _use_new_zipfile_serialization=False)
        yield


@pytest.mark.parametrize("name", READERS)
def test_no_pickle_is_run(name, tmp_path, request, refused):
    trace, folder = tmp_path / "it ran", tmp_path / "files"
    folder.mkdir()
    for _ in hostile_forms(name, trace, folder / name):
        shutil.rmtree(folder / "base", ignore_errors=True)
        refused(READERS[name], folder / name, request)
        count(executed=int(trace.exists()))
        assert not trace.exists()


def test_the_pickles_here_do_run_where_they_are_believed(tmp_path):
    for name in ("any.pkl", "any.npz"):
        for _ in hostile_forms(name, tmp_path / "it ran", tmp_path / name):
            content = np.load(tmp_path / name, allow_pickle=True)
            if not isinstance(content, dict):
                content["poses"]
            (tmp_path / "it ran").unlink()


# Weights.


def safetensors_bytes(header: dict | str, data: bytes = bytes(16), length: int | None = None) -> bytes:
    """As the format's definition has it: the header's length, 8 bytes little-endian; the header, JSON; the data."""
    header = header if isinstance(header, str) else json.dumps(header)
    return struct.pack("<Q", len(header.encode()) if length is None else length) + header.encode() + data


def entry(dtype="F32", shape=(4,), offsets=(0, 16)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


LYING_HEADERS = {
    "longer than the file": safetensors_bytes({"a": entry()}, length=1 << 20),
    "longer than any file": safetensors_bytes({"a": entry()}, length=(1 << 64) - 1),
    "offsets behind the end": safetensors_bytes({"a": entry(offsets=(0, 1 << 40), shape=(1 << 38,))}),
    "offsets backwards": safetensors_bytes({"a": entry(offsets=(16, 0))}),
    "offsets that overlap": safetensors_bytes({"a": entry(), "b": entry()}),
    "a hole": safetensors_bytes({"a": entry(shape=(1,), offsets=(0, 4)), "b": entry(shape=(2,), offsets=(8, 16))}),
    "a shape that overflows": safetensors_bytes({"a": entry(shape=(1 << 32, 1 << 32, 4))}),
    "an unknown type": safetensors_bytes({"a": entry("P64")}),
    "a shape of another size": safetensors_bytes({"a": entry(shape=(5,))}),
    "nested deeply": safetensors_bytes("[" * DEEP + "]" * DEEP),
    "no JSON": safetensors_bytes("{"),
    "nothing": b"",
}


@pytest.mark.parametrize("lie", LYING_HEADERS)
def test_lying_headers_of_weights(lie, tmp_path, request, refused):
    for name in ("lora.safetensors", "aligner.safetensors", "sks.safetensors", FEATURES):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_bytes(LYING_HEADERS[lie])
        assert name in refused(READERS[name], folder / name, request)


METADATA = {
    "nested deeply": "[" * DEEP,
    "a list": "[1]",
    "a number for a configuration": '{"unet.r": 4, "unet.lora_alpha": "much", "unet.target_modules": 3}',
    "patterns that are none": '{"unet.r": 4, "unet.lora_alpha": 4, "unet.alpha_pattern": [1]}',
}


@pytest.mark.parametrize("what", METADATA)
def test_what_a_lora_file_says_of_itself(what, tmp_path, base, refused):
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    weights = {f"{layer}.lora_A.weight": torch.zeros(4, 32), f"{layer}.lora_B.weight": torch.zeros(32, 4)}
    save_file(weights, tmp_path / LORA_FILE, {"format": "pt", "lora_adapter_metadata": METADATA[what]})
    refused(load_lora, base, tmp_path)
    for layout in ("kohya", "peft"):
        refused(export_lora, tmp_path / LORA_FILE, layout, tmp_path / "out")


@pytest.mark.parametrize("heads", ["many", "0", "-1", "7", "9" * 30, "1.5"])
def test_heads_of_an_aligner_that_cannot_be(heads, tmp_path, base, refused):
    state = {"visual_proj.weight": torch.zeros(16, 24), "query": torch.zeros(1, 77, 16)}
    state |= {"i2t.layers.0.linear1.weight": torch.zeros(32, 16)}
    save_file(state, tmp_path / "aligner.safetensors", {"heads": heads})
    assert "aligner.safetensors" in refused(load_aligner, tmp_path / "aligner.safetensors", Aligner(), base)


def test_a_small_aligner_that_speaks_of_a_wide_one(tmp_path, base, refused):
    state = {"visual_proj.weight": torch.zeros(50_000, 1), "query": torch.zeros(1, 1, 1)}
    state |= {"i2t.layers.0.linear1.weight": torch.zeros(9)}
    save_file(state, tmp_path / "aligner.safetensors", {"heads": "1"})
    assert "aligner.safetensors" in refused(load_aligner, tmp_path / "aligner.safetensors", Aligner(), base)


@pytest.mark.parametrize(
    "change",
    [
        {"query": torch.zeros(())},
        {"i2t.layers.0.linear1.weight": torch.zeros(())},
        {"visual_proj.weight": torch.zeros(3)},
        {"query": torch.zeros(3)},
        {"query": torch.zeros(1, 77, 0), "visual_proj.weight": torch.zeros(0, 24)},
    ],
)
def test_aligners_of_other_shapes(change, tmp_path, base, refused):
    state = {"visual_proj.weight": torch.zeros(16, 24), "query": torch.zeros(1, 77, 16)}
    save_file(state | {"i2t.layers.0.linear1.weight": torch.zeros(32, 16)} | change, tmp_path / "aligner.safetensors")
    assert "aligner.safetensors" in refused(load_aligner, tmp_path / "aligner.safetensors", Aligner(), base)


@pytest.mark.parametrize(
    "change",
    [
        {"lora_down.weight": torch.ones(())},
        {"lora_up.weight": torch.ones(())},
        {"lora_down.weight": torch.ones(0, 32), "lora_up.weight": torch.ones(32, 0)},
        {"alpha": torch.ones(2)},
        {"alpha": torch.ones(0)},
        {"dora_scale": torch.ones(())},
        {"dora_scale": torch.ones(32, 2)},
        {"lora_magnitude_vector": torch.ones(3)},
    ],
)
def test_lora_layers_of_other_shapes(change, tmp_path, base, refused):
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {"lora_down.weight": torch.ones(4, 32), "lora_up.weight": torch.ones(32, 4)} | change
    save_file({f"{layer}.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "lora.safetensors")
    assert "lora.safetensors" in refused(load_lora, base, tmp_path / "lora.safetensors")


# Archives that unpack to more than they are.


def npy_head(count: int) -> bytes:
    """As numpy's format 1.0 has it, of an array of bytes."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count},), }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def test_an_archive_of_arrays_that_unpacks_to_more_than_any_has(tmp_path, monkeypatch, refused):
    monkeypatch.setattr("render.smpl.LARGEST_ARRAYS", 8 << 20)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("poses", "v_template", "v_template"):
            archive.writestr(f"{name}.npy", npy_head(4 << 20) + bytes(4 << 20))
    assert (tmp_path / "bomb.npz").stat().st_size < 20_000
    for read in (read_arrays, read_shapes, read_amass, lambda path: read_fit(path, "anny", 64, 64)):
        assert "unpacks to" in refused(read, tmp_path / "bomb.npz")


def test_an_array_that_claims_more_than_it_has(tmp_path, refused):
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
        archive.writestr("poses.npy", npy_head(1 << 50) + bytes(100))
    assert "more numbers than it holds" in refused(read_amass, tmp_path / "lie.npz")


def test_weights_that_unpack_to_more_than_their_file(tmp_path, request, refused):
    """torch.save compresses nothing: what is larger inside than outside was not written by it."""
    torch.save({"a": torch.zeros(4)}, tmp_path / "small.pt")
    for name in ("lora.bin", "aligner.pth", RESUME_FILE):
        with zipfile.ZipFile(tmp_path / "small.pt") as small:
            entries = {item: small.read(item) for item in small.namelist()}
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as bomb:
            for item, content in entries.items():
                bomb.writestr(item, bytes(20 << 20) if item.endswith("data/0") else content)
        assert (tmp_path / name).stat().st_size < 40_000
        assert "unpacks to" in refused(READERS[name], tmp_path / name, request)


# Pickles that fill the memory or take for ever, though they name nothing.

BOMBS = {
    # LONG_BINPUT: "remember this as the 2^31st".
    "a memo of gigabytes": b"\x80\x02]r\xff\xff\xff\x7f.",
    # The empty key → bytes(2 ** 32), by a call of the type.
    "bytes of a given length": b"\x80\x02}U\x00c__builtin__\nbytes\n\x8a\x05\x00\x00\x00\x00\x01\x85Rs.",
    "bytes packed as a module says": b"\x80\x02}U\x00c_codecs\nencode\nU\x01aU\x04zlib\x86Rs.",
    "bytes that are not there": b"\x80\x05}\x8e\xff\xff\xff\xff\xff\x00\x00\x00.",
    "a bytearray that is not there": b"\x80\x05}\x8c\x01a\x96\xff\xff\xff\xff\xff\x01\x00\x00s.",
    "a list of itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_pickles_that_fill_the_memory(bomb, tmp_path, refused):
    (tmp_path / "bomb.pkl").write_bytes(BOMBS[bomb])
    for read in (read_arrays, lambda path: read_fit(path, "anny", 64, 64)):
        assert "bomb.pkl" in refused(read, tmp_path / "bomb.pkl")


@pytest.mark.parametrize("order", ["<", ">"])
def test_text_of_no_letters(order, tmp_path, refused):
    text = np.frombuffer(np.full(4, 0x110000, np.dtype(np.uint32).newbyteorder(order)).tobytes(), f"{order}U4")
    np.savez(tmp_path / "a.npz", gender=text)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"gender": text}))
    for name in ("a.npz", "a.pkl"):
        refused(read_arrays, tmp_path / name)


def test_dictionaries_that_hold_each_other_twice(tmp_path, refused):
    """A billion laughs: 60 dictionaries in the file, 2^60 to whoever follows them."""
    laughs = {"poses": 1}
    for _ in range(60):
        laughs = {"a": laughs, "b": laughs}
    (tmp_path / "laughs.pkl").write_bytes(pickle.dumps(laughs))
    assert "laughs.pkl" in refused(read_arrays, tmp_path / "laughs.pkl")


def test_an_object_in_an_object_twice(tmp_path, refused):
    """The same through arrays of objects, which are opened only where a fit is read."""
    laughs = {"poses": 1}
    for _ in range(60):
        laughs = {"a": np.array(laughs, dtype=object), "b": np.array(laughs, dtype=object)}
        laughs["b"] = laughs["a"]
    (tmp_path / "laughs.pkl").write_bytes(pickle.dumps(laughs))
    assert "laughs.pkl" in refused(read_fit, tmp_path / "laughs.pkl", "anny", 64, 64)


def test_a_number_that_stands_for_many(tmp_path, base, refused):
    """Strides of 0: a tensor of a terabyte in a file of a kilobyte."""
    state = {"projector.2.weight": torch.zeros(1).expand(1 << 19, 1 << 19)}
    torch.save(state, tmp_path / "aligner.pth")
    assert "more numbers" in refused(load_aligner, tmp_path / "aligner.pth", Aligner(), base)


# Texts: JSON, YAML, prompts.

DEEP_JSON = "[" * DEEP + "]" * DEEP
DEEP_OBJECT = '{"a":' * DEEP + "1" + "}" * DEEP


@pytest.mark.parametrize("text", [DEEP_JSON, DEEP_OBJECT, "1", "null", '"text"', "[]", "{}", "\xff\xfe", "1e999", ""])
def test_json_that_is_no_description(text, tmp_path, refused):
    data = text.encode("latin1")

    def write(name: str) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    write("1.png"), write("metadata.csv")
    refused(read_fit, write("fit.json"), "anny", 64, 64)
    refused(read_settings, write("settings.json"))
    write(ADAPTER_FILE)
    refused(read_adapter, tmp_path)
    refused(export_word, tmp_path, tmp_path / "out")
    refused(read_results, str(write(RESULTS)))
    refused(read_prompts, write("prompts.jsonl"), ["1.png"], 1, tmp_path)
    refused(ATLASLarge, write(INFO_FILE).parent, False, 8)
    (tmp_path / INFO_FILE).unlink()
    refused(ATLASLarge, write("state.json").parent, False, 8)
    (tmp_path / "step-000001").mkdir()
    (tmp_path / "step-000001" / STATE_FILE).write_bytes(data)
    assert saved_states(tmp_path) == {}


def test_a_description_that_names_what_is_no_file(tmp_path, run_script, in_bounded_memory):
    settings = {field: 1 for field in ("num_inference_steps", "guidance_scale", "text_guidance", "image_guidance")}
    described = {**settings, "sampler": "ddim", "negative_prompt": "", "img_weight": 0.5, "eta": 0, "strength": 0.5,
                 "size": 64, "seam_fix": True, "prompt": "a", "images": []}  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps(described))
    assert read_settings(tmp_path / "x.json")["prompt"] == "a", "the rest is as it should be"
    for change in ({"images": ["a\0b"]}, {"images": [7]}, {"images": None}, {"prompt": ["a"]}, {"checkpoint": 5},
                   {"size": "64"}, {"size": float("nan")}):  # fmt: skip
        (tmp_path / "x.json").write_text(json.dumps(described | change))
        status, _, error = run_script(infer_main, "--settings", tmp_path / "x.json", "--out", tmp_path / "out")
        assert status == 2 and error.count("\n") == 1 and "x.json" in error, error
    del described["images"]
    (tmp_path / "x.json").write_text(json.dumps(described))
    assert run_script(infer_main, "--settings", tmp_path / "x.json")[0] == 2


def laughing_yaml(levels: int = 60) -> str:
    lines = ["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}" for n in range(1, levels)]
    return "\n".join(lines)


HOSTILE_YAML = {
    "an object": "output: !!python/object/apply:pathlib.Path.touch [TRACE]",
    "a new object": "output: !!python/object/new:pathlib.Path [TRACE]",
    "a name": "output: !!python/name:os.system",
    "a module": "output: !!python/module:this",
    "a tag of its own": "output: !run TRACE",
    "lists in lists": "output: " + DEEP_JSON,
    "objects in objects": DEEP_OBJECT,
    "blocks in blocks": "\n".join(" " * level + "a:" for level in range(1500)),
    "anchors in anchors": laughing_yaml(),
    "merged anchors": "a0: &a0 {x: 1}\n"
    + "\n".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 60)),
    "an anchor in itself": "output: &a {out_dir: *a}",
    "a list as a key": "? [output]\n: 1",
    "a number of a million digits": "training: {seed: " + "9" * 1_000_000 + "}",
}


@pytest.mark.parametrize("what", HOSTILE_YAML)
def test_configurations(what, tmp_path, refused):
    trace = tmp_path / "it ran"
    (tmp_path / "config.yaml").write_text(HOSTILE_YAML[what].replace("TRACE", str(trace)))
    assert "config.yaml" in refused(load_config, tmp_path / "config.yaml")
    count(executed=int(trace.exists()))
    assert not trace.exists()


def test_an_override_is_no_yaml_of_its_own(refused):
    for value in ("!!python/name:os.system", "[" * 1000 + "]" * 1000, "&a [*a]", "9" * 10_000):
        refused(load_config, DEFAULT_CONFIG, [f"training.seed={value}"])


LONG_LINE = "red " * 2_500_000


def test_prompt_files(tmp_path, refused):
    names = ["1.png"]
    for content, words in (
        (b"a man in \xff\xfe red\n", "UTF-8"),
        (b"a\0man\n", "NUL"),
        (b"\n", "0 prompts"),
    ):
        (tmp_path / "prompts.txt").write_bytes(content)
        assert words in refused(read_prompts, tmp_path / "prompts.txt", names, 1)
    for suffix in (".csv", ".jsonl"):
        (tmp_path / f"prompts{suffix}").write_text(LONG_LINE)
        assert "line 1" in refused(read_prompts, tmp_path / f"prompts{suffix}", names, 1)
    for file in ("../../etc/passwd", "/etc/passwd", "a\u0000b", "\ud800", "n" * 300):
        (tmp_path / "prompts.jsonl").write_text(json.dumps({"file_name": file, "prompt": "a man"}))
        assert "line 1" in refused(read_prompts, tmp_path / "prompts.jsonl", names, 1, tmp_path)


def test_a_prompt_of_megabytes_is_refused_before_it_is_encoded(base, refused):
    assert "10000000 characters" in refused(prompt_pieces, base, LONG_LINE)
    assert len(prompt_pieces(base, "red " * 2_000)) > 1


def test_control_characters_reach_no_terminal(tmp_path, run_script):
    name = f"{tmp_path}/\x1b[2J\x07\u202e.json"
    status, _, error = run_script(infer_main, "--settings", name)
    assert status == 2 and error.count("\n") == 1 and r"\x1b[2J\x07\u202e.json" in error
    assert all(letter.isprintable() for letter in error[:-1])


# Pictures.


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, pixels: bytes | None = None) -> bytes:
    """Gray, 8 bits. By the PNG specification: each row has a byte for its filter."""
    rows = bytes((width + 1) * height) if pixels is None else pixels
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(chunks)
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )


def packed(size: int) -> bytes:
    return zlib.compress(bytes(size), 1)


def hostile_pictures():
    yield "of many pixels", png(60_000, 60_000, pixels=bytes(100))
    yield "of a text", png(8, 8, png_chunk(b"zTXt", b"parameters\0\0" + packed(100 << 20)))
    yield "of a text in UTF-8", png(8, 8, png_chunk(b"iTXt", b"parameters\0\1\0\0\0" + packed(100 << 20)))
    yield "of many texts", png(8, 8, *[png_chunk(b"zTXt", b"a%d\0\0" % n + packed(20 << 20)) for n in range(5)])


def test_pictures_that_unpack_to_more_than_a_picture_holds(tmp_path, base, refused):
    for what, content in hostile_pictures():
        (tmp_path / "bomb.png").write_bytes(content)
        assert len(content) < 3_000_000, what
        assert "bomb.png" in refused(open_image, tmp_path / "bomb.png")
        refused(read_settings, tmp_path / "bomb.png")
        job = SimpleNamespace(path=tmp_path / "bomb.png")
        assert not is_done(job, {"prompt": "a"}, [])
    assert open_image(png(8, 8)).size == (8, 8), "the other chunks are as they should be"


def test_a_picture_that_says_that_it_is_another(tmp_path, refused):
    contents = {
        "1.png": b"%PDF-1.4",
        "2.jpg": b"#!/bin/sh",
        "3.webp": b"RIFF\xff\xff\xff\xffWEBPVP8 ",
        "4.gif": b"GIF89a\xff\xff\xff\xff",
        "5.tif": b"II*\0\x08\0\0\0\xff\xff",
        "6.bmp": b"BM",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert name in refused(open_image, tmp_path / name)


# Meshes.

SQUARE = "v 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 0 1\nf 1/1 2/2 3/3\n"
HOSTILE_MESHES = {
    "no number": SQUARE.replace("v 1 0 0", "v nan 0 0"),
    "no finite one": SQUARE.replace("v 1 0 0", "v 1 inf 0"),
    "too large for a float": SQUARE.replace("v 1 0 0", "v 1e39 0 0"),
    "no finite UV": SQUARE.replace("vt 1 0", "vt nan 0"),
    "a large UV": SQUARE.replace("vt 1 0", "vt 1e300 0"),
    "an index of 12 digits": SQUARE.replace("3/3", "999999999999/3"),
    "an index of 30 digits": SQUARE.replace("3/3", f"{'9' * 30}/3"),
    "an index of 10,000 digits": SQUARE.replace("3/3", f"{'9' * 10_000}/3"),
    "an index of 30 digits, backwards": SQUARE.replace("3/3", f"-{'9' * 30}/3"),
    "an index of a UV": SQUARE.replace("3/3", f"3/{'9' * 30}"),
    "a word": SQUARE.replace("f 1/1", "f one/1"),
    "no UVs": SQUARE.replace("vt", "vn"),
    "one long line": "f " + "1/1 " * 20_000,
    "only backslashes": "\\\n" * 10_000,
    "bytes": "\xff\xfe\x00\xd8",
}


@pytest.mark.parametrize("what", HOSTILE_MESHES)
def test_meshes(what, tmp_path, refused):
    (tmp_path / "mesh.obj").write_bytes(HOSTILE_MESHES[what].encode("latin1"))
    assert "mesh.obj" in refused(read_obj, str(tmp_path / "mesh.obj"))


def test_a_meshs_materials_are_never_opened(tmp_path):
    """Not the files of mtllib, whatever their path, nor the pictures in them: a pipe would be waited for."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.mtl")
    for path in ("../pipe.mtl", tmp_path / "pipe.mtl", "/etc/passwd", "//host/share/x.mtl", "file:///etc/passwd"):
        (tmp_path / "folder" / "mesh.obj").write_text(f"mtllib {path}\nusemtl x\nmap_Kd {path}\n{SQUARE}")
        assert len(read_obj(str(tmp_path / "folder" / "mesh.obj")).faces) == 1


# Names of files.

NAMES = {
    "a newline": "a\nb",
    "a leading dash": "--out",
    "255 bytes": "n" * 251,
    "emoji": "\U0001f469\u200d\U0001f3a8" * 3,
    "an escape": "\x1b[31mred",
    "two dots": "a..",
    "spaces": "  a  ",
    "patterns": "[a]*?$HOME",
    "right to left": "\u202egnp",
}


@pytest.mark.parametrize("what", NAMES)
def test_pictures_of_any_name_are_made_textures_of_inside_the_folder(what, tmp_path, run_script):
    folder, out = tmp_path / "pictures", tmp_path / "out"
    folder.mkdir()
    picture = folder / f"{NAMES[what]}.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    assert picture_files(folder) == [picture]
    arguments = SimpleNamespace(prompts_file=None, prompt=None, images=str(folder), image=None, out=str(out),
                                seed=0, num=1, fit=None, iuv=None)  # fmt: skip
    (job,) = list_jobs(arguments)
    assert job.path.parent == out and "\n" not in job.path.name and len(job.path.name.encode()) < 200
    assert not job.path.name.startswith("-") and job.path.name.isprintable()
    turntable = out / f"{NAMES[what]}.gif"
    status, _, error = run_script(
        turntable_main,
        f"--texture={folder}",
        f"--out={out}",
        "--frames=1",
        "--size=8x8",
        "--format=sheet",
        "--body=nowhere",
    )
    assert status == 2 and error.count("\n") == 1 and not turntable.exists()


def test_a_prompts_name_stays_in_its_folder():
    for prompt in (
        "../../etc/passwd",
        "/etc/passwd",
        "..",
        "a\nb",
        "-rf",
        "x" * 5000,
        "\U0001f469" * 300,
        "\x1b[2J",
        "CON",
    ):
        name = file_name(prompt)
        assert name and not set("/\\\n\0") & set(name) and not name.startswith((".", "-")), prompt
        assert len(name.encode()) < 200 and name.isprintable()


def test_tables_name_no_files_outside(tmp_path, refused):
    """`save_to_disk` writes its files into its own folder; another name leads elsewhere."""
    datasets.Dataset.from_dict({"image": ["x"], "prompt": ["a man"]}).save_to_disk(tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "data")
    for name in ("../elsewhere/data-00000-of-00001.arrow", str(tmp_path / "elsewhere" / "data-00000-of-00001.arrow")):
        state = json.loads((tmp_path / "elsewhere" / "state.json").read_text())
        state["_data_files"] = [{"filename": name}]
        (tmp_path / "data" / "state.json").write_text(json.dumps(state))
        assert "another folder" in refused(ATLASLarge, tmp_path / "data", False, 8)
        assert "another folder" in refused(HuggingFaceATLAS, str(tmp_path / "data"))


@pytest.mark.parametrize("named", ["{elsewhere}", "../secret.png", "link.png", "pictures/../../secret.png", "a\0b"])
def test_tables_name_no_pictures_outside(named, tmp_path, refused):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    path = named.format(elsewhere=tmp_path / "secret.png")
    rows = {"image": [{"bytes": None, "path": path}], "texture": [{"bytes": None, "path": path}], "prompt": ["a man"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    (tmp_path / "data" / "pictures").mkdir()
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    assert "is not in" in refused(lambda: ATLASLarge(tmp_path / "data", False, 8).texture(0))
    assert "is not in" in refused(lambda: HuggingFaceATLAS(str(tmp_path / "data"))[0])
    assert "is not in" in refused(verify_dataset, tmp_path / "data")
    table = ATLASLarge(tmp_path / "data", False, 8).textures
    assert "is not in" in refused(picture_keys, table, "texture", tmp_path / "data", tmp_path / "cache")


def test_a_table_names_pictures_of_its_own_folder(tmp_path):
    picture = {"bytes": None, "path": "0.png"}
    rows = {"image": [picture], "texture": [picture], "prompt": ["a man"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "data" / "0.png")
    dataset = ATLASLarge(tmp_path / "data", False, 8)
    assert dataset.texture(0)[:, 0, 0].tolist() == [1, -1, -1]
    keys = picture_keys(dataset.textures, "texture", tmp_path / "data", tmp_path / "cache")
    assert keys == [content_hash((tmp_path / "data" / "0.png").read_bytes())]
    assert HuggingFaceATLAS(str(tmp_path / "data"))[0] == ((tmp_path / "data" / "0.png").read_bytes(), "a man")


@pytest.mark.parametrize("prompts", [{}, {"prompt": pyarrow.array([b"\xff"]).cast("string", safe=False)}])
def test_a_table_without_prompts_or_with_bytes_that_are_no_text(prompts, tmp_path, refused):
    (tmp_path / "textures").mkdir()
    (tmp_path / INFO_FILE).write_text(json.dumps({"body": "anny", "complete": True, "views": 0}))
    table = pyarrow.table({"texture": [{"bytes": b"", "path": None}], "texture_id": ["0"], **prompts})
    pyarrow.parquet.write_table(table, tmp_path / "textures" / "shard-00000.parquet")
    assert "cannot read data set" in refused(ATLASLarge, tmp_path, False, 8, 8, str(tmp_path / "cache"))


def test_an_adapters_word_is_no_path(tmp_path, refused):
    said = {"class_prompt": "a man", "base_checkpoint": "x", "base_weights": "y"}
    for word in ("../sks", "/etc/passwd", "a/b", "..", "", 7, None, "\x1b"):
        (tmp_path / ADAPTER_FILE).write_text(json.dumps({**said, "word": word}))
        refused(read_adapter, tmp_path)
        refused(export_word, tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [
        {"gender": np.array(b"\xff\xfe")},  # which is no gender, and is taken for none
        {"mocap_framerate": np.array([10**400], dtype=object)},
        {"poses": np.full((4, 156), 1e300)},
        {"poses": np.full((4, 156), np.nan)},
    ],
)
def test_motions_of_other_things_than_numbers(change, tmp_path):
    arrays = {"poses": np.zeros((4, 156)), "gender": np.array("female"), "mocap_framerate": np.array(60.0)}
    np.savez(tmp_path / "motion.npz", **arrays | change)
    if "gender" in change:
        assert read_amass(tmp_path / "motion.npz")[2] == "neutral"
        return
    with pytest.raises(UserError, match=r"motion\.npz"):
        read_amass(tmp_path / "motion.npz")


def test_whole_numbers_that_no_float_holds(tmp_path, refused):
    (tmp_path / "fit.json").write_text(json.dumps({"pose": [10**400] * 72, "betas": [0], "orig_cam": [1, 1, 0, 0]}))
    refused(read_fit, tmp_path / "fit.json", "smpl:nowhere", 64, 64)
    settings = dict.fromkeys(("text_guidance", "image_guidance", "num_inference_steps"), 1)
    settings |= {"sampler": "ddim", "negative_prompt": "", "img_weight": 0.5, "eta": 0, "strength": 0.5, "size": 64,
                 "seam_fix": True, "prompt": "a", "images": []}  # fmt: skip
    for number, is_read in ((2, True), (10**400, False), (float("inf"), False)):
        (tmp_path / "settings.json").write_text(json.dumps({**settings, "guidance_scale": number}))
        if is_read:
            assert read_settings(tmp_path / "settings.json")["settings"].guidance_scale == number
        else:
            assert "guidance_scale" in refused(read_settings, tmp_path / "settings.json")


def test_densepose_tables(tmp_path, refused):
    for name, content in {"large": np.zeros(1_000_001, np.uint8), "cell": np.array([{"a": 1}], dtype=object)}.items():
        savemat(tmp_path / f"{name}.mat", {"All_Faces": content}, do_compression=True)
        assert f"{name}.mat" in refused(_read_table, str(tmp_path / f"{name}.mat"))
    (tmp_path / "none.mat").write_bytes(bytes(200))
    refused(_read_table, str(tmp_path / "none.mat"))
