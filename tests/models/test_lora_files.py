"""LoRA files of every maker, each written here from its own definition, change the base as by hand."""

import json
import re

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig

from common.errors import UserError
from config.configuration import LoRA
from lora_utils import LORA_FILE, add_lora, add_text_encoder_lora, export_lora, lora_parameters, merge_lora, save_lora
from lora_utils import main as lora_main
from models import lora_files
from models.base import load_base
from models.conditioning import encode_prompts
from models.interchange import load_any, updated
from models.lora_files import load_lora

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
ATTENTION = [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn2.to_v", f"{BLOCK}.attn1.to_out.0"]
OTHERS = [
    f"{BLOCK}.ff.net.0.proj",
    "down_blocks.1.attentions.0.proj_in",
    "mid_block.resnets.0.conv1",
    "conv_in",
    "up_blocks.0.resnets.0.conv_shortcut",
    "down_blocks.0.downsamplers.0.conv",
    "time_embedding.linear_1",
    "mid_block.resnets.0.time_emb_proj",
]
TEXT = [f"encoder.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
MLP = ["encoder.layers.0.mlp.fc1", "encoder.layers.0.mlp.fc2"]


def outputs(base):
    generator = torch.Generator().manual_seed(5)
    noisy_latents, context = (torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 77, 16)))
    with torch.no_grad():
        return base.unet.eval()(noisy_latents, 7, context).sample, encode_prompts(base, ["a man in red"])


def assert_same(base, other):
    for mine, theirs in zip(outputs(base), outputs(other)):
        assert torch.allclose(mine, theirs, atol=2e-5), (mine - theirs).abs().max()


def random_updates(base, layers, with_alpha=True, with_dora=False):
    """{(component, layer): (down, up, alpha, magnitude)}, each layer of another rank and alpha; without: the rank."""
    updates = {}
    for number, layer in enumerate(layers):
        component = "text_encoder" if layer.startswith("encoder") else "unet"
        weight = getattr(base, component).get_submodule(layer).weight
        rank = 2 + number % 3
        down = torch.randn(rank, *weight.shape[1:]) / weight[0].numel() ** 0.5
        up = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2)) * 0.3
        magnitude = weight.flatten(1).norm(dim=1) * (0.5 + torch.rand(len(weight))) if with_dora else None
        updates[component, layer] = (down, up, (1, 4, 6, 2.5)[number % 4] if with_alpha else rank, magnitude)
    return updates


def changed_by_hand(folder, updates):
    """A base whose weights have the updates in them."""
    base = load_base(str(folder))
    for (component, layer), (down, up, alpha, magnitude) in updates.items():
        weight = getattr(base, component).get_submodule(layer).weight
        changed = weight + alpha / len(down) * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
        if magnitude is not None:
            norm = changed.flatten(1).norm(dim=1)
            changed = changed * (magnitude / norm).view(-1, *[1] * (weight.ndim - 1))
        weight.data = changed
    return base


def kohya_key(component, layer):
    return ("lora_unet_" if component == "unet" else "lora_te_text_model_") + layer.replace(".", "_")


def kohya_file(updates):
    tensors = {}
    for place, (down, up, alpha, magnitude) in updates.items():
        key = kohya_key(*place)
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down, up
        tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
        if magnitude is not None:
            tensors[f"{key}.dora_scale"] = magnitude.view(-1, *[1] * (down.ndim - 1))
    return tensors


def processor_key(component, layer):
    """diffusers before 0.20: attention processors; the text encoder's layers under the UNet's names."""
    if component == "text_encoder":
        name = re.sub(r"\.(q|k|v|out)_proj$", r".to_\1_lora", layer)
        return f"text_encoder.text_model.{name}"
    block, _, name = layer.removesuffix(".0").rpartition(".")
    return f"unet.{block}.processor.{name}_lora"


def keyed(updates, key, down_name, up_name):
    tensors = {}
    for place, (down, up, _, _) in updates.items():
        tensors[f"{key(*place)}.{down_name}.weight"], tensors[f"{key(*place)}.{up_name}.weight"] = down, up
    return tensors


