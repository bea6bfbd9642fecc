"""LoRA on the UNet: adding it, saving it where others can load it, loading it from ours, diffusers' or PEFT's files."""

import argparse
import math
import re
from pathlib import Path

import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer

from common.errors import UserError, exit_on_user_error, reason

LORA_FILE = "pytorch_lora_weights.safetensors"
ADAPTED = ("unet", "text_encoder")
TEXT_ENCODER_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def add_lora(unet, settings) -> list[torch.nn.Parameter]:
    """Puts a new LoRA (configuration.LoRA) on a frozen UNet → its parameters, float32 whatever the UNet's dtype.

    float32 because in bf16 most updates at lr 1e-4 are smaller than half a step and vanish.
    """
    return _add_adapter(unet, settings, settings.r, settings.alpha, settings.target_modules)


def add_text_encoder_lora(text_encoder, settings) -> list[torch.nn.Parameter]:
    """The same on the text encoder's attention, of rank text_encoder_r and at the UNet's scale of alpha / r."""
    alpha = settings.alpha * settings.text_encoder_r / settings.r
    return _add_adapter(text_encoder, settings, settings.text_encoder_r, alpha, TEXT_ENCODER_TARGETS)


def _add_adapter(module, settings, r: int, alpha: float, target_modules: list[str]) -> list[torch.nn.Parameter]:
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=settings.dropout,
        init_lora_weights="gaussian",
        target_modules=target_modules,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )
    try:
        module.add_adapter(config)
    except ValueError as error:
        raise UserError(f"model.lora.target_modules {target_modules}: {reason(error)}") from None
    cast_training_params(module, dtype=torch.float32)
    return lora_parameters(module)


def lora_parameters(module) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in module.named_parameters() if "lora_" in name]


