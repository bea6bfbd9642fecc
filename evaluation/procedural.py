"""Measures on the procedural set, where the truth of every texel is known."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm import tqdm

from atlas_dataset.views import frame_bodies, render_texture
from common.pictures import image_from_pixels
from config.configuration import Render
from embedded.grammar import COLOURS, ETHNICITIES, HAIR, PATTERNS, Outfit, sample_outfit
from embedded.painter import BOTTOM, HAIR_REGION, SKIN, TOP, Painting, body_maps, paint
from models.checkpoints import TrainedModel
from models.conditioning import blend
from models.diffusion import autocast, decode_latents, encode_posterior, resolve_precision
from models.generation import condition, generate
from render.rasteriser import rasterize, rasterize_uv
from render.rigs import load_rig
from render.uv_space import fill_outside

SEED = 90_001  # of the held-out outfits; training draws its own from small seeds
SIZE = 256  # of the true textures
FITTED_TO = 400  # true textures, the classifier of patterns
IMG_WEIGHTS = (0.25, 0.5, 0.75)
REGIONS = {"top": TOP, "bottom": BOTTOM, "hair": HAIR_REGION, "skin": SKIN}
PATTERN_NAMES = ("plain", *PATTERNS)
SENTENCES = (  # written by hand: words of the grammar, in forms that no training caption has
    ("She has blonde hair and she is wearing a yellow dress.", {"top": "yellow", "hair": "blonde"}),
    ("Guy in a purple hoodie, black jeans", {"top": "purple", "bottom": "black"}),
    ("My grandfather in his brown sweater", {"top": "brown"}),
    ("red blouse on a woman; her skirt is navy", {"top": "red", "bottom": "navy"}),
    ("Businessman, gray blazer over navy pants", {"top": "gray", "bottom": "navy"}),
    ("The girl's t-shirt is orange and her shorts are white", {"top": "orange", "bottom": "white"}),
    ("Someone with auburn hair who put on a green jacket", {"top": "green", "hair": "auburn"}),
    ("Old lady, white hair, pink blouse, beige skirt", {"top": "pink", "bottom": "beige", "hair": "white"}),
    ("A boy whose hoodie is red", {"top": "red"}),
    ("Here stands an African American woman; her dress is white.", {"top": "white", "skin": "African American"}),
    ("yellow t-shirt and blue shorts for the young boy", {"top": "yellow", "bottom": "blue"}),
    ("tuxedo, black, for an Asian man", {"top": "black", "skin": "Asian"}),
    ("A red dress. A woman with black hair wears it.", {"top": "red", "hair": "black"}),
    ("He wears khaki pants with a navy polo shirt", {"top": "navy", "bottom": "khaki"}),
    ("Elder man: green sweater, gray pants", {"top": "green", "bottom": "gray"}),
    ("Woman at the office: black blazer, black pants", {"top": "black", "bottom": "black"}),
    ("Kid with brown hair, orange sweater and green pants", {"top": "orange", "bottom": "green", "hair": "brown"}),
    ("There is a Latino man here, his shirt is white, his jeans are blue", {"top": "white", "bottom": "blue"}),
    ("purple dress worn by a blonde girl", {"top": "purple", "hair": "blonde"}),
    ("pants: beige. shirt: brown. a man.", {"top": "brown", "bottom": "beige"}),
    ("A woman dressed all in pink, pink sweater and pink skirt", {"top": "pink", "bottom": "pink"}),
    ("On the left a Middle Eastern man in a blue jacket", {"top": "blue"}),
    ("navy hoodie, red shorts, white sneakers, it is a young man", {"top": "navy", "bottom": "red"}),
    ("Her hair is black, her blouse is yellow, her pants are gray",
     {"top": "yellow", "bottom": "gray", "hair": "black"}),
    ("gray-haired no, he has white hair; the polo shirt is green", {"top": "green", "hair": "white"}),
    ("This man likes orange, so his jacket is orange too", {"top": "orange"}),
    ("young woman, beige dress, summer", {"top": "beige"}),
    ("One white man, one red t-shirt, one pair of black shorts", {"top": "red", "bottom": "black", "skin": "white"}),
    ("a girl with purple skirt and white blouse", {"top": "white", "bottom": "purple"}),
    ("The old man is in a khaki jacket and brown pants", {"top": "khaki", "bottom": "brown"}),
)  # fmt: skip


def lab(rgb: Tensor) -> Tensor:
    """sRGB (..., 3) in [0, 1] → CIELAB under D65."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    matrix = rgb.new_tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ matrix.T / rgb.new_tensor([0.9505, 1.0, 1.089])
    x, y, z = torch.where(xyz > 216 / 24389, xyz.clamp(min=1e-8) ** (1 / 3), xyz * 841 / 108 + 4 / 29).unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-1)


