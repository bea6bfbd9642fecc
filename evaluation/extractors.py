"""Networks that turn pictures, and some also texts, into the features that distances and similarities are measured on.

A network that cannot be had is a sentence that says what is needed, never a network with random weights.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from common.errors import UserError, reason
from models.base import resolve_source

EMBEDDED_BASE = "embedded/base"
# Short names for what the field measures with.
CLIP_NAMES = {
    "clip": "openai/clip-vit-large-patch14",  # CLIP score: torchmetrics' default
    "clip-336": "openai/clip-vit-large-patch14-336",  # CMMD's (Jayasumana et al. 2024)
    "clip-b32": "openai/clip-vit-base-patch32",  # clean-fid's CLIP-FID
    "embedded": EMBEDDED_BASE,
}
INCEPTION_FILE = "inception-2015-12-05.pt"  # FID's own network as TorchScript, as StyleGAN and clean-fid load it
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"
INCEPTION_SIDE, FACE_SIDE = 299, 112
BATCH = 16  # pictures at once


@dataclass(frozen=True)
class Extractor:
    """name: as reports label its rows. side: of the pictures it takes, in pixels.

    encode_pictures: (B, 3, side, side) in [0, 1] → (B, D). encode_texts: B texts → (B, D), None where it has none.
    """

    name: str
    side: int
    encode_pictures: Callable[[Tensor], Tensor]
    encode_texts: Callable[[list[str]], Tensor] | None = None


def resize(pictures: Tensor, side: int) -> Tensor:
    """PIL's bicubic on each channel as float, never rounded to 8 bits: clean-fid's way (Parmar, Zhang and Zhu 2022), as
    other resizers move FID by 6 on the same pictures. (N, 3, H, W) in [0, 1] → (N, 3, side, side)."""
    if pictures.shape[-2:] == (side, side):
        return pictures
    channels = pictures.detach().cpu().float().flatten(0, 1).numpy()
    resized = [
        np.asarray(Image.fromarray(channel).resize((side, side), Image.Resampling.BICUBIC)) for channel in channels
    ]
    return torch.from_numpy(np.stack(resized)).clamp(0, 1).unflatten(0, pictures.shape[:2]).to(pictures.device)


@torch.no_grad()
def features_of(extractor: Extractor, pictures: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] → (N, D) float32."""
    batches = [extractor.encode_pictures(resize(batch, extractor.side)).float() for batch in pictures.split(BATCH)]
    return torch.cat(batches)


@torch.no_grad()
def text_features_of(extractor: Extractor, texts: list[str]) -> Tensor | str:
    """N texts → (N, D) float32, or the reason where the network reads none."""
    if extractor.encode_texts is None:
        return f"{extractor.name} reads no texts; use a CLIP model"
    batches = [extractor.encode_texts(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
    return torch.cat(batches).float()


@functools.lru_cache(maxsize=8)
def load_extractor(name: str, device: str = "cpu") -> Extractor | str:
    """ "inception", one of CLIP_NAMES, a CLIP model's folder or hub name, or the TorchScript file of FID's Inception →
    the network, or what it needs."""
    if name == "inception":
        return _load_inception(Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE, device)
    if name.endswith(".pt"):
        return _load_inception(Path(name), device)
    return _load_clip(CLIP_NAMES.get(name, name), device)


@functools.lru_cache(maxsize=2)
def load_face_model(path: str, device: str = "cpu") -> Extractor | str:
    """A face recognition network as a TorchScript file, that takes (B, 3, 112, 112) in [-1, 1] as ArcFace does."""
    script = _load_script(Path(path), device)
    if isinstance(script, str):
        return f"face similarity needs a TorchScript file: {script}"
    return Extractor(Path(path).stem, FACE_SIDE, lambda pictures: script(pictures.to(device) * 2 - 1).flatten(1))


def _load_script(path: Path, device: str) -> torch.jit.ScriptModule | str:
    if not path.is_file():
        return f"there is no {path}"
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        return f"cannot read {path} ({reason(error)})"


def _load_inception(path: Path, device: str) -> Extractor | str:
    script = _load_script(path, device)
    if isinstance(script, str):
        return f"needs {INCEPTION_FILE}: {script}; it is at {INCEPTION_URL}"
    if not hasattr(script, "layers"):
        return f"needs {INCEPTION_FILE}: {path} is another network"

    def encode_pictures(pictures: Tensor) -> Tensor:
        # Its `layers` come after its own resizing, which pictures must not go through (clean-fid).
        return script.layers((pictures.to(device) * 255 - 128) / 128).flatten(1)

    return Extractor("inception", INCEPTION_SIDE, encode_pictures)


def _load_clip(name: str, device: str) -> Extractor | str:
    """A CLIP model, its two encoders in one folder as transformers writes it, or apart as diffusers does."""
    try:
        source = resolve_source(name)
        apart = (Path(source) / "image_encoder").is_dir()
        folders = ("image_encoder", "text_encoder", "tokenizer", "feature_extractor") if apart else ("",) * 4
        classes = (CLIPVisionModelWithProjection, CLIPTextModelWithProjection, CLIPTokenizer, CLIPImageProcessorPil)
        options = ({"dtype": torch.float32}, {"dtype": torch.float32}, {}, {})
        vision, text, tokenizer, processor = (
            _load_whole(cls, source, folder, **option) for cls, folder, option in zip(classes, folders, options)
        )
    except Exception as error:  # transformers raises many kinds for a missing, damaged or private file
        return f"needs {name} ({reason(error)})"
    vision, text = (encoder.eval().requires_grad_(False).to(device) for encoder in (vision, text))
    mean, std = (
        torch.tensor(values, device=device)[:, None, None] for values in (processor.image_mean, processor.image_std)
    )

    def encode_pictures(pictures: Tensor) -> Tensor:
        return vision(pixel_values=(pictures.to(device) - mean) / std).image_embeds

    def encode_texts(texts: list[str]) -> Tensor:
        length = text.config.max_position_embeddings  # what is longer is cut, as in torchmetrics
        tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return text(**tokens.to(device)).text_embeds

    label = "embedded image encoder" if name == EMBEDDED_BASE else name
    return Extractor(label, vision.config.image_size, encode_pictures, encode_texts)


def _load_whole(cls, source: str, folder: str, **options):
    """cls from a folder inside source. Raises UserError when weights are missing, which transformers would draw."""
    if not issubclass(cls, (CLIPVisionModelWithProjection, CLIPTextModelWithProjection)):
        return cls.from_pretrained(source, subfolder=folder)
    model, loading = cls.from_pretrained(source, subfolder=folder, output_loading_info=True, **options)
    missing = sorted(loading["missing_keys"])
    if missing:
        raise UserError(f"{len(missing)} weights are missing, {missing[0]} first")
    return model


def network_label(name: str) -> str:
    """What a network's rows are called; rows' names are nested at dots."""
    return name.replace(".", "_")


def unit(features: Tensor) -> Tensor:
    """(..., D), each of length 1."""
    return F.normalize(features, dim=-1)
