"""Weights made elsewhere give here what plain torch, PEFT and diffusers make of them."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderDC, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from transformers import CLIPTextModel, CLIPVisionModel

from common.errors import UserError
from embedded.pretrain.card import MODEL_INDEX
from lora_utils import LORA_FILE, add_lora, export_lora, save_lora
from models.base import load_base
from models.conditioning import PooledAligner, QueryAligner, encode_prompts
from models.diffusion import inference_scheduler
from models.generation import generate, prompt_condition, unit_noise
from models.interchange import layout_of, load_any

PROMPT = "a man in red"


def randomised(module):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return module


def output(unet, context):
    noisy_latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return unet.eval()(noisy_latents, 7, context).sample


def tokens(model, base):
    ids = base.tokenizer([PROMPT], padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        return model.eval()(ids).last_hidden_state


@pytest.fixture()
def cfg(make_config):
    return make_config()


@pytest.mark.parametrize("folder", ["i2uv", "i2t"])
def test_texdreamers_release(tiny_base, base, cfg, tmp_path, folder):
    torch.manual_seed(0)
    unet_lora = LoraConfig(r=4, lora_alpha=7, target_modules=["to_q", "to_k", "to_v"])
    unet = get_peft_model(UNet2DConditionModel.from_pretrained(tiny_base / "unet"), unet_lora)
    text_lora = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"])
    text = get_peft_model(CLIPTextModel.from_pretrained(tiny_base / "text_encoder"), text_lora)
    randomised(unet).save_pretrained(tmp_path / "unet")
    randomised(text).save_pretrained(tmp_path / "text_encoder")
    vision = CLIPVisionModel.from_pretrained(tiny_base / "image_encoder")
    with torch.no_grad():
        vision.post_layernorm.weight.add_(0.1) if hasattr(vision, "post_layernorm") else None
        next(vision.parameters()).add_(0.1)
    vision.save_pretrained(tmp_path / folder / "vision_encoder")
    aligner = QueryAligner(vision.config.hidden_size, 16, 77, layers=3, heads=1, feed_forward=2048)
    torch.save(aligner.state_dict(), tmp_path / folder / "i2t_decoder.pth")
    assert layout_of(tmp_path) == "texdreamer"

    loaded = load_any(tmp_path, cfg)
    states = tokens(text, base)
    assert torch.allclose(encode_prompts(loaded.base, [PROMPT]), states, atol=1e-5)
    assert torch.allclose(output(loaded.base.unet, states), output(unet, states), atol=1e-5)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        image_tokens = loaded.base.image_encoder(pixel_values=pixels).last_hidden_state
        assert torch.allclose(image_tokens, vision.eval()(pixel_values=pixels).last_hidden_state, atol=1e-5)
        assert torch.allclose(loaded.aligner(image_tokens), aligner.eval()(image_tokens), atol=1e-5)
    settings = loaded.cfg.inference
    assert loaded.cfg.model.prompt_template.startswith("hutex, {prompt}") and settings.sampler == "euler_a"
    assert (settings.guidance_scale, settings.image_guidance_scale, settings.num_inference_steps) == (7.5, 2.0, 32)
    assert "overexposed" in settings.negative_prompt
    given = load_any(tmp_path, cfg, ["inference.num_inference_steps=2"])
    assert given.cfg.inference.num_inference_steps == 2, "what is given by hand wins"


@pytest.mark.parametrize("safe", [True, False])
def test_the_seeds_checkpoint(tiny_base, base, cfg, tmp_path, safe):
    unet_lora = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"])
    unet = get_peft_model(UNet2DConditionModel.from_pretrained(tiny_base / "unet"), unet_lora)
    randomised(unet).save_pretrained(tmp_path, safe_serialization=safe)
    aligner = PooledAligner(base.image_encoder.config.hidden_size, 16, 77, 8)
    torch.save(aligner.state_dict(), tmp_path / "aligner.pth")
    loaded, context = load_any(tmp_path, cfg), torch.randn(1, 77, 16)
    assert torch.allclose(output(loaded.base.unet, context), output(unet, context), atol=1e-5)
    image_tokens = torch.randn(2, 5, base.image_encoder.config.hidden_size)
    with torch.no_grad():
        assert torch.allclose(loaded.aligner(image_tokens), aligner.eval()(image_tokens), atol=1e-5)


@pytest.fixture()
def ours(base, cfg):
    settings = cfg.model.lora.model_copy(update={"r": 4, "alpha": 6.0})
    add_lora(base.unet, settings)
    randomised(base.unet)
    return base


def test_a_diffusers_lora_alone(ours, cfg, tmp_path):
    save_lora(ours, tmp_path)
    context = torch.randn(1, 77, 16)
    for path in (tmp_path, tmp_path / LORA_FILE):
        loaded = load_any(path, cfg)
        assert loaded.aligner is None
        assert torch.allclose(output(loaded.base.unet, context), output(ours.unet, context), atol=1e-5)


def test_a_whole_pipeline(tiny_base, cfg, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "pipeline")
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet")
    with torch.no_grad():
        unet.conv_out.weight.add_(0.1)
    unet.save_pretrained(tmp_path / "pipeline" / "unet")
    loaded, context = load_any(tmp_path / "pipeline", cfg), torch.randn(1, 77, 16)
    assert torch.allclose(output(loaded.base.unet, context), output(unet, context), atol=1e-5)


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_exported_loras_come_back_the_same(ours, tiny_base, tmp_path, layout):
    save_lora(ours, tmp_path)
    context = torch.randn(1, 77, 16)
    expected = output(ours.unet, context)
    path = export_lora(tmp_path / LORA_FILE, layout, tmp_path / "exported")
    if layout == "kohya":
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_base)
        pipeline.load_lora_weights(path)
        assert torch.allclose(output(pipeline.unet, context), expected, atol=1e-5)
    else:
        from peft import PeftModel

        unet = PeftModel.from_pretrained(UNet2DConditionModel.from_pretrained(tiny_base / "unet"), path)
        assert torch.allclose(output(unet, context), expected, atol=1e-5)


def test_unknown_layouts_and_other_bases_are_refused(ours, cfg, tmp_path, tiny_base):
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"found weights\.bin; expected one of"):
        load_any(tmp_path, cfg)
    with pytest.raises(UserError, match=r"cannot read .*weights\.bin"):
        load_any(tmp_path / "weights.bin", cfg)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="of single files only a LoRA is read"):
        load_any(tmp_path / "notes.txt", cfg)
    with pytest.raises(UserError, match="no checkpoint at"):
        load_any(tmp_path / "nowhere", cfg)
    other = UNet2DConditionModel.from_config(
        UNet2DConditionModel.load_config(tiny_base / "unet"), block_out_channels=(32, 64)
    )
    add_lora(other, cfg.model.lora)
    wrong = load_base(str(tiny_base))
    wrong.unet = other
    save_lora(wrong, tmp_path / "other")
    with pytest.raises(UserError, match="another base"):
        load_any(tmp_path / "other", cfg)


@pytest.fixture()
def deep_compression_base(tiny_base, tmp_path):
    """The stand-in with an AutoencoderDC, written as the embedded base writes its own."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    shutil.rmtree(folder / "vae")
    torch.manual_seed(1)
    layers = dict(encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1))
    sizes = dict(encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16))
    scales = dict(encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()))
    vae = AutoencoderDC(latent_channels=4, scaling_factor=0.7, **layers, **sizes, **scales)
    vae.register_to_config(block_out_channels=(8, 16))
    vae.save_pretrained(folder / "vae")
    index = json.loads((folder / "model_index.json").read_text()) | {"vae": MODEL_INDEX["vae"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("kind", ["tiny_base", "deep_compression_base"])
def test_plain_diffusers_makes_our_picture(checkpoint, cfg, request, kind):
    folder = request.getfixturevalue(kind)
    loaded = load_any(checkpoint, cfg)
    loaded.base.vae = load_base(str(folder)).vae
    ours = generate(loaded, prompt_condition(loaded, PROMPT), "", [3], num_inference_steps=4, guidance_scale=3.0)
    plain = StableDiffusionPipeline.from_pretrained(folder)
    plain.load_lora_weights(checkpoint)
    plain.scheduler = inference_scheduler(loaded.base.noise_scheduler)
    plain.set_progress_bar_config(disable=True)
    side = loaded.base.native_resolution
    options = dict(height=side, width=side, num_inference_steps=4, guidance_scale=3.0, negative_prompt="")
    options["latents"] = unit_noise(loaded, [3])
    latents = plain(PROMPT, **options, output_type="latent").images
    with torch.no_grad():
        theirs = plain.vae.decode(latents / plain.vae.config.scaling_factor).sample.clamp(-1, 1)
    assert ours.std() > 0.01 and torch.allclose(ours, theirs, atol=2e-4)
    if kind == "tiny_base":
        assert torch.allclose((ours + 1) / 2, plain(PROMPT, **options, output_type="pt").images, atol=1e-4)
    else:  # what the README warns of
        with pytest.raises(TypeError, match="generator"):
            plain(PROMPT, **options)
