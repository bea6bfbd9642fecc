"""Fast adapters: a second LoRA beside a checkpoint's own, with which few steps without guidance do (distill.py).

It lies in the checkpoint's folder, in FOLDER: diffusers' LoRA file, and fast.json, which says for what it is.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common.errors import UserError, reason
from common.text import parse_json
from lora_utils import FAST_FOLDER, LORA_FILE, bake_lora
from models.adapters import weights_hash
from models.checkpoints import TrainedModel
from models.interchange import updated
from models.lora_files import load_lora

ABOUT_FILE = "fast.json"


@dataclass(frozen=True)
class Fast:
    """What fast.json says. base_weights: `weights_hash` of the checkpoint; windows: the fewest steps it is made for."""

    base_weights: str
    windows: int


def save_fast(folder: Path, fast: Fast) -> None:
    (folder / ABOUT_FILE).write_text(json.dumps(asdict(fast), indent=2) + "\n")


def load_fast(trained: TrainedModel, checkpoint: Path, steps: int) -> TrainedModel:
    """The model with the checkpoint's fast adapter in its weights, and `steps` steps of DDIM without guidance as its
    own settings. Raises UserError where there is no such adapter, or one of other weights."""
    folder = checkpoint / FAST_FOLDER
    if not (folder / ABOUT_FILE).is_file():
        raise UserError(f"{checkpoint} has no fast adapter; make one with python distill.py --checkpoint {checkpoint}")
    try:
        fast = Fast(**parse_json((folder / ABOUT_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {folder / ABOUT_FILE}: {reason(error)}") from None
    if fast.base_weights != weights_hash(checkpoint):
        raise UserError(f"{folder} was made for other weights; make it anew: distill.py --checkpoint {checkpoint}")
    bake_lora(trained.base)
    load_lora(trained.base, folder / LORA_FILE)
    bake_lora(trained.base)
    values = {"num_inference_steps": steps, "sampler": "ddim", "guidance_scale": 1.0, "image_guidance_scale": None}
    cfg = updated(trained.cfg, {f"inference.{name}": value for name, value in values.items()})
    return replace(trained, cfg=cfg)


def fast_weights_hash(checkpoint: Path) -> str:
    """A short hash of a checkpoint's fast adapter."""
    return weights_hash(checkpoint / FAST_FOLDER / LORA_FILE)
