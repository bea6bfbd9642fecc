"""Views, features and similarities: the same views for all, transformers' own figures, and what cannot be had said."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from common.errors import UserError
from embedded.painter import body_maps
from evaluation.extractors import (
    Extractor,
    features_of,
    load_extractor,
    load_face_model,
    resize,
    text_features_of,
)
from evaluation.procedural import held_out_paintings
from evaluation.render_space import (
    clip_score,
    compare_renders,
    face_similarity,
    image_similarity,
    render_face,
    render_four_views,
    retrieval,
    silhouettes,
    view_features,
)
from render.bodies import load_anny_body
from render.uv_space import fill_outside


@pytest.fixture(scope="module")
def body():
    return load_anny_body()


@pytest.fixture(scope="module")
def outfits():
    """Prompts and filled textures of ten held-out bodies."""
    paintings = held_out_paintings(10)
    textures = [fill_outside(painting.texture[:3], painting.texture[3] > 0) for _, painting in paintings]
    return [outfit.prompt for outfit, _ in paintings], textures


def mean_colour(name: str = "mean colour", side: int = 8) -> Extractor:
    return Extractor(name, side, lambda pictures: pictures.mean((2, 3)))


def test_pictures_are_resized_as_clean_fid_does():
    pictures = torch.rand(2, 3, 96, 70)
    resized = resize(pictures, 32)
    antialiased = F.interpolate(pictures, size=(32, 32), mode="bicubic", antialias=True)
    assert torch.allclose(resized, antialiased.clamp(0, 1), atol=1e-5)
    channel = Image.fromarray((pictures[1, 2] * 255).numpy()).resize((32, 32), Image.Resampling.BICUBIC)
    assert torch.allclose(resized[1, 2], torch.from_numpy(np.array(channel).clip(0, 255)) / 255, atol=1e-6)
    assert torch.equal(resize(resized, 32), resized)


def test_four_views_show_the_front_the_left_the_back_and_the_right(body):
    """A texture that is red on the body's left, green on its right, brighter in front."""
    maps = body_maps(256)
    texture = torch.zeros(3, 256, 256)
    mask = torch.from_numpy(maps.mask)
    x, z = torch.from_numpy(maps.position[:, 0]), torch.from_numpy(maps.normal[:, 2])
    texture[:, mask] = torch.stack([x > 0, x < 0, z > 0]).float()
    renders, masks = render_four_views(body, fill_outside(texture, mask), 128), silhouettes(body, 128)
    assert renders.shape == (4, 3, 128, 128) and masks.shape == (4, 128, 128)
    assert renders.min() >= 0 and renders.max() <= 1
    assert (renders[..., 0] == 1).all() and not masks[..., 0].any(), "white behind"
    red, green, blue = (
        torch.stack([view[channel][mask].mean() for view, mask in zip(renders, masks)]) for channel in range(3)
    )
    assert red.argmax() == 1 and green.argmax() == 3 and blue.argmax() == 0 and blue.argmin() == 2


def test_features_come_texture_by_texture(body, outfits):
    _, textures = outfits
    features = view_features(body, textures[:3], [mean_colour(), mean_colour("again")], side=64)
    assert set(features) == {"mean colour", "again"} and features["again"].shape == (3, 4, 3)
    alone = features_of(mean_colour(), render_four_views(body, textures[2], 64))
    assert torch.equal(features["mean colour"][2], alone)