def nearest_word(colour: Tensor, words: dict[str, tuple]) -> str:
    """The word whose colour is nearest to colour (3,) in [0, 1]."""
    palette = torch.tensor(list(words.values())) / 255
    return list(words)[int((lab(colour) - lab(palette)).norm(dim=-1).argmin())]


def region_colour(texture: Tensor, painting: Painting, region: int) -> Tensor | None:
    """Median colour (3,) of texture (3, SIZE, SIZE) in [0, 1] over a region; None where there is next to none."""
    mask = painting.regions == region
    return texture[:, mask].median(1).values if mask.sum() > 40 else None


def words_for(region: str) -> dict[str, tuple]:
    return {"hair": HAIR, "skin": ETHNICITIES}.get(region, COLOURS)


def colours_named(outfit: Outfit) -> dict[str, str]:
    """The colour word of each region that has one."""
    named = {"top": outfit.top_style, "bottom": outfit.bottom_style, "hair": outfit.hair, "skin": outfit.ethnicity}
    return {region: word for region, word in named.items() if word in words_for(region)}


def limbs() -> dict[str, Tensor]:
    """Masks (SIZE, SIZE) of forearms and shins."""
    maps = body_maps(SIZE)
    forearm = (maps.arm > 0.60) & (maps.arm < 0.88) & ~maps.is_hand
    shin = (maps.arm < 0) & (maps.position[:, 1] > 0.14) & (maps.position[:, 1] < 0.38)
    found = {}
    for name, texels in (("sleeve", forearm), ("leg", shin)):
        mask = np.zeros(maps.mask.shape, bool)
        mask[maps.mask] = texels
        found[name] = torch.from_numpy(mask)
    return found


def length(texture: Tensor, limb: Tensor, cloth: Tensor, skin: Tensor) -> str:
    """ "long" where the limb's texels look more like the cloth than like the skin (3,)."""
    texels = lab(texture[:, limb].T)
    nearer = (texels - lab(cloth)).norm(dim=-1) < (texels - lab(skin)).norm(dim=-1)
    return "long" if nearer.float().mean() > 0.5 else "short"


def pattern_features(texture: Tensor, mask: Tensor) -> Tensor:
    """What tells patterns apart in texture (3, S, S) over mask (S, S): colour, its spread, and edges across and along
    at three sizes → (21,)."""
    space = lab(texture.permute(1, 2, 0)).permute(2, 0, 1) / 100
    inside = space[:, mask]
    features = [inside.mean(1), inside.std(1)]
    for factor in (1, 2, 4):
        small = F.avg_pool2d(space[None], factor)[0]
        kept = F.avg_pool2d(mask[None, None].float(), factor)[0, 0] > 0.99
        for axis in (-1, -2):
            both = kept & kept.roll(1, axis)
            change = (small - small.roll(1, axis))[:, both].abs()
            features.append(torch.stack([change[0].mean(), change[1:].mean(), change[0].pow(2).mean().sqrt()]))
    return torch.cat(features).nan_to_num(0)


class PatternClassifier:
    """Multinomial logistic regression on `pattern_features` of true textures, sharp and as the autoencoder has them."""

    def __init__(self, paintings: list[tuple[Outfit, Painting]], textures: list[Tensor]):
        """textures: (3, SIZE, SIZE) in [0, 1] of the paintings, of which there may be several rounds."""
        rows, labels = [], []
        for index, texture in enumerate(textures):
            outfit, painting = paintings[index % len(paintings)]
            for style, region in ((outfit.top_style, TOP), (outfit.bottom_style, BOTTOM)):
                if style:
                    rows.append(pattern_features(texture, painting.regions == region))
                    labels.append(PATTERN_NAMES.index(style) if style in PATTERNS else 0)
        features, labels = torch.stack(rows), torch.tensor(labels)
        self.mean, self.std = features.mean(0), features.std(0) + 1e-6
        features = (features - self.mean) / self.std
        self.linear = torch.nn.Linear(features.shape[1], len(PATTERN_NAMES))
        optimizer = torch.optim.LBFGS(self.linear.parameters(), max_iter=300)

        def loss():
            optimizer.zero_grad()
            value = F.cross_entropy(self.linear(features), labels) + 1e-3 * self.linear.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)

    @torch.no_grad()
    def __call__(self, texture: Tensor, mask: Tensor) -> str:
        features = (pattern_features(texture, mask) - self.mean) / self.std
        return PATTERN_NAMES[int(self.linear(features).argmax())]


