import json

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import INCOMPLETE, INTERRUPTED
from infer_uv import main as infer_main
from lora_utils import lora_parameters, save_lora
from render.rigs import load_body
from render.uv_space import uv_mask


def pixels(path):
    return np.asarray(Image.open(path))


def test_texture_from_text(checkpoint, tmp_path, run_script, mesh):
    arguments = ["--prompt", "A man in RED", "--checkpoint", checkpoint]
    status, out, error = run_script(infer_main, *arguments, "--out", tmp_path / "o", "--num", 2, "--seed", 4)
    assert status == 0, error
    assert out.split() == [str(tmp_path / "o" / f"a-man-in-red-{seed}.png") for seed in (4, 5)]
    with Image.open(tmp_path / "o" / "a-man-in-red-4.png") as texture:
        assert texture.mode == "RGBA" and texture.size == (1024, 1024)
        settings = json.loads(texture.text["parameters"])
        assert settings["prompt"] == "A man in RED" and settings["seed"] == 4 and settings["num_inference_steps"] == 2
    alpha = pixels(tmp_path / "o" / "a-man-in-red-4.png")[..., 3]
    assert np.array_equal(alpha == 255, uv_mask(load_body(f"obj:{mesh}"), 1024).numpy())
    assert set(np.unique(alpha)) == {0, 255}
    first, second = (pixels(tmp_path / "o" / f"a-man-in-red-{seed}.png").astype(int) for seed in (4, 5))
    assert not np.array_equal(first, second)

    again = tmp_path / "again.png"
    status, out, _ = run_script(infer_main, *arguments, "--out", again, "--seed", 5, "--turntable")
    assert status == 0 and out.split() == [str(tmp_path / "again.png"), str(tmp_path / "again.gif")]
    with Image.open(tmp_path / "again.gif") as turntable:
        assert turntable.n_frames == 36
    assert np.abs(pixels(again).astype(int) - second).max() <= 1, (
        "a seed gives its texture, whatever else is in the batch"
    )


def test_weights_of_both_inputs_and_other_settings(checkpoint, tmp_path, run_script, textures):
    common = ["--checkpoint", checkpoint]
    text, image = ["--prompt", "a man"], ["--image", textures / "1.png"]
    variants = {
        "text": text,
        "image": image,
        "zero": [*text, *image, "--img-weight", 0],
        "one": [*text, *image, "--img-weight", 1],
        "half": [*text, *image],
        "guided": [*text, "--guidance-scale", 9],
        "negative": [*text, "--negative-prompt", "red"],
        "steps": [*text, "--steps", 4],
    }
    outputs = {}
    for name, arguments in variants.items():
        status, _, error = run_script(infer_main, *common, *arguments, "--out", tmp_path / f"{name}.png")
        assert status == 0, error
        outputs[name] = pixels(tmp_path / f"{name}.png")
    assert np.array_equal(outputs["zero"], outputs["text"]) and np.array_equal(outputs["one"], outputs["image"])
    for name in ("image", "half", "guided", "negative", "steps"):
        assert not np.array_equal(outputs[name], outputs["text"]), name


