"""Stable Diffusion's shapes with random weights, for benchmarks: speed does not ask what the weights are."""

import json
from pathlib import Path

import torch
from count_scaling import TEXT, UNETS, VAE, VISION
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPImageProcessorPil, CLIPTextConfig, CLIPTextModel, CLIPVisionModel

from config.configuration import DEFAULT_CONFIG, load_config
from embedded.pretrain.card import MODEL_INDEX
from lora_utils import add_lora
from models.base import load_base, load_configured_base
from models.checkpoints import save_checkpoint
from models.conditioning import make_aligner

ARCHITECTURES = {"sd15": "SD 1.5", "sd21": "SD 2.1"}  # names of count_scaling.py


def make_sd_shape(architecture: str, folder: Path) -> Path:
    """A base of ARCHITECTURES and its CLIP vision model, in half precision, and the embedded tokenizer."""
    name, tokenizer = ARCHITECTURES[architecture], load_base("embedded/base").tokenizer
    tokenizer.save_pretrained(folder / "tokenizer")
    modules = {
        "unet": UNet2DConditionModel(sample_size=64, **UNETS[name]),
        "vae": AutoencoderKL(sample_size=512, **VAE),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**{**TEXT[name].to_dict(), "vocab_size": len(tokenizer)})),
        "image_encoder": CLIPVisionModel(VISION[name]),
    }
    for module_name, module in modules.items():
        module.half().save_pretrained(folder / module_name)
    CLIPImageProcessorPil().save_pretrained(folder / "feature_extractor")
    DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False).save_pretrained(
        folder / "scheduler"
    )
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX | {"vae": ["diffusers", "AutoencoderKL"]}))
    return folder


def sd_settings(base: Path) -> list[str]:
    """Overrides of the default configuration for a base of `make_sd_shape`: the seed's LoRA and aligner, at 512."""
    return [
        f"model.pretrained_model={base}",
        "model.prompt_template={prompt}",
        "model.image_size=null",
        "model.aligner.layers=3",
        "model.aligner.heads=8",
        "model.lora.target_modules=[to_q, to_k, to_v, to_out.0]",
        "data.resolution=512",
        "inference.guidance_scale=7.5",
    ]


def make_sd_checkpoint(architecture: str, folder: Path, num_inference_steps: int) -> Path:
    """A checkpoint of joint training as it stands at its first step, on such a base."""
    base_folder, checkpoint = make_sd_shape(architecture, folder / "base"), folder / "checkpoint"
    steps = f"inference.num_inference_steps={num_inference_steps}"
    cfg = load_config(DEFAULT_CONFIG, [*sd_settings(base_folder), steps])
    base = load_configured_base(cfg.model, torch.device("cpu"), torch.float32)
    add_lora(base.unet, cfg.model.lora)
    save_checkpoint(checkpoint, cfg, "joint", 0, base, make_aligner(cfg.model.aligner, base))
    return checkpoint
