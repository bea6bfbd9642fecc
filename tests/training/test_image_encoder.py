"""A LoRA on the image encoder: it trains, resumes, is written beside the aligner and never missed without a word."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.errors import UserError
from infer_uv import TexturePipeline
from lora_utils import IMAGE_ENCODER_LORA_FILE, LORA_FILE, lora_parameters
from lora_utils import main as lora_main
from models.base import load_base
from models.checkpoints import ALIGNER_FILE, load_checkpoint, load_trained
from models.conditioning import encode_images
from models.interchange import load_any
from models.publish import main as publish_main
from training import loop
from training.loop import train
from training.run import set_up

OPTIONS = ("model.lora.image_encoder_r=2", "data.cache=latents", "training.joint.aligner_learning_rate=0.05")


@pytest.fixture()
def config(make_config, tmp_path):
    def make(name: str, *overrides: str):
        return make_config(f"output.out_dir={tmp_path / name}", *OPTIONS, *overrides)

    return make


@pytest.fixture()
def checkpoint(config) -> Path:
    return train(config("run"), "joint")


def pictures() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1


@torch.no_grad()
def tokens(base) -> torch.Tensor:
    return encode_images(base, pictures())


def change(file: Path, edit) -> None:
    """Rewrites a file of tensors as edit(tensors) has them, its metadata kept."""
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    save_file(edit(load_file(file)), file, metadata)


@pytest.mark.parametrize("schedule", ["alternate", "paired"])
def test_gradients_arrive_at_every_layer_and_nowhere_below(config, schedule):
    run = set_up(config("run", f"training.joint.schedule={schedule}"), "joint")
    frozen = {name: value.clone() for name, value in run.base.image_encoder.named_parameters() if "lora_" not in name}
    before = tokens(run.base)
    log, batches = loop.RunLog(run), loop.open_batches(run)
    for step in (1, 2):  # at the first, the half of each layer that starts at zero; then both
        start = [parameter.detach().clone() for parameter in lora_parameters(run.base.image_encoder)]
        loop.optimizer_step(run, step, batches, log)
    moved = [not torch.equal(*pair) for pair in zip(start, lora_parameters(run.base.image_encoder), strict=True)]
    assert len(moved) == 2 * 4 and all(moved), "both halves of query, key, value and output"
    assert (tokens(run.base) - before).abs().max() > 1e-3
    for name, value in run.base.image_encoder.named_parameters():
        assert "lora_" in name or torch.equal(value, frozen[name]), name
    assert [group["lr"] for group in run.optimizer.param_groups][1] == pytest.approx(
        run.lr_scheduler.base_lrs[1] * run.lr_scheduler.lr_lambdas[1](2)
    )
    trained_with_aligner = {id(parameter) for parameter in run.optimizer.param_groups[1]["params"]}
    assert {id(parameter) for parameter in lora_parameters(run.base.image_encoder)} <= trained_with_aligner


def test_the_checkpoint_gives_the_trained_tokens_to_the_bit(config, checkpoint, tiny_base, run_script, tmp_path):
    run = set_up(config("again"), "joint")
    run.restore(torch.load(checkpoint / "training_state.pt", weights_only=True))
    loaded, plain = load_checkpoint(checkpoint), load_base(str(tiny_base))
    assert torch.equal(tokens(loaded.base), tokens(run.base))
    assert (tokens(loaded.base) - tokens(plain)).abs().max() > 1e-3, "its update is not zero"
    assert not any(parameter.requires_grad for parameter in lora_parameters(loaded.base.image_encoder))
    # By hand from the file's tensors: W + alpha / r * up @ down.
    with safe_open(checkpoint / IMAGE_ENCODER_LORA_FILE, "pt") as file:
        assert "lora_alpha" in file.metadata()["lora_adapter_metadata"]
    tensors = load_file(checkpoint / IMAGE_ENCODER_LORA_FILE)
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            layer = key.removeprefix("image_encoder.").removesuffix(".lora_A.weight")
            up = tensors[key.replace("lora_A", "lora_B")]
            plain.image_encoder.get_submodule(layer).weight.data += up @ down  # alpha / r is 1
    assert torch.allclose(tokens(plain), tokens(loaded.base), atol=1e-5)
    # It reaches what is made from a picture, and what is published.
    picture = Image.new("RGB", (32, 32), "red")
    (texture,) = TexturePipeline.from_pretrained(checkpoint)(images=[picture], size=32)
    status, _, error = run_script(publish_main, "--checkpoint", checkpoint, "--licence", "mit", "--out", tmp_path / "o")
    assert status == 0, error
    (published,) = TexturePipeline.from_pretrained(tmp_path / "o")(images=[picture], size=32)
    assert published.tobytes() == texture.tobytes()
    change(checkpoint / IMAGE_ENCODER_LORA_FILE, lambda tensors: {key: 9 * value for key, value in tensors.items()})
    (other,) = TexturePipeline.from_pretrained(checkpoint)(images=[picture], size=32)
    assert other.tobytes() != texture.tobytes()


def test_plain_diffusers_still_loads_the_other_file(checkpoint, tiny_base):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base)
    pipeline.load_lora_weights(checkpoint)
    ours = load_checkpoint(checkpoint).base
    noisy_latents, context = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 16)
    with torch.no_grad():
        pair = [unet(noisy_latents, 7, context).sample for unet in (pipeline.unet, ours.unet)]
    assert torch.allclose(*pair, atol=1e-6)
    assert all(key.startswith("unet.") for key in load_file(checkpoint / LORA_FILE))


@pytest.mark.parametrize("options", [["training.ema_decay=0.9", "model.lora.dropout=0.2"], ["data.views=online"]])
def test_a_resumed_run_ends_with_the_same_weights(config, tmp_path, options):
    whole = train(config("whole", "output.save_every=1", *options), "joint")
    train(config("cut", "output.save_every=1", *options), "joint")
    shutil.rmtree(tmp_path / "cut" / "joint" / "step-000003")
    again = train(config("cut", "output.save_every=1", *options), "joint", resume="auto")
    for name in (LORA_FILE, ALIGNER_FILE, IMAGE_ENCODER_LORA_FILE):
        before, after = load_file(whole / name), load_file(again / name)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before), name
    first = load_file(whole.with_name("step-000001") / IMAGE_ENCODER_LORA_FILE)
    assert any(not torch.equal(first[key], after[key]) for key in after)
    with pytest.raises(UserError, match=r"model\.lora"):
        train(config("other", "model.lora.image_encoder_r=4"), "joint", resume=str(whole))


def without(mark: str):
    return lambda tensors: {key: value for key, value in tensors.items() if mark not in key}


def with_one_more(key: str):
    return lambda tensors: {**tensors, **{f"{key}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("k_proj"), r"lacks the LoRA of 1 layers, such as encoder\.layers\.0\.self_attn\.k_proj"),
        (without("k_proj.lora_B"), "has a matrix down and one up"),
        (with_one_more("image_encoder.encoder.layers.7.self_attn.q_proj"), "have no counterpart"),
        (with_one_more("unet.conv_in"), "have no counterpart"),
        (
            lambda tensors: {
                **tensors,
                "image_encoder.encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(2, 24),
                "image_encoder.encoder.layers.0.mlp.fc1.lora_B.weight": torch.ones(32, 2),
            },
            r"unlike this encoder's, the LoRA of 1 layers, such as encoder\.layers\.0\.mlp\.fc1",
        ),
        (lambda tensors: {**tensors, "image_encoder.embeddings": torch.ones(2)}, "which is no weight of a LoRA"),
    ],
)
def test_a_missing_or_an_unknown_tensor_is_refused(checkpoint, edit, message):
    change(checkpoint / IMAGE_ENCODER_LORA_FILE, edit)
    with pytest.raises(UserError, match=message):
        load_checkpoint(checkpoint)


def test_file_and_configuration_must_agree(checkpoint, make_config):
    with pytest.raises(UserError, match=r"image_encoder_lora\.safetensors for no aligner with .*image_encoder_r None"):
        load_checkpoint(checkpoint, ["model.lora.image_encoder_r=null"])
    # A LoRA and an aligner by their paths: what lies beside the aligner belongs to it.
    by_paths = load_trained(make_config(), checkpoint / LORA_FILE, checkpoint / ALIGNER_FILE)
    assert torch.equal(tokens(by_paths.base), tokens(load_checkpoint(checkpoint).base))
    (checkpoint / IMAGE_ENCODER_LORA_FILE).unlink()
    with pytest.raises(UserError, match=r"image_encoder_r 2 but has no image_encoder_lora\.safetensors"):
        load_checkpoint(checkpoint)


def test_without_it_a_checkpoint_is_as_before(make_config, config):
    checkpoint = train(make_config(), "joint")
    assert not (checkpoint / IMAGE_ENCODER_LORA_FILE).exists()
    text = (checkpoint / "config.yaml").read_text()
    (checkpoint / "config.yaml").write_text(text.replace("    image_encoder_r: null\n", ""))  # as of earlier versions
    assert "image_encoder_r" not in (checkpoint / "config.yaml").read_text()
    assert load_checkpoint(checkpoint).aligner is not None
    # Prompts alone have no use for it.
    of_text = train(config("text", "data.cache=all"), "t2uv")
    assert not (of_text / IMAGE_ENCODER_LORA_FILE).exists() and load_checkpoint(of_text).aligner is None


def test_cached_tokens_are_refused(config):
    with pytest.raises(UserError, match=r"model\.lora\.image_encoder_r trains the image encoder.*latents or none"):
        set_up(config("run", "data.cache=all"), "joint")
    run = set_up(config("run", "data.cache=all", "data.views=online"), "joint")
    assert set(run.dataset.cached) == {"posterior", "text_states"}, "tokens of fresh views were never cached"


def test_exports(checkpoint, tiny_base, make_config, run_script, tmp_path):
    out = tmp_path / "peft"
    status, _, error = run_script(lora_main, "export", checkpoint, "--format", "peft", "--out", out)
    assert status == 0, error
    plain = load_base(str(tiny_base))
    plain.image_encoder = PeftModel.from_pretrained(plain.image_encoder, out / "image_encoder")
    with torch.no_grad():
        theirs = plain.image_encoder(pixel_values=pictures()).last_hidden_state
        ours = load_checkpoint(checkpoint).base.image_encoder(pixel_values=pictures()).last_hidden_state
    assert torch.allclose(theirs, ours, atol=1e-6)
    shutil.copy(checkpoint / ALIGNER_FILE, out)
    assert torch.allclose(tokens(load_any(out, make_config()).base), tokens(load_checkpoint(checkpoint).base))
    kohya = tmp_path / "kohya"
    status, _, error = run_script(lora_main, "export", checkpoint, "--format", "kohya", "--out", kohya)
    assert status == 0 and "is left out: kohya's layout has no image encoder" in error