def lora_key(component, layer):
    name = "text_model." * (component == "text_encoder") + layer
    return f"{component}.{name}.{'lora' if component == 'unet' else 'lora_linear_layer'}"


MAKERS = {
    "kohya": (ATTENTION + OTHERS + TEXT + MLP, True, kohya_file),
    "processors": (ATTENTION + TEXT, False, lambda updates: keyed(updates, processor_key, "down", "up")),
    "bare processors": (
        ATTENTION,
        False,
        lambda updates: keyed(updates, lambda *place: processor_key(*place).removeprefix("unet."), "down", "up"),
    ),
    "diffusers": (ATTENTION + OTHERS + TEXT + MLP, False, lambda updates: keyed(updates, lora_key, "down", "up")),
    "bare": (ATTENTION + OTHERS, False, lambda updates: keyed(updates, lambda _, name: name, "lora_A", "lora_B")),
    "peft": (
        ATTENTION + OTHERS + TEXT,
        False,
        lambda updates: keyed(updates, lambda _, name: f"base_model.model.{name}", "lora_A", "lora_B"),
    ),
}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("maker", MAKERS)
def test_every_makers_file_changes_the_base_as_by_hand(base, tiny_base, tmp_path, maker, merged):
    layers, with_alpha, write = MAKERS[maker]
    updates = random_updates(base, layers, with_alpha)
    expected = changed_by_hand(tiny_base, updates)
    assert (outputs(base)[0] - outputs(expected)[0]).abs().max() > 0.01
    if maker == "processors":
        (tmp_path / "old").mkdir()
        torch.save(write(updates), tmp_path / "old" / "pytorch_lora_weights.bin")
        path = tmp_path / "old"
    else:
        path = tmp_path / "file.safetensors"
        safetensors.torch.save_file(write(updates), path)
    load_lora(base, path)
    if merged:
        merge_lora(base)
    assert_same(base, expected)


@pytest.mark.parametrize("merged", [False, True])
def test_kohyas_dora_keeps_its_magnitudes(base, tiny_base, tmp_path, merged):
    updates = random_updates(base, ATTENTION + OTHERS + TEXT, with_dora=True)
    safetensors.torch.save_file(kohya_file(updates), tmp_path / "dora.safetensors")
    load_lora(base, tmp_path / "dora.safetensors")
    if merged:
        merge_lora(base)
    assert_same(base, changed_by_hand(tiny_base, updates))


def test_pefts_patterns_and_rank_stabilised_scale(base, tiny_base, tmp_path):
    updates = random_updates(base, ATTENTION + OTHERS)
    ranks = {layer: len(down) for (_, layer), (down, *_) in updates.items()}
    alphas = {layer: alpha / len(down) ** 0.5 for (_, layer), (down, _, alpha, _) in updates.items()}
    config = LoraConfig(r=8, lora_alpha=9, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=True)
    config.save_pretrained(tmp_path)
    tensors = keyed(updates, lambda _, name: f"base_model.model.{name}", "lora_A", "lora_B")
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    load_lora(base, tmp_path)
    assert_same(base, changed_by_hand(tiny_base, updates))
    save_lora(base, tmp_path / "again")
    again = load_base(str(tiny_base))
    load_lora(again, tmp_path / "again")
    assert_same(again, base)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_in_half_precision_takes_what_it_can_hold(tiny_base, tmp_path, dtype):
    """Rounding is no difference, even where up and down nearly cancel."""
    base = load_base(str(tiny_base), dtype=dtype)
    updates = random_updates(load_base(str(tiny_base)), ATTENTION + OTHERS + TEXT, with_dora=True)
    for down, up, *_ in updates.values():
        down[1], up[:, 1] = down[0] * 1.01, -up[:, 0]
    safetensors.torch.save_file(kohya_file(updates), tmp_path / "file.safetensors")
    load_lora(base, tmp_path / "file.safetensors")
    assert lora_parameters(base.unet)[0].dtype == dtype


