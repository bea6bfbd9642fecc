"""Personal adapters: a word and a LoRA on top of a checkpoint, alone, together, and for other programs."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from common.errors import UserError
from infer_uv import main as infer_main
from lora_utils import ADAPTER_FILE, LORA_FILE, add_lora, bake_lora, merge_lora
from lora_utils import main as export_main
from models.adapters import (
    Adapter,
    add_word,
    check_word,
    load_adapters,
    noun_vector,
    parse_adapter,
    weights_hash,
)
from models.base import load_base
from models.checkpoints import save_checkpoint
from models.conditioning import encode_prompts
from models.lora_files import load_lora


@pytest.fixture()
def make_adapter(tiny_base, make_config, checkpoint, tmp_path):
    """An adapter of random weights for that checkpoint."""

    def make(word: str, seed: int = 0):
        cfg, base = make_config("model.lora.r=2", "model.lora.alpha=3"), load_base(str(tiny_base))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in add_lora(base.unet, cfg.model.lora):
                parameter.normal_(std=0.3)
        add_word(base, word, torch.randn(1, 16))
        adapter = Adapter(word, "a man", str(checkpoint), weights_hash(checkpoint))
        save_checkpoint(tmp_path / word, cfg, "personal", 1, base, None, None, adapter)
        return tmp_path / word

    return make


def loaded(tiny_base, checkpoint, *adapters):
    base = load_base(str(tiny_base))
    load_lora(base, checkpoint)
    load_adapters(base, adapters, weights_hash(checkpoint))
    return base


def unet_weights(base) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in base.unet.state_dict().items()}


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_two_adapters_add_up_with_their_weights(tiny_base, checkpoint, make_adapter):
    first, second = make_adapter("sks", 1), make_adapter("ohwx", 2)
    plain = load_base(str(tiny_base))
    load_lora(plain, checkpoint)
    bake_lora(plain)
    expected = unet_weights(plain)
    for folder, weight in ((first, 0.7), (second, -0.5)):
        alone = load_base(str(tiny_base))
        before = unet_weights(alone)
        load_lora(alone, folder)
        bake_lora(alone)
        for name, value in alone.unet.state_dict().items():
            expected[name] += weight * (value - before[name])
    both = loaded(tiny_base, checkpoint, (first, 0.7), (second, -0.5))
    other_way = loaded(tiny_base, checkpoint, (second, -0.5), (first, 0.7))
    for name, value in both.unet.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other_way.unet.state_dict()[name], value, atol=1e-5, rtol=1e-5)
    for folder in (first, second):
        number = both.tokenizer.convert_tokens_to_ids(folder.name)
        embedded = both.text_encoder.get_input_embeddings()(torch.tensor([[number]]))[0]
        assert torch.equal(embedded, load_file(folder / f"{folder.name}.safetensors")[folder.name])


def test_an_adapter_of_weight_0_and_the_word_leave_the_base_to_the_bit(tiny_base, checkpoint, make_adapter):
    plain = load_base(str(tiny_base))
    load_lora(plain, checkpoint)
    merge_lora(plain)
    bake_lora(plain)
    without = loaded(tiny_base, checkpoint, (make_adapter("sks"), 0.0))
    for name, value in plain.unet.state_dict().items():
        assert torch.equal(value, without.unet.state_dict()[name]), name
    prompts = ["a man in a red shirt", "asks", ""]
    assert torch.equal(encode_prompts(plain, prompts), encode_prompts(without, prompts))
    assert not torch.equal(encode_prompts(plain, ["sks"]), encode_prompts(without, ["sks"]))


def test_the_command_uses_adapters_and_repeats_them(checkpoint, make_adapter, tmp_path, run_script):
    sks, other = make_adapter("sks", 1), make_adapter("ohwx", 2)
    common = ["--checkpoint", checkpoint, "--size", 32]
    variants = {
        "plain": ["--prompt", "a man"],
        "adapted": ["--prompt", "a man", "--adapter", sks],
        "zero": ["--prompt", "a man", "--adapter", f"{sks}:0"],
        "both": ["--prompt", "sks and ohwx", "--adapter", f"{sks}:0.8", "--adapter", other],
    }
    for name, arguments in variants.items():
        status, _, error = run_script(infer_main, *common, *arguments, "--out", tmp_path / f"{name}.png")
        assert status == 0, error
    images = {name: pixels(tmp_path / f"{name}.png") for name in variants}
    assert np.array_equal(images["plain"], images["zero"]) and not np.array_equal(images["plain"], images["adapted"])
    repeat = ["--settings", tmp_path / "both.png", "--out", tmp_path / "again.png"]
    assert run_script(infer_main, *repeat)[0] == 0
    assert np.array_equal(images["both"], pixels(tmp_path / "again.png"))

    make_adapter("sks", 3)  # another one in its place
    status, _, error = run_script(infer_main, *repeat)
    assert status == 2 and "adapter is no longer what" in error.replace(str([f"{sks}:0.8", str(other)]), "adapter")
    assert run_script(infer_main, *repeat, "--adapter", sks)[0] == 0  # by hand


def test_a_list_from_before_there_were_adapters_stands(checkpoint, tmp_path, run_script, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a man\n")
    arguments = ["--prompts-file", tmp_path / "prompts.txt", "--checkpoint", checkpoint, "--out", tmp_path / "list"]
    assert run_script(infer_main, *arguments)[0] == 0
    (texture,) = (tmp_path / "list").glob("*.png")
    with Image.open(texture) as image:
        image.load()
        description = json.loads(image.text["parameters"])
    assert description.pop("adapter") is None and description.pop("adapter_weights") is None
    from models.settings import encode_described

    texture.write_bytes(encode_described(image, description))
    status, out, _ = run_script(infer_main, *arguments)
    assert status == 0 and "1 of 1 textures are there already" in out
    (tmp_path / "old.json").write_text(json.dumps(description))
    assert run_script(infer_main, "--settings", tmp_path / "old.json", "--out", tmp_path / "again.png")[0] == 0


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--adapter", "{other}"], "was trained on another base, {checkpoint}; give that with --checkpoint"),
        (["--adapter", "{sks}", "--adapter", "{sks}:0.5"], "two adapters have the word 'sks'"),
        (["--adapter", "{checkpoint}"], "it has no adapter.json"),
        (["--adapter", "nowhere:0.5"], "no adapter in nowhere"),
        (["--checkpoint", "{sks}"], "is a personal adapter, which needs its base beside it"),
        (["--lora", "{sks}"], "is a personal adapter"),
        (["--lora", "{sks}/pytorch_lora_weights.safetensors"], "is a personal adapter"),
        (["--adapter", "{wide}"], "was it made for another base?"),
        (["--adapter", "{evil}"], "is no word"),
    ],
)
def test_refusals_are_one_line(arguments, message, checkpoint, make_adapter, tmp_path, run_script):
    names = {name: make_adapter("sks") for name in ("sks",)} | {"checkpoint": checkpoint}
    for name, changes in {"other": {"base_weights": "0" * 16}, "evil": {"word": "../sks"}, "wide": {}}.items():
        names[name] = tmp_path / name
        names[name].mkdir()
        for file in names["sks"].iterdir():
            (names[name] / file.name).write_bytes(file.read_bytes())
        said = json.loads((names[name] / ADAPTER_FILE).read_text()) | changes
        (names[name] / ADAPTER_FILE).write_text(json.dumps(said))
    from safetensors.torch import save_file

    save_file({"sks": torch.zeros(1, 24)}, names["wide"] / "sks.safetensors")
    arguments = [argument.format(**names) for argument in arguments]
    if not {"--checkpoint", "--lora"} & set(arguments):
        arguments += ["--checkpoint", checkpoint]
    status, _, error = run_script(infer_main, "--prompt", "sks", *arguments, "--out", tmp_path / "o.png")
    assert status == 2 and message.format(**names) in error and error.count("\n") == 1, error
    assert not (tmp_path / "o.png").exists()


def test_a_weight_is_told_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:0.5").mkdir()
    assert parse_adapter("b:0.5") == (Path("b"), 0.5) and parse_adapter("b") == (Path("b"), 1)
    assert parse_adapter("a:0.5")[1] == 1 and parse_adapter("C:\\adapters\\sks") == (
        parse_adapter("C:\\adapters\\sks")[0],
        1,
    )


def test_names(base):
    for word in ("man", "red", "shirt"):
        with pytest.raises(UserError, match=f"{word}' is a word that the text encoder knows.*such as {word}x"):
            check_word(base.tokenizer, word)
    for word in ("two words", "Sks", "s", "<sks>", "naïve"):
        with pytest.raises(UserError, match="give one word"):
            check_word(base.tokenizer, word)
    check_word(base.tokenizer, "sks")
    ids = copy.deepcopy(base.tokenizer)("asks, a sks. SKS-man", add_special_tokens=False).input_ids
    add_word(base, "sks", noun_vector(base, "a man"))
    new = base.tokenizer.convert_tokens_to_ids("sks")
    assert new not in ids
    assert base.tokenizer("asks, a sks. SKS-man", add_special_tokens=False).input_ids.count(new) == 2
    with pytest.raises(UserError):
        check_word(base.tokenizer, "sks")


def test_a_new_word_starts_as_its_class(base):
    before = encode_prompts(base, ["a man in red"])
    add_word(base, "sks", noun_vector(base, "a man"))
    assert torch.equal(encode_prompts(base, ["a sks in red"]), before)


def test_diffusers_reads_the_word(tiny_base, base, make_adapter):
    """`load_textual_inversion` takes the word from the file itself, and its prompts then mean what ours do."""
    file = make_adapter("sks") / "sks.safetensors"
    (vector,) = load_file(file).values()  # A1111 and ComfyUI: one tensor, (tokens, width), under any key
    assert vector.shape == (1, 16) and vector.dtype == torch.float32
    pipeline = StableDiffusionPipeline.from_pretrained(
        tiny_base, safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False
    )
    pipeline.load_textual_inversion(str(file.parent), weight_name=file.name)
    tokens = pipeline.tokenizer(["sks in red"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    states = pipeline.text_encoder(tokens).last_hidden_state
    add_word(base, "sks", vector)
    torch.testing.assert_close(states, encode_prompts(base, ["sks in red"]))


def test_export(make_adapter, tmp_path, run_script):
    adapter = make_adapter("sks")
    for layout, path in (("kohya", "person.safetensors"), ("peft", "person/adapter_model.safetensors")):
        out = tmp_path / layout / "person"
        status, said, error = run_script(export_main, "export", adapter, "--format", layout, "--out", out)
        assert status == 0, error
        assert (tmp_path / layout / path).is_file()
        word_file = tmp_path / layout / "sks.safetensors"
        assert str(word_file) in said and word_file.read_bytes() == (adapter / "sks.safetensors").read_bytes()
    tensors = load_file(tmp_path / "kohya" / "person.safetensors")
    ours = load_file(adapter / LORA_FILE)
    assert len([key for key in tensors if key.endswith("lora_down.weight")]) == len(ours) / 2
    for out in ("sks", "sks.safetensors"):
        status, _, error = run_script(
            export_main, "export", adapter, "--format", "kohya", "--out", tmp_path / "named" / out
        )
        assert status == 2 and "the name of the word's own file" in error and not (tmp_path / "named").exists()
