"""Weights made elsewhere: tells which layout a checkpoint has, and loads it so that it runs as its makers meant.

| layout | told by | base |
| --- | --- | --- |
| ours | config.yaml and pytorch_lora_weights.safetensors | what its config.yaml names |
| TexDreamer's release | unet/adapter_config.json, i2uv/ | as configured: Stable Diffusion 2.1 |
| the seed's | adapter_config.json, aligner.pth | as configured: Stable Diffusion 1.4 |
| a LoRA | a .safetensors, .bin or .pt file (lora_files.py), or a folder with pytorch_lora_weights | as configured |
| a whole pipeline, as SMPLitex's | model_index.json | itself |
"""

from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from config.configuration import Config
from lora_utils import LORA_FILE
from models.checkpoints import ALIGNER_FILE, CONFIG_FILE, TrainedModel, load_checkpoint, load_trained
from models.lora_files import ADAPTER_CONFIG, OLD_LORA_FILE, WEIGHT_SUFFIXES

LAYOUTS = (
    f"{CONFIG_FILE} and {LORA_FILE} (ours), unet/adapter_config.json (TexDreamer), adapter_config.json (PEFT), "
    f"{LORA_FILE} or .bin (a LoRA), model_index.json (a whole pipeline)"
)
# What a folder of each layout has; the first that fits is taken.
FILES_OF_LAYOUT = {
    "ours": (CONFIG_FILE, LORA_FILE),
    "texdreamer": (f"unet/{ADAPTER_CONFIG}",),
    "peft": (ADAPTER_CONFIG,),
    "lora": (LORA_FILE,),
    "old lora": (OLD_LORA_FILE,),
    "pipeline": ("model_index.json",),
}
# How TexDreamer's own inference code calls its models (Liu et al. 2024).
TEXDREAMER = {
    "model.prompt_template": "hutex, {prompt}, natural lighting, photo-realistic, 4k",
    "inference.negative_prompt": "overexposed, shadow, reflection, low quality, teeth, open mouth, eyes closed",
    "inference.num_inference_steps": 32,
    "inference.guidance_scale": 7.5,
    "inference.image_guidance_scale": 2.0,
    "inference.sampler": "euler_a",
    "data.resolution": 1024,
}


def layout_of(path: Path) -> str:
    """A name of FILES_OF_LAYOUT. Raises UserError for anything else, saying what is there."""
    if not path.exists():
        raise UserError(f"no checkpoint at {path}: give a folder or a LoRA file")
    if path.is_file():
        if path.suffix in WEIGHT_SUFFIXES:
            return "lora"
        raise UserError(f"{path} is no checkpoint: of single files only a LoRA is read ({', '.join(WEIGHT_SUFFIXES)})")
    for name, files in FILES_OF_LAYOUT.items():
        if all((path / file).is_file() for file in files):
            return name
    content = sorted(child.name + "/" * child.is_dir() for child in path.iterdir())
    listed = (", ".join(content[:8]) or "nothing") + (" ..." if len(content) > 8 else "")
    raise UserError(f"{path} is no checkpoint: found {listed}; expected one of {LAYOUTS}")


def updated(cfg: Config, values: dict) -> Config:
    """cfg with dotted keys set."""
    nested = cfg.model_dump()
    for key, value in values.items():
        *sections, name = key.split(".")
        level = nested
        for section in sections:
            level = level[section]
        level[name] = value
    return Config.model_validate(nested)


def load_any(path: str | Path, cfg: Config, overrides: Sequence[str] = ()) -> TrainedModel:
    """Loads a checkpoint of any layout above.

    cfg: what the user configured; it names the base where the layout does not. overrides: dotted keys given by hand,
    which win over a layout's own settings. Raises UserError for an unknown layout or another base's weights.
    """
    path = Path(path)
    layout = layout_of(path)
    if layout == "ours":
        return load_checkpoint(path, overrides)
    if layout in SETTINGS_OF_LAYOUT:
        given = {override.partition("=")[0] for override in overrides}
        own_settings = SETTINGS_OF_LAYOUT[layout](path)
        cfg = updated(cfg, {key: value for key, value in own_settings.items() if key not in given})
    if layout == "pipeline":  # the path is the base, whatever else is configured
        cfg = updated(cfg, {"model.pretrained_model": str(path)})
    return load_trained(cfg, None if layout == "pipeline" else path, aligner_file(path))


def texdreamer_settings(path: Path) -> dict:
    """TEXDREAMER, and its own image encoder where it lies beside."""
    folders = [path / name / "vision_encoder" for name in ("i2uv", "i2t")]
    image_encoder = next((str(folder) for folder in folders if folder.is_dir()), None)
    return {**TEXDREAMER, "model.image_encoder": image_encoder} if image_encoder else TEXDREAMER


# What a layout sets for lack of a configuration of its own.
SETTINGS_OF_LAYOUT = {"texdreamer": texdreamer_settings, "pipeline": lambda path: {"data.resolution": None}}


def aligner_file(path: Path) -> Path | None:
    """The aligner that lies with a checkpoint, under any of the known names."""
    names = ("i2uv/i2t_decoder.pth", "i2t/i2t_decoder.pth", "aligner.pth", ALIGNER_FILE)
    folder = path if path.is_dir() else path.parent
    return next((folder / name for name in names if (folder / name).is_file()), None)
