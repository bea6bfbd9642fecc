"""Attributes of ATLAS's prompts by a CLIP model: the prompts as ATLAS has them, the path, and what is said without."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

import evaluate as command
from embedded.grammar import Outfit, sample_outfit
from embedded.pretrain.tokenizer import train_tokenizer
from evaluation.attributes import ATLAS_FORM, TEXTS, WORDS, parse_prompt, told_attributes
from evaluation.extractors import Extractor, load_extractor
from tests.conftest import command_line

# ATLAS's own words, by its description: the prompts are the grid of these.
ETHNICITIES = ("white", "Asian", "African American", "Latino", "Middle Eastern", "Mixed race")
PERSONS = ("man", "woman", "young boy", "young girl", "elder man", "elder woman")
TOPS = ("shirt", "long sleeve shirt", "polo shirt", "button-down shirt", "blouse", "sweater", "jacket", "blazer")
STYLES = ("white", "black", "gray", "blue", "green", "pink", "orange", "khaki", "denim", "striped", "plaid", "floral")


def test_every_word_of_atlas_is_read():
    for ethnicity, person, hair in itertools.product(ETHNICITIES, PERSONS, ("black", "brown", "blonde", "auburn")):
        prompt = f"{ethnicity}, {person}, black shirt, striped jeans, {hair} hair"
        assert parse_prompt(prompt) == Outfit(ethnicity, person, "black", "shirt", "striped", "jeans", hair)
    for style, top, bottom in itertools.product(STYLES, TOPS, ("jeans", "pants", "shorts")):
        outfit = parse_prompt(f'"white, man, {style} {top}, {style} {bottom}, white hair"\n')
        assert (outfit.top_style, outfit.top, outfit.bottom_style, outfit.bottom) == (style, top, style, bottom)


def test_the_grammars_own_prompts_are_read():
    rng = np.random.default_rng(5)
    outfits = [sample_outfit(rng) for _ in range(200)]
    for outfit in outfits:
        is_open = outfit.hair_cut == "bald" and not outfit.beard  # nothing says the colour
        assert parse_prompt(outfit.prompt) == (replace(outfit, hair="") if is_open else outfit)
    assert {outfit.hair_cut for outfit in outfits} == {"", "short", "long", "bald"}
    assert any(not outfit.bottom for outfit in outfits) and any(outfit.sneakers for outfit in outfits)


@pytest.mark.parametrize(
    "prompt",
    ["", "a man in red", "white, woman, shirt, blue jeans, black hair",
     "green, woman, red shirt, blue jeans, black hair",
     "white, woman, red shirt, blue jeans, black hair, smiling", "white, woman, red hat, blue jeans, black hair"],
)  # fmt: skip
def test_other_prompts_are_not(prompt):
    assert parse_prompt(prompt) is None


def knows(outfit: Outfit) -> torch.Tensor:
    """Features of an extractor that sees an outfit just so: near to every text that is true of it."""
    return sum(feature_of(text(outfit)) for kind, text in TEXTS.items() if getattr(outfit, kind))


def feature_of(text: str) -> torch.Tensor:
    return torch.randn(4096, generator=torch.Generator().manual_seed(sum(map(ord, text)) * 131 + len(text)))


def test_what_is_there_is_told_and_what_is_not_is_missed():
    extractor = Extractor(
        "knows", 8, lambda pictures: pictures, lambda texts: torch.stack(list(map(feature_of, texts)))
    )
    shown = parse_prompt("white, woman, red shirt, blue jeans, black hair")
    features = knows(shown).expand(4, 4, -1)
    asked = [shown.prompt, "white, woman, red shirt, green shorts, black hair", "a man"]
    asked.append("white, man, red dress, black hair")
    told = told_attributes(extractor, features, asked)
    assert told.keys() == WORDS.keys()
    assert [told[kind][0].item() for kind in WORDS] == [1] * len(WORDS)
    assert told["bottom"][1] == 0 and told["bottom_style"][1] == 0 and told["top_style"][1] == 1
    assert all(values[2].isnan() for values in told.values()) and told["bottom"][3].isnan() and told["person"][3] == 0


def test_what_is_said_where_nothing_can_be_told():
    extractor = Extractor("mute", 8, lambda pictures: pictures)
    features = torch.zeros(1, 4, 8)
    assert told_attributes(extractor, features, ["a man"]).endswith(f"as {ATLAS_FORM!r}")
    assert told_attributes(extractor, features, [ATLAS_FORM]) == "mute reads no texts; use a CLIP model"


@pytest.fixture()
def clip_folder(tmp_path):
    """A small CLIP model with random weights, both encoders, as transformers writes it."""
    torch.manual_seed(0)
    train_tokenizer(tmp_path / "words", vocab_size=600)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "words" / "tokenizer")
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, projection_dim=12)
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id},
        vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=12,
    )  # fmt: skip
    folder = tmp_path / "small.clip"
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_a_clip_model_in_a_folder_is_asked_and_named(clip_folder, textures, mesh, make_config, run_script, tmp_path):
    assert load_extractor(str(clip_folder)).name == str(clip_folder)
    prompts = ["white, man, red shirt, blue jeans, black hair", "Asian, woman, green sweater, pink shorts, white hair",
               "a man in blue", "Latino, young boy, khaki jacket, denim pants, brown hair"]  # fmt: skip
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    arguments = ("--textures", textures, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out")
    config = command_line(make_config("model.image_encoder=null"))
    options = (f"--extractor={clip_folder}", "--extractor=openai/none-such", "--extractor=embedded")
    status, printed, error = run_script(command.main, *config, *arguments, *options)
    assert status == 0, error
    attributes = json.loads(printed.splitlines()[-1])["t2uv"]["follows"]["attributes"]
    told = attributes.pop(str(clip_folder).replace(".", "_"))
    assert told.keys() == WORDS.keys()
    assert told["hair"]["count"] == 3 and told["hair"]["skipped"] == 1 and 0 <= told["hair"]["value"] <= 1
    assert attributes.pop("openai/none-such").startswith("needs openai/none-such") and not attributes


def test_without_a_clip_model_its_name_is_said(textures, make_config, run_script, tmp_path):
    arguments = ("--textures", textures, "--prompts", textures / "prompts.txt", "--out", tmp_path / "out")
    config = command_line(make_config("model.image_encoder=null"))
    status, printed, error = run_script(command.main, *config, *arguments)
    assert status == 0, error
    attributes = json.loads(printed.splitlines()[-1])["t2uv"]["follows"]["attributes"]
    assert attributes.startswith("attributes need openai/clip-vit-large-patch14")
