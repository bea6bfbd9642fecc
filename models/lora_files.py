"""LoRA files of every maker: read by one small reader, put on the base, and compared with what the model then has.

| maker | a layer's keys | scale |
| --- | --- | --- |
| ours, diffusers since 0.35 | unet.LAYER.lora_A.weight, .lora_B, .lora_magnitude_vector | lora_alpha in the metadata |
| diffusers before | unet.LAYER.lora.down.weight, ATTENTION.processor.to_q_lora.down.weight, .up; also bare | 1 |
| PEFT | base_model.model.LAYER.lora_A.weight, .lora_B, .lora_magnitude_vector | adapter_config.json beside |
| kohya, LyCORIS, OneTrainer | lora_unet_LAYER.lora_down.weight, .lora_up, .dora_scale; lora_te_LAYER | .alpha |

diffusers' own conversion drops .dora_scale, loses the attention layers' alphas, and takes neither PEFT's keys nor keys
without a prefix; PEFT puts the layers in and runs them.
"""

import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from torch import Tensor, nn

from common.errors import UserError, reason
from common.text import parse_json
from lora_utils import (
    ADAPTED,
    CLIP_TARGETS,
    IMAGE_ENCODER_LORA_FILE,
    LORA_FILE,
    all_finite,
    checked_config,
    diffusers_config,
    lora_parameters,
    make_dora_view_free,
    own_config,
    read_tensors,
    scale_of,
)

ADAPTER_CONFIG = "adapter_config.json"
OLD_LORA_FILE = "pytorch_lora_weights.bin"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt")
KEY = re.compile(
    r"(?P<layer>.+?)[._](?:"
    r"(?P<down>(?:lora_A(?:\.default)?|lora_down|lora(?:_linear_layer)?\.down)\.weight)|"
    r"(?P<up>(?:lora_B(?:\.default)?|lora_up|lora(?:_linear_layer)?\.up)\.weight)|"
    r"(?P<alpha>alpha)|"
    r"(?P<dora_scale>dora_scale)|"
    r"(?P<magnitude>lora_magnitude_vector(?:\.default)?(?:\.weight)?))"
)
PREFIXES = ("base_model.model.", "lora_unet_", "lora_te_", "unet.", "text_encoder.", "image_encoder.")
EMBEDDING = "bundle_emb."  # OneTrainer's, of textual inversion
# Kinds of update other than up · down, by what their keys hold (LyCORIS' and PEFT's names, and others').
OTHER_KINDS = {
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    ".a1.weight": "GLoRA",
    ".oft_": "OFT",
    ".boft_": "BOFT",
    ".on_input": "IA3",
    ".ia3_l": "IA3",
    ".vera_lambda": "VeRA",
    ".hra_u": "HRA",
    ".fourierft_": "FourierFT",
    ".lora_mid": "Tucker-decomposed LoRA",
    ".w_norm": "LyCORIS norm",
    ".diff": "weight-difference",
    "lora_controlnet": "Control-LoRA",
    ":up": "lora_diffusion",  # cloneofsimo's, whose layers have numbers for names
    "string_to_param": "textual inversion",
    "emb_params": "textual inversion",
}
# Models that are no Stable Diffusion 1 or 2 in diffusers' names, by how the layers of their LoRA files are called.
OTHER_MODELS = {
    r"lora_te[12]_|text_encoder_2\.|lora_unet_(input|middle|output)_block": "Stable Diffusion XL's",
    r"lora_unet_(double|single)_blocks|(diffusion_model\.)?(double|single)_blocks": "Flux's",
    r"lora_unet_joint_blocks|lora_te3_": "Stable Diffusion 3's",
    r"transformer\.|lora_transformer_": "a transformer's, such as Flux",
    r"diffusion_model\.": "ComfyUI's, with the original names of the UNet's blocks",
    r"lora_prior_|prior\.": "Stable Cascade's",
}
# Ways in which PEFT changes the weights under a LoRA; such a LoRA is none of the base's own.
CHANGED_BASES = ("pissa", "olora", "corda", "lora_ga", "loftq")
TOLERANCE = 1e-3  # of sums whose order may differ


@dataclass
class FileLayer:
    """What a file says of one layer: its weight W becomes W + scale · up @ down (Hu et al. 2022), and with magnitude
    m that sum divided by its norm over the inputs, times m (DoRA, Liu et al. 2024).

    down: (rank, inputs[, height, width]); up: (outputs, rank[, 1, 1]); magnitude: one value an output; all float32.
    """

    key: str  # as the file calls it
    component: str  # unet, text_encoder or image_encoder
    layer: str  # as the component's module calls it
    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None


