"""Caches on disk: they change nothing, notice what changed, and are whole or refused."""

import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import command_line
from PIL import Image
from test_training import scalars
from transformers import CLIPTokenizer

from atlas_dataset.building import build_dataset
from atlas_dataset.dataset import ATLASLarge
from atlas_dataset.sources import HuggingFaceATLAS
from common.errors import UserError
from joint import main as joint_main
from training import caching
from training.loop import train
from training.run import set_up

CACHED = {"none": set(), "latents": {"posterior"}, "all": {"posterior", "text_states", "image_tokens"}}


@pytest.fixture()
def encoded_rows(monkeypatch):
    """How many rows were encoded for a cache, by its name."""
    counts, original = {}, caching._build

    def count(folder, encoding, missing, workers):
        counts[encoding.name] = counts.get(encoding.name, 0) + len(missing)
        return original(folder, encoding, missing, workers)

    monkeypatch.setattr(caching, "_build", count)
    return counts


def entries(root: Path) -> list[Path]:
    return sorted((root / "cache" / "encoded").rglob("*.safetensors"))


def test_the_losses_are_the_same_with_and_without(make_config, tmp_path):
    curves = {}
    for cache in CACHED:
        steps = ("training.joint.max_steps=8", "training.joint.learning_rate=0.01", "output.log_every=1")
        cfg = make_config(f"data.cache={cache}", f"output.log_dir={tmp_path / cache}", *steps)
        run = set_up(cfg, "joint")
        assert set(run.dataset.cached) == CACHED[cache]
        assert ("texture" in run.dataset[0]) == (cache == "none") and ("image" in run.dataset[0]) == (cache != "all")
        train(cfg, "joint")
        curves[cache] = scalars(tmp_path / cache)
    for name in ("loss/t2uv", "loss/i2uv", "loss/align"):
        assert len(curves["none"][name]) == 8 and curves["none"][name][0] != curves["none"][name][-1]
        for cache in ("latents", "all"):
            assert curves[cache][name] == pytest.approx(curves["none"][name], rel=1e-4), (cache, name)


def test_only_what_changed_is_made_again(make_config, mesh, textures, tmp_path, encoded_rows):
    folder = Path(shutil.copytree(textures, tmp_path / "textures"))

    def build(name):
        source = HuggingFaceATLAS(str(folder), folder / "prompts.txt")
        return build_dataset(source, f"obj:{mesh}", 2, tmp_path / name, 32, 24)

    def encoded(*overrides, data="first"):
        encoded_rows.clear()
        set_up(make_config(f"data.dataset={tmp_path / data}", *overrides), "joint")
        return encoded_rows

    build("first")
    assert encoded() == {"posterior": 4, "text_states": 4, "image_tokens": 8}
    assert encoded() == {}, "a second start finds all"
    Image.new("RGB", (64, 64), "white").save(folder / "2.png")
    prompts = (folder / "prompts.txt").read_text().replace("blue", "purple")
    (folder / "prompts.txt").write_text(prompts)
    build("second")
    assert encoded(data="second") == {"posterior": 1, "text_states": 1, "image_tokens": 2}, "one texture was edited"
    assert encoded("data.resolution=32") == {"posterior": 4}, "other pixels"
    assert encoded("model.prompt_template=a texture of {prompt}") == {"text_states": 4}
    assert encoded() == {}, "the first are still there"


def seed_layout(folder: Path, colour: int, fingerprint: str) -> Path:
    """One texture, of one colour, in a table that says it was made as any other of that fingerprint."""
    texture = np.full((8, 8, 3), colour, np.uint8)
    features = datasets.Features(texture=datasets.Image(), prompt=datasets.Value("string"))
    table = datasets.Dataset.from_dict({"texture": [Image.fromarray(texture)], "prompt": ["a man"]}, features)
    table._fingerprint = fingerprint
    table.save_to_disk(folder)
    return folder


def test_another_picture_of_the_same_size_time_and_fingerprint_is_noticed(tmp_path):
    """As when the code that made a table runs again over pictures that were edited."""
    keys, root = [], tmp_path / "encoded"
    for colour in (10, 200):
        folder = seed_layout(tmp_path / f"made-{colour}", colour, "f" * 16)
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        folder.rename(tmp_path / "data")
        for file in (tmp_path / "data").iterdir():
            os.utime(file, (1, 1))
        textures = ATLASLarge(tmp_path / "data", False, 32).textures
        keys.append(caching.picture_keys(textures, "texture", tmp_path / "data", root))
        assert caching.picture_keys(textures, "texture", tmp_path / "data", root) == keys[-1], "remembered"
        assert len(list(root.glob("keys-*.json"))) == len(keys)
    assert keys[0] != keys[1]


