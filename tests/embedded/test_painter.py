"""What outfits are called, and what is painted from them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from embedded import grammar, painter
from embedded.sources import ProceduralTextures
from render.rigs import load_body
from render.uv_space import fill_outside


def test_procedural_textures_wear_what_the_prompt_says():
    outfit = grammar.Outfit("Asian", "woman", "green", "long sleeve shirt", "orange", "shorts", "blonde")
    painting = painter.paint(outfit, 3, 128)
    texture = painting.texture
    assert texture.shape == (4, 128, 128) and texture.min() >= 0 and texture.max() <= 1
    assert torch.equal(texture, painter.paint(outfit, 3, 128).texture)
    assert not torch.equal(texture, painter.paint(outfit, 4, 128).texture)
    maps, colours = painter.body_maps(128), texture[:3, texture[3] > 0].T.numpy()
    y, arm = maps.position[:, 1], maps.arm

    def distance(where, colour):
        return np.abs(np.median(colours[where], 0) - np.array(colour) / 255).max()

    assert distance((arm < 0) & (y > 1.0) & (y < 1.2), grammar.COLOURS["green"]) < 0.12
    assert distance((arm > 0.6) & (arm < 0.9), grammar.COLOURS["green"]) < 0.12, "a long sleeve"
    assert distance((arm < 0) & (y > 0.6) & (y < 0.9), grammar.COLOURS["orange"]) < 0.12
    assert distance((arm < 0) & (y > 0.2) & (y < 0.4), grammar.ETHNICITIES["Asian"]) < 0.12, "bare legs"
    assert distance(maps.is_head & (y > 1.6), grammar.HAIR["blonde"]) < 0.15

    regions = painting.regions.numpy()
    assert ((regions > painter.OUTSIDE) == maps.mask).all()
    colours_of_regions = {
        painter.TOP: grammar.COLOURS["green"],
        painter.BOTTOM: grammar.COLOURS["orange"],
        painter.HAIR_REGION: grammar.HAIR["blonde"],
        painter.SKIN: grammar.ETHNICITIES["Asian"],
    }
    for region, colour in colours_of_regions.items():
        assert (regions == region).sum() > 300
        assert distance(regions[maps.mask] == region, colour) < 0.12


def test_outfits_are_what_the_grammar_allows_and_one_in_ten_is_held_out():
    rng = np.random.default_rng(0)
    outfits = [grammar.sample_outfit(rng) for _ in range(600)]
    assert not any(outfit.held_out for outfit in outfits) and grammar.sample_outfit(rng, held_out=True).held_out
    for outfit in outfits:
        assert (outfit.top == "tuxedo" and outfit.person not in grammar.FEMALE) or outfit.top != "tuxedo"
        assert outfit.person in grammar.FEMALE or (outfit.top != "dress" and outfit.bottom != "skirt")
        assert bool(outfit.bottom) == (outfit.top not in ("dress", "tuxedo"))
        assert all(word in outfit.prompt for word in (outfit.ethnicity, outfit.person, outfit.top_style, outfit.top))
        assert (outfit.hair_words in outfit.prompt) and (outfit.beard <= (outfit.person not in grammar.FEMALE))
    assert {outfit.top for outfit in outfits} == {*grammar.TOPS, "dress", "tuxedo"}
    dress = grammar.Outfit("white", "woman", "yellow", "dress", "", "", "black", "red")
    assert dress.prompt == "white, woman, yellow dress, black hair, red sneakers"
    assert (dress.sleeve_length, dress.leg_length) == ("short", "short")
    assert {outfit.hair_cut for outfit in outfits} == {"", *grammar.HAIR_CUTS}


def test_a_bald_head_is_skin_and_a_beard_has_the_hairs_colour():
    man = grammar.Outfit("white", "man", "red", "shirt", "navy", "jeans", "black", hair_cut="bald", beard=True)
    assert man.prompt == "white, man, red shirt, navy jeans, bald, black beard"
    maps, regions = painter.body_maps(128), painter.paint(man, 0, 128).regions
    assert not (regions == painter.HAIR_REGION).any()
    shaved = painter.paint(replace(man, beard=False), 0, 128).texture[:3, maps.mask]
    bearded = painter.paint(man, 0, 128).texture[:3, maps.mask]
    x, y, z = maps.position.T
    chin = maps.is_head & (np.abs(x) < 0.01) & (np.abs(y - 1.425) < 0.01) & (z > 0.08)
    assert chin.sum() > 2 and bearded[:, chin].mean() < 0.3 < 0.5 < shaved[:, chin].mean()


@pytest.mark.parametrize("top", grammar.TOPS)
def test_every_garment_and_pattern_paints(top):
    for style, person, bottom in zip(grammar.STYLES, grammar.PERSONS * 3, ("jeans", "pants", "shorts", "skirt") * 5):
        outfit = grammar.Outfit("white", person, style, top, style, bottom, "brown", "red" if style == "navy" else "")
        assert painter.paint(outfit, 0, 64).texture.isfinite().all()


@pytest.mark.parametrize("top,person", [("dress", "woman"), ("tuxedo", "man")])
def test_one_pieces_cover_the_legs(top, person):
    outfit = grammar.Outfit("white", person, "red", top, "", "", "brown")
    painting, maps = painter.paint(outfit, 0, 64), painter.body_maps(64)
    thighs = (maps.arm < 0) & (maps.position[:, 1] > 0.6) & (maps.position[:, 1] < 0.8) & ~maps.is_hand
    assert (painting.regions.numpy()[maps.mask][thighs] == painter.TOP).mean() > 0.95


def test_other_layouts_hold_the_whole_body_in_other_places():
    """What the base is pretrained on: every region is there, none where Anny's own layout has it."""
    outfit = grammar.Outfit("white", "man", "red", "sweater", "blue", "pants", "black")
    own, others = painter.paint(outfit, 0, 64), [painter.paint(outfit, 0, 64, layout=n) for n in range(3)]
    clothes = {painter.TOP, painter.BOTTOM, painter.SHOES}
    for other in others:
        assert set(other.regions.unique().tolist()) >= {painter.SKIN, painter.HAIR_REGION, *clothes}
        both = (own.regions > 0) & (other.regions > 0)
        assert (own.regions[both] == other.regions[both]).float().mean() < 0.6
    assert not torch.equal(others[0].regions, others[1].regions)
    body = painter.other_layout(0)
    assert body.uvs.min() >= 0 and body.uvs.max() <= 1