def load_lora(base, path: str | Path) -> None:
    """Puts a saved LoRA on a base's UNet, and on its text encoder where there is one for it, frozen.

    path: a file of any maker above, or a folder: with diffusers' file, with a PEFT adapter (and the text encoder's in
    text_encoder/), or with PEFT adapters in unet/ and text_encoder/ (TexDreamer's). Raises UserError when it is
    missing, unreadable, of another kind or made for another base, and where the model has another update than the file.
    """
    layers = []
    for file in weight_files(Path(path)):
        layers += read_layers(base, file)
    _refuse_doubles(layers, path)
    _put_on(base, layers, ADAPTED, path)


def load_image_encoder_lora(base, path: Path) -> None:
    """Puts on a base's image encoder the LoRA that an aligner was trained with, frozen.

    path: of `image_encoder_lora_file`. Raises UserError as `load_lora` does, and unless the file has all of the
    encoder's attention layers and no others: without one of them the aligner reads other tokens than it knows.
    """
    layers = read_layers(base, path, ("image_encoder",))
    _refuse_doubles(layers, path)
    names_in_file = {layer.layer for layer in layers}
    needed = {name for name, _ in base.image_encoder.named_modules() if name.rpartition(".")[2] in CLIP_TARGETS}
    for names, fault in ((needed - names_in_file, "lacks"), (names_in_file - needed, "holds, unlike this encoder's,")):
        if names:
            raise UserError(
                f"{path} {fault} the LoRA of {len(names)} layers, such as {min(names)}; was it made for another image "
                "encoder?"
            )
    _put_on(base, layers, ("image_encoder",), path)


def image_encoder_lora_file(folder: Path) -> Path | None:
    """Where a checkpoint's folder has its image encoder's LoRA, as training or as the export to PEFT writes it."""
    names = (IMAGE_ENCODER_LORA_FILE, "image_encoder/adapter_model.safetensors")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _put_on(base, layers: list[FileLayer], components: tuple[str, ...], path: str | Path) -> None:
    """Gives the components these layers, checked and frozen."""
    try:
        for name in components:
            _put_in(getattr(base, name), [layer for layer in layers if layer.component == name])
    except Exception as error:  # peft has many kinds
        raise UserError(f"cannot load the LoRA at {path}: {reason(error)}; was it made for another base?") from error
    check_layers(base, layers, path)
    for name in components:
        module = getattr(base, name)
        for parameter in lora_parameters(module):
            parameter.requires_grad_(False)
        module.eval()  # new layers come in training mode, with LoRA's dropout


def weight_files(path: Path) -> list[Path]:
    """The files of weights at a path. Raises UserError where there is none."""
    if not path.is_dir():
        files = [path] if path.is_file() else []
    else:
        folders = [path, *(path / name for name in ADAPTED)]
        folders = [folder for folder in folders if (folder / ADAPTER_CONFIG).is_file()]
        names = ("adapter_model.safetensors", "adapter_model.bin") if folders else (LORA_FILE, OLD_LORA_FILE)
        files = []
        for folder in folders or [path]:
            of_folder = [folder / name for name in names if (folder / name).is_file()]
            if folders and not of_folder:
                raise UserError(f"{folder} has {ADAPTER_CONFIG} but no {' or '.join(names)}")
            files += of_folder[:1]
    if not files:
        raise UserError(f"no LoRA at {path}: expected {LORA_FILE} or a PEFT folder with {ADAPTER_CONFIG}")
    return files


def _config(file: Path, metadata: dict[str, str]) -> dict:
    """PEFT's configuration of a file's weights: beside it, or in its metadata; empty for files without."""
    config_file = file.with_name(ADAPTER_CONFIG)
    if not file.name.startswith("adapter_model") or not config_file.is_file():
        return diffusers_config(metadata, file)
    try:
        config = checked_config(parse_json(config_file.read_text()))
        kind, init = config.get("peft_type", "LORA"), str(config.get("init_lora_weights")).lower()
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read {config_file}: {reason(error)}") from None
    if kind != "LORA":
        raise UserError(f"{file.parent} is a {kind} adapter, which is not supported; LoRA and DoRA are")
    if init.startswith(CHANGED_BASES):
        raise UserError(
            f"{file.parent} was trained on weights that {init} changed; save it as a plain LoRA in PEFT "
            "(path_initial_model_for_weight_conversion)"
        )
    return config


def read_layers(base, file: Path, components: tuple[str, ...] = ADAPTED) -> list[FileLayer]:
    """What a file of weights says of each layer of the base's components.

    Raises UserError for what is no LoRA, and for layers that this base has not or has in another shape. Embeddings
    beside the LoRA are left out, said on stderr.
    """
    tensors, metadata = read_tensors(file)
    config, weights_of_layers = _config(file, metadata), _by_layer(tensors, file)
    if not config and any(key.startswith("base_model.model.") for key in weights_of_layers):
        print(f"note: {file} has no {ADAPTER_CONFIG} beside it to say its alpha: the scale is 1", file=sys.stderr)
    places = _places(base, components)
    strangers = [key for key in weights_of_layers if _underscored(key) not in places]
    if strangers or not weights_of_layers:
        raise UserError(
            f"{len(strangers)} of the {len(weights_of_layers)} layers of {file} have no counterpart in this base"
            f"{f', such as {strangers[0]}' if strangers else ''}; {_other_model(strangers)}"
        )
    return [
        _layer(base, key, *places[_underscored(key)], weights, config, file)
        for key, weights in weights_of_layers.items()
    ]


