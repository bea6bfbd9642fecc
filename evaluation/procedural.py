"""Measures on the procedural set, where the truth of every texel is known."""

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from skimage.color import rgb2lab
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm import tqdm

from atlas_dataset.views import frame_bodies, render_texture
from common.pictures import image_from_pixels
from config.configuration import Render
from embedded.grammar import COLOURS, ETHNICITIES, HAIR, PATTERNS, SLEEVES, Outfit, sample_outfit
from embedded.painter import BOTTOM, HAIR_REGION, SKIN, TOP, Painting, body_maps, paint
from evaluation.consistency import gradient_energy, seam_error
from evaluation.sentences import FORMS, SYNONYMS
from models.checkpoints import TrainedModel
from models.diffusion import decode_latents, encode_posterior
from models.generation import finish_texture
from models.settings import GenerationSettings
from render.bodies import Body
from render.rasteriser import rasterize, rasterize_uv
from render.rigs import load_body, load_rig
from render.uv_space import fill_outside, texture_pixels

SEED = 90_001  # of the held-out outfits; training draws its own from small seeds
SIZE = 256  # of the true textures
ROWS_AT_ONCE = 8
PAINTINGS_KEPT = 4 * ROWS_AT_ONCE
FITTED_TO = 400  # true textures, the classifier of patterns
IMG_WEIGHTS = (0.25, 0.5, 0.75)
REGIONS = {"top": TOP, "bottom": BOTTOM, "hair": HAIR_REGION, "skin": SKIN}
PATTERN_NAMES = ("plain", *PATTERNS)
CUFF = 0.04  # of the arm, left out on both sides of a sleeve's end
JUST_NOTICEABLE = 2.3  # a difference in CIELAB (Mahy, van Eycken and Oosterlinck 1994)
SENTENCES = {"forms": FORMS, "synonyms": SYNONYMS}
MEDIANS = ("i2uv.skin_lab",)  # measures of which outliers say little


def lab(rgb: Tensor) -> Tensor:
    """sRGB (..., 3) in [0, 1] → CIELAB under D65."""
    return torch.from_numpy(rgb2lab(rgb.numpy()))


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
    """Masks (SIZE, SIZE) of what the grammar's long sleeves and legs cover and its short ones leave bare: round the
    elbows, and the shins."""
    maps = body_maps(SIZE)
    ends: dict[str, list[float]] = {"long": [], "short": []}
    for top, end in SLEEVES.items():
        ends[Outfit("", "", "", top, "", "", "").sleeve_length].append(end)
    elbow = (maps.arm > max(ends["short"]) + CUFF) & (maps.arm < min(ends["long"]) - CUFF)
    shin = (maps.arm < 0) & (maps.position[:, 1] > 0.14) & (maps.position[:, 1] < 0.38)
    masks = {}
    for name, texels in (("sleeve", elbow), ("leg", shin)):
        mask = np.zeros(maps.mask.shape, bool)
        mask[maps.mask] = texels
        masks[name] = torch.from_numpy(mask)
    return masks


def colour_spread(texture: Tensor, mask: Tensor) -> MultivariateNormal:
    """The colours of texture (3, SIZE, SIZE) in [0, 1] over a mask, in CIELAB: a Gaussian, no narrower than what the
    eye takes for one colour."""
    colours = lab(texture[:, mask].T)
    return MultivariateNormal(colours.mean(0), colours.T.cov() + JUST_NOTICEABLE**2 * torch.eye(3))


def length(texture: Tensor, limb: Tensor, cloth: Tensor, skin: Tensor) -> str:
    """ "long" where most of the limb's texels are likelier among the colours of the cloth than among the skin's.

    Of several colours, as a plaid's, none need be near the cloth's median. cloth, skin: masks (SIZE, SIZE); what of
    them lies on the limb is left out.
    """
    texels = lab(texture[:, limb].T)
    spreads = [colour_spread(texture, mask & ~limb) for mask in (cloth, skin)]
    like_cloth, like_skin = (spread.log_prob(texels) for spread in spreads)
    return "long" if (like_cloth > like_skin).float().mean() > 0.5 else "short"