def test_newest_checkpoint_or_lora_and_aligner(checkpoint, tmp_path, run_script, textures, make_config):
    from conftest import command_line

    image = ["--image", textures / "1.png"]
    out_dir = f"--output.out_dir={tmp_path / 'checkpoints'}"
    assert run_script(infer_main, *image, out_dir, "--out", tmp_path / "newest.png")[0] == 0
    lora, aligner = ["--lora", checkpoint], ["--aligner", checkpoint / "aligner.safetensors"]
    settings = command_line(make_config())
    status, _, error = run_script(infer_main, *image, *lora, *aligner, "--out", tmp_path / "files.png", *settings)
    assert status == 0, error
    assert np.array_equal(pixels(tmp_path / "newest.png"), pixels(tmp_path / "files.png"))
    status, _, error = run_script(infer_main, *image, *lora, "--out", tmp_path / "no.png", *settings)
    assert status == 2 and "aligner" in error and not (tmp_path / "no.png").exists()


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "give --prompt, --image or both"),
        (["--prompt", "  "], "give --prompt, --image or both"),
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--prompt", "a", "--checkpoint", "nowhere"], "no checkpoint at nowhere"),
        (["--prompt", "a", "--output.out_dir=nowhere"], "no checkpoint under nowhere"),
        (["--prompt", "a", "--img-weight", "0.5"], "give both"),
        (["--prompt", "a", "--image", "b", "--img-weight", "2"], "--img-weight 2.0: give 0 to 1"),
        (["--prompt", "a", "--checkpoint", "c", "--lora", "d"], "not both"),
        (["--prompt", "a", "--aligner", "d"], "needs --lora"),
        (["--prompt", "a", "--steps", "0"], "--steps 0: give 1 or more"),
        (["--prompt", "a", "--guidance-scale", "0.5"], "--guidance-scale 0.5: give 1 or more"),
        (["--prompt", "a", "--num", "2", "--out", "x.png"], "one file"),
        (["--prompt", "a", "--inference.step=3"], "unknown key"),
        (["--prompt", "a", "--lora", "nowhere"], "no LoRA at nowhere"),
        (["--prompt", "a", "--seed", "-1"], "--seed -1"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch, run_script, tiny_base):
    monkeypatch.chdir(tmp_path)
    if "--lora" in arguments:
        arguments = [*arguments, f"--model.pretrained_model={tiny_base}"]
    status, _, error = run_script(infer_main, *arguments)
    assert status == 2 and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place(checkpoint, tmp_path, run_script):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "folder"):
        status, _, error = run_script(infer_main, "--prompt", "a", "--checkpoint", checkpoint, "--out", out)
        assert status == 2 and str(tmp_path / "file") in error


def test_lora_is_used_and_bf16_runs(checkpoint, tmp_path, run_script, base):
    """The same prompt with the LoRA's weights set to nothing gives another texture; autocast gives nearly the same."""
    arguments = ["--prompt", "a man", "--checkpoint", checkpoint]
    bf16 = ["--training.mixed_precision=bf16", "--out", tmp_path / "bf16.png"]
    assert run_script(infer_main, *arguments, "--out", tmp_path / "with.png")[0] == 0
    assert run_script(infer_main, *arguments, *bf16)[0] == 0
    with torch.no_grad():
        for parameter in lora_parameters(base.unet):
            parameter.zero_()
    save_lora(base, checkpoint)
    assert run_script(infer_main, *arguments, "--out", tmp_path / "without.png")[0] == 0
    outputs = {name: pixels(tmp_path / f"{name}.png").astype(int) for name in ("with", "bf16", "without")}
    changed, rounded = (np.abs(outputs["with"] - outputs[name]).mean() for name in ("without", "bf16"))
    assert changed > 0.5 and rounded < changed / 2


def test_a_texture_repeats_itself_to_the_bit(checkpoint, tmp_path, run_script, textures):
    (tmp_path / "prompts.txt").write_text("a man in red\na woman in blue\na man in green\n")
    arguments = ["--prompts-file", tmp_path / "prompts.txt", "--checkpoint", checkpoint, "--out", tmp_path / "list"]
    assert run_script(infer_main, *arguments, "--sampler", "euler_a", "--guidance-scale", 2, "--seed", 7)[0] == 0
    second = tmp_path / "list" / "00001-a-woman-in-blue-7.png"
    status, _, error = run_script(infer_main, "--settings", second, "--out", tmp_path / "again.png")
    assert status == 0, error
    assert np.array_equal(pixels(tmp_path / "again.png"), pixels(second))

    line = (tmp_path / "list" / "manifest.jsonl").read_text().splitlines()[1]
    (tmp_path / "line.json").write_text(line)
    status, _, error = run_script(infer_main, "--settings", tmp_path / "line.json", "--out", tmp_path / "json.png")
    assert status == 0, error
    assert np.array_equal(pixels(tmp_path / "json.png"), pixels(second))

    edited = tmp_path / "edited.png"
    picture, mask = textures / "1.png", textures / "0.png"
    changes = ["--prompt", "a man", "--image", picture, "--init-texture", second, "--mask", mask, "--size", 64]
    changes += ["--text-guidance", 3, "--image-guidance", 2, "--seam-fix"]
    assert run_script(infer_main, "--checkpoint", checkpoint, *changes, "--out", edited)[0] == 0
    assert run_script(infer_main, "--settings", edited, "--out", tmp_path / "edited-again.png")[0] == 0
    assert np.array_equal(pixels(tmp_path / "edited-again.png"), pixels(edited))

    status, _, error = run_script(infer_main, "--settings", second, "--seed", 8, "--out", tmp_path / "other.png")
    assert status == 0 and not np.array_equal(pixels(tmp_path / "other.png"), pixels(second)), error


