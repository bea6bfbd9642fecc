"""Small stand-ins with exactly the real layouts: a base as diffusers lays it out, a mesh, textures, a data set."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from atlas_dataset.building import build_dataset
from atlas_dataset.sources import HuggingFaceATLAS
from config.configuration import DEFAULT_CONFIG, load_config
from embedded.pretrain.card import MODEL_INDEX
from embedded.pretrain.tokenizer import train_tokenizer
from lora_utils import add_lora
from models.base import load_base
from models.checkpoints import save_checkpoint
from models.conditioning import make_aligner
from render.rigs import load_body
from render.uv_space import uv_mask

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "yellow": (230, 220, 40)}


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A base with random weights whose parts have Stable Diffusion's classes, key names and folders."""
    folder = tmp_path_factory.mktemp("tiny_base")
    torch.manual_seed(0)
    train_tokenizer(folder, vocab_size=600)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), cross_attention_dim=16, norm_num_groups=8,
        attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).save_pretrained(folder / "unet")  # fmt: skip
    AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=8, latent_channels=4, sample_size=16, scaling_factor=0.9,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    ).save_pretrained(folder / "vae")  # fmt: skip
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
    ).save_pretrained(folder / "text_encoder")
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
    ).save_pretrained(folder / "image_encoder")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder / "feature_extractor"
    )
    DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False
    ).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX | {"vae": ["diffusers", "AutoencoderKL"]}))
    return folder


@pytest.fixture()
def base(tiny_base):
    return load_base(str(tiny_base))


@pytest.fixture(scope="session")
def mesh(tmp_path_factory):
    """A box 1.6 m high, one UV square a face in a 3 x 2 atlas with gaps, so that some texels are outside."""
    corners = [(x, y, z) for x in (-0.4, 0.4) for y in (0, 1.6) for z in (-0.2, 0.2)]
    quads = [(1, 2, 4, 3), (5, 7, 8, 6), (1, 5, 6, 2), (3, 4, 8, 7), (1, 3, 7, 5), (2, 6, 8, 4)]
    lines = [f"v {x} {y} {z}" for x, y, z in corners]
    for index in range(6):
        left, low = (index % 3) / 3, (index // 3) / 2
        lines += [f"vt {left + u} {low + v}" for u, v in ((0.03, 0.04), (0.3, 0.04), (0.3, 0.46), (0.03, 0.46))]
    for index, quad in enumerate(quads):
        lines.append("f " + " ".join(f"{corner}/{4 * index + turn + 1}" for turn, corner in enumerate(quad)))
    path = tmp_path_factory.mktemp("mesh") / "box.obj"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def textures(tmp_path_factory):
    """Four one-colour RGBA textures, transparent black in the corner, and their prompts."""
    folder = tmp_path_factory.mktemp("textures")
    for index, colour in enumerate(COLOURS.values()):
        pixels = np.zeros((64, 64, 4), np.uint8)
        pixels[:48] = (*colour, 255)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (folder / "prompts.txt").write_text("\n".join(f"a man in {name}" for name in COLOURS))
    return folder


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory, mesh, textures):
    source = HuggingFaceATLAS(str(textures), textures / "prompts.txt")
    return build_dataset(source, f"obj:{mesh}", 3, tmp_path_factory.mktemp("data") / "built", 32, 24)


@pytest.fixture()
def make_config(tiny_base, dataset_dir, mesh, tmp_path):
    """The default configuration on the stand-ins, with overrides."""

    def make(*overrides: str):
        return load_config(DEFAULT_CONFIG, [
            f"model.pretrained_model={tiny_base}", "model.aligner.layers=1", "model.aligner.heads=2",
            f"data.dataset={dataset_dir}", f"data.body=obj:{mesh}", f"data.cache_dir={tmp_path / 'cache'}",
            f"output.out_dir={tmp_path / 'checkpoints'}", f"output.log_dir={tmp_path / 'logs'}",
            "training.mixed_precision=no", "training.device=cpu", "inference.num_inference_steps=2",
            "output.sample_prompts=[a man in red]", "output.sample_every=1000", "data.validation_textures=0",
            "training.ema_decay=null", "training.outside_weight=1", "output.half_precision=false",
            "model.prompt_template={prompt}", "model.image_size=null",
            "output.log_every=10", "output.save_every=250", "output.keep_last=null", "output.validate_every=100",
            "model.lora.r=16", "model.lora.alpha=16", "data.views_per_texture=4",
            "model.lora.target_modules=[to_q, to_k, to_v, to_out.0, proj_in, proj_out, ff.net.0.proj, ff.net.2, conv1, "
            "conv2, conv_shortcut, time_emb_proj]",
            *(f"training.{task}.{key}" for task in ("joint", "t2uv", "i2uv")
              for key in ("batch_size=4", "effective_batch_size=4", "max_steps=3", "lr_warmup_steps=0")),
            *overrides,
        ])  # fmt: skip

    return make


def command_line(config) -> list[str]:
    """A configuration as command-line overrides."""
    flat = []

    def walk(section, prefix):
        for key, value in section.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                flat.append(f"--{prefix}{key}={'null' if value is None else value}")

    walk(config.model_dump(), "")
    return flat


@pytest.fixture()
def run_script(monkeypatch, capsys):
    """Runs a script's main() in this process → (exit status, stdout, stderr)."""

    def run(main, *arguments: str):
        monkeypatch.setattr("sys.argv", [main.__module__, *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture()
def make_checkpoint(base, make_config, tmp_path):
    """A checkpoint of joint training with a random LoRA, of the configuration with overrides → its folder."""

    def make(*overrides: str):
        cfg = make_config(*overrides)
        with torch.no_grad():
            for parameter in add_lora(base.unet, cfg.model.lora):
                parameter.normal_(std=0.1)
        folder = tmp_path / "checkpoints" / "joint" / "step-000001"
        save_checkpoint(folder, cfg, "joint", 1, base, make_aligner(cfg.model.aligner, base))
        return folder

    return make


@pytest.fixture()
def checkpoint(make_checkpoint):
    return make_checkpoint()


@pytest.fixture()
def examples(mesh, tmp_path):
    """Three textures in the box's own layout, each of one colour."""
    mask = uv_mask(load_body(f"obj:{mesh}"), 32).numpy()
    (tmp_path / "examples").mkdir()
    for number, colour in enumerate([(200, 40, 40), (190, 60, 30), (210, 30, 60)]):
        pixels = np.zeros((32, 32, 4), np.uint8)
        pixels[mask] = (*colour, 255)
        Image.fromarray(pixels).save(tmp_path / "examples" / f"{number}.png")
    return tmp_path / "examples"
