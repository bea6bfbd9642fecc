"""Checkpoints: self-describing folders, written to a temporary name and renamed, so that each is whole or absent."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from base_model import BaseModel, load_base, pick_device
from conditioning import make_aligner
from configuration import Config, load_config, save_config
from diffusion import frozen_dtype, resolve_precision
from errors import UserError, reason
from lora_utils import LORA_FILE, all_finite, load_lora, lora_parameters, save_lora

CONFIG_FILE, ALIGNER_FILE, STATE_FILE = "config.yaml", "aligner.safetensors", "training_state.json"


def save_checkpoint(folder: Path, cfg: Config, task: str, global_step: int, unet, aligner: nn.Module | None) -> None:
    """Writes LoRA, aligner (unless None), the resolved configuration and the step. Raises UserError on NaN weights."""
    trained = lora_parameters(unet) + (list(aligner.parameters()) if aligner else [])
    if not all_finite(trained):
        raise UserError(f"weights at step {global_step} are not finite: {folder} is not written, earlier checkpoints "
                        "are whole; lower the learning rate")  # fmt: skip
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_lora(unet, partial)
    if aligner is not None:
        state = {key: value.detach().cpu().contiguous() for key, value in aligner.state_dict().items()}
        metadata = {key: str(value) for key, value in cfg.model.aligner.model_dump().items()}
        safetensors.torch.save_file(state, partial / ALIGNER_FILE, metadata)
    save_config(cfg, partial / CONFIG_FILE)
    (partial / STATE_FILE).write_text(json.dumps({"task": task, "global_step": global_step}) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def newest_checkpoint(out_dir: str | Path) -> Path:
    """The checkpoint under out_dir that was written last. Raises UserError when there is none."""
    found = [path.parent for path in Path(out_dir).glob(f"*/*/{STATE_FILE}") if not path.parent.name.startswith(".")]
    if not found:
        raise UserError(f"no checkpoint under {out_dir}; train one with 'python joint.py' or give --checkpoint DIR")
    return max(found, key=lambda path: (path / STATE_FILE).stat().st_mtime)


def load_aligner(path: Path, settings, base: BaseModel) -> nn.Module:
    """An aligner from safetensors or from a .pth state dict (tensors only, no code is run), in eval mode."""
    if not path.is_file():
        raise UserError(f"no aligner at {path}; give its .safetensors or .pth file")
    metadata = {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors each have their own errors
        raise UserError(f"cannot read aligner {path}: {reason(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} is not a state dict of tensors")
    kind = "pooled" if "cls_token" in state else "query"
    layers = 1 + max((int(key.split(".")[2]) for key in state if key.startswith("i2t.layers.")), default=0)
    # No state dict tells its number of heads: ours is in the metadata, the seed's pooled aligner has 8.
    heads = int(metadata.get("heads", 8 if kind == "pooled" else settings.heads))
    aligner = make_aligner(settings.model_copy(update={"kind": kind, "layers": layers, "heads": heads}), base)
    try:
        aligner.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"aligner {path} does not fit this base: {str(error).splitlines()[-1].strip()}") from None
    return aligner.eval().requires_grad_(False)


@dataclass
class TrainedModel:
    """A base with its LoRA, its aligner (None when it was trained on text alone) and its configuration."""

    base: BaseModel
    aligner: nn.Module | None
    cfg: Config


def load_trained(cfg: Config, lora: Path, aligner: Path | None) -> TrainedModel:
    """The configured base with the LoRA and, unless None, the aligner at those paths."""
    device = pick_device(cfg.training.device)
    dtype = frozen_dtype(resolve_precision(cfg.training.mixed_precision, device), device)
    base = load_base(cfg.model.pretrained_model, cfg.model.image_encoder, device, dtype, cfg.model.attention)
    load_lora(base.unet, lora)
    loaded = None if aligner is None else load_aligner(Path(aligner), cfg.model.aligner, base)
    return TrainedModel(base, loaded, cfg)


def load_checkpoint(folder: str | Path, overrides: list[str] = ()) -> TrainedModel:
    """A checkpoint folder of ours, rebuilt from its own configuration (with dotted overrides applied)."""
    folder = Path(folder)
    missing = [name for name in (CONFIG_FILE, LORA_FILE) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} is no checkpoint: {' and '.join(missing)} not found; a checkpoint holds "
            f"{CONFIG_FILE}, {LORA_FILE} and, for images, {ALIGNER_FILE}"
        )
    aligner = folder / ALIGNER_FILE
    return load_trained(load_config(folder / CONFIG_FILE, overrides), folder, aligner if aligner.is_file() else None)