def _other_model(strangers: list[str]) -> str:
    """Whose layout the layers have that this base has not, as far as their names tell."""
    for pattern, layout in OTHER_MODELS.items():
        if any(re.match(pattern, key) for key in strangers):
            return f"its layout is {layout}, which is not supported"
    return "was it made for another base?"


def _by_layer(tensors: dict[str, Tensor], file: Path) -> dict[str, dict[str, Tensor]]:
    """A file's layers, each with its tensors by KEY's names: down, up, and where it has them alpha and magnitudes."""
    for mark, kind in OTHER_KINDS.items():
        if any(mark in key for key in tensors if not key.startswith(EMBEDDING)):
            raise UserError(f"{file} is a {kind} file, which is not supported; LoRA and DoRA files are")
    weights_of_layers, embeddings = defaultdict(dict), set()
    for key, value in tensors.items():
        match = KEY.fullmatch(key)
        if key.startswith(EMBEDDING):
            embeddings.add(key.split(".")[1])
        elif not match:
            raise UserError(f"{file} holds {key}, which is no weight of a LoRA; only LoRA and DoRA files are read")
        elif match.lastgroup in weights_of_layers[match["layer"]]:
            raise UserError(f"{file} holds the {match.lastgroup} of {match['layer']} twice")
        else:
            weights_of_layers[match["layer"]][match.lastgroup] = value.float()
    if embeddings:
        words = ", ".join(sorted(embeddings))
        print(f"warning: {file} holds embeddings too, which are left out: prompts cannot use {words}", file=sys.stderr)
    for key, weights in weights_of_layers.items():
        if not {"down", "up"} <= weights.keys():
            raise UserError(f"{file} holds {', '.join(weights)} of {key}, but a LoRA has a matrix down and one up")
        if not all_finite(weights.values()):
            raise UserError(f"{file} holds values of {key} that are not finite")
    return weights_of_layers


