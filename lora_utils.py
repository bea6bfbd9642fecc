"""LoRA on the UNet and both encoders: adding it, saving it where others can load it, merging and exporting it."""

import argparse
import math
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora.dora import DoraConv2dLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from safetensors import safe_open

from common.errors import UserError, exit_on_user_error, reason
from common.files import write_whole
from common.text import parse_json

LORA_FILE = "pytorch_lora_weights.safetensors"
FAST_FOLDER = "fast"  # in a checkpoint: its fast adapter (models/fast.py)
ADAPTER_FILE = "adapter.json"  # of a personal adapter (models/adapters.py): the base it is for, its word
IMAGE_ENCODER_LORA_FILE = "image_encoder_lora.safetensors"  # its own: Stable Diffusion pipelines have no such encoder
ADAPTED = ("unet", "text_encoder")  # in LORA_FILE
IN_FILE = {LORA_FILE: ADAPTED, IMAGE_ENCODER_LORA_FILE: ("image_encoder",)}
CLIP_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def add_lora(unet, settings) -> list[torch.nn.Parameter]:
    """Puts a new LoRA (configuration.LoRA) on a frozen UNet → its parameters, float32 whatever the UNet's dtype.

    float32 because in bf16 most updates at lr 1e-4 are smaller than half a step and vanish.
    """
    return _add_adapter(unet, settings, settings.r, settings.alpha, settings.target_modules)


def add_text_encoder_lora(text_encoder, settings) -> list[torch.nn.Parameter]:
    """The same on the text encoder's attention, of rank text_encoder_r and at the UNet's scale of alpha / r."""
    return _add_clip_adapter(text_encoder, settings, settings.text_encoder_r)


def add_image_encoder_lora(image_encoder, settings) -> list[torch.nn.Parameter]:
    """The same on the image encoder's attention, of rank image_encoder_r."""
    return _add_clip_adapter(image_encoder, settings, settings.image_encoder_r)


def _add_clip_adapter(encoder, settings, r: int) -> list[torch.nn.Parameter]:
    return _add_adapter(encoder, settings, r, settings.alpha * r / settings.r, CLIP_TARGETS)


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
        raise UserError(f"target_modules {target_modules}: {reason(error)}") from None
    make_dora_view_free(module)
    cast_training_params(module, dtype=torch.float32)
    return lora_parameters(module)


def make_dora_view_free(module) -> None:
    """Lets DoRA's convolutions run in the memory format channels_last: PEFT flattens their weights by `view`, which
    only the plain format allows."""
    for layer in module.modules():
        if isinstance(layer, DoraConv2dLayer):
            layer.get_lora_weight = _flat_product


def _flat_product(lora_A: torch.nn.Module, lora_B: torch.nn.Module, adapter_name: str | None = None) -> torch.Tensor:
    """up @ down of a convolution: (outputs, inputs * height * width)."""
    return lora_B.weight.flatten(1) @ lora_A.weight.flatten(1)


def lora_parameters(module) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in module.named_parameters() if "lora_" in name]


def lora_layers(module) -> dict[str, BaseTunerLayer]:
    """PEFT's layers in a module, by their paths."""
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}


def adapted_modules(base) -> dict[str, torch.nn.Module]:
    """What may have a LoRA, by name; without the image encoder where the base has none."""
    return {name: module for name, module in base.modules().items() if name in sum(IN_FILE.values(), ())}


def save_lora(base, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes diffusers' LoRA file, with rank and alpha in its metadata, for `load_lora_weights` anywhere.

    dtype: of the file. It holds the UNet's LoRA, and the text encoder's where there is one; the image encoder's goes
    into IMAGE_ENCODER_LORA_FILE, written alike. The keys are PEFT's: diffusers' own older names cover attention alone,
    and a file that mixes both loads half.
    """
    for file, names in IN_FILE.items():
        tensors, metadata = {}, {}
        for name, module in adapted_modules(base).items():
            if name in names and lora_parameters(module):
                # Embeddings are never trained; "auto" asks the hub whether they were resized, at every save.
                state = get_peft_model_state_dict(module, save_embedding_layers=False)
                tensors |= {f"{name}.{key}": value.to(dtype).contiguous() for key, value in state.items()}
                # With lora_alpha: without it the file runs at the wrong scale elsewhere.
                config = module.peft_config["default"].to_dict()
                metadata |= {f"{name}.{key}": value for key, value in config.items() if value is not None}
        if tensors:
            StableDiffusionLoraLoaderMixin.write_lora_layers(
                tensors,
                folder,
                is_main_process=True,
                weight_name=file,
                save_function=None,
                safe_serialization=True,
                lora_adapter_metadata=metadata,
            )


def merge_lora(base) -> None:
    """Adds the LoRA to the weights under it, so that inference pays nothing for it."""
    for module in adapted_modules(base).values():
        for layer in lora_layers(module).values():
            if not layer.merged:
                layer.merge()


def bake_lora(base) -> None:
    """Merges the LoRA and takes PEFT's layers out: the base as it stands then can have another LoRA."""
    merge_lora(base)
    for module in adapted_modules(base).values():
        layers = lora_layers(module)
        for path, layer in layers.items():
            parent, _, child = path.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.get_base_layer())
        if layers:
            del module.peft_config
            module._hf_peft_config_loaded = False  # as diffusers and transformers note it