def limb_cloth(outfit: Outfit, painting: Painting) -> dict[str, int]:
    """What covers a limb, or would: "sleeve" and "leg" → a region.

    None where there is next to no cloth or skin, or where both have one colour in truth, so that nobody could say how
    long it is."""
    regions = {"sleeve": TOP, "leg": BOTTOM if outfit.bottom else TOP}
    skin, covering = region_colour(painting.texture[:3], painting, SKIN), {}
    for limb, region in regions.items():
        cloth = region_colour(painting.texture[:3], painting, region)
        if cloth is not None and skin is not None and (lab(cloth) - lab(skin)).norm() > JUST_NOTICEABLE:
            covering[limb] = region
    return covering


def pattern_features(texture: Tensor, mask: Tensor) -> Tensor:
    """What tells patterns apart in texture (3, S, S) over mask (S, S): colour, its spread, and edges across and along
    at three sizes → (21,)."""
    colours = lab(texture.permute(1, 2, 0)).permute(2, 0, 1) / 100  # (3, S, S)
    inside = colours[:, mask]
    features = [inside.mean(1), inside.std(1)]
    for factor in (1, 2, 4):
        small = F.avg_pool2d(colours[None], factor)[0]
        is_inside = F.avg_pool2d(mask[None, None].float(), factor)[0, 0] > 0.99
        for axis in (-1, -2):
            both_inside = is_inside & is_inside.roll(1, axis)
            lightness, *chroma = (small - small.roll(1, axis))[:, both_inside].abs()
            edges = [lightness.mean(), torch.stack(chroma).mean(), lightness.square().mean().sqrt()]
            features.append(torch.stack(edges))
    return torch.cat(features).nan_to_num(0)


class PatternClassifier:
    """Multinomial logistic regression on `pattern_features` of true textures, sharp and as the autoencoder has them."""

    def __init__(self, paintings: Sequence[tuple[Outfit, Painting]], textures: Iterable[Tensor]):
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
        """{"i2uv": {"psnr": mean, ...}, ...}, the means, and the medians of MEDIANS, to four digits."""
        measures: dict = {}
        for name, values in self.answers.items():
            *parents, leaf = name.split(".")
            level = measures
            for parent in parents:
                level = level.setdefault(parent, {})
            level[leaf] = round(statistics.median(values) if name in MEDIANS else statistics.fmean(values), 4)
        return measures


def colour_right(tally: Tally, task: str, outfit: Outfit, painting: Painting, texture: Tensor) -> dict[str, Tensor]:
    """Adds whether each region of texture (3, SIZE, SIZE) in [0, 1] has its colour → the regions' colours."""
    medians = {name: region_colour(texture, painting, region) for name, region in REGIONS.items()}
    for region, word in colours_named(outfit).items():
        if medians[region] is not None:
            tally.add(f"{task}.color.{region}", nearest_word(medians[region], words_for(region)) == word)
    return medians


def score(
    tally: Tally,
    task: str,
    outfit: Outfit,
    painting: Painting,
    texture: Tensor,
    classifier: PatternClassifier,
    limb_masks: dict[str, Tensor],
) -> None:
    """Adds one generated texture (3, SIZE, SIZE) in [0, 1]."""
    colour_right(tally, task, outfit, painting, texture)
    for style, region in ((outfit.top_style, TOP), (outfit.bottom_style, BOTTOM)):
        if style:
            pattern = style if style in PATTERNS else "plain"
            tally.add(f"{task}.pattern", classifier(texture, painting.regions == region) == pattern)
    told, is_skin = {"sleeve": outfit.sleeve_length, "leg": outfit.leg_length}, painting.regions == SKIN
    for limb, region in limb_cloth(outfit, painting).items():
        shown = length(texture, limb_masks[limb], painting.regions == region, is_skin)
        tally.add(f"{task}.length", shown == told[limb])


class Paintings(Sequence):
    """Outfits, each with what it looks like at SIZE: painted when it is asked for and the last few kept, so that memory
    stays the same for any number."""

    def __init__(self, outfits: list[Outfit], first_seed: int):
        self.outfits, self.first_seed = outfits, first_seed

    def __len__(self) -> int:
        return len(self.outfits)

    def __getitem__(self, number: int) -> tuple[Outfit, Painting]:
        return self.outfits[number], _painted(self.outfits[number], self.first_seed + number)


@functools.lru_cache(maxsize=PAINTINGS_KEPT)
def _painted(outfit: Outfit, seed: int) -> Painting:
    return paint(outfit, seed, SIZE)


def held_out_paintings(count: int) -> Paintings:
    """Outfits that training never sees, painted at SIZE."""
    rng = np.random.default_rng(SEED)
    return Paintings([sample_outfit(rng, held_out=True) for _ in range(count)], SEED)


