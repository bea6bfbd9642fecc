"""How long sleeves and legs are: right on every true texture, and not said where nobody could tell."""

from dataclasses import replace

import pytest
import torch

from embedded.grammar import SLEEVES, Outfit
from embedded.painter import BOTTOM, SKIN, TOP, Painting, paint
from evaluation.procedural import SIZE, Judge, Paintings, held_out_paintings, length, limb_cloth, limbs

# Cloth near the skin's colour, and patterns whose median is of neither of their colours.
HARD = (
    Outfit("African American", "woman", "pink", "t-shirt", "striped", "pants", "black"),
    Outfit("Latino", "man", "plaid", "blazer", "plaid", "jeans", "brown"),
    Outfit("African American", "man", "white", "polo shirt", "brown", "pants", "black"),
    Outfit("Asian", "young girl", "beige", "blouse", "beige", "shorts", "auburn"),
    Outfit("white", "woman", "floral", "dress", "", "", "blonde"),
)


def lengths(outfit: Outfit, painting: Painting, texture: torch.Tensor | None = None) -> dict[str, str]:
    texture = painting.texture[:3] if texture is None else texture
    skin, masks = painting.regions == SKIN, limbs()
    covering = limb_cloth(outfit, painting)
    return {limb: length(texture, masks[limb], painting.regions == region, skin) for limb, region in covering.items()}


@pytest.mark.parametrize("outfit", HARD, ids=lambda outfit: f"{outfit.top_style} {outfit.top}")
def test_true_lengths_are_told(outfit):
    painting = paint(outfit, 3, SIZE)
    assert lengths(outfit, painting) == {"sleeve": outfit.sleeve_length, "leg": outfit.leg_length}


def test_the_elbow_is_covered_by_every_long_sleeve_and_by_no_short_one():
    elbow = limbs()["sleeve"]
    assert elbow.sum() > 100
    for top in SLEEVES:
        outfit = Outfit("white", "man", "blue", top, "black", "pants", "black")
        regions = paint(outfit, 0, SIZE).regions[elbow]
        assert set(regions.tolist()) == {TOP if outfit.sleeve_length == "long" else SKIN}, top


def test_a_texture_that_shows_the_other_length_is_wrong():
    long = Outfit("white", "man", "red", "sweater", "blue", "pants", "black")
    short = replace(long, top="t-shirt", bottom="shorts")
    assert lengths(long, paint(long, 0, SIZE), paint(short, 0, SIZE).texture[:3]) == {"sleeve": "short", "leg": "short"}


def test_cloth_of_the_skins_colour_does_not_count_and_is_said():
    outfit = Outfit("African American", "man", "blue", "sweater", "brown", "pants", "black")
    painting = paint(outfit, 0, SIZE)
    assert limb_cloth(outfit, painting) == {"sleeve": TOP, "leg": BOTTOM}
    texture = painting.texture.clone()
    texture[:3, painting.regions == BOTTOM] = texture[:3, painting.regions == SKIN].median(1).values[:, None]
    alike = Painting(texture, painting.regions)
    assert limb_cloth(outfit, alike) == {"sleeve": TOP}
    judge = Judge([(outfit, painting), (outfit, alike)])
    (sentence,) = judge.lengths_that_do_not_count()
    assert sentence.startswith("sample 00001: how long its legs are does not count")


def test_paintings_are_the_same_whenever_they_are_painted():
    paintings = held_out_paintings(40)
    first = paintings[0][1].texture.clone()
    assert len([outfit for outfit, _ in paintings]) == 40  # more than are kept
    assert torch.equal(paintings[0][1].texture, first)
    other = Paintings(paintings.outfits, paintings.first_seed + 1)
    assert not torch.equal(other[0][1].texture, first)
