"""Checkpoints: self-describing folders, written to a temporary name and renamed, so that each is whole or absent."""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from common.errors import UserError, reason
from common.files import PROJECT_ROOT
from config.configuration import Config, Output, load_config, save_config
from lora_utils import LORA_FILE, all_finite, load_lora, lora_parameters, save_lora
from models.base import BaseModel, load_configured_base, pick_device
from models.conditioning import make_aligner
from models.diffusion import frozen_dtype, resolve_precision

CONFIG_FILE, ALIGNER_FILE, STATE_FILE = "config.yaml", "aligner.safetensors", "training_state.json"
RESUME_FILE = "training_state.pt"
EMBEDDED_CHECKPOINT = PROJECT_ROOT / "embedded" / "checkpoint"  # joint training on the embedded base, made by joint.py


def save_checkpoint(
    folder: Path,
    cfg: Config,
    task: str,
    global_step: int,
    base: BaseModel,
    aligner: nn.Module | None,
    state: dict | None = None,
) -> None:
    """Writes LoRA, aligner (unless None), the resolved configuration, the step, and what resuming needs (unless None).

    Raises UserError on NaN weights or a full disk: no half checkpoint is left, and earlier ones stay.
    """
    trained = lora_parameters(base.unet) + lora_parameters(base.text_encoder)
    trained += list(aligner.parameters()) if aligner else []
    if not all_finite(trained):
        raise UserError(
            f"weights at step {global_step} are not finite: {folder} is not written, earlier checkpoints are whole; "
            "lower the learning rate"
        )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        dtype = torch.float16 if cfg.output.half_precision else torch.float32
        save_lora(base, partial, dtype)
        if aligner is not None:
            weights = {key: value.detach().cpu().to(dtype).contiguous() for key, value in aligner.state_dict().items()}
            metadata = {key: str(value) for key, value in cfg.model.aligner.model_dump().items()}
            safetensors.torch.save_file(weights, partial / ALIGNER_FILE, metadata)
        if state is not None:
            torch.save(state, partial / RESUME_FILE)
        save_config(cfg, partial / CONFIG_FILE)
        (partial / STATE_FILE).write_text(json.dumps({"task": task, "global_step": global_step}) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        needed = sum(parameter.numel() * 4 for parameter in trained) * (1 if state is None else 4) / 1e6
        raise UserError(
            f"cannot write {folder} ({reason(error)}): a checkpoint takes {needed:.0f} MB; earlier checkpoints are "
            "whole, --resume auto goes on from the last"
        ) from error


def drop_old_checkpoints(run_dir: Path, keep_last: int | None) -> None:
    """Deletes all but the `keep_last` checkpoints of a run that were written last; None keeps all."""
    if keep_last:
        for folder in by_time(run_dir)[:-keep_last]:
            shutil.rmtree(folder)


def by_time(run_dir: Path) -> list[Path]:
    """A run's checkpoints in the order they were written: a run begun anew may have fewer steps than an older one."""
    return sorted(run_dir.glob("step-*"), key=lambda folder: (folder.stat().st_mtime_ns, folder.name))


def newest_state(run_dir: Path) -> Path | None:
    """The checkpoint of a run that was written last; one that lacks a file is passed over with a warning."""
    for folder in reversed(by_time(run_dir)):
        missing = [name for name in (CONFIG_FILE, LORA_FILE, STATE_FILE, RESUME_FILE) if not (folder / name).is_file()]
        if not missing:
            return folder
        print(f"warning: {folder} lacks {', '.join(missing)} and is passed over", file=sys.stderr)
    return None


def load_state(folder: Path, cfg: Config, task: str) -> dict:
    """What a checkpoint holds for resuming. Raises UserError when it is of another run or cannot be read."""
    if not (folder / RESUME_FILE).is_file():
        raise UserError(f"{folder} cannot be resumed: it has no {RESUME_FILE}; give a step-* folder of training")
    saved, now = load_config(folder / CONFIG_FILE).model_dump(), cfg.model_dump()
    pairs = {"model": (saved["model"], now["model"])}
    for key in ("seed", "optimizer", "ema_decay"):
        pairs[f"training.{key}"] = (saved["training"][key], now["training"][key])
    for key in ("batch_size", "effective_batch_size", "weight_decay"):
        pairs[f"training.{task}.{key}"] = (saved["training"][task][key], now["training"][task][key])
    for key, (before, after) in pairs.items():
        if before != after:
            changed = [name for name in after if before[name] != after[name]] if isinstance(after, dict) else []
            if changed:
                key, before, after = f"{key}.{changed[0]}", before[changed[0]], after[changed[0]]
            raise UserError(f"{folder} was trained with {key} {before}, not {after}; resume with the same settings")
    try:
        state = torch.load(folder / RESUME_FILE, map_location="cpu", weights_only=True)
        saved_task = json.loads((folder / STATE_FILE).read_text())["task"]
    except Exception as error:  # pickle, zip and JSON each have their own errors
        raise UserError(f"cannot read {folder} ({reason(error)}); resume from an earlier checkpoint") from error
    if saved_task != task:
        raise UserError(f"{folder} is of task {saved_task}, not {task}")
    return state


def newest_checkpoint(out_dir: str | Path) -> Path:
    """The checkpoint under out_dir that was written last; where nobody has trained yet, the embedded one.

    Raises UserError when there is none.
    """
    folders = [file.parent for file in Path(out_dir).glob(f"*/*/{STATE_FILE}") if file.parent.name[0] != "."]
    if not folders and Path(out_dir) == Path(Output().out_dir) and (EMBEDDED_CHECKPOINT / LORA_FILE).exists():
        print(f"no checkpoint under {out_dir} yet: using the embedded one", file=sys.stderr)
        return EMBEDDED_CHECKPOINT
    if not folders:
        raise UserError(f"no checkpoint under {out_dir}; train one with 'python joint.py' or give --checkpoint DIR")
    return max(folders, key=lambda folder: (folder / STATE_FILE).stat().st_mtime)


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
    is_pooled = "cls_token" in state
    layers = 1 + max((int(key.split(".")[2]) for key in state if key.startswith("i2t.layers.")), default=0)
    # No state dict tells its number of heads: ours is in the metadata, the seed's pooled aligner has 8.
    heads = int(metadata.get("heads", 8 if is_pooled else settings.heads))
    own_settings = {"kind": "pooled" if is_pooled else "query", "layers": layers, "heads": heads}
    aligner = make_aligner(settings.model_copy(update=own_settings), base)
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
    base = load_configured_base(cfg.model, device, dtype)
    load_lora(base, lora)
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
