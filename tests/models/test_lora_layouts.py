"""Every public layout of LoRA files, at the full sizes of Stable Diffusion 1.5: read, or refused by its name.

Each is written here from its maker's own definition: diffusers' and PEFT's state dicts, kohya-ss/sd-scripts
(networks/lora.py, oft.py), LyCORIS (lycoris/modules), OneTrainer (LoRAModule), ai-toolkit (its LoRA network keeps
kohya's names), ComfyUI's LoraSave, lora_diffusion. What each does to the model is tested in test_lora_files.py.
"""

import re
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from common.errors import UserError
from models.lora_files import read_layers, weight_files
from tests.faults.tally import count

LINEAR_IN_TRANSFORMERS = 192  # with the 1x1 convolutions: sd-scripts says so of Stable Diffusion 1
TEXT_LAYERS = 72  # the same of its text encoder


@pytest.fixture(scope="module")
def stable_diffusion():
    """Stable Diffusion 1.5's UNet and text encoder as their published configurations have them, without memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
            )
        )
    assert unet.config.block_out_channels == (320, 640, 1280, 1280)
    return SimpleNamespace(unet=unet, text_encoder=text_encoder)


def layers_of(base, chosen: str) -> list[tuple[str, str]]:
    """(component, layer) of the layers that can have a LoRA. chosen: which layers, by a regular expression."""
    places = []
    for component in ("unet", "text_encoder"):
        for layer, module in getattr(base, component).named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                name = layer.removeprefix("text_model.")
                if re.search(chosen, f"{component}.{name}"):
                    places.append((component, layer))
    return places


def short(layer: str) -> str:
    """A text encoder's layer without the module that transformers before 5 had around it."""
    return layer.removeprefix("text_model.")


