"""The measures of evaluate.py: right on the truth, wrong on what is wrong."""

import pytest
import torch

from config.configuration import Inference
from embedded.grammar import PATTERNS
from embedded.painter import SKIN, TOP
from evaluation.procedural import (
    SENTENCES,
    SIZE,
    PatternClassifier,
    Tally,
    colours_named,
    held_out_paintings,
    lab,
    limbs,
    nearest_word,
    score,
    score_both,
    score_pixels,
    score_seams,
    score_sentences,
    score_skin,
    view_of,
    words_for,
)
from models.settings import GenerationSettings
from render.rigs import load_body


def test_lab_is_cielab():
    colours = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0]])
    expected = torch.tensor([[100.0, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20]])
    assert torch.allclose(lab(colours), expected, atol=0.1) and torch.equal(lab(colours[2]), lab(colours)[2])


@pytest.fixture(scope="module")
def truths():
    return held_out_paintings(40)


@pytest.fixture(scope="module")
def classifier(truths):
    return PatternClassifier(truths, [painting.texture[:3] for _, painting in truths])


def shares(truths, classifier, change):
    tally, limb_masks = Tally(), limbs()
    for outfit, painting in truths:
        score(tally, "t2uv", outfit, painting, change(painting.texture[:3]), classifier, limb_masks)
    return tally.nested()["t2uv"]


def test_the_truth_scores_high_and_another_texture_low(truths, classifier):
    right = shares(truths, classifier, lambda texture: texture)
    assert min(right["color"].values()) > 0.9 and right["pattern"] > 0.9 and right["length"] == 1
    wrong = shares(truths, classifier, lambda texture: 1 - texture)
    assert max(wrong["color"].values()) < 0.4
    flat = shares(truths, classifier, lambda texture: torch.full_like(texture, 0.5))
    styles = [style for outfit, _ in truths for style in (outfit.top_style, outfit.bottom_style) if style]
    plain = sum(style not in PATTERNS for style in styles) / len(styles)
    assert flat["pattern"] == pytest.approx(plain, abs=1e-3) and flat["color"]["top"] < 0.3


def test_colours_are_named_by_the_nearest_word(truths):
    assert nearest_word(torch.tensor([0.15, 0.33, 0.7]), words_for("top")) == "blue"
    assert nearest_word(torch.tensor([0.85, 0.68, 0.4]), words_for("hair")) == "blonde"
    assert (truths[0][1].regions == TOP).any()


def test_pixels_that_the_picture_shows_are_told_from_those_it_hides(truths):
    painting = truths[0][1]
    _, seen = view_of(painting, 0)
    share = (seen & (painting.texture[3] > 0)).sum() / (painting.texture[3] > 0).sum()
    assert 0.2 < share < 0.7, "a picture shows about half a body"
    texture = painting.texture[:3].clone()
    texture[:, ~seen] += 0.1
    tally = Tally()
    score_pixels(tally, painting, seen, texture)
    measures = tally.nested()["i2uv"]
    assert measures["psnr_visible"] == 80 and measures["psnr_hidden"] == pytest.approx(20, abs=0.01)
    assert 20 < measures["psnr"] < 30 and 0.8 < measures["ssim"] < 1


def test_of_both_inputs_the_one_whose_colours_are_there_wins(truths):
    told, words = truths[0], colours_named(truths[0][0])
    all_words = [colours_named(outfit) for outfit, _ in truths]
    shown = next(truths[row] for row, others in enumerate(all_words) if others.keys() & words and others != words)
    tally = Tally()
    score_both(tally, 0.5, told, shown, told[1].texture[:3])
    assert tally.nested()["both"]["img_weight_0_5"]["text_wins"] == 1


def test_skin_is_compared_in_lab_and_outliers_say_little(truths):
    tally = Tally()
    for number in range(5):
        painting = truths[number][1]
        score_skin(tally, painting, painting.texture[:3])
    assert tally.nested()["i2uv"]["skin_lab"] == 0
    painting = truths[0][1]
    other = painting.texture[:3].clone()
    other[:, painting.regions == SKIN] *= 0.5  # to black would be as far as the skin is light
    score_skin(tally, painting, other)
    assert tally.nested()["i2uv"]["skin_lab"] == 0, "one of six"
    alone = Tally()
    score_skin(alone, painting, other)
    skin = painting.texture[:3, painting.regions == SKIN].median(1).values
    assert alone.nested()["i2uv"]["skin_lab"] == pytest.approx((lab(skin) - lab(skin * 0.5)).norm().item(), abs=1)
    other = painting.texture[:3].clone()
    other[:, painting.regions != SKIN] = 0
    score_skin(alone, painting, other)
    assert alone.answers["i2uv.skin_lab"][-1] == 0, "what is not skin does not count"


def test_seams_are_measured_as_the_command_writes_them_and_raw(truths):
    settings, body = GenerationSettings.of(Inference()), load_body("anny")
    assert settings.seam_fix and settings.size == 1024
    generator = torch.Generator().manual_seed(0)
    blotches = torch.nn.functional.interpolate(
        torch.rand(1, 3, 16, 16, generator=generator), size=(SIZE, SIZE), mode="bicubic"
    )[0].clamp(0, 1)  # which know nothing of seams
    tally = Tally()
    score_seams(tally, "t2uv", body, blotches, settings)
    measures = tally.nested()["t2uv"]
    assert measures["seam_error_raw"] > 5 and measures["seam_error"] < 1.2
    unfixed = Tally()
    score_seams(unfixed, "t2uv", body, blotches, settings.changed(seam_fix=False))
    assert unfixed.nested()["t2uv"]["seam_error"] == measures["seam_error_raw"], "what the default is decides"


@pytest.mark.parametrize("name", SENTENCES)
def test_sentences_name_regions_and_words_that_can_be_told(name):
    sentences = SENTENCES[name]
    assert len({sentence for sentence, _ in sentences}) == len(sentences) > 0
    for sentence, words in sentences:
        assert words and all(word in words_for(region) for region, word in words.items()), sentence
    red, tally = torch.tensor([0.77, 0.12, 0.15])[:, None, None].expand(3, SIZE, SIZE), Tally()
    score_sentences(tally, name, [red] * len(sentences))
    told = [words["top"] for _, words in sentences if "top" in words]
    assert tally.answers[f"sentences.{name}"].count(1.0) >= told.count("red") > 0
    with pytest.raises(ValueError, match="shorter"):
        score_sentences(tally, name, [red])