class Judge:
    """Tells whether textures show the attributes of held-out outfits."""

    def __init__(self, truths: Paintings, trained: TrainedModel | None = None):
        """trained: whose autoencoder blurs half of what the classifier of patterns is fitted to; None: all is sharp."""
        self.truths, self.trained, self.limb_masks = truths, trained, limbs()

    @functools.cached_property
    def classifier(self) -> PatternClassifier:
        rng = np.random.default_rng(SEED + 1)
        fitted = Paintings([sample_outfit(rng) for _ in range(FITTED_TO)], 0)
        sharp = (painting.texture[:3] for _, painting in fitted)
        blurred = () if self.trained is None else autoencoded(self.trained, fitted)
        with torch.enable_grad():
            return PatternClassifier(fitted, itertools.chain(sharp, blurred))

    def lengths_that_do_not_count(self) -> list[str]:
        """A sentence for each sleeve and leg whose length nobody could tell in truth."""
        limbs_of = [limb_cloth(*truth) for truth in self.truths]
        return [
            f"sample {number:05d}: how long its {limb}s are does not count: cloth and skin are within "
            f"{JUST_NOTICEABLE} in CIELAB, or next to nothing of them is to be seen"
            for number, told in enumerate(limbs_of)
            for limb in self.limb_masks
            if limb not in told
        ]

    def add(self, tally: Tally, task: str, number: int, texture: Tensor) -> None:
        outfit, painting = self.truths[number]
        score(tally, task, outfit, painting, texture, self.classifier, self.limb_masks)

    def shares(self, number: int, texture: Tensor) -> dict[str, float]:
        """Of texture (3, SIZE, SIZE) in [0, 1] for outfit `number`: "color.top" and so on → share of right answers."""
        tally = Tally()
        self.add(tally, "texture", number, texture)
        return {name.partition(".")[2]: sum(hits) / len(hits) for name, hits in tally.answers.items()}


@torch.no_grad()
def evaluate(judge: Judge, texture: Callable[[str, int], Tensor], tasks: list[str]) -> dict:
    """The measures that evaluate.py explains, nested by name.

    texture: "t2uv", "i2uv", `sentences_name` or `blend_name` and a number → what was made, (3, SIZE, SIZE) in [0, 1].
    tasks: of "t2uv", "i2uv". Raises UserError where a texture is missing.
    """
    tally, truths, limit = Tally(), judge.truths, len(judge.truths)
    body = load_body("anny")  # that the paintings are of
    energy = statistics.fmean(gradient_energy(body, painting.texture[:3]) for _, painting in truths)
    decoded = autoencoded(judge.trained, truths)
    for number, ((_, painting), blurred) in enumerate(zip(truths, decoded)):
        judge.add(tally, "truth", number, painting.texture[:3])
        judge.add(tally, "autoencoder", number, blurred)
        inside = painting.texture[3] > 0
        error = (blurred - painting.texture[:3])[:, inside].square().mean()
        tally.add("autoencoder.psnr", -10 * error.log10())
        tally.add("autoencoder.sharpness", gradient_energy(body, blurred) / energy)
    settings = GenerationSettings.of(judge.trained.cfg.inference)
    for task in tasks:
        for number in tqdm(range(limit), f"{task}: measures"):
            generated, painting = texture(task, number), truths[number][1]
            judge.add(tally, task, number, generated)
            tally.add(f"{task}.sharpness", gradient_energy(body, generated) / energy)
            if task == "t2uv":
                score_seams(tally, task, body, generated, settings)
            else:
                score_pixels(tally, painting, view_of(painting, number)[1], generated)
                score_skin(tally, painting, generated)
    if "t2uv" in tasks:
        for name, sentences in SENTENCES.items():
            textures = [texture(sentences_name(name), number) for number in range(len(sentences))]
            score_sentences(tally, name, textures)
    for weight, number in blends(limit) if len(tasks) == 2 else ():
        pair = truths[number], truths[(number + 1) % limit]
        score_both(tally, weight, *pair, texture(blend_name(weight), number))
    return tally.nested()


def blends(limit: int) -> list[tuple[float, int]]:
    """(weight of the picture, number): a quarter of the prompts, each with the next person's picture."""
    numbers = range(math.ceil(limit / 4)) if limit > 1 else ()
    return [(weight, number) for weight in IMG_WEIGHTS for number in numbers]