def test_garments_meet_at_seams():
    """Texels at one place on the body, on both sides of a UV seam, have nearly the same colour."""
    outfit = grammar.Outfit("white", "man", "blue", "sweater", "green", "pants", "brown")
    size, body = 256, load_body("anny")
    texture = painter.paint(outfit, 0, size).texture
    texture = fill_outside(texture[:3], texture[3] > 0)
    pairs: dict[int, list[int]] = {}
    for vertex, uv in zip(body.faces.flatten().tolist(), body.uv_faces.flatten().tolist()):
        pairs.setdefault(vertex, []).append(uv)
    seams = [(vertex, sorted(set(uvs))[:2]) for vertex, uvs in pairs.items() if len(set(uvs)) > 1]
    inside = [uvs for vertex, uvs in seams if 0.2 < body.vertices[vertex, 1] < 0.85]
    assert len(inside) > 40

    def colour(index):
        u, v = body.uvs[index]
        return texture[:, min(int((1 - v) * size), size - 1), min(int(u * size), size - 1)]

    differences = torch.stack([(colour(a) - colour(b)).abs().max() for a, b in inside])
    assert differences.median() < 0.06


def test_prompts_and_procedural_rows():
    assert grammar.Outfit("white", "woman", "black", "shirt", "striped", "jeans", "black").prompt == (
        "white, woman, black shirt, striped jeans, black hair"
    )
    first, second = ProceduralTextures(3, 64)[1], ProceduralTextures(3, 64)[1]
    assert first == second and ProceduralTextures(3, 64, held_out=True)[1][1] != first[1]