def test_embeddings_beside_a_lora_are_left_out_aloud(base, tiny_base, tmp_path, capsys):
    updates = random_updates(base, ATTENTION)
    bundled = {**kohya_file(updates), "bundle_emb.person.string_to_param.*": torch.ones(2, 16)}
    safetensors.torch.save_file(bundled, tmp_path / "bundle.safetensors")
    load_lora(base, tmp_path / "bundle.safetensors")
    assert_same(base, changed_by_hand(tiny_base, updates))
    assert "embeddings too, which are left out: prompts cannot use person" in capsys.readouterr().err


def refused(base, tmp_path, tensors, message, config=None):
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    if config:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_lora(base, tmp_path / "adapter_model.safetensors")
    assert not lora_parameters(base.unet), "nothing is half loaded"


Q = kohya_key("unet", ATTENTION[0])
OTHER_KINDS = {
    "LoHa": ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"],
    "LoKr": ["lokr_w1", "lokr_w2"],
    "GLoRA": ["a1.weight", "a2.weight", "b1.weight", "b2.weight"],
    "OFT": ["oft_blocks"],
    "IA3": ["weight", "on_input"],
    "weight-difference": ["diff", "diff_b"],
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_are_refused_by_their_name(base, tmp_path, kind):
    tensors = {f"{Q}.{name}": torch.ones(2, 2) for name in (*OTHER_KINDS[kind], "alpha")}
    refused(base, tmp_path, tensors, f"is a {kind} file, which is not supported")


def test_what_would_be_dropped_is_refused_by_its_reason(base, tmp_path):
    good = kohya_file(random_updates(base, ATTENTION[:1], with_dora=True))
    bare_peft = keyed(random_updates(base, ATTENTION), lambda _, name: name, "lora_A", "lora_B")
    config = {"peft_type": "LORA", "lora_alpha": 4}
    elsewhere = {"lora_te2_x.lora_down.weight": torch.ones(2, 3), "lora_te2_x.lora_up.weight": torch.ones(3, 2)}
    again = keyed(random_updates(base, ATTENTION[:1]), lambda *place: ".".join(place), "lora_A", "lora_B")
    up = f"{Q}.lora_up.weight"
    cases = [
        (good | elsewhere, "1 of the 2 layers of .* have no counterpart in this base, such as lora_te2_x"),
        (good | {f"{Q}.lora_down.weight": torch.ones(2, 99)}, "do not fit this base's layer.*another base"),
        (good | {f"{Q}.bias": torch.ones(3)}, "holds .*bias, which is no weight of a LoRA"),
        (good | {f"{Q}.dora_scale": torch.ones(1, 32)}, "magnitudes of its inputs"),
        (good | {up: good[up] * float("nan")}, "not finite"),
        ({up: good[up]}, "holds up of"),
        (good | again, "one layer twice"),
        (bare_peft | {f"{ATTENTION[0]}.lora.down.weight": torch.ones(2, 32)}, "the down of .* twice"),
        ({"emb": torch.ones(1)}, "holds emb, which is no weight"),
        ({}, "0 of the 0 layers"),
    ]
    for tensors, message in cases:
        refused(base, tmp_path, tensors, message)
    refused(base, tmp_path, bare_peft, "is a LOHA adapter", {"peft_type": "LOHA"})
    refused(base, tmp_path, bare_peft, "weights that pissa changed", {**config, "init_lora_weights": "pissa"})
    refused(base, tmp_path, bare_peft, "says that it is a DoRA", {**config, "use_dora": True})


@pytest.mark.parametrize("fault", ["scale", "weights", "magnitude", "zero"])
def test_what_the_model_has_is_compared_with_the_file(base, tmp_path, monkeypatch, fault):
    """Whatever loads the weights may drop, scale or mix up something: each is noticed, and named."""
    original = lora_files._put_in
    updates = random_updates(base, ATTENTION + OTHERS, with_dora=fault == "magnitude")
    safetensors.torch.save_file(kohya_file(updates), tmp_path / "file.safetensors")

    def faulty(module, layers):
        original(module, layers)
        if not layers:
            return
        layer = module.get_submodule(OTHERS[2])  # a convolution
        if fault == "scale":
            layer.scaling["default"] *= 1.1
        elif fault == "weights":
            layer.lora_A["default"].weight.data = layer.lora_A["default"].weight.data.flip(-1)
        elif fault == "magnitude":
            layer.lora_magnitude_vector["default"].weight.data *= 1.1
        else:
            layer.lora_B["default"].weight.data.zero_()

    monkeypatch.setattr(lora_files, "_put_in", faulty)
    reason = {"weights": "up x down", "layer": r"up x down .* but 0 in the model"}.get(fault, fault)
    with pytest.raises(
        UserError, match=f"{reason}.*{kohya_key('unet', OTHERS[2])}|{kohya_key('unet', OTHERS[2])}.*0 in"
    ):
        load_lora(base, tmp_path / "file.safetensors")


@pytest.fixture()
def trained(base):
    """A base with a LoRA on UNet and text encoder, of another alpha than the rank."""
    settings = LoRA(r=4, alpha=6.0, text_encoder_r=2, target_modules=["to_q", "to_out.0", "conv1", "proj_in"])

    def make(**variant):
        parameters = add_lora(base.unet, settings.model_copy(update=variant))
        parameters += add_text_encoder_lora(base.text_encoder, settings.model_copy(update=variant))
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        return base

    return make


@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}])
@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_exports_hold_the_text_encoders_lora_too(trained, tiny_base, make_config, tmp_path, layout, variant):
    base = trained(**variant)
    save_lora(base, tmp_path)
    path = export_lora(tmp_path / LORA_FILE, layout, tmp_path / "exported")
    assert_same(load_any(path, make_config()).base, base)
    if layout == "peft":
        from peft import PeftModel

        plain = load_base(str(tiny_base))
        plain.unet = PeftModel.from_pretrained(plain.unet, path)
        plain.text_encoder = PeftModel.from_pretrained(plain.text_encoder, path / "text_encoder")
        assert_same(plain, base)
    elif not variant.get("use_dora"):  # whose magnitudes diffusers drops
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_base)
        pipeline.load_lora_weights(path)
        assert_same(pipeline_as_base(pipeline, base), base)
        with safetensors.safe_open(path, "pt") as file:
            assert any(key.startswith("lora_te_text_model_encoder_layers_0_self_attn_q_proj.") for key in file.keys())  # noqa: SIM118