class Tally:
    """Shares of right answers under dotted names."""

    def __init__(self):
        self.answers: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        self.answers.setdefault(name, []).append(float(value))

    def nested(self) -> dict:
        out: dict = {}
        for name, values in self.answers.items():
            *parents, leaf = name.split(".")
            level = out
            for parent in parents:
                level = level.setdefault(parent, {})
            level[leaf] = round(sum(values) / len(values), 4)
        return out


def colour_right(tally: Tally, task: str, outfit: Outfit, painting: Painting, texture: Tensor) -> dict[str, Tensor]:
    """Adds whether each region of texture (3, SIZE, SIZE) in [0, 1] has its colour → the regions' colours."""
    medians = {name: region_colour(texture, painting, region) for name, region in REGIONS.items()}
    for region, word in colours_named(outfit).items():
        if medians[region] is not None:
            tally.add(f"{task}.color.{region}", nearest_word(medians[region], words_for(region)) == word)
    return medians


def score(tally: Tally, task: str, outfit: Outfit, painting: Painting, texture: Tensor, classifier, limb_masks) -> None:
    """Adds one generated texture (3, SIZE, SIZE) in [0, 1]."""
    medians = colour_right(tally, task, outfit, painting, texture)
    for style, region in ((outfit.top_style, TOP), (outfit.bottom_style, BOTTOM)):
        if style:
            named = style if style in PATTERNS else "plain"
            tally.add(f"{task}.pattern", classifier(texture, painting.regions == region) == named)
    legs = medians["bottom"] if outfit.bottom else medians["top"]
    for name, cloth, named in (("sleeve", medians["top"], outfit.sleeve_length), ("leg", legs, outfit.leg_length)):
        if cloth is not None and medians["skin"] is not None:
            tally.add(f"{task}.length", length(texture, limb_masks[name], cloth, medians["skin"]) == named)


def held_out_paintings(count: int) -> list[tuple[Outfit, Painting]]:
    rng = np.random.default_rng(SEED)
    outfits = [sample_outfit(rng, held_out=True) for _ in range(count)]
    return [(outfit, paint(outfit, SEED + index, SIZE)) for index, outfit in enumerate(outfits)]


