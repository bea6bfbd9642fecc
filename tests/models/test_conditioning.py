import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from common.errors import UserError
from common.pictures import image_from_pixels, pixels_from_image, prepare_image
from config.configuration import Aligner
from models.conditioning import (
    PooledAligner,
    QueryAligner,
    drop_conditions,
    encode_images,
    encode_prompts,
    make_aligner,
    picture_size,
)
from render.uv_space import texture_pixels


def test_text_and_image_give_one_shape(base):
    text_states = encode_prompts(base, ["a man", "a woman in a red dress"])
    image_tokens = encode_images(base, torch.rand(2, 3, 32, 32) * 2 - 1)
    assert text_states.shape == (2, 77, 16) and image_tokens.shape == (2, 17, 24)
    for kind in ("query", "pooled"):
        aligner = make_aligner(Aligner(kind=kind, layers=1, heads=2), base)
        assert aligner(image_tokens).shape == text_states.shape


def test_images_reach_clip_as_its_own_processor_makes_them(base, tiny_base):
    picture = Image.effect_noise((32, 32), 80).convert("RGB")
    expected = CLIPImageProcessorPil.from_pretrained(tiny_base / "feature_extractor")(picture, return_tensors="pt")
    with torch.no_grad():
        expected = base.image_encoder(expected.pixel_values).last_hidden_state
    assert torch.allclose(encode_images(base, prepare_image(picture, 32)[None]), expected, atol=1e-4)


def test_query_aligner_keeps_positions_and_pooled_does_not():
    tokens = torch.randn(1, 10, 24)
    query = QueryAligner(24, 16, 7, layers=2, heads=2)(tokens)
    pooled = PooledAligner(24, 16, 7, heads=2)(tokens)
    assert (query[:, 1:] - query[:, :1]).abs().amax(-1).min() > 1e-3
    assert (pooled - pooled[:, :1]).abs().max() == 0


def test_aligners_have_the_published_key_names():
    query = QueryAligner(1280, 1024, 77, layers=3, heads=16).state_dict()
    assert {"query", "visual_proj.weight", "i2t.layers.2.multihead_attn.in_proj_weight"} <= query.keys()
    assert query["query"].shape == (1, 77, 1024) and not any(key.startswith("i2t.norm") for key in query)
    pooled = PooledAligner(1024, 768, 77, heads=8).state_dict()
    assert {"cls_token", "attn_pool.in_proj_weight", "projector.0.weight", "projector.2.bias"} <= pooled.keys()


def test_heads_must_divide_the_width(base):
    with pytest.raises(UserError, match=r"model\.aligner\.heads"):
        make_aligner(Aligner(heads=5), base)
    base.image_encoder = None
    with pytest.raises(UserError, match="image_encoder"):
        make_aligner(Aligner(), base)


def test_whole_rows_are_dropped():
    states, null = torch.ones(3, 5, 4), torch.full((1, 5, 4), 7.0)
    dropped = drop_conditions(states, null, torch.tensor([True, False, True]))
    assert torch.equal(dropped[[0, 2]], null.expand(2, -1, -1)) and torch.equal(dropped[1], states[1])


def test_pictures_are_padded_not_squashed():
    picture = Image.new("RGB", (30, 60), "white")
    pixels = prepare_image(picture, 32)
    assert pixels.shape == (3, 32, 32) and pixels.min() == -1 and pixels.max() == 1
    assert pixels[:, :, :6].max() < 0 and pixels[:, :, 12:20].min() > 0.9
    see_through = Image.new("RGBA", (10, 10), (255, 255, 255, 0))
    assert prepare_image(see_through, 8).max() == -1


def test_larger_pictures_keep_their_shape_and_take_interpolated_positions(base):
    assert picture_size(base, (400, 300), None) == (32, 32), "the square that the encoder was made for"
    assert picture_size(base, (400, 300), 64) == (64, 48) and picture_size(base, (300, 400), 64) == (48, 64)
    assert picture_size(base, (400, 290), 64) == (64, 48), "whole patches of 8"
    with pytest.raises(UserError, match="not a multiple of 8"):
        picture_size(base, (400, 300), 60)
    picture = Image.effect_noise((30, 40), 80).convert("RGB")
    pixels = prepare_image(picture, (64, 48))
    assert pixels.shape == (3, 64, 48) and pixels[:, :, 0].max() > -1, "nothing is padded"
    tokens = encode_images(base, pixels[None])
    assert tokens.shape == (1, 1 + 8 * 6, 24)
    # By hand: patches with the 4x4 positions stretched to 8x6.
    model = base.image_encoder
    embeddings = model.embeddings if hasattr(model, "embeddings") else model.vision_model.embeddings
    positions = embeddings.position_embedding.weight
    grid = positions[1:].view(1, 4, 4, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(8, 6), mode="bicubic", align_corners=False)
    expected = torch.cat([positions[:1], grid.flatten(2)[0].T])
    interpolated = embeddings.interpolate_pos_encoding(torch.zeros(1, 49, 24), 64, 48)[0]
    assert torch.allclose(interpolated, expected, atol=1e-5)


def test_pixels_round_trip():
    picture = Image.effect_noise((16, 16), 90).convert("RGB")
    pixels = pixels_from_image(picture)
    assert pixels.min() >= -1 and pixels.max() <= 1
    assert image_from_pixels(pixels).tobytes() == picture.tobytes()


def test_texture_alpha_is_filled_and_bleeds_nothing():
    texture = Image.new("RGBA", (64, 64), (0, 255, 0, 0))
    texture.paste((200, 0, 0, 255), (8, 8, 40, 40))
    pixels = texture_pixels(texture, 16)
    assert pixels.shape == (3, 16, 16)
    assert (pixels[0] - (200 / 127.5 - 1)).abs().max() < 0.02, "red everywhere"
    assert pixels[1].max() < -0.97, "none of the green under transparent texels"
    assert texture_pixels(Image.new("RGB", (20, 20), "white"), 16).min() == 1