def matrices(base, component: str, layer: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = getattr(base, component).get_submodule(layer).weight
    down = torch.full((rank, *weight.shape[1:]), 0.01)
    return down, torch.full((len(weight), rank, *[1] * (weight.ndim - 2)), 0.01)


ATTENTION = r"^unet.*attn[12]\."
TRANSFORMERS = r"^unet.*attentions"
CONVOLUTIONS = r"^unet.*(attentions|resnets|samplers)"
TEXT = r"|^text_encoder.*(self_attn|mlp)"
TEXT_ATTENTION = r"|^text_encoder.*self_attn"


def kohya(component, layer):
    return ("lora_unet_" if component == "unet" else "lora_te_text_model_") + short(layer).replace(".", "_")


def processors(component, layer):
    if component == "text_encoder":
        return "text_encoder.text_model." + re.sub(r"\.(q|k|v|out)_proj$", r".to_\1_lora", short(layer))
    block, _, name = layer.removesuffix(".0").rpartition(".")
    return f"unet.{block}.processor.{name}_lora"


def diffusers(component, layer):
    return f"unet.{layer}.lora" if component == "unet" else f"text_encoder.text_model.{short(layer)}.lora_linear_layer"


def prefixed(component, layer):
    return f"{component}.{layer}"


# Layout → layers, a layer's key, names of down and up, what else it has for each layer.
ALPHA, DORA = "alpha", "dora_scale"
READ = {
    "diffusers' attention processors": (ATTENTION + TEXT_ATTENTION, processors, "down.weight", "up.weight", ()),
    "diffusers' attention processors, bare": (
        ATTENTION, lambda *place: processors(*place).removeprefix("unet."), "down.weight", "up.weight", ()),
    "diffusers before PEFT": (CONVOLUTIONS + TEXT, diffusers, "down.weight", "up.weight", ()),
    "diffusers with PEFT": (CONVOLUTIONS + TEXT, prefixed, "lora_A.weight", "lora_B.weight", ()),
    "diffusers with PEFT, DoRA": (
        CONVOLUTIONS, prefixed, "lora_A.weight", "lora_B.weight", ("lora_magnitude_vector",)),
    "PEFT": (CONVOLUTIONS, lambda _, layer: f"base_model.model.{layer}", "lora_A.weight", "lora_B.weight", ()),
    "PEFT, DoRA": (
        CONVOLUTIONS, lambda _, layer: f"base_model.model.{layer}", "lora_A.weight", "lora_B.weight",
        ("lora_magnitude_vector",)),
    "PEFT without prefix": (CONVOLUTIONS, lambda _, layer: layer, "lora_A.weight", "lora_B.weight", ()),
    "PEFT with its adapter's name": (
        CONVOLUTIONS, lambda _, layer: f"base_model.model.{layer}", "lora_A.default.weight",
        "lora_B.default.weight", ()),
    "kohya": (TRANSFORMERS + TEXT, kohya, "lora_down.weight", "lora_up.weight", (ALPHA,)),
    "kohya without alpha": (TRANSFORMERS + TEXT, kohya, "lora_down.weight", "lora_up.weight", ()),
    "kohya's LoCon": (CONVOLUTIONS + TEXT, kohya, "lora_down.weight", "lora_up.weight", (ALPHA,)),
    "LyCORIS' LoCon, every layer": (r"^unet" + TEXT, kohya, "lora_down.weight", "lora_up.weight", (ALPHA,)),
    "kohya's DoRA": (CONVOLUTIONS + TEXT, kohya, "lora_down.weight", "lora_up.weight", (ALPHA, DORA)),
    "OneTrainer": (TRANSFORMERS + TEXT, kohya, "lora_down.weight", "lora_up.weight", (ALPHA, "bundle")),
    "OneTrainer's DoRA": (TRANSFORMERS + TEXT, kohya, "lora_down.weight", "lora_up.weight", (ALPHA, DORA)),
    "ai-toolkit": (CONVOLUTIONS + TEXT, kohya, "lora_down.weight", "lora_up.weight", (ALPHA, "half")),
}  # fmt: skip
PEFT_CONFIGURED = ("PEFT", "PEFT, DoRA", "PEFT with its adapter's name")


def write(base, layout: str, folder, rank: int = 2, alpha: float = 3.0):
    """A file of the layout with each of its layers → (file, places)."""
    chosen, key, down_name, up_name, extras = READ[layout]
    places, tensors = layers_of(base, chosen), {}
    for place in places:
        down, up = matrices(base, *place, rank)
        tensors[f"{key(*place)}.{down_name}"], tensors[f"{key(*place)}.{up_name}"] = down, up
        if ALPHA in extras:
            tensors[f"{key(*place)}.alpha"] = torch.tensor(alpha)
        if DORA in extras:
            tensors[f"{key(*place)}.dora_scale"] = torch.ones(len(up), *[1] * (down.ndim - 1))
        if "lora_magnitude_vector" in extras:
            tensors[f"{key(*place)}.lora_magnitude_vector"] = torch.ones(len(up))
    if "bundle" in extras:
        tensors["bundle_emb.person.string_to_param.*"] = torch.ones(2, 768)
    if "half" in extras:
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
    if layout in PEFT_CONFIGURED:
        LoraConfig(r=rank, lora_alpha=alpha, use_dora="DoRA" in layout).save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors")
    return weight_files(folder / "adapter_model.safetensors")[0], places


@pytest.mark.parametrize("layout", READ)
def test_each_layer_of_each_layout_is_read_at_full_size(layout, stable_diffusion, tmp_path):
    file, places = write(stable_diffusion, layout, tmp_path)
    layers = read_layers(stable_diffusion, file)
    assert sorted((layer.component, layer.layer) for layer in layers) == sorted(places)
    says_alpha = ALPHA in READ[layout][-1] or layout in PEFT_CONFIGURED
    assert {layer.scale for layer in layers} == {1.5 if says_alpha else 1.0}
    assert {layer.magnitude is not None for layer in layers} == {"DoRA" in layout}
    for layer in layers:
        weight = getattr(stable_diffusion, layer.component).get_submodule(layer.layer).weight
        assert layer.down.shape[1:] == weight.shape[1:] and len(layer.up) == len(weight)
    count(layouts_read=1)


def test_the_layers_are_as_many_as_sd_scripts_counts(stable_diffusion):
    assert len(layers_of(stable_diffusion, TRANSFORMERS)) == LINEAR_IN_TRANSFORMERS
    assert len(layers_of(stable_diffusion, TEXT[1:])) == TEXT_LAYERS


Q, BLOCK = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", "down_blocks.0.attentions.0"
LORA = ("lora_down.weight", "lora_up.weight")
# Layout → its name in the message, a layer's key, what it has for the layer.
REFUSED = {
    "LyCORIS' LoHa": ("LoHa", f"lora_unet_{Q}", ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha")),
    "PEFT's LoHa": ("LoHa", f"base_model.model.{BLOCK}.proj_in", ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
    "LyCORIS' LoHa of convolutions": ("LoHa", f"lora_unet_{Q}", ("hada_t1", "hada_w1_a", "hada_t2", "alpha")),
    "LyCORIS' LoKr": ("LoKr", f"lora_unet_{Q}", ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha")),
    "LyCORIS' GLoRA": ("GLoRA", f"lora_unet_{Q}", ("a1.weight", "a2.weight", "b1.weight", "b2.weight")),
    "LyCORIS' full": ("weight-difference", f"lora_unet_{Q}", ("diff", "diff_b")),
    "LyCORIS' norm": ("LyCORIS norm", f"lora_unet_{Q}", ("w_norm", "b_norm")),
    "LyCORIS' IA3": ("IA3", f"lora_unet_{Q}", ("weight", "on_input")),
    "LyCORIS' OFT": ("OFT", f"lora_unet_{Q}", ("oft_blocks", "alpha")),
    "LyCORIS' Tucker LoCon": ("Tucker-decomposed LoRA", f"lora_unet_{Q}", (*LORA, "lora_mid.weight", "alpha")),
    "kohya's OFT": ("OFT", f"oft_unet_{Q}", ("oft_blocks", "alpha")),
    "PEFT's OFT": ("OFT", f"base_model.model.{BLOCK}.proj_in", ("oft_R.weight",)),
    "PEFT's BOFT": ("BOFT", f"base_model.model.{BLOCK}.proj_in", ("boft_R", "boft_s")),
    "PEFT's IA3": ("IA3", f"base_model.model.{BLOCK}.proj_in", ("ia3_l",)),
    "PEFT's VeRA": ("VeRA", f"base_model.model.{BLOCK}.proj_in", ("vera_lambda_b", "vera_lambda_d")),
    "PEFT's HRA": ("HRA", f"base_model.model.{BLOCK}.proj_in", ("hra_u",)),
    "PEFT's FourierFT": ("FourierFT", f"base_model.model.{BLOCK}.proj_in", ("fourierft_spectrum",)),
    "Control-LoRA": ("Control-LoRA", "lora_controlnet", ("",)),
    "lora_diffusion": ("lora_diffusion", "unet:0:up", ("",)),
    "textual inversion of A1111": ("textual inversion", "string_to_param", ("*",)),
    "textual inversion of sd-scripts": ("textual inversion", "emb_params", ("",)),
    "kohya's of SDXL, text": ("Stable Diffusion XL", "lora_te2_text_model_encoder_layers_0_self_attn_q_proj", LORA),
    "kohya's of SDXL": ("Stable Diffusion XL", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", LORA),
    "diffusers' of SDXL": (
        "Stable Diffusion XL", "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer",
        ("down.weight", "up.weight")),
    "kohya's of Flux": ("Flux", "lora_unet_double_blocks_0_img_attn_qkv", LORA),
    "kohya's of SD 3": ("Stable Diffusion 3", "lora_unet_joint_blocks_0_x_block_attn_qkv", LORA),
    "ai-toolkit's of Flux": (
        "Flux", "transformer.single_transformer_blocks.0.attn.to_q", ("lora_A.weight", "lora_B.weight")),
    "OneTrainer's of Flux": ("Flux", "lora_transformer_transformer_blocks_0_attn_to_q", LORA),
    "ComfyUI's LoraSave": ("ComfyUI", "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", LORA),
    "OneTrainer's of Stable Cascade": ("Stable Cascade", "lora_prior_unet_down_blocks_0_2_attention_attn_to_q", LORA),
}  # fmt: skip


@pytest.mark.parametrize("layout", REFUSED)
def test_other_layouts_are_refused_by_name(layout, stable_diffusion, tmp_path):
    name, key, tensors = REFUSED[layout]
    save_file({f"{key}.{tensor}".rstrip("."): torch.ones(2, 2) for tensor in tensors}, tmp_path / "l.safetensors")
    with pytest.raises(UserError, match=re.escape(name)) as error:
        read_layers(stable_diffusion, tmp_path / "l.safetensors")
    assert "not supported" in str(error.value) and "\n" not in str(error.value)
    count(layouts_refused=1)