def _places(base, components: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """Where each layer that can have a LoRA is, (component, module's name), by every name that files have for it."""
    places = {}
    for component in components:
        for layer, module in getattr(base, component).named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                name = layer.replace(".", "_")
                names = {name, re.sub("to_out_0$", "to_out", name)}
                if component == "text_encoder":
                    # diffusers once called them as the UNet's; text_model is a module in transformers before 5.
                    names.add(re.sub("self_attn_(q|k|v|out)_proj$", r"self_attn_to_\1", name))
                    names |= {f"text_model_{name}" for name in names}
                if component == "image_encoder":
                    names.add(f"vision_model_{name}")
                assert not names & places.keys(), names
                places |= dict.fromkeys(names, (component, layer))
    return places


def _bare(key: str) -> str:
    """A layer's key without the prefix of its maker."""
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _underscored(key: str) -> str:
    """A layer's key as kohya writes names."""
    return _bare(key).replace(".processor.", ".").replace(".", "_")


def _refuse_doubles(layers: list[FileLayer], path: str | Path) -> None:
    keys_of_places = defaultdict(list)
    for layer in layers:
        keys_of_places[layer.component, layer.layer].append(layer.key)
    for keys in keys_of_places.values():
        if len(keys) > 1:
            raise UserError(f"{path} holds one layer twice, as {' and as '.join(keys)}")


def _layer(
    base, key: str, component: str, layer: str, weights: dict[str, Tensor], config: dict, file: Path
) -> FileLayer:
    down, up, base_weight = weights["down"], weights["up"], getattr(base, component).get_submodule(layer).weight
    rank, outputs = len(down) if down.ndim else 0, len(base_weight)
    is_down_right = rank > 0 and _trimmed(down.shape[1:]) == _trimmed(base_weight.shape[1:])
    if not is_down_right or _trimmed(up.shape) != _trimmed((outputs, rank)):
        raise UserError(
            f"{key} of {file} has the shapes {list(down.shape)} and {list(up.shape)}, which do not fit this base's "
            f"layer of {list(base_weight.shape)}; was it made for another base?"
        )
    config = own_config(config, component)
    scale = 1.0  # where nothing says alpha, it is the rank
    if "alpha" in weights:
        if weights["alpha"].numel() != 1:
            raise UserError(f"the alpha of {key} of {file} is {weights['alpha'].numel()} numbers; it is to be one")
        scale = weights["alpha"].item() / rank
    elif "lora_alpha" in config:
        scale = scale_of(config, _bare(key), rank)
    magnitude = weights.get("magnitude", weights.get("dora_scale"))
    if magnitude is not None and magnitude.shape[:1] != (outputs,) and "dora_scale" in weights:
        raise UserError(f"{key} of {file} has DoRA magnitudes of its inputs, which is not supported; of outputs is")
    if magnitude is not None and magnitude.numel() != outputs:
        raise UserError(f"{key} of {file} has {magnitude.numel()} DoRA magnitudes for {outputs} outputs")
    if magnitude is None and config.get("use_dora"):
        raise UserError(f"{file} says that it is a DoRA and holds no magnitude of {key}")
    down, up = down.reshape(rank, *base_weight.shape[1:]), up.reshape(outputs, rank, *[1] * (base_weight.ndim - 2))
    return FileLayer(key, component, layer, down, up, scale, None if magnitude is None else magnitude.flatten())


def _trimmed(shape) -> list[int]:
    """A shape without the ones at its end: a linear layer's weights are those of a 1x1 convolution."""
    shape = list(shape)
    while shape and shape[-1] == 1:
        shape.pop()
    return shape


def _put_in(module: nn.Module, layers: list[FileLayer]) -> None:
    """Gives a module PEFT's layers with these weights."""
    if not layers:
        return
    config = LoraConfig(
        target_modules="|".join(re.escape(layer.layer) for layer in layers),
        rank_pattern=_pattern({layer.layer: len(layer.down) for layer in layers}),
        alpha_pattern=_pattern({layer.layer: layer.scale * len(layer.down) for layer in layers}),
        use_dora=any(layer.magnitude is not None for layer in layers),
    )
    state = {}
    for layer in layers:
        state[f"{layer.layer}.lora_A.weight"], state[f"{layer.layer}.lora_B.weight"] = layer.down, layer.up
        if layer.magnitude is not None:
            is_convolution = layer.down.ndim == 4
            magnitude = layer.magnitude.view(1, -1, 1, 1) if is_convolution else layer.magnitude
            state[f"{layer.layer}.lora_magnitude_vector"] = magnitude
    inject_adapter_in_model(config, module, state_dict=state)
    set_peft_model_state_dict(module, state)
    make_dora_view_free(module)
    module._hf_peft_config_loaded = True  # as diffusers and transformers note it


def _pattern(values: dict[str, float]) -> dict[str, float]:
    """PEFT's pattern of a value for each layer: a regular expression for each value, since it tries one by one."""
    layers_of_values = defaultdict(list)
    for layer, value in values.items():
        layers_of_values[value].append(re.escape(layer))
    return {f"^(?:{'|'.join(layers)})": value for value, layers in layers_of_values.items()}


def check_layers(base, layers: list[FileLayer], path: str | Path) -> None:
    """Raises UserError unless the model has of each layer what the file says: scale, up @ down on a random vector, and
    magnitudes. Products with vectors alone: 0.6 s on one core for the 282 layers of Stable Diffusion 1.5 at rank 128.
    """
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        module = getattr(base, layer.component).get_submodule(layer.layer)
        vector = torch.randn(layer.down[0].numel(), generator=generator)
        down, up = (side["default"].weight.detach().cpu() for side in (module.lora_A, module.lora_B))
        dtype, magnitude = up.dtype, None  # a base in half precision rounds what the file says
        if module.lora_magnitude_vector:
            magnitude = module.lora_magnitude_vector["default"].weight.detach().cpu().float().flatten()
        file_product = _product(layer.up.to(dtype), layer.down.to(dtype), vector)
        file_magnitude = None if layer.magnitude is None else layer.magnitude.to(dtype).float()
        comparisons = {
            "scale": (torch.tensor(layer.scale), torch.tensor(float(module.scaling["default"]))),
            "up x down": (file_product, _product(up, down, vector)),
            "magnitude": (file_magnitude, magnitude),
        }
        for name, (in_file, in_model) in comparisons.items():
            if not _is_close(in_file, in_model):
                raise UserError(
                    f"{path}: {name} of {layer.key} is {_size(in_file)} in the file but {_size(in_model)} in the "
                    "model, which so would not run as it was trained; please report it"
                )


def _product(up: Tensor, down: Tensor, vector: Tensor) -> Tensor:
    return up.float().flatten(1) @ (down.float().flatten(1) @ vector)


def _is_close(in_file: Tensor | None, in_model: Tensor | None) -> bool:
    """Within TOLERANCE of each other; NaN and infinity are close to nothing."""
    if in_file is None or in_model is None:
        return in_file is in_model
    return bool((in_file - in_model).norm() <= TOLERANCE * in_file.norm())


def _size(values: Tensor | None) -> str:
    return "none" if values is None else f"{values.norm():.4g}"