@contextmanager
def without_lora(module):
    """Inside, the module runs as if it had no LoRA."""
    layers = lora_layers(module).values()
    for layer in layers:
        layer._disable_adapters = True  # enable_adapters would also freeze what is being trained
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def all_finite(tensors) -> bool:
    return all(math.isfinite(float(tensor.detach().sum())) for tensor in tensors)


def read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file, or tensors of a pickle, of which no code is run.

    Raises UserError when it is damaged or holds something else.
    """
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as content:
                return {key: content.get_tensor(key) for key in content.keys()}, content.metadata() or {}  # noqa: SIM118
        tensors = load_pickle(file)
    except Exception as error:  # pickle, zip and safetensors each have their own errors
        raise UserError(f"cannot read {file}: {reason(error)}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise UserError(f"{file} is not a state dict of tensors")
    if any(map(is_larger_than_its_storage, tensors.values())):
        raise UserError(f"{file} holds a tensor of more numbers than are in the file; save it anew")
    return tensors, {}


def load_pickle(file: Path):
    """What torch.save wrote, on the CPU; no code of it is run. Raises what torch raises, and ValueError for an archive
    that unpacks to more than it is: torch.save compresses nothing."""
    with open(file, "rb") as start:
        is_archive = start.read(4) == b"PK\x03\x04"
    if is_archive:
        with zipfile.ZipFile(file) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > file.stat().st_size:
            raise ValueError(f"it unpacks to {size / 1e6:.0f} MB, more than its own size, as torch.save writes nothing")
    return torch.load(file, map_location="cpu", weights_only=True)


def is_larger_than_its_storage(tensor: torch.Tensor) -> bool:
    """Whether a file gives one number for many, by strides of 0, which whoever copies it would have to hold."""
    return tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()


def tensors_in(content) -> Iterator[torch.Tensor]:
    """The tensors anywhere in dictionaries, lists and tuples, each container once however often it is held."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)


def diffusers_config(metadata: dict[str, str], file: Path) -> dict:
    """What diffusers writes into a LoRA file of its PEFT configurations, each key after its component's name; {} where
    it says nothing."""
    try:
        return checked_config(parse_json(metadata.get("lora_adapter_metadata", "{}")))
    except ValueError as error:
        raise UserError(f"cannot read the metadata of {file}: {reason(error)}") from None


def checked_config(config) -> dict:
    """PEFT's configuration, keys bare or after a component's name. Raises ValueError where its scale is no number."""
    if not isinstance(config, dict):
        raise ValueError(f"a {type(config).__name__} is no configuration")
    for key, value in config.items():
        name = key.rpartition(".")[2]
        if name == "lora_alpha" and not isinstance(value, int | float):
            raise ValueError(f"{key} {value!r} is no number")
        if name in ("alpha_pattern", "rank_pattern") and not (
            value is None or (isinstance(value, dict) and all(isinstance(item, int | float) for item in value.values()))
        ):
            raise ValueError(f"{key} does not say a number for each layer")
    return config


def own_config(config: dict, component: str) -> dict:
    """Of diffusers' metadata, which has each component's name before PEFT's keys, one component's configuration."""
    return {name.removeprefix(f"{component}."): value for name, value in config.items()}


def scale_of(config: dict, layer: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) in a rank-stabilised LoRA (Kalajdzievski 2023). config: PEFT's."""
    if "lora_alpha" not in config:
        raise UserError(f"the file's configuration does not say the lora_alpha of {layer}; save the LoRA anew")
    alphas = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(alphas, layer), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