@pytest.mark.parametrize("content", ["{}", "[1]", "no json", '{"num_inference_steps": 0}'])
def test_settings_that_say_nothing_are_one_line(content, tmp_path, monkeypatch, run_script, textures):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.json").write_text(content)
    for file in ("settings.json", textures / "1.png", "nowhere.png"):
        status, _, error = run_script(infer_main, "--settings", file)
        assert status == 2 and str(file) in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_no_two_inputs_have_one_name(checkpoint, tmp_path, run_script, textures):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("anna.png", "anna.jpg", "a.b.png", "a-b.png", "ä b.png"):
        Image.open(textures / "1.png").convert("RGB").save(folder / name)
    alike = "a man in a long coat, " * 4
    for arguments, count in (
        (["--images", folder], 5),
        (["--images", folder, "--prompt", "a man"], 5),
        (["--prompt", "一个穿红衬衫的男人"], 1),
        (["--prompt", "мужчина в красной рубашке"], 1),
        (["--prompt", alike + "red"], 1),
        (["--prompt", alike + "blue"], 1),
        (["--prompt", "a man, in red"], 1),
        (["--prompt", "a man in red"], 1),
    ):
        before = len(list((tmp_path / "o").glob("*.png")))
        status, _, error = run_script(
            infer_main, *arguments, "--checkpoint", checkpoint, "--out", tmp_path / "o", "--size", 16
        )
        assert status == 0, error
        assert len(list((tmp_path / "o").glob("*.png"))) == before + count, arguments