def test_renders_are_compared_inside_their_silhouettes(body, outfits):
    _, textures = outfits
    values = compare_renders(body, textures[:2], [textures[0], textures[0]], side=96)
    assert values["psnr"][0] == 80 and values["psnr"][1] < 30 and values["mse"][0] == 0
    assert values["ms_ssim"] == "ms_ssim needs pictures of 176 texels a side, has 96"
    darker = compare_renders(body, [0.5 * textures[0]], [textures[0]], side=96)
    renders, masks = render_four_views(body, textures[0], 96), silhouettes(body, 96)
    expected = [(view / 2)[:, mask].square().mean() for view, mask in zip(renders, masks)]
    assert darker["mse"].item() == pytest.approx(torch.stack(expected).mean().item(), abs=1e-4)
    with pytest.raises(UserError, match="no textures"):
        compare_renders(body, [], [])


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory, tiny_base):
    """A CLIP model with random weights, as transformers writes it, and itself."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(tiny_base / "tokenizer")
    torch.manual_seed(0)
    shared = {
        "projection_dim": 12,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {**shared, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**shared, "image_size": 32, "patch_size": 8}, projection_dim=12)
    ).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in (tiny_base / "feature_extractor").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder, model, tokenizer


def test_the_clip_score_is_a_hundred_times_the_cosine_that_transformers_gives(clip_folder):
    folder, model, tokenizer = clip_folder
    extractor = load_extractor(str(folder))
    assert not isinstance(extractor, str), extractor
    assert extractor.name == str(folder) and extractor.side == 32
    pixels, texts = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8), ["a man in red", "a woman", "blue"]
    pictures = pixels / 255
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    processed = processor([picture.permute(1, 2, 0).numpy() for picture in pixels], return_tensors="pt")
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(pixel_values=processed["pixel_values"], **tokens)
        cosine = output.logits_per_image / model.logit_scale.exp()
    features = features_of(extractor, pictures).view(3, 2, -1)
    text_features = text_features_of(extractor, texts)
    own = cosine.view(3, 2, 3)[torch.arange(3), :, torch.arange(3)]  # two views of each text's own picture
    for sign in (1, -1):
        expected = (100 * (sign * own).clamp(min=0)).mean(1)
        assert torch.allclose(clip_score(sign * features, text_features), expected, atol=1e-4)
    assert torch.allclose(image_similarity(features, 3 * features), torch.full((3,), 100.0), atol=1e-4)


def test_backbones_that_cannot_be_had_are_named(tmp_path, clip_folder, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert load_extractor("clip").startswith("needs openai/clip-vit-large-patch14 (")
    inception = load_extractor("inception")
    assert inception.startswith("needs inception-2015-12-05.pt: there is no") and "https://" in inception
    (tmp_path / "damaged.pt").write_bytes(b"nothing")
    assert "cannot read" in load_extractor(str(tmp_path / "damaged.pt"))
    assert load_face_model(str(tmp_path / "arcface.pt")).startswith("face similarity needs a TorchScript file")
    # A folder without the text encoder's weights: transformers would draw them at random.
    folder, model, _ = clip_folder
    model.vision_model.save_pretrained(tmp_path / "half")
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "half" / name).write_bytes((folder / name).read_bytes())
    assert "weights are missing" in load_extractor(str(tmp_path / "half"))


class Scripted(torch.nn.Module):
    """With the interface of FID's own TorchScript file: what `layers` sees is in [-1, 1]."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1))

    def forward(self, pictures):
        return self.layers(pictures)


def test_scripted_networks_see_their_own_range_and_size(tmp_path):
    path = tmp_path / "inception.pt"
    torch.jit.script(Scripted()).save(str(path))
    extractor = load_extractor(str(path))
    picture = torch.rand(1, 3, 40, 40)
    assert torch.allclose(
        features_of(extractor, picture), (resize(picture, 299) * 255 - 128).mean((2, 3)) / 128, atol=1e-5
    )
    assert text_features_of(extractor, ["a man"]) == "inception reads no texts; use a CLIP model"
    faces = load_face_model(str(path))
    assert torch.allclose(features_of(faces, picture), resize(picture, 112).mean((2, 3)) * 2 - 1, atol=1e-5)


def test_retrieval_counts_ties_by_their_right_share():
    keys = torch.eye(4)
    names = ["red", "green", "blue", "red"]
    assert retrieval(keys[:, None], keys, names).tolist() == [1, 1, 1, 1]
    assert retrieval(keys.roll(1, 0)[:, None], keys, names).tolist() == [1, 0, 0, 0], "the fourth key is red's too"
    blind = retrieval(torch.ones(4, 2, 4), torch.ones(4, 4), names)
    assert blind.tolist() == [0.5, 0.25, 0.25, 0.5], "who sees nothing is at chance"
    assert retrieval(keys[:2, None], keys[:2], ["red", "red"]) == (
        "retrieval needs 2 different prompts or pictures, has 1"
    )


def test_the_embedded_encoders_find_each_textures_prompt(body, outfits):
    prompts, textures = outfits
    extractor = load_extractor("embedded")
    assert extractor.name == "embedded image encoder"
    features = view_features(body, textures, [extractor], side=128)[extractor.name]
    keys = text_features_of(extractor, prompts)
    assert retrieval(features, keys, prompts).mean() >= 0.8
    assert retrieval(features, keys.roll(1, 0), prompts).mean() <= 0.2
    own, others = clip_score(features, keys), clip_score(features, keys.roll(1, 0))
    assert own.mean() > others.mean() + 20
    assert torch.allclose(image_similarity(features, features), torch.full((10,), 100.0), atol=1e-3)


def test_a_face_is_the_head_from_in_front(body, outfits):
    maps = body_maps(256)
    mask = torch.from_numpy(maps.mask)
    texture = torch.zeros(3, 256, 256)
    texture[0, mask] = torch.from_numpy(maps.is_head).float()
    face = render_face(body, fill_outside(texture, mask), 64)
    is_body = face[0].amin(0) < 0.99
    assert is_body.float().mean() > 0.3 and (face[0, 0][is_body] > 0.3).float().mean() > 0.8, "nearly all is head"
    assert (face[0, :, :3] == 1).all(), "all of it is in the picture"

    _, textures = outfits
    feet = textures[0].clone()
    feet[:, torch.zeros_like(mask).masked_scatter(mask, torch.from_numpy(maps.is_foot))] = 0
    values = face_similarity(body, [textures[0], feet, 1 - textures[0]], [textures[0]] * 3, mean_colour())
    assert values[0] == pytest.approx(100, abs=1e-3) and values[1] == pytest.approx(100, abs=1e-3)
    assert values[2] < 99.9
    assert face_similarity(body, textures, textures, None) == "face similarity needs a face embedding model"