FORMATS = ("kohya", "peft")
KOHYA_PREFIX = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}


def export_lora(file: str | Path, layout: str, out: str | Path) -> Path:
    """Our LoRA file in the layout of other tools → the path to give to them.

    kohya: one .safetensors with kohya's keys and an alpha for each layer, for ComfyUI and A1111. peft: a folder of
    adapter_config.json and adapter_model.safetensors, for peft.PeftModel; the encoders' in text_encoder/ and
    image_encoder/, of which the last, from the file beside a checkpoint's, has no place in kohya's layout: said on
    stderr. Raises UserError for a file that does not say its alpha.
    """
    tensors, config = _with_config(Path(file))
    beside = Path(file).with_name(IMAGE_ENCODER_LORA_FILE)
    if layout == "kohya":
        if beside.is_file():
            print(f"note: {beside} is left out: kohya's layout has no image encoder", file=sys.stderr)
        return _export_kohya(tensors, config, Path(out))
    if beside.is_file():
        tensors, config = (both | own for both, own in zip((tensors, config), _with_config(beside)))
    return _export_peft(tensors, config, Path(out))


def _with_config(file: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors of a LoRA file, and what its metadata says of them."""
    tensors, metadata = read_tensors(file)
    config = diffusers_config(metadata, file)
    if not config:
        raise UserError(f"{file} does not hold its alpha; give a checkpoint of this project, or its {LORA_FILE}")
    return tensors, config


def export_word(folder: Path, out: Path) -> Path | None:
    """Copies the embedding of a personal adapter's word beside `out`, under the word as its name, which A1111 and
    ComfyUI read it by. None for what is no adapter. Raises UserError where out is that name."""
    if not (folder / ADAPTER_FILE).is_file():
        return None
    try:
        name = f"{parse_json((folder / ADAPTER_FILE).read_text())['word']}.safetensors"
        if Path(name).name != name:
            raise ValueError(f"{name} lies in another folder")
        embedding = (folder / name).read_bytes()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the word of {folder}: {reason(error)}") from None
    target = out.parent / name
    if out.name in (name, target.stem):
        raise UserError(f"--out {out} is the name of the word's own file; give the LoRA another, such as {out}_lora")
    write_whole(target, embedding)
    return target


def _export_peft(tensors: dict[str, torch.Tensor], config: dict, out: Path) -> Path:
    folders = {"unet": out, "text_encoder": out / "text_encoder", "image_encoder": out / "image_encoder"}
    for component, folder in folders.items():
        prefix = f"{component}."
        weights = {
            f"base_model.model.{key.removeprefix(prefix)}": value
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
        if weights:
            write_whole(folder / "adapter_model.safetensors", safetensors.torch.save(weights, {"format": "pt"}))
            options = own_config(config, component)
            options = {name: options[name] for name in LoraConfig.__dataclass_fields__.keys() & options.keys()}
            try:
                LoraConfig(**options).save_pretrained(folder)
            except OSError as error:
                raise UserError(f"cannot write {folder}: {reason(error)}; choose another place") from None
    return out


def _export_kohya(tensors: dict[str, torch.Tensor], config: dict, out: Path) -> Path:
    weights = {}
    for key, value in tensors.items():
        component, _, name = key.partition(".")
        layer, side = re.fullmatch(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)", name).groups()
        target = KOHYA_PREFIX[component] + layer.replace(".", "_")
        if side == "lora_A.weight":
            rank = len(value)
            weights[f"{target}.lora_down.weight"] = value
            weights[f"{target}.alpha"] = torch.tensor(scale_of(own_config(config, component), layer, rank) * rank)
        elif side == "lora_B.weight":
            weights[f"{target}.lora_up.weight"] = value
        else:  # LyCORIS' name for DoRA's magnitudes, with the axes of the layer's weight
            axes = tensors[f"{component}.{layer}.lora_A.weight"].ndim
            weights[f"{target}.dora_scale"] = value.reshape(-1, *[1] * (axes - 1))
    # Not with_suffix, which cuts "v1.5" to "v1".
    path = out if out.suffix == ".safetensors" else out.with_name(f"{out.name}.safetensors")
    write_whole(path, safetensors.torch.save(weights))
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
        word_file = export_word(file.parent, args.out)
        print(export_lora(file, args.format, args.out), *filter(None, [word_file]), sep="\n")


if __name__ == "__main__":
    main()