def blend_name(weight: float) -> str:
    return f"both_{weight}"


def sentences_name(name: str) -> str:
    """name: of SENTENCES."""
    return f"sentences_{name}"


@torch.no_grad()
def autoencoded(trained: TrainedModel, paintings: Paintings) -> Iterator[Tensor]:
    """The true textures through the autoencoder and back, in turn: the best that any latents can look like."""
    base = trained.base
    for start in tqdm(range(0, len(paintings), ROWS_AT_ONCE), "autoencoder"):
        numbers = range(start, min(start + ROWS_AT_ONCE, len(paintings)))
        textures = [paintings[number][1].texture for number in numbers]
        filled = torch.stack([fill_outside(texture[:3], texture[3] > 0) for texture in textures])
        pixel_values = resized(filled, base.native_resolution) * 2 - 1
        mean, _ = encode_posterior(base.vae, pixel_values.to(base.device))
        decoded = decode_latents(base.vae, mean * base.vae.config.scaling_factor).cpu()
        yield from resized((decoded + 1) / 2, SIZE)


def resized(textures: Tensor, side: int) -> Tensor:
    """(B, 3, H, W) → (B, 3, side, side)"""
    return F.interpolate(textures, size=(side, side), mode="bilinear", antialias=True)


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
    (told_outfit, painting), (shown_outfit, _) = told, shown
    told_words, shown_words = colours_named(told_outfit), colours_named(shown_outfit)
    measure = f"both.img_weight_{weight}.text_wins".replace("0.", "0_")
    for region in told_words.keys() & shown_words.keys():
        words = (told_words[region], shown_words[region])
        colour = region_colour(texture, painting, REGIONS[region])
        if words[0] != words[1] and colour is not None:
            nearest = nearest_word(colour, {word: words_for(region)[word] for word in words})
            tally.add(measure, nearest == words[0])


def score_skin(tally: Tally, painting: Painting, texture: Tensor) -> None:
    """How far the skin of texture (3, SIZE, SIZE) in [0, 1] is from the true one: CIELAB's Delta E 76 of medians."""
    colours = [region_colour(picture, painting, SKIN) for picture in (texture, painting.texture[:3])]
    if all(colour is not None for colour in colours):
        tally.add("i2uv.skin_lab", (lab(colours[0]) - lab(colours[1])).norm())


def score_seams(tally: Tally, task: str, body: Body, texture: Tensor, settings: GenerationSettings) -> None:
    """The seam error of texture (3, SIZE, SIZE) in [0, 1] as infer_uv.py writes it by its defaults, and without the
    seam fix."""
    for name, seam_fix in (("seam_error", settings.seam_fix), ("seam_error_raw", False)):
        finished = finish_texture(texture * 2 - 1, body, settings.size, seam_fix)
        pixels = (texture_pixels(finished, settings.size) + 1) / 2
        tally.add(f"{task}.{name}", seam_error(body, pixels))


def score_sentences(tally: Tally, name: str, textures: list[Tensor]) -> None:
    """Colours of SENTENCES[name], over what every garment covers. textures: (3, SIZE, SIZE) in [0, 1], one a
    sentence."""
    neutral = paint(Outfit("white", "man", "white", "t-shirt", "black", "shorts", "black"), SEED, SIZE)
    for (_, words), texture in zip(SENTENCES[name], textures, strict=True):
        for region, word in words.items():
            colour = region_colour(texture, neutral, REGIONS[region])
            tally.add(f"sentences.{name}", nearest_word(colour, words_for(region)) == word)


def view_of(painting: Painting, index: int) -> tuple[Image.Image, Tensor]:
    """A picture of the painting on a body of its own pose and shape, and the texels (SIZE, SIZE) that it shows."""
    rig, (height, width) = load_rig("anny"), (512, 384)
    texture = fill_outside(painting.texture[:3], painting.texture[3] > 0) * 2 - 1
    picture, view = render_texture(rig, texture, Render(full_body=1), SEED, index, [0], height, width)[0]
    vertices = rig.vertices([view])
    cameras = frame_bodies(vertices, [view], width / height)
    shown_faces = rasterize(vertices, rig.body.faces, cameras, height, width).face
    texels = rasterize_uv(rig.body, SIZE)
    seen = torch.zeros(SIZE * SIZE, dtype=torch.bool)
    seen[texels.pixel] = torch.isin(texels.face, shown_faces)
    return image_from_pixels(picture), seen.view(SIZE, SIZE)