def test_what_is_there_is_taken_only_for_what_it_is(checkpoint, tmp_path, run_script, textures, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a man in red\na woman in blue\n")
    out = tmp_path / "o"
    arguments = ["--prompts-file", tmp_path / "prompts.txt", "--checkpoint", checkpoint, "--out", out, "--size", 16]
    assert run_script(infer_main, *arguments)[0] == 0
    first = out / "00000-a-man-in-red-0.png"
    before = pixels(first)
    assert "2 of 2 textures are there already" in run_script(infer_main, *arguments)[1]

    status, printed, _ = run_script(infer_main, *arguments, "--guidance-scale", 9)
    assert status == 0 and "2 of 2 textures were made otherwise" in printed
    assert not np.array_equal(pixels(first), before)

    Image.new("RGB", (16, 16)).save(first)  # as the picture of an OBJ that was written before the texture
    status, printed, _ = run_script(infer_main, *arguments, "--guidance-scale", 9)
    assert status == 0 and "1 of 2 textures are there already" in printed and pixels(first).shape[-1] == 4

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("infer_uv.write_texture", killed)
        assert run_script(infer_main, *arguments, "--export", "obj,sheet")[0] == INTERRUPTED
    status, printed, _ = run_script(infer_main, *arguments, "--export", "obj,sheet")
    assert status == 0 and "already" not in printed
    with Image.open(first) as texture:
        assert texture.mode == "RGBA" and "parameters" in texture.text
    (out / "00000-a-man-in-red-0.obj").unlink()
    assert "1 of 2 textures are there already" in run_script(infer_main, *arguments, "--export", "obj,sheet")[1]


def test_the_manifest_names_every_texture_though_killed_between_the_two(checkpoint, tmp_path, run_script):
    (tmp_path / "prompts.txt").write_text("a man in red\na woman in blue\n")
    out = tmp_path / "o"
    arguments = ["--prompts-file", tmp_path / "prompts.txt", "--checkpoint", checkpoint, "--out", out, "--size", 16]
    assert run_script(infer_main, *arguments)[0] == 0
    first, second = (out / "manifest.jsonl").read_text().splitlines()
    (out / "manifest.jsonl").write_text(f"{first}\n")
    assert run_script(infer_main, *arguments)[0] == 0
    again = (out / "manifest.jsonl").read_text().splitlines()
    assert again[0] == first and json.loads(again[1]) == json.loads(second) and len(again) == 2


def test_an_edited_picture_is_another_input(checkpoint, tmp_path, run_script, textures):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.open(textures / "1.png").save(folder / "1.png")
    arguments = ["--images", folder, "--checkpoint", checkpoint, "--out", tmp_path / "o", "--size", 16]
    assert run_script(infer_main, *arguments)[0] == 0
    Image.open(textures / "2.png").save(folder / "1.png")
    assert "1 of 1 textures were made otherwise" in run_script(infer_main, *arguments)[1]


def test_a_damaged_picture_is_left_out_and_counted(checkpoint, tmp_path, run_script, textures):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("1.png", "3.png"):
        Image.open(textures / name).save(folder / name)
    (folder / "2.png").write_bytes((textures / "2.png").read_bytes()[:60])
    status, _, error = run_script(
        infer_main, "--images", folder, "--checkpoint", checkpoint, "--out", tmp_path / "o", "--size", 16
    )
    assert status == INCOMPLETE and str(folder / "2.png") in error and "1 pictures could not be read" in error
    assert sorted(path.name for path in (tmp_path / "o").glob("*.png")) == ["1-png-0.png", "3-png-0.png"]


def test_a_blend_repeats_itself_and_one_of_an_earlier_rule_is_refused(checkpoint, tmp_path, run_script, textures):
    texture, again = tmp_path / "blend.png", tmp_path / "again.png"
    made = ["--prompt", "a man", "--image", textures / "1.png", "--img-weight", 0.25, "--checkpoint", checkpoint]
    assert run_script(infer_main, *made, "--out", texture, "--size", 16)[0] == 0
    assert run_script(infer_main, "--settings", texture, "--out", again)[0] == 0
    assert np.array_equal(pixels(texture), pixels(again))
    with Image.open(texture) as image:
        description = json.loads(image.text["parameters"])
    assert description.pop("blend")
    (tmp_path / "old.json").write_text(json.dumps(description))
    repeated = ["--settings", tmp_path / "old.json", "--out", again]
    status, _, error = run_script(infer_main, *repeated)
    assert status == 2 and "blended as an earlier version did it" in error and error.count("\n") == 1
    assert run_script(infer_main, *repeated, "--img-weight", 0.25)[0] == 0, "by hand it is meant"
    assert np.array_equal(pixels(texture), pixels(again))
    # What was no blend is repeated as ever.
    made = ["--prompt", "a man", "--checkpoint", checkpoint, "--out", texture, "--size", 16]
    assert run_script(infer_main, *made)[0] == 0
    with Image.open(texture) as image:
        description = {key: value for key, value in json.loads(image.text["parameters"]).items() if key != "blend"}
    (tmp_path / "old.json").write_text(json.dumps(description))
    assert run_script(infer_main, *repeated)[0] == 0
    assert np.array_equal(pixels(texture), pixels(again))


def test_what_changed_since_is_not_repeated_unseen(checkpoint, tmp_path, run_script, textures):
    picture, texture = tmp_path / "person.png", tmp_path / "texture.png"
    Image.open(textures / "1.png").save(picture)
    made = ["--image", picture, "--checkpoint", checkpoint, "--out", texture, "--size", 16]
    assert run_script(infer_main, *made)[0] == 0
    again = ["--settings", texture, "--out", tmp_path / "again.png"]
    assert run_script(infer_main, *again)[0] == 0
    Image.open(textures / "2.png").save(picture)
    status, _, error = run_script(infer_main, *again)
    assert status == 2 and "person.png" in error and "no longer" in error
    assert run_script(infer_main, *again, "--image", picture)[0] == 0, "by hand it is meant"
