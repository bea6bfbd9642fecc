"""Checkpoints: self-describing folders, written to a temporary name and renamed, so that each is whole or absent."""

import json
import re
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from common.errors import UserError, reason
from common.files import PROJECT_ROOT, remove_folder, replace_folder
from common.text import parse_json
from config.configuration import Config, Output, load_config, save_config
from lora_utils import (
    IMAGE_ENCODER_LORA_FILE,
    LORA_FILE,
    adapted_modules,
    all_finite,
    is_larger_than_its_storage,
    load_pickle,
    lora_parameters,
    read_tensors,
    save_lora,
    tensors_in,
)
from models.adapters import Adapter, refuse_adapter, save_word
from models.base import BaseModel, load_configured_base, pick_device
from models.conditioning import aligner_from_state
from models.diffusion import frozen_dtype, resolve_precision
from models.lora_files import image_encoder_lora_file, load_image_encoder_lora, load_lora
from models.partial import PARTIAL_FILE, PartialInput, load_partial_input, save_partial_input

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
    adapter: Adapter | None = None,
    partial_input: PartialInput | None = None,
) -> None:
    """Writes LoRA, aligner (unless None), the resolved configuration, the step, and what resuming needs (unless None);
    of a personal adapter, its word too; and the input for partial textures where there is one.

    Raises UserError on NaN weights or a full disk: no half checkpoint is left, and earlier ones stay.
    """
    trained = [parameter for module in adapted_modules(base).values() for parameter in lora_parameters(module)]
    trained += list(aligner.parameters()) if aligner else []
    trained += list(partial_input.parameters()) if partial_input else []
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
        if adapter is not None:
            save_word(partial, adapter, base.text_encoder.get_input_embeddings().vectors)
        if aligner is not None:
            weights = {key: value.detach().cpu().to(dtype).contiguous() for key, value in aligner.state_dict().items()}
            metadata = {key: str(value) for key, value in cfg.model.aligner.model_dump().items()}
            safetensors.torch.save_file(weights, partial / ALIGNER_FILE, metadata)
        if partial_input is not None:
            save_partial_input(partial, partial_input, dtype)
        if state is not None:
            torch.save(state, partial / RESUME_FILE)
        save_config(cfg, partial / CONFIG_FILE)
        written = max(time.time(), *(saved["written"] + 0.001 for saved in saved_states(folder.parent).values()), 0)
        own_state = {"task": task, "global_step": global_step, "written": written}
        (partial / STATE_FILE).write_text(json.dumps(own_state) + "\n")
        replace_folder(partial, folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        needed = sum(parameter.numel() * 4 for parameter in trained) * (1 if state is None else 4) / 1e6
        raise UserError(
            f"cannot write {folder} ({reason(error)}): a checkpoint takes {needed:.0f} MB; earlier checkpoints are "
            "whole, --resume auto goes on from the last"
        ) from error


def saved_states(run_dir: Path) -> dict[Path, dict]:
    """The checkpoints that training wrote into a folder, in the order it wrote them, each with what its
    training_state.json says: task, global_step, written.

    "written" is the time of writing in seconds since 1970, but always later than of those that lie beside it, whatever
    the clock says. It decides, not the time that the file system tells, which copying sets anew, nor the step: a run
    begun anew in the folder of an older one has fewer steps, and its checkpoints are the newer. Those of versions that
    did not note the time come first, by their steps. Only a folder of the very name that training gives, step-NNNNNN
    with the step that its own state says, is one: a copy that was renamed, or an archive, is somebody's own.
    """
    states = {}
    for folder in run_dir.glob("step-*"):
        try:
            state = parse_json((folder / STATE_FILE).read_text())
            step, written = int(state["global_step"]), float(state.get("written", 0))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            if re.fullmatch(r"step-\d{6,}", folder.name):
                print(f"warning: {folder} does not say its step ({reason(error)}) and is left alone", file=sys.stderr)
            continue
        if folder.name == f"step-{step:06d}":
            states[folder] = {**state, "global_step": step, "written": written}
    return dict(sorted(states.items(), key=lambda item: (item[1]["written"], item[1]["global_step"])))


def drop_old_checkpoints(run_dir: Path, keep_last: int | None) -> None:
    """Deletes all but the `keep_last` of `saved_states` that were written last; None keeps all."""
    if keep_last:
        for folder in list(saved_states(run_dir))[:-keep_last]:
            remove_folder(folder)
        for left_by_one_killed in run_dir.glob(".step-*.old"):
            shutil.rmtree(left_by_one_killed, ignore_errors=True)


def newest_state(run_dir: Path) -> Path | None:
    """The checkpoint of a folder that was written last and can be resumed."""
    return first_whole(reversed(saved_states(run_dir)), (CONFIG_FILE, LORA_FILE, RESUME_FILE))


def first_whole(folders: Iterable[Path], needed: tuple[str, ...]) -> Path | None:
    """The first folder that has the needed files; those before it are passed over with a warning."""
    for folder in folders:
        missing = [name for name in needed if not (folder / name).is_file()]
        if not missing:
            return folder
        print(f"warning: {folder} lacks {', '.join(missing)} and is passed over", file=sys.stderr)
    return None


def check_resumable(folder: Path) -> None:
    """Raises UserError for a folder without what resuming needs."""
    if not (folder / RESUME_FILE).is_file():
        raise UserError(f"{folder} cannot be resumed: it has no {RESUME_FILE}; give a step-* folder of training")


def load_state(folder: Path, cfg: Config, task: str) -> dict:
    """What a checkpoint holds for resuming. Raises UserError when it is of another run or cannot be read."""
    check_resumable(folder)
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
        state = load_pickle(folder / RESUME_FILE)
        saved_task = read_state(folder)["task"]
    except Exception as error:  # pickle and zip each have their own errors
        raise UserError(f"cannot read {folder} ({reason(error)}); resume from an earlier checkpoint") from error
    if saved_task != task:
        raise UserError(f"{folder} is of task {saved_task}, not {task}")
    if not isinstance(state, dict):
        raise UserError(f"{folder / RESUME_FILE} holds a {type(state).__name__}; resume from an earlier checkpoint")
    if any(map(is_larger_than_its_storage, tensors_in(state))):
        raise UserError(f"{folder / RESUME_FILE} holds a tensor of more numbers than are in the file; do not use it")
    return state


def read_state(folder: Path) -> dict:
    """The task and the step that a checkpoint says it is of. Raises UserError when it does not."""
    try:
        state = parse_json((folder / STATE_FILE).read_text())
        return {"task": str(state["task"]), "global_step": int(state["global_step"])}
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{folder / STATE_FILE} does not say the task and the step ({reason(error)})") from None


def newest_checkpoint(out_dir: str | Path) -> Path:
    """The checkpoint under out_dir that was written last; where nobody has trained yet, the embedded one.

    Raises UserError when there is none.
    """
    states = {}
    for run_dir in Path(out_dir).glob("*/"):
        states |= saved_states(run_dir)
    newest_first = sorted(states, key=lambda folder: (states[folder]["written"], states[folder]["global_step"]))[::-1]
    newest = first_whole(newest_first, (CONFIG_FILE, LORA_FILE))
    if newest:
        return newest
    if not states and Path(out_dir) == Path(Output().out_dir) and (EMBEDDED_CHECKPOINT / LORA_FILE).exists():
        print(f"no checkpoint under {out_dir} yet: using the embedded one", file=sys.stderr)
        return EMBEDDED_CHECKPOINT
    raise UserError(f"no checkpoint under {out_dir}; train one with 'python joint.py' or give --checkpoint DIR")


def load_aligner(path: Path, settings, base: BaseModel) -> nn.Module:
    """An aligner from safetensors or from a .pth state dict (tensors only, no code is run), in eval mode."""
    if not path.is_file():
        raise UserError(f"no aligner at {path}; give its .safetensors or .pth file")
    state, metadata = read_tensors(path)
    # No state dict tells its number of heads: ours is in the metadata, and in the first of ours in the configuration
    # alone; None is what the peers' code has.
    try:
        heads = int(metadata.get("heads", settings.heads)) if path.suffix == ".safetensors" else None
        aligner = aligner_from_state(state, base.context_tokens, heads)
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError, ArithmeticError) as error:  # torch's
        lines = str(error).strip().splitlines()  # of load_state_dict's, the first is a heading
        raise UserError(f"cannot load the aligner {path}: {lines[min(1, len(lines) - 1)].strip()}") from None
    check_fits(aligner, path, base)
    return aligner.to(base.device).eval().requires_grad_(False)