def save_lora(base, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes diffusers' LoRA file, with rank and alpha in its metadata, for `load_lora_weights` anywhere.

    dtype: of the file. It holds the UNet's LoRA, and the text encoder's where there is one. The keys are PEFT's:
    diffusers' own older names cover attention alone, and a file that mixes both loads half.
    """
    layers, metadata = {}, {}
    for name in ADAPTED:
        module = getattr(base, name)
        if lora_parameters(module):
            config = module.peft_config["default"].to_dict()
            state = get_peft_model_state_dict(module, adapter_name="default")
            layers[f"{name}_lora_layers"] = {key: value.to(dtype).contiguous() for key, value in state.items()}
            metadata[f"{name}_lora_adapter_metadata"] = {
                key: value for key, value in config.items() if value is not None
            }
    StableDiffusionPipeline.save_lora_weights(folder, **layers, **metadata)


def load_lora(base, path: str | Path) -> None:
    """Puts a saved LoRA on a base's UNet, and on its text encoder where there is one for it, frozen.

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
            _load_peft_adapter(base.unet, folder)
        else:
            _load_diffusers_file(base, file)
    except Exception as error:  # diffusers, peft, pickle and safetensors each have their own errors
        raise UserError(f"cannot load the LoRA at {path}: {reason(error)}; was it made for another base?") from error
    if not lora_parameters(base.unet):
        raise UserError(f"the LoRA at {path} has no weights for this UNet; was it made for another base?")
    _freeze_lora(base)


def _load_diffusers_file(base, file: Path) -> None:
    state, network_alphas, metadata = StableDiffusionPipeline.lora_state_dict(
        str(file.parent), weight_name=file.name, return_lora_metadata=True, local_files_only=True
    )
    StableDiffusionPipeline.load_lora_into_unet(state, network_alphas, base.unet, metadata=metadata)
    if any(key.startswith("text_encoder.") for key in state):
        StableDiffusionPipeline.load_lora_into_text_encoder(state, network_alphas, base.text_encoder, metadata=metadata)
    for name in ADAPTED:
        expected = sum(key.startswith(f"{name}.") for key in state)
        loaded = len(lora_parameters(getattr(base, name)))
        if expected != loaded:
            raise ValueError(f"{loaded} of its {expected} weights fit this {name}")


def load_peft_adapters(base, folder: str | Path) -> None:
    """TexDreamer's layout: a PEFT adapter in unet/ and, if there is one, in text_encoder/. Raises UserError as
    `load_lora` does."""
    for name in ADAPTED:
        if (Path(folder) / name).is_dir():
            try:
                _load_peft_adapter(getattr(base, name), Path(folder) / name)
            except Exception as error:  # peft, pickle and safetensors each have their own errors
                raise UserError(
                    f"cannot load the LoRA at {Path(folder) / name}: {reason(error)}; was it made for another base?"
                ) from error
    _freeze_lora(base)


def _freeze_lora(base) -> None:
    for parameter in (*lora_parameters(base.unet), *lora_parameters(base.text_encoder)):
        parameter.requires_grad_(False)
    base.unet.eval()  # new layers come in training mode, with LoRA's dropout
    base.text_encoder.eval()


def _load_peft_adapter(module, folder: Path) -> None:
    """A PEFT model's folder (the seed's format), whose keys start with base_model.model."""
    weights = folder / "adapter_model.safetensors"
    if weights.exists():
        state = safetensors.torch.load_file(weights)
    else:
        state = torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
    module.add_adapter(LoraConfig.from_pretrained(folder))
    state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    result = set_peft_model_state_dict(module, state)
    if result.unexpected_keys:
        raise ValueError(
            f"{len(result.unexpected_keys)} of its weights fit no layer, such as {result.unexpected_keys[0]}"
        )


def merge_lora(base) -> None:
    """Adds the LoRA to the weights under it, so that inference pays nothing for it."""
    for name in ADAPTED:
        for module in getattr(base, name).modules():
            if isinstance(module, BaseTunerLayer) and not module.merged:
                module.merge()


def all_finite(tensors) -> bool:
    return all(math.isfinite(float(tensor.detach().sum())) for tensor in tensors)


FORMATS = ("kohya", "peft")
KOHYA_PREFIX = {"unet": "lora_unet", "text_encoder": "lora_te"}


def export_lora(file: str | Path, layout: str, out: str | Path) -> Path:
    """Our LoRA file in the layout of other tools → the path to give to them.

    kohya: one .safetensors with kohya's keys and an alpha for each layer, for ComfyUI and A1111. peft: a folder of
    adapter_config.json and adapter_model.safetensors, for peft.PeftModel. Raises UserError for another kind of file.
    """
    state, _, metadata = StableDiffusionPipeline.lora_state_dict(
        str(Path(file).parent), weight_name=Path(file).name, return_lora_metadata=True, local_files_only=True
    )
    if not metadata or layout not in FORMATS:
        raise UserError(f"{file} does not hold its alpha, or {layout!r} is none of {', '.join(FORMATS)}")
    out = Path(out)
    if layout == "peft":
        fields = LoraConfig.__dataclass_fields__
        config = {key.removeprefix("unet."): value for key, value in metadata.items() if key.startswith("unet.")}
        out.mkdir(parents=True, exist_ok=True)
        weights = {}
        for key, value in state.items():
            if key.startswith("unet."):
                weights[f"base_model.model.{key.removeprefix('unet.')}"] = value.contiguous()
        safetensors.torch.save_file(weights, out / "adapter_model.safetensors", {"format": "pt"})
        LoraConfig(**{key: value for key, value in config.items() if key in fields}).save_pretrained(out)
        return out
    weights = {}
    for key, value in state.items():
        component, _, name = key.partition(".")
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if not match:
            raise UserError(f"{file} has {name}, which kohya's layout has no place for; export it as peft")
        target = f"{KOHYA_PREFIX[component]}_{match[1].replace('.', '_')}"
        side = {"A": "lora_down", "B": "lora_up"}[match[2]]
        weights[f"{target}.{side}.weight"] = value.contiguous()
        alpha = metadata[f"{component}.lora_alpha"]
        if metadata.get(f"{component}.use_rslora"):
            alpha = alpha * metadata[f"{component}.r"] ** 0.5
        weights[f"{target}.alpha"] = torch.tensor(float(alpha))
    path = out.with_suffix(".safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, path)
    return path


def main():
    parser = argparse.ArgumentParser(description="LoRA files for other tools.")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write a checkpoint's LoRA in the layout of another tool")
    export.add_argument("checkpoint", type=Path, help="a checkpoint's folder, or its LoRA file")
    export.add_argument("--format", choices=FORMATS, required=True, help="kohya: ComfyUI, A1111; peft: PEFT")
    export.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with exit_on_user_error():
        file = args.checkpoint / LORA_FILE if args.checkpoint.is_dir() else args.checkpoint
        if not file.is_file():
            raise UserError(f"no {LORA_FILE} in {args.checkpoint}; give a checkpoint's folder")
        print(export_lora(file, args.format, args.out))


if __name__ == "__main__":
    main()