@pytest.mark.parametrize("content", ["[", "[]", None])
def test_remembered_keys_that_are_damaged_or_to_be_rebuilt_are_made_anew(content, tmp_path):
    textures = ATLASLarge(seed_layout(tmp_path / "data", 10, "f" * 16), False, 32).textures
    keys = caching.picture_keys(textures, "texture", tmp_path / "data", tmp_path)
    (memo,) = tmp_path.glob("keys-*.json")
    memo.write_text('["wrong"]' if content is None else content)
    assert caching.picture_keys(textures, "texture", tmp_path / "data", tmp_path, rebuild=content is None) == keys
    assert memo.read_text() == f'["{keys[0]}"]'


def test_another_padding_token_is_noticed(make_config, tiny_base, tmp_path, encoded_rows):
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer", pad_token="!")
    assert tokenizer.pad_token_id != CLIPTokenizer.from_pretrained(tiny_base / "tokenizer").pad_token_id
    tokenizer.save_pretrained(base / "tokenizer")
    for name in (tiny_base, base):
        encoded_rows.clear()
        set_up(make_config(f"model.pretrained_model={name}"), "t2uv")
        assert encoded_rows.get("text_states") == 4


def test_a_cache_that_cannot_be_deleted_is_not_taken_for_rebuilt(make_config, monkeypatch):
    set_up(make_config(), "t2uv")

    def refuse(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(caching.shutil, "rmtree", refuse)
    with pytest.raises(UserError, match=r"cannot delete .*posterior-.*: Permission denied; delete it by hand"):
        set_up(make_config(), "t2uv", rebuild_cache=True)


def test_another_base_is_noticed(make_config, tiny_base, tmp_path, encoded_rows):
    from diffusers import AutoencoderKL

    set_up(make_config(), "joint")
    encoded_rows.clear()
    other = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    set_up(make_config(f"model.pretrained_model={other}"), "joint")
    assert encoded_rows == {}, "the same weights in another place"
    vae = AutoencoderKL.from_pretrained(other / "vae")
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] += 1e-3
    vae.save_pretrained(other / "vae")
    set_up(make_config(f"model.pretrained_model={other}"), "joint")
    assert encoded_rows == {"posterior": 4}


def test_the_command_builds_rebuilds_and_refuses_a_damaged_cache(make_config, tmp_path, run_script, encoded_rows):
    arguments = command_line(make_config())
    status, out, _ = run_script(joint_main, *arguments, "--cache-only")
    assert status == 0 and "posterior, text_states, image_tokens cached" in out
    assert not (tmp_path / "checkpoints").exists(), "nothing was trained"
    assert encoded_rows == {"posterior": 4, "text_states": 4, "image_tokens": 12}
    file = next(path for path in entries(tmp_path) if path.parent.name.startswith("posterior"))
    file.write_bytes(file.read_bytes()[:-5])
    status, _, error = run_script(joint_main, *arguments)
    assert status == 2 and str(file) in error and "--rebuild-cache" in error and len(error.strip().splitlines()) == 1
    encoded_rows.clear()
    assert run_script(joint_main, *arguments, "--rebuild-cache", "--cache-only")[0] == 0
    assert encoded_rows == {"posterior": 4, "text_states": 4, "image_tokens": 12}


def test_a_full_disk_is_told_beforehand_and_keeps_what_is_whole(make_config, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(caching.shutil, "disk_usage", lambda path: usage._replace(free=100))
        with pytest.raises(UserError, match=r"needs .* MB but 0 MB are free; set data.cache_dir"):
            set_up(make_config(), "joint")
    assert entries(tmp_path) == []
    original, shards = caching.safetensors.torch.save_file, []

    def fills_up(tensors, file):
        shards.append(file)
        if len(shards) == 2:
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return original(tensors, file)

    monkeypatch.setattr(caching.safetensors.torch, "save_file", fills_up)
    with pytest.raises(UserError, match="No space left on device"):
        set_up(make_config(), "joint")
    assert [path.parent.name.split("-")[0] for path in entries(tmp_path)] == ["posterior"]
    assert not list((tmp_path / "cache" / "encoded").rglob(".*.partial"))


def test_what_is_trained_is_not_cached(make_config):
    with pytest.raises(UserError, match=r"model\.lora\.text_encoder_r trains the text encoder"):
        set_up(make_config("model.lora.text_encoder_r=2"), "joint")


def test_entries_that_are_not_finite_are_refused(make_config, monkeypatch, tmp_path):
    monkeypatch.setattr(caching, "encode_posterior", lambda vae, pixels: (pixels[:, :, ::2, ::2] * float("nan"),) * 2)
    with pytest.raises(UserError, match="posterior of row 0 is not finite"):
        set_up(make_config(), "joint")
    assert entries(tmp_path) == []


def test_renders_made_online_are_not_cached(make_config):
    run = set_up(make_config("data.views=online", "data.views_per_texture=2"), "joint")
    assert set(run.dataset.cached) == {"posterior", "text_states"} and "image" in run.dataset[0]
