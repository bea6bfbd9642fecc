"""The Python API and what the command adds: conditions, samplers, editing, lists, exports."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from infer_uv import TexturePipeline
from infer_uv import main as infer_main
from lora_utils import merge_lora
from models.conditioning import encode_long_prompt, encode_prompts, same_length
from models.diffusion import SAMPLERS
from models.interchange import load_any
from render.bodies import load_anny_body
from render.seams import edge_pairs, fix_seams, seam_error
from render.uv_space import fill_outside, uv_mask


@pytest.fixture()
def pipeline(checkpoint):
    return TexturePipeline.from_pretrained(checkpoint)


@pytest.fixture()
def cfg(make_config):
    return make_config()


@pytest.fixture()
def person(textures):
    return Image.open(textures / "1.png")


def pixels(picture) -> np.ndarray:
    return np.asarray(picture).astype(int)


def test_weights_of_0_and_1_are_one_input_alone_to_the_bit(pipeline, person):
    (text,) = pipeline(prompt="a man", size=64)
    (picture,) = pipeline(images=[person], size=64)
    assert np.array_equal(pixels(pipeline("a man", [person], img_weight=0.0, size=64)[0]), pixels(text))
    assert np.array_equal(pixels(pipeline("a man", [person], img_weight=1.0, size=64)[0]), pixels(picture))
    assert np.abs(pixels(pipeline("a man", [person], size=64)[0]) - pixels(text)).max() > 0


def test_each_end_of_a_blend_has_its_own_guidance_scale(checkpoint, person):
    scales = ["inference.guidance_scale=5", "inference.image_guidance_scale=2"]
    pipeline = TexturePipeline.from_pretrained(checkpoint, overrides=scales)
    for weight, alone in ((0.0, {"prompt": "a man"}), (1.0, {"images": [person]})):
        (end,) = pipeline("a man", [person], img_weight=weight, size=64)
        assert np.array_equal(pixels(end), pixels(pipeline(**alone, size=64)[0]))
    # Rows that are guided otherwise are made apart, in the order they were given.
    together = pipeline(["a man", None], [[], [person]], seeds=[0, 0], size=64)
    for one, alone in zip(together, ({"prompt": "a man"}, {"images": [person]})):
        assert np.abs(pixels(one) - pixels(pipeline(**alone, size=64)[0])).max() <= 1


def test_two_guidance_scales_pull_apart(pipeline, person):
    (text,) = pipeline(prompt="a man", guidance_scale=3.0, size=64)
    (alone,) = pipeline("a man", [person], text_guidance=3.0, image_guidance=0.0, size=64)
    assert np.abs(pixels(alone) - pixels(text)).max() <= 1
    (both,) = pipeline("a man", [person], text_guidance=3.0, image_guidance=3.0, size=64)
    assert np.abs(pixels(both) - pixels(text)).max() > 0


def test_several_views_are_read_together(pipeline, person):
    (one,) = pipeline(images=[person], size=64)
    (twice,) = pipeline(images=[person, person], size=64)
    assert np.abs(pixels(one) - pixels(twice)).max() <= 1, "the same view twice says the same"
    (other,) = pipeline(images=[person, Image.new("RGB", (40, 60), "lime")], size=64)
    assert np.abs(pixels(one) - pixels(other)).max() > 0


def test_different_people_are_made_at_once(pipeline, person):
    people = [[person], [], [person]]
    together = pipeline(["a man", "a woman " * 60, None], people, seeds=[1, 2, 3], size=64)
    alone = [
        pipeline(*row, seeds=[seed], size=64)[0]
        for seed, row in enumerate(zip(("a man", "a woman " * 60, None), people), 1)
    ]
    for one, other in zip(together, alone):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1
    blend = pipeline("a man", [person], seeds=[1], size=64)
    assert np.abs(pixels(together[0]) - pixels(blend[0])).max() <= 1
    with pytest.raises(UserError, match="nothing to make a texture from"):
        pipeline(["a man", None], [[person], []], seeds=[1, 2])
    with pytest.raises(UserError, match="2 prompts"):
        pipeline(["a man", "a woman"], seeds=[1, 2, 3])


def test_pictures_of_any_shape_are_read_at_a_larger_size(checkpoint, person):
    larger = TexturePipeline.from_pretrained(checkpoint, overrides=["model.image_size=64"])
    (portrait,) = larger(images=[person.resize((48, 64))], size=64)
    (several,) = larger(images=[person.resize((48, 64)), person], size=64)
    assert np.abs(pixels(portrait) - pixels(several)).max() > 0
    with pytest.raises(UserError, match="multiple of 8"):
        TexturePipeline.from_pretrained(checkpoint, overrides=["model.image_size=50"])(images=[person])


def test_a_merged_lora_gives_the_same(checkpoint, cfg):
    loaded, context = load_any(checkpoint, cfg), torch.randn(1, 77, 16)
    noisy_latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        apart = loaded.base.unet(noisy_latents, 7, context).sample
        merge_lora(loaded.base)
        merged = loaded.base.unet(noisy_latents, 7, context).sample
        merge_lora(loaded.base)  # a second time changes nothing
        again = loaded.base.unet(noisy_latents, 7, context).sample
    assert torch.allclose(apart, merged, atol=1e-4) and torch.equal(merged, again)


def test_long_prompts_are_read_to_their_end(base, pipeline):
    short = "a man in red"
    assert torch.allclose(encode_long_prompt(base, short), encode_prompts(base, [short]), atol=1e-6)
    long = "red blue green " * 60
    states = encode_long_prompt(base, long)
    assert states.shape[1] > 77 and states.shape[1] % 77 == 0
    other = encode_long_prompt(base, long + "blue")
    assert other.shape == states.shape and not torch.equal(other, states)
    lengths = [padded.shape[1] for padded in same_length(states, encode_prompts(base, [""]))]
    assert lengths == [states.shape[1]] * 2
    longer = pipeline(long + "blue", guidance_scale=50.0, size=64)
    assert np.abs(pixels(pipeline(long, guidance_scale=50.0, size=64)[0]) - pixels(longer[0])).max() > 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_gives_a_seed_its_texture(pipeline, sampler):
    first, second = pipeline("a man", seeds=[3, 4], sampler=sampler, num_inference_steps=4, size=64)
    (again,) = pipeline("a man", seeds=[4], sampler=sampler, num_inference_steps=4, size=64)
    assert np.abs(pixels(again) - pixels(second)).max() <= 1
    assert np.abs(pixels(first) - pixels(second)).max() > 0


def test_editing_keeps_what_is_outside_the_mask(pipeline):
    (start,) = pipeline("a man", size=64)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    (edited,) = pipeline("a woman in red", seeds=[9], init_texture=start, mask=mask, size=64)
    assert np.array_equal(pixels(edited)[:, 34:], pixels(start)[:, 34:])
    assert np.abs(pixels(edited)[:, :30] - pixels(start)[:, :30]).max() > 3
    (little,) = pipeline("a woman in red", seeds=[9], init_texture=start, strength=0.5, num_inference_steps=2, size=64)
    assert np.abs(pixels(little) - pixels(start)).max() > 0


def test_a_region_alone_is_made_anew(pipeline):
    (start,) = pipeline("a man", size=64)
    (edited,) = pipeline("a woman in red", seeds=[9], init_texture=start, mask="feet", size=64)
    is_kept = pipeline.mask("feet", 64).numpy() == 0
    assert 0.5 < is_kept.mean() < 1
    assert np.array_equal(pixels(edited)[is_kept], pixels(start)[is_kept])
    assert np.abs(pixels(edited) - pixels(start))[~is_kept].max() > 3
    with pytest.raises(UserError, match="no texels for the region 'face'"):
        pipeline("a man", init_texture=start, mask="face")  # the body is a box
    with pytest.raises(UserError, match="unknown region 'nose'"):
        pipeline("a man", init_texture=start, mask="nose")


def test_seams_are_found_and_mended():
    body = load_anny_body()
    seams, others = edge_pairs(body)
    assert 200 < len(seams) < 0.1 * len(others)
    size, mask = 256, uv_mask(body, 256)
    # A texture that is smooth in the square, as a diffusion model's is, is not smooth over the seams.
    v, u = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    texture = torch.stack([u, v, (3 * u + 2 * v) % 1 * 0.2 + 0.4]) * 0.8 + 0.1
    fixed = fill_outside(fix_seams(body, texture), mask)
    before, after = seam_error(body, texture), seam_error(body, fixed)
    assert before > 5 and after < before / 3, (before, after)
    far = torch.nn.functional.max_pool2d((fixed - texture).abs().amax(0, keepdim=True)[None] * mask, 1)[0, 0] == 0
    assert far[mask].float().mean() > 0.2, "what is far from a seam stays as it is"
    even = torch.full((3, size, size), 0.5)
    assert torch.allclose(fix_seams(body, even), even, atol=1e-6)


def test_lists_are_made_once_and_exports_lie_beside(checkpoint, tmp_path, run_script):
    (tmp_path / "prompts.txt").write_text("a man in red\n\na woman in blue\n")
    arguments = ["--prompts-file", tmp_path / "prompts.txt", "--checkpoint", checkpoint, "--out", tmp_path / "o"]
    arguments += ["--size", 64, "--export", "glb,sheet"]
    status, _, error = run_script(infer_main, *arguments)
    assert status == 0, error
    names = {path.name for path in (tmp_path / "o").iterdir()}
    expected = {"manifest.jsonl"}
    for stem in ("00000-a-man-in-red-0", "00001-a-woman-in-blue-0"):
        expected |= {f"{stem}.png", f"{stem}.glb", f"{stem}-sheet.png"}
    assert names == expected
    lines = [json.loads(line) for line in (tmp_path / "o" / "manifest.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["a man in red", "a woman in blue"]
    (tmp_path / "o" / "00001-a-woman-in-blue-0.png").unlink()
    before = (tmp_path / "o" / "00000-a-man-in-red-0.png").stat().st_mtime_ns
    status, out, _ = run_script(infer_main, *arguments)
    assert status == 0 and "1 of 2 textures are there already" in out
    assert (tmp_path / "o" / "00000-a-man-in-red-0.png").stat().st_mtime_ns == before
    assert (tmp_path / "o" / "00001-a-woman-in-blue-0.png").exists()


def test_a_folder_of_pictures(checkpoint, tmp_path, run_script, textures):
    status, _, error = run_script(
        infer_main, "--images", textures, "--checkpoint", checkpoint, "--out", tmp_path / "o", "--size", 32
    )
    assert status == 0, error
    assert len(list((tmp_path / "o").glob("*.png"))) == len(list(textures.glob("*.png")))


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--prompt", "a", "--export", "fbx"], "unknown"),
        (["--prompt", "a", "--mask", "face"], "--init-texture"),
        (["--prompt", "a", "--prompts-file", "b"], "one or many"),
        (["--prompts-file", "nowhere.txt"], "nowhere.txt"),
        (["--images", "nowhere"], "no pictures in nowhere"),
        (["--prompt", "a", "--image", "b", "--img-weight", "1", "--text-guidance", "2"], "not both"),
        (["--prompt", "a", "--init-texture", "nowhere.png"], "nowhere.png"),
        (["--prompt", "a", "--eta", "2"], "--eta"),
    ],
)
def test_bad_input_of_the_new_options_is_one_line(arguments, message, tmp_path, monkeypatch, run_script):
    monkeypatch.chdir(tmp_path)
    status, _, error = run_script(infer_main, *arguments)
    assert status == 2 and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
