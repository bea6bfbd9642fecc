"""LoRA on the UNet: adding it, saving it where others can load it, loading it from ours, diffusers' or PEFT's files."""

import math
from pathlib import Path

import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

from errors import UserError, reason

LORA_FILE = "pytorch_lora_weights.safetensors"


def add_lora(unet, settings) -> list[torch.nn.Parameter]:
    """Puts a new LoRA (configuration.LoRA) on a frozen UNet → its parameters, float32 whatever the UNet's dtype.

    float32 because in bf16 most updates at lr 1e-4 are smaller than half a step and vanish.
    """
    config = LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout, init_lora_weights="gaussian",
        target_modules=settings.target_modules,
    )  # fmt: skip
    try:
        unet.add_adapter(config)
    except ValueError as error:
        raise UserError(f"model.lora.target_modules {settings.target_modules}: {reason(error)}") from None
    cast_training_params(unet, dtype=torch.float32)
    return lora_parameters(unet)


def lora_parameters(unet) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in unet.named_parameters() if "lora_" in name]


def save_lora(unet, folder: Path) -> None:
    """Writes diffusers' LoRA file with rank and alpha in its metadata, for `load_lora_weights` anywhere.

    The keys are PEFT's: diffusers' own older names cover attention alone, and a file that mixes both loads half.
    """
    config = unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata={key: value for key, value in config.items() if value is not None},
    )


def load_lora(unet, path: str | Path) -> None:
    """Puts a saved LoRA on the UNet, frozen.

    path: a folder with diffusers' LoRA file (ours) or a PEFT adapter (adapter_config.json), or the diffusers
    file itself. Raises UserError when it is missing, unreadable or made for another base.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    is_peft = (folder / "adapter_config.json").exists() and (path.is_dir() or path.name.startswith("adapter_model"))
    file = path / LORA_FILE if path.is_dir() and not is_peft else path
    if not path.exists() or not (is_peft or file.is_file()):
        raise UserError(f"no LoRA at {path}: expected {LORA_FILE} or a PEFT folder with adapter_config.json")
    try:
        if is_peft:
            _load_peft_adapter(unet, folder)
        else:
            state, network_alphas, metadata = StableDiffusionPipeline.lora_state_dict(
                str(file.parent), weight_name=file.name, return_lora_metadata=True, local_files_only=True
            )
            StableDiffusionPipeline.load_lora_into_unet(state, network_alphas, unet, metadata=metadata)
            expected = sum(key.startswith("unet.") for key in state)
            if expected != len(lora_parameters(unet)):
                raise ValueError(f"{len(lora_parameters(unet))} of its {expected} weights fit this UNet")
    except Exception as error:  # diffusers, peft, pickle and safetensors each have their own errors
        raise UserError(f"cannot load the LoRA at {path}: {reason(error)}; was it made for another base?") from error
    parameters = lora_parameters(unet)
    if not parameters:
        raise UserError(f"the LoRA at {path} has no weights for this UNet; was it made for another base?")
    for parameter in parameters:
        parameter.requires_grad_(False)


def _load_peft_adapter(unet, folder: Path) -> None:
    """The seed's format: a PEFT model's folder, whose keys start with base_model.model."""
    weights = folder / "adapter_model.safetensors"
    if weights.exists():
        state = safetensors.torch.load_file(weights)
    else:
        state = torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
    unet.add_adapter(LoraConfig.from_pretrained(folder))
    state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    result = set_peft_model_state_dict(unet, state)
    if result.unexpected_keys:
        raise ValueError(
            f"{len(result.unexpected_keys)} of its weights fit no layer, such as {result.unexpected_keys[0]}"
        )


def all_finite(tensors) -> bool:
    return all(math.isfinite(float(tensor.detach().sum())) for tensor in tensors)