def pipeline_as_base(pipeline, base):
    plain = load_base(pipeline.config._name_or_path)
    plain.unet, plain.text_encoder = pipeline.unet, pipeline.text_encoder
    return plain


def test_names_with_dots_are_not_cut(trained, tmp_path, run_script):
    save_lora(trained(), tmp_path)
    written = []
    for name in ("uv-lora-v1.4", "uv-lora-v1.5", "uv.safetensors"):
        arguments = ["export", tmp_path, "--format", "kohya", "--out", tmp_path / "out" / name]
        status, out, error = run_script(lora_main, *arguments)
        assert status == 0, error
        written.append(out.strip().rpartition("/")[2])
    assert written == ["uv-lora-v1.4.safetensors", "uv-lora-v1.5.safetensors", "uv.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == written


def test_bad_files_to_export_are_one_line(tmp_path, run_script):
    for content in (b"torn", safetensors.torch.save({"unet.conv_in.lora_A.weight": torch.ones(1)})):
        (tmp_path / LORA_FILE).write_bytes(content)
        arguments = ["export", tmp_path, "--format", "peft", "--out", tmp_path / "out"]
        status, _, error = run_script(lora_main, *arguments)
        assert status == 2 and LORA_FILE in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_whole_pipelines_resolution_given_by_hand_wins(tiny_base, make_config):
    cfg = updated(make_config(), {"data.resolution": 24})
    assert load_any(tiny_base, cfg).cfg.data.resolution is None
    assert load_any(tiny_base, cfg, ["data.resolution=24"]).cfg.data.resolution == 24