def check_fits(aligner: nn.Module, path: Path, base: BaseModel) -> None:
    """Raises UserError unless an aligner reads the base's image tokens and gives its UNet's context."""
    if base.image_encoder is None:
        raise UserError("this base has no image encoder; set model.image_encoder to a CLIP vision model")
    needed = (base.image_encoder.config.hidden_size, base.context_tokens, base.unet.config.cross_attention_dim)
    if aligner.shape != needed:
        (reads, length, width), (image_dim, context_tokens, context_dim) = aligner.shape, needed
        raise UserError(
            f"the aligner {path} does not fit this base: from image tokens of {reads} it makes {length} of {width}, "
            f"but the image encoder's are of {image_dim} and the UNet reads {context_tokens} of {context_dim}"
        )


@dataclass
class TrainedModel:
    """A base with its LoRA, its aligner (None when it was trained on text alone) and its configuration.

    partial_input: for partial textures, where it was trained with them; not yet attached to the UNet.
    """

    base: BaseModel
    aligner: nn.Module | None
    cfg: Config
    partial_input: PartialInput | None = None


def load_trained(cfg: Config, lora: Path | None, aligner: Path | None) -> TrainedModel:
    """The configured base with the LoRA and the aligner at those paths, unless None.

    Where the image encoder's LoRA lies beside the aligner, the aligner reads the tokens of both.
    """
    if lora is not None:
        refuse_adapter(Path(lora))
    device = pick_device(cfg.training.device)
    dtype = frozen_dtype(resolve_precision(cfg.training.mixed_precision, device), device)
    base = load_configured_base(cfg.model, device, dtype)
    if lora is not None:
        load_lora(base, lora)
    if aligner is None:
        return TrainedModel(base, None, cfg)
    loaded = load_aligner(Path(aligner), cfg.model.aligner, base)
    if image_encoder_lora := image_encoder_lora_file(Path(aligner).parent):
        load_image_encoder_lora(base, image_encoder_lora)
    return TrainedModel(base, loaded, cfg)