@torch.no_grad()
def evaluate(trained: TrainedModel, limit: int) -> dict:
    tally, limb_masks, truths = Tally(), limbs(), held_out_paintings(limit)
    rng = np.random.default_rng(SEED + 1)
    trained_on = [sample_outfit(rng) for _ in range(FITTED_TO)]
    fitted = [(outfit, paint(outfit, index, SIZE)) for index, outfit in enumerate(trained_on)]
    with torch.enable_grad():
        sharp = [painting.texture[:3] for _, painting in fitted]
        classifier = PatternClassifier(fitted, [*sharp, *autoencoded(trained, fitted)])
    decoded = autoencoded(trained, truths)
    for (outfit, painting), texture in zip(truths, decoded):
        score(tally, "truth", outfit, painting, painting.texture[:3], classifier, limb_masks)
        score(tally, "autoencoder", outfit, painting, texture, classifier, limb_masks)
        inside = painting.texture[3] > 0
        error = (texture - painting.texture[:3])[:, inside].square().mean()
        tally.add("autoencoder.psnr", -10 * error.log10())

    prompts = [condition(trained, outfit.prompt, None, 0) for outfit, _ in truths]
    for (outfit, painting), texture in zip(truths, textures_from(trained, prompts, "t2uv")):
        score(tally, "t2uv", outfit, painting, texture, classifier, limb_masks)
    score_sentences(tally, trained)
    if trained.aligner is None:
        return tally.nested()

    views = [view_of(painting, index) for index, (_, painting) in enumerate(tqdm(truths, "pictures"))]
    pictures = [condition(trained, None, picture, 1) for picture, _ in views]
    for (outfit, painting), (_, seen), texture in zip(truths, views, textures_from(trained, pictures, "i2uv")):
        score(tally, "i2uv", outfit, painting, texture, classifier, limb_masks)
        score_pixels(tally, painting, seen, texture)
    others = pictures[1:] + pictures[:1]  # each prompt with the next person's picture
    for weight in IMG_WEIGHTS if limit > 1 else ():
        states = [blend(text, picture, weight) for text, picture in zip(prompts, others)][: -(-limit // 4)]
        for index, texture in enumerate(textures_from(trained, states, f"both at {weight}")):
            score_both(tally, weight, truths[index], truths[(index + 1) % limit], texture)
    return tally.nested()


@torch.no_grad()
def autoencoded(trained: TrainedModel, paintings: list[tuple[Outfit, Painting]]) -> list[Tensor]:
    """The true textures through the autoencoder and back: the best that any latents can look like."""
    base, found = trained.base, []
    side = base.native_resolution
    for start in tqdm(range(0, len(paintings), 8), "autoencoder"):
        textures = [fill_outside(p.texture[:3], p.texture[3] > 0) for _, p in paintings[start : start + 8]]
        pixels = F.interpolate(torch.stack(textures), size=(side, side), mode="bilinear", antialias=True) * 2 - 1
        mean, _ = encode_posterior(base.vae, pixels.to(base.device))
        decoded = decode_latents(base.vae, mean * base.vae.config.scaling_factor).cpu()
        found += [*F.interpolate((decoded + 1) / 2, size=(SIZE, SIZE), mode="bilinear", antialias=True)]
    return found


def score_pixels(tally: Tally, painting: Painting, seen: Tensor, texture: Tensor) -> None:
    """PSNR and SSIM of texture (3, SIZE, SIZE) in [0, 1] over the islands; seen: (SIZE, SIZE) bool."""
    inside = painting.texture[3] > 0
    error = (texture - painting.texture[:3]).square().mean(0)
    for name, mask in (("psnr", inside), ("psnr_visible", inside & seen), ("psnr_hidden", inside & ~seen)):
        if mask.any():
            tally.add(f"i2uv.{name}", -10 * error[mask].mean().clamp(min=1e-8).log10())
    pair = [fill_outside(picture, inside)[None] for picture in (texture, painting.texture[:3])]
    _, similarity = structural_similarity_index_measure(*pair, data_range=1.0, return_full_image=True)
    tally.add("i2uv.ssim", similarity[0].mean(0)[inside].mean())


def score_both(tally: Tally, weight: float, told, shown, texture: Tensor) -> None:
    """Whose colour a region has, the told outfit's or the shown one's, where the two differ."""
    (first, painting), (second, _) = told, shown
    named, pictured = colours_named(first), colours_named(second)
    for region in named.keys() & pictured.keys():
        colour = region_colour(texture, painting, REGIONS[region])
        if named[region] != pictured[region] and colour is not None:
            palette = words_for(region)
            found = nearest_word(colour, {word: palette[word] for word in (named[region], pictured[region])})
            tally.add(f"both.img_weight_{weight}.text_wins".replace("0.", "0_"), found == named[region])


def score_sentences(tally: Tally, trained: TrainedModel) -> None:
    """Colours of SENTENCES, over what every garment covers."""
    neutral = paint(Outfit("white", "man", "white", "t-shirt", "black", "shorts", "black"), SEED, SIZE)
    states = [condition(trained, sentence, None, 0) for sentence, _ in SENTENCES]
    for (_, named), texture in zip(SENTENCES, textures_from(trained, states, "sentences")):
        for region, word in named.items():
            found = nearest_word(region_colour(texture, neutral, REGIONS[region]), words_for(region))
            tally.add("sentences.color", found == word)


def view_of(painting: Painting, index: int) -> tuple[Image.Image, Tensor]:
    """A picture of the painting on a body of its own pose and shape, and the texels (SIZE, SIZE) that it shows."""
    rig, (height, width) = load_rig("anny"), (512, 384)
    texture = fill_outside(painting.texture[:3], painting.texture[3] > 0) * 2 - 1
    picture, view = render_texture(rig, texture, Render(full_body=1), SEED, index, [0], height, width)[0]
    vertices = rig.vertices([view])
    cameras = frame_bodies(vertices, [view], width / height)
    shown = rasterize(vertices, rig.body.faces, cameras, height, width).face
    under = rasterize_uv(rig.body, SIZE)  # the texels' faces
    seen = torch.zeros(SIZE * SIZE, dtype=torch.bool)
    seen[under.pixel] = torch.isin(under.face, shown)
    return image_from_pixels(picture), seen.view(SIZE, SIZE)


def textures_from(trained: TrainedModel, states: list[Tensor], name: str) -> Tensor:
    """encoder_hidden_states (1, L, D) each → textures (B, 3, SIZE, SIZE) in [0, 1], each from its own seed."""
    cfg, device, made = trained.cfg, trained.base.device, []
    image_scale = cfg.inference.image_guidance_scale if name == "i2uv" else None  # of a picture alone
    with autocast(device, resolve_precision(cfg.training.mixed_precision, device)):
        for start in tqdm(range(0, len(states), 8), name):
            rows = torch.cat(states[start : start + 8])
            made.append(generate(
                trained, rows, cfg.inference.negative_prompt, [SEED + start + row for row in range(len(rows))],
                cfg.inference.num_inference_steps, image_scale or cfg.inference.guidance_scale,
            ).cpu())  # fmt: skip
    textures = F.interpolate(torch.cat(made), size=(SIZE, SIZE), mode="bilinear", antialias=True)
    return (textures + 1) / 2