def load_checkpoint(folder: str | Path, overrides: Sequence[str] = ()) -> TrainedModel:
    """A checkpoint folder of ours, rebuilt from its own configuration (with dotted overrides applied)."""
    folder = Path(folder)
    missing = [name for name in (CONFIG_FILE, LORA_FILE) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} is no checkpoint: {' and '.join(missing)} not found; a checkpoint holds "
            f"{CONFIG_FILE}, {LORA_FILE} and, for images, {ALIGNER_FILE}"
        )
    cfg, aligner = load_config(folder / CONFIG_FILE, overrides), folder / ALIGNER_FILE
    needs_lora = aligner.is_file() and cfg.model.lora.image_encoder_r is not None
    if needs_lora != (image_encoder_lora_file(folder) is not None):
        rank = f"model.lora.image_encoder_r {cfg.model.lora.image_encoder_r}"
        raise UserError(
            f"{folder} was trained with {rank} but has no {IMAGE_ENCODER_LORA_FILE}; copy it whole"
            if needs_lora
            else f"{folder} holds {IMAGE_ENCODER_LORA_FILE} for no aligner with {rank}; copy the checkpoint whole"
        )
    trained = load_trained(cfg, folder, aligner if aligner.is_file() else None)
    if (folder / PARTIAL_FILE).is_file():
        trained.partial_input = load_partial_input(folder / PARTIAL_FILE, trained.base.unet)
    elif trained.aligner is not None and (folder / STATE_FILE).is_file():
        task = read_state(folder)["task"]
        if share := getattr(getattr(cfg.training, task, None), "partial_share", 0):
            told = f"training.{task}.partial_share {share}"
            raise UserError(f"{folder} was trained with {told} but has no {PARTIAL_FILE}; copy it whole")
    return trained
