"""Trains the embedded base from nothing: a Stable Diffusion in small, in the diffusers folder layout.

    python -m embedded.pretrain.scenes --out embedded/base   # an hour and a half on 2 cores; continues where it stopped

Six stages, each on captioned renders of procedurally dressed bodies, on their textures in other UV layouts and on
patchworks of fabric; no picture shows a texture in Anny's own layout, so making those is left to the joint training:
1. tokenizer (byte-level BPE);  2. text and image encoder, contrastively (CLIP, Radford et al. 2021), with two views of
an outfit (SLIP, Mu et al. 2022), captions that are nearly right, and the outfit's colours to tell;  3. the text
encoder alone, whose tokens are to tell who wears what;  4. the image encoder alone, which is shown where the parts of
an outfit are;  5. autoencoder;  6. UNet (v-prediction, zero terminal SNR: Lin et al. 2024), first on pictures of half
the size.
"""

import argparse
import json
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from atlas_dataset.building import prepare_renderer
from atlas_dataset.views import frame_bodies, render_texture, sample_view
from config.configuration import Render
from embedded import painter as procedural
from embedded.grammar import BOTTOMS, COLOURS, ETHNICITIES, HAIR, STYLES, TOPS, Outfit, sample_outfit
from models.base import load_base
from models.diffusion import autocast, encode_posterior, resolve_precision, training_target
from render.bodies import load_anny_body
from render.rasteriser import ambient_light, fill_outside, look_at, orbit_cameras, render_views, studio_lights
from render.rigs import load_rig

RESOLUTION, PATCH = 256, 8  # side in pixels of a picture, and of what one latent stands for
CLIP_RESOLUTION = 128
CAPTIONS = 4  # of a picture
SMALL_SHARE = 0.75  # of the UNet's steps: pictures of half the size, and twice as many
LARGE = 3000  # pictures for its other steps
LAYOUTS = 12  # other ways to unwrap the body; Anny's own is left to the joint training
VIEWS = 3  # of an outfit, for the image encoder
OUTFIT_RENDER = Render(fill=[0.5, 0.95])
PARTS = (procedural.TOP, procedural.BOTTOM, procedural.HAIR_REGION, procedural.SKIN)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TOLD = {"top_style": STYLES, "bottom_style": STYLES, "hair": tuple(HAIR), "ethnicity": tuple(ETHNICITIES),
        "top": (*TOPS, "dress", "tuxedo"), "bottom": (*BOTTOMS, "skirt"), "sneakers": tuple(COLOURS)}  # fmt: skip
PHENOTYPES = {  # Anny's axes: gender 0 male to 1 female; age 1/3 child, 2/3 adult, 1 old
    "man": dict(gender=0.0, age=0.67), "woman": dict(gender=1.0, age=0.67),
    "young boy": dict(gender=0.0, age=0.42), "young girl": dict(gender=1.0, age=0.42),
    "elder man": dict(gender=0.0, age=0.92), "elder woman": dict(gender=1.0, age=0.92),
}  # fmt: skip


def captions_of(outfit: Outfit, rng: np.random.Generator) -> list[str]:
    """CAPTIONS ways to say it: the ATLAS form and sentences."""
    return [outfit.prompt, *(outfit.sentence(rng) for _ in range(CAPTIONS - 1))]


def layout_words(number: int) -> str:
    """What a caption of a texture ends with: it says how the body is unwrapped."""
    return f", uv {number}"


def painted(outfit: Outfit, seed: int, layout: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The texture (3, 256, 256) in [0, 1], filled outside the islands, and its regions (256, 256)."""
    painting = procedural.paint(outfit, seed, RESOLUTION, layout)
    return fill_outside(painting.texture[:3], painting.texture[3] > 0), painting.regions


def render_scene(seed: int, index: int) -> tuple[np.ndarray, dict]:
    """Picture `index` → (3, 256, 256) uint8 and its captions; the same for the same (seed, index).

    One in four is a render; the others are textures in LAYOUTS layouts that are not Anny's own.
    """
    rng = np.random.default_rng([seed, index])
    outfit = sample_outfit(rng)
    label = {"captions": captions_of(outfit, rng)}
    if index % 4:
        layout = int(rng.integers(LAYOUTS))
        label["captions"] = [caption + layout_words(layout) for caption in label["captions"]]
        picture, _ = painted(outfit, index, layout)
        return (picture * 255).round().to(torch.uint8).numpy(), label
    texture, _ = painted(outfit, index)
    body = load_anny_body(**PHENOTYPES[outfit.person], weight=float(rng.choice([0.3, 0.5, 0.7])))

    width = RESOLUTION if rng.uniform() < 0.5 else RESOLUTION * 3 // 4
    azimuth, elevation = torch.tensor([rng.uniform(0, 360)]), torch.tensor([rng.uniform(-12, 25)])
    fov = torch.tensor([rng.uniform(20, 45)])
    cameras = orbit_cameras(body, azimuth, elevation, fov, fill=rng.uniform(0.75, 0.95), aspect=width / RESOLUTION)
    if rng.uniform() < 0.45:  # nearer, to a height between knees and face
        eye = -(cameras.rotation.transpose(1, 2) @ cameras.translation[..., None])[..., 0]
        height = body.vertices[:, 1].max()
        target = torch.tensor([[0.0, rng.uniform(0.35, 0.92), 0.0]]) * height
        cameras = look_at(target + (eye - target) * rng.uniform(0.3, 0.7), target, fov)
    background = torch.tensor(rng.uniform(0, 1, (1, 3)), dtype=torch.float32)
    with torch.no_grad():
        picture = render_views(
            body, texture[None], cameras, RESOLUTION, width, studio_lights(cameras), background, supersample=2
        )
    bars = (RESOLUTION - width) // 2  # portraits are padded to a square with black, as at inference
    picture = F.pad(picture[0], (bars, bars)) * 255
    return picture.round().to(torch.uint8).numpy(), label


def outfit_of(seed: int, index: int) -> Outfit:
    """The one that `render_outfit` shows."""
    return sample_outfit(np.random.default_rng([seed, index, 1]))


@torch.no_grad()
def render_outfit(seed: int, index: int) -> tuple[np.ndarray, dict]:
    """One outfit on VIEWS posed bodies of any shape → (VIEWS, 3, 128, 128) uint8 and its label.

    The label: captions; confusions, the captions of outfits that differ by who wears which colour; colours, the medians
    of PARTS (None where there is none). Every third outfit is recoloured beyond the grammar's colours and has no
    captions: two views of it still match.
    """
    rng = np.random.default_rng([seed, index, 1])
    outfit = sample_outfit(rng)  # as outfit_of has it
    (texture, regions), label = painted(outfit, index), {"captions": [], "confusions": []}
    if index % 3 == 2:
        gray, tint = texture.mean(0, keepdim=True), torch.from_numpy(rng.uniform(0.55, 1.1, (3, 1, 1))).float()
        texture = (gray + (texture - gray) * rng.uniform(0.2, 1.0))[torch.from_numpy(rng.permutation(3))]
        texture = (texture ** rng.uniform(0.7, 1.8) * tint).clamp(0, 1)
    else:
        label["captions"] = captions_of(outfit, rng)
        label["confusions"] = [confused(outfit, rng) for _ in range(CAPTIONS)]
    masks = [regions == part for part in PARTS]
    label["colours"] = [texture[:, mask].median(1).values.tolist() if mask.sum() > 40 else None for mask in masks]
    width = CLIP_RESOLUTION if index % 4 < 2 else CLIP_RESOLUTION * 3 // 4
    numbers, size = list(range(VIEWS)), (CLIP_RESOLUTION, width)
    rendered = render_texture(load_rig("anny"), texture * 2 - 1, OUTFIT_RENDER, seed, index, numbers, *size)
    pictures = torch.stack([F.pad((picture + 1) / 2, ((CLIP_RESOLUTION - width) // 2,) * 2) for picture, _ in rendered])
    return (pictures * 255).round().to(torch.uint8).numpy(), label


@torch.no_grad()
def render_parts(seed: int, index: int) -> tuple[np.ndarray, dict]:
    """Where `render_outfit` shows PARTS: each patch's share → (VIEWS, PARTS, 8, 8) uint8, 255 is all."""
    outfit, rig = outfit_of(seed, index), load_rig("anny")
    _, regions = painted(outfit, index)
    shares = torch.stack([regions == part for part in PARTS]).float()
    width = CLIP_RESOLUTION if index % 4 < 2 else CLIP_RESOLUTION * 3 // 4
    views = [sample_view(OUTFIT_RENDER, rig, seed, index, number) for number in range(VIEWS)]
    vertices = rig.vertices(views)
    cameras, light = frame_bodies(vertices, views, width / CLIP_RESOLUTION), ambient_light(torch.ones(1, 3))
    size, black = (CLIP_RESOLUTION, width), torch.zeros(1, 3)
    some = [
        render_views(rig.body, part[None], cameras, *size, light, black, vertices=vertices)
        for part in (shares[:3], shares[3:].expand(3, -1, -1))  # a picture has three channels
    ]
    maps = torch.cat([some[0], some[1][:, :1]], 1)
    maps = F.avg_pool2d(F.pad(maps, ((CLIP_RESOLUTION - width) // 2,) * 2), 16)
    return (maps.clamp(0, 1) * 255).round().to(torch.uint8).numpy(), {}


def confused(outfit: Outfit, rng: np.random.Generator) -> str:
    """A caption that is nearly right: top and bottom have changed colours, or one colour is another (as the hard
    negatives of Yuksekgonul et al. 2023)."""
    if outfit.bottom and outfit.top_style != outfit.bottom_style and rng.uniform() < 0.5:
        return replace(outfit, top_style=outfit.bottom_style, bottom_style=outfit.top_style).sentence(rng)
    name = str(rng.choice(["top_style", "hair", "ethnicity", *(["bottom_style"] if outfit.bottom else [])]))
    others = {"hair": HAIR, "ethnicity": ETHNICITIES}.get(name, STYLES)
    word = str(rng.choice([word for word in others if word != getattr(outfit, name)]))
    changed = replace(outfit, **{name: word})
    caption = changed.sentence(rng)
    return caption if word in caption else changed.prompt


def load_renders(work: Path, name: str, scene, count: int, seed: int) -> tuple[np.ndarray, list[dict]]:
    """scene(seed, 0 .. count - 1): pictures (count, ...) uint8, memory-mapped, and labels; goes on if stopped."""
    pictures, labels = work / f"{name}_{count}.npy", work / f"{name}_{count}.jsonl"
    done = len(labels.read_text().splitlines()) if labels.exists() else 0
    if done < count:
        shape = (count, *scene(seed, 0)[0].shape)
        array = np.lib.format.open_memmap(pictures, "r+" if done else "w+", np.uint8, shape)
        with (
            ProcessPoolExecutor(initializer=prepare_renderer, mp_context=get_context("spawn")) as pool,
            labels.open("a") as lines,
        ):
            scenes = pool.map(partial(scene, seed), range(done, count), chunksize=32)
            for index, (picture, label) in enumerate(tqdm(scenes, name, initial=done, total=count), done):
                array[index] = picture
                print(json.dumps(label), file=lines, flush=True)
        array.flush()
    return np.load(pictures, mmap_mode="r"), [json.loads(line) for line in labels.read_text().splitlines()]


def train_stage(
    name: str, work: Path, modules: dict, loss_fn, steps: int, lr: float, ema=None, log_every=50, save_seconds=120
):
    """Trains modules on loss_fn(step) for `steps` steps of AdamW with a cosine decay; resumes from work/name.pt."""
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
    )
    parts = {**modules, "optimizer": optimizer, "lr_scheduler": lr_scheduler, **({"ema": ema} if ema else {})}
    saved, start, losses, seconds = work / f"{name}.pt", 0, [], 0.0
    if saved.exists():
        state = torch.load(saved, map_location=parameters[0].device, weights_only=True)
        start, losses, seconds = state["step"], state["losses"], state["seconds"]
        for key, part in parts.items():
            part.load_state_dict(state[key])

    def save(step):
        state = {key: part.state_dict() for key, part in parts.items()}
        torch.save({**state, "step": step, "losses": losses, "seconds": seconds}, saved.with_suffix(".tmp"))
        os.replace(saved.with_suffix(".tmp"), saved)

    progress = tqdm(range(start, steps), name, initial=start, total=steps)
    last_save = clock = time.perf_counter()
    recent = []
    for step in progress:
        torch.manual_seed(1_000_003 * step + 17)
        loss = loss_fn(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        lr_scheduler.step()
        if ema:
            ema.step(parameters)
        recent.append(float(loss.detach()))
        if (step + 1) % log_every == 0 or step + 1 == steps:
            losses.append([step + 1, float(np.mean(recent))])
            progress.set_postfix(loss=f"{losses[-1][1]:.4f}")
            recent = []
        now = time.perf_counter()
        if now - last_save > save_seconds or step + 1 == steps:
            seconds, clock, last_save = seconds + now - clock, now, now
            save(step + 1)
    return {"steps": steps, "seconds": round(seconds), "first_loss": losses[0][1], "last_loss": losses[-1][1]}


def train_tokenizer(out: Path, vocab_size: int = 1024):
    """CLIP's tokenizer (lower case, byte-level BPE, '</w>' at a word's end) on the grammar's own sentences."""
    rng = np.random.default_rng(0)
    outfits = [sample_outfit(rng) for _ in range(4000)]
    corpus = [text.lower() for outfit in outfits for text in (outfit.prompt, outfit.sentence(rng))]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, end_of_word_suffix="</w>", special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    # CLIP's own order: bytes, bytes that end a word, merges, then the two markers.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    folder = out / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=77
    ).save_pretrained(folder)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    return tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


def augment(pixel_values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(B, 3 or more, H, W) in [0, 1]: mirrored, zoomed and shifted at random, the first three channels dimmed; the
    border's colour runs on outside."""
    rows = len(pixel_values)

    def uniform(low, high, *shape):
        return torch.empty(rows, *shape).uniform_(low, high, generator=generator)

    zoom, theta = uniform(-0.5, 0.2).exp(), torch.zeros(rows, 2, 3)
    theta[:, 0, 0] = zoom * uniform(-1, 1).sign()
    theta[:, 1, 1] = zoom
    theta[:, :, 2] = uniform(-0.15, 0.15, 2)
    grid = F.affine_grid(theta, pixel_values.shape, align_corners=False).to(pixel_values.device)
    moved = F.grid_sample(pixel_values, grid, padding_mode="border", align_corners=False)
    moved[:, :3] *= uniform(0.85, 1.15, 1, 1, 1).to(moved.device)
    return moved.clamp(0, 1)


def train_clip(out: Path, work: Path, pictures, labels, steps: int, batch: int, device, precision) -> dict:
    """pictures: (N, VIEWS, 3, 128, 128) uint8 with the labels of `render_outfit`."""
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    captioned = torch.tensor([bool(label["captions"]) for label in labels])
    place = captioned.cumsum(0) - 1  # of an outfit among the captioned ones
    right, wrong = (
        tokenize(tokenizer, [caption for label in labels for caption in label[key]]).view(-1, CAPTIONS, 77)
        for key in ("captions", "confusions")
    )
    # Attention is causal: padding behind the end changes nothing before it.
    longest = max(int((ids != tokenizer.eos_token_id).sum(-1).max()) for ids in (right, wrong)) + 1
    right, wrong = right[..., :longest], wrong[..., :longest]
    colours = torch.tensor([[colour or [0.0] * 3 for colour in label["colours"]] for label in labels])  # (N, PARTS, 3)
    has_colour = torch.tensor([[colour is not None for colour in label["colours"]] for label in labels])
    torch.manual_seed(0)
    markers = dict(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id
    )
    text = CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, projection_dim=128, **markers)).to(device)  # fmt: skip
    image = CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=192, intermediate_size=576, num_hidden_layers=3, num_attention_heads=6,
        image_size=CLIP_RESOLUTION, patch_size=16, projection_dim=128)).to(device)  # fmt: skip
    width = image.config.hidden_size
    heads = torch.nn.ModuleDict({
        "views": torch.nn.Linear(width, 128), "colours": torch.nn.Linear(width, 3 * len(PARTS))
    }).to(device)  # fmt: skip
    scale = torch.nn.ParameterDict({"log": torch.nn.Parameter(torch.tensor([2.66, 2.66]))}).to(device)
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))

    def loss_fn(step):
        rng = np.random.default_rng([1, step])
        rows = rng.choice(len(pictures), batch, replace=False)
        views = rng.permuted(np.tile(range(VIEWS), (batch, 1)), axis=1)
        chosen = np.concatenate([pictures[rows, views[:, 0]], pictures[rows, views[:, 1]]])
        generator = torch.Generator().manual_seed(step)
        pixels = (augment(torch.from_numpy(chosen).to(device) / 255, generator) - mean) / std
        known = captioned[rows]
        captions, form = place[rows][known], torch.from_numpy(rng.integers(0, CAPTIONS, int(known.sum())))
        input_ids = torch.cat([right[captions, form], wrong[captions, form]]).to(device)
        with autocast(device, precision):
            encoded = image.vision_model(pixel_values=pixels)
            image_embeds = F.normalize(image.visual_projection(encoded.pooler_output).float(), dim=-1)
            view_embeds = F.normalize(heads["views"](encoded.pooler_output).float(), dim=-1)
            guessed = heads["colours"](encoded.pooler_output).float().view(2 * batch, -1, 3)
            text_embeds = F.normalize(text(input_ids=input_ids).text_embeds.float(), dim=-1)
        scales = scale["log"].exp().clamp(max=60)
        labels = torch.arange(batch, device=device)
        logits = view_embeds[:batch] @ view_embeds[batch:].T * scales[0]
        same_outfit = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        named = image_embeds[known.repeat(2).to(device)]
        logits, count = named @ text_embeds.T * scales[1], len(captions)  # right captions, then nearly right ones
        matching = F.cross_entropy(logits, labels[:count].repeat(2))
        for part in logits[:, :count].chunk(2):
            matching = matching + F.cross_entropy(part.T, labels[:count]) / 2
        error = (guessed - colours[rows].repeat(2, 1, 1).to(device)).abs().mean(-1)
        return matching / 2 + 0.5 * same_outfit + 3 * error[has_colour[rows].repeat(2, 1).to(device)].mean()

    modules = {"text": text, "image": image, "heads": heads, "scale": scale}
    summary = train_stage("clip", work, modules, loss_fn, steps, lr=1e-3)
    text.half().save_pretrained(out / "text_encoder")
    image.half().save_pretrained(out / "image_encoder")
    CLIPImageProcessorPil(
        size={"shortest_edge": CLIP_RESOLUTION}, crop_size={"height": CLIP_RESOLUTION, "width": CLIP_RESOLUTION},
        image_mean=CLIP_MEAN, image_std=CLIP_STD,
    ).save_pretrained(out / "feature_extractor")  # fmt: skip
    return summary


def telling_heads(width: int) -> torch.nn.ModuleDict:
    """For `telling_loss`: how much each token says about each part, and which word it is."""
    words = {name: torch.nn.Linear(width, len(words)) for name, words in TOLD.items()}
    return torch.nn.ModuleDict({"query": torch.nn.Linear(width, len(TOLD)), **words})


def telling_loss(heads, states: torch.Tensor, outfits: list[Outfit], captions: list[str] | None = None) -> torch.Tensor:
    """Cross-entropy of the words of TOLD, each read from states (B, L, D) as a UNet's attention would, by one query.

    captions: a word that a row's caption leaves out does not count there."""
    read, loss = heads["query"](states).softmax(1).transpose(1, 2) @ states, 0.0  # (B, TOLD, D)
    for place, (name, words) in enumerate(TOLD.items()):
        said = [getattr(outfit, name) for outfit in outfits]
        spoken = captions or said
        told = [words.index(word) if word and word in caption else -1 for word, caption in zip(said, spoken)]
        told = torch.tensor(told, device=states.device)
        if (told >= 0).any():
            loss = loss + F.cross_entropy(heads[name](read[:, place]), told, ignore_index=-1)
    return loss


def train_text(out: Path, work: Path, pictures, labels, steps: int, batch: int, device, precision) -> dict:
    """The text encoder goes on against the finished image encoder: as a UNet's attention would, one query a part reads
    from its states what that part's words were, on new outfits at every step."""
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    text = CLIPTextModelWithProjection.from_pretrained(out / "text_encoder", dtype=torch.float32).to(device)
    image = CLIPVisionModelWithProjection.from_pretrained(out / "image_encoder", dtype=torch.float32).to(device).eval()
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    captioned = [row for row, label in enumerate(labels) if label["captions"]]
    image_embeds = []
    with torch.no_grad(), autocast(device, precision):
        for start in range(0, len(captioned), 100):
            pixels = torch.from_numpy(pictures[captioned[start : start + 100], 0]).to(device) / 255
            image_embeds.append(F.normalize(image(pixel_values=(pixels - mean) / std).image_embeds.float(), dim=-1))
    image_embeds = torch.cat(image_embeds)
    torch.manual_seed(4)
    width = text.config.hidden_size
    heads = telling_heads(width).to(device)

    def loss_fn(step):
        rng = np.random.default_rng([6, step])
        outfits = [sample_outfit(rng) for _ in range(batch)]
        captions = [outfit.sentence(rng) if rng.uniform() < 0.7 else outfit.prompt for outfit in outfits]
        rows = rng.choice(len(captioned), batch // 4, replace=False)
        shown, form = [labels[captioned[row]] for row in rows], rng.integers(0, CAPTIONS, len(rows))
        named = [label[key][which] for key in ("captions", "confusions") for label, which in zip(shown, form)]
        numbers = rng.integers(0, 2 * LAYOUTS, batch)
        endings = [layout_words(number) if number < LAYOUTS else "" for number in numbers]
        input_ids = tokenize(tokenizer, [*(caption + end for caption, end in zip(captions, endings)), *named])
        longest = int((input_ids != tokenizer.eos_token_id).sum(-1).max()) + 1
        with autocast(device, precision):
            encoded = text.text_model(input_ids=input_ids[:, :longest].to(device))
            text_embeds = F.normalize(text.text_projection(encoded.pooler_output[batch:]).float(), dim=-1)
        states = encoded.last_hidden_state[:batch].float()
        logits = 30 * image_embeds[torch.from_numpy(rows).to(device)] @ text_embeds.T  # right captions, then wrong ones
        matching = F.cross_entropy(logits, torch.arange(len(rows), device=device))
        return 0.2 * matching + telling_loss(heads, states, outfits, captions)

    summary = train_stage("text", work, {"text": text, "heads": heads}, loss_fn, steps, lr=1e-3)
    text.half().save_pretrained(out / "text_encoder")
    return summary


def train_image(out: Path, work: Path, pictures, labels, parts, steps: int, batch: int, device, precision) -> dict:
    """The image encoder goes on against the finished text encoder: its patches tell where PARTS are and which colour
    each has, and what words name them. parts: (N, VIEWS, PARTS, 8, 8) uint8 of `render_parts`."""
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    text = CLIPTextModelWithProjection.from_pretrained(out / "text_encoder", dtype=torch.float32).to(device).eval()
    image = CLIPVisionModelWithProjection.from_pretrained(out / "image_encoder", dtype=torch.float32).to(device)
    captioned = torch.tensor([bool(label["captions"]) for label in labels])
    with torch.no_grad():
        captions = [label["captions"][0] for label in labels if label["captions"]]
        embeds = [text(tokenize(tokenizer, captions[start : start + 100]).to(device)).text_embeds
                  for start in range(0, len(captions), 100)]  # fmt: skip
    text_embeds = torch.zeros(len(labels), embeds[0].shape[1], device=device)
    text_embeds[captioned.to(device)] = F.normalize(torch.cat(embeds), dim=-1)
    colours = torch.tensor([[colour or [0.0] * 3 for colour in label["colours"]] for label in labels])  # (N, PARTS, 3)
    has_colour = torch.tensor([[colour is not None for colour in label["colours"]] for label in labels])
    torch.manual_seed(3)
    width = image.config.hidden_size
    heads = torch.nn.ModuleDict({
        "where": torch.nn.Linear(width, len(PARTS)), "colours": torch.nn.Linear(width, 3 * len(PARTS)),
        "words": telling_heads(width),
    }).to(device)  # fmt: skip
    outfits = [outfit_of(0, row) for row in range(len(parts))]
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))

    def loss_fn(step):
        rng = np.random.default_rng([5, step])
        rows, views = rng.choice(len(parts), batch, replace=False), rng.integers(0, VIEWS, batch)
        chosen = torch.from_numpy(np.stack([pictures[row, view] for row, view in zip(rows, views)])).float()
        shares = F.interpolate(torch.from_numpy(parts[rows, views]).float(), size=CLIP_RESOLUTION)
        both = augment(torch.cat([chosen, shares], 1).to(device) / 255, torch.Generator().manual_seed(step))
        if rng.uniform() < 0.75:  # larger and 3:4, as sharper pictures will come, with positions interpolated
            margin = CLIP_RESOLUTION // 8
            both = F.interpolate(both[..., margin:-margin], scale_factor=2, mode="bilinear")
        with autocast(device, precision):
            encoded = image.vision_model(pixel_values=(both[:, :3] - mean) / std, interpolate_pos_encoding=True)
            tokens = image.vision_model.post_layernorm(encoded.last_hidden_state[:, 1:])
            image_embeds = F.normalize(image.visual_projection(encoded.pooler_output).float(), dim=-1)
            where, guessed = heads["where"](tokens).float(), heads["colours"](tokens).float()
        target = F.avg_pool2d(both[:, 3:], image.config.patch_size).flatten(2).transpose(1, 2)  # (B, patches, PARTS)
        located = F.binary_cross_entropy_with_logits(where, target)
        # Each patch tells the colour of what it shows; of each part all its patches together count alike.
        error = (guessed.unflatten(-1, (len(PARTS), 3)) - colours[rows, None].to(device)).abs().mean(-1)
        known = has_colour[rows].to(device) & (target.sum(1) > 0.1)
        error = ((error * target).sum(1) / target.sum(1).clamp(min=0.1))[known].mean()
        known = captioned[rows]
        logits = 30 * image_embeds[known.to(device)] @ text_embeds[torch.from_numpy(rows)[known].to(device)].T
        matching = F.cross_entropy(logits, torch.arange(len(logits), device=device))
        told_by = [outfits[row] for row in rows[known.numpy()]]
        told = telling_loss(heads["words"], tokens.float()[known.to(device)], told_by)
        return 5 * located + 5 * error + 0.1 * matching + 0.2 * told

    summary = train_stage("image", work, {"image": image, "heads": heads}, loss_fn, steps, lr=1e-3)
    image.half().save_pretrained(out / "image_encoder")
    return summary


def train_vae(out: Path, work: Path, pictures, steps: int, batch: int, device, precision) -> dict:
    torch.manual_seed(1)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(16, 32, 64, 96), layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, sample_size=RESOLUTION,
        norm_num_groups=1,  # groups of two channels would lose the colour of flat areas
    ).to(device)  # fmt: skip
    patchwork = torch.stack([procedural.generic_picture(np.random.default_rng([2, i]), 256) for i in range(192)])

    def random_crop(rng: np.random.Generator, side: int = 64) -> torch.Tensor:
        if rng.uniform() < 0.5:
            picture = torch.from_numpy(pictures[rng.integers(len(pictures))].copy()) / 255
        else:
            picture = patchwork[rng.integers(len(patchwork))]
        top, left = rng.integers(0, RESOLUTION - side + 1, 2)
        crop = picture[:, top : top + side, left : left + side].rot90(int(rng.integers(4)), (1, 2))
        if rng.uniform() < 0.25:  # any palette, not the grammar's alone
            crop = crop[torch.from_numpy(rng.permutation(3))]
        dark, light = rng.uniform(0, 0.4), rng.uniform(0.6, 1)
        return crop if rng.uniform() < 0.5 else dark + (light - dark) * crop

    def loss_fn(step):
        rng = np.random.default_rng([3, step])
        pixel_values = torch.stack([random_crop(rng) for _ in range(batch)]).float().to(device) * 2 - 1
        with autocast(device, precision):
            posterior = vae.encode(pixel_values).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = decoded.float() - pixel_values
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        coarse = F.avg_pool2d(error, 8).abs().mean()
        # The first three channels hold each patch's mean colour: learned at once, and smooth to diffuse in.
        anchor = F.mse_loss(posterior.mean[:, :3].float(), 2 * F.avg_pool2d(pixel_values, PATCH))
        return error.abs().mean() + 0.3 * edges + coarse + 0.5 * anchor + 1e-5 * posterior.kl().mean() / 64

    summary = train_stage("vae", work, {"vae": vae}, loss_fn, steps, lr=2e-3)
    equalise(vae, torch.from_numpy(pictures[:256].copy()).to(device) / 127.5 - 1)
    vae.half().save_pretrained(out / "vae")
    return summary


@torch.no_grad()
def equalise(vae: AutoencoderKL, pixel_values: torch.Tensor) -> None:
    """Gives each latent channel mean 0, and deviation 1 where it holds colour and 0.5 where it holds detail, by the 1x1
    convolutions before and after the latents: what the autoencoder does stays the same, and colour counts for as much
    as all detail in the UNet's loss."""
    mean = torch.cat([vae.encode(part).latent_dist.mean for part in pixel_values.split(32)])
    centre, factor = mean.mean((0, 2, 3)), 0.5 / mean.std((0, 2, 3))
    factor[:3] *= 2
    channels, before, after = len(centre), vae.quant_conv, vae.post_quant_conv
    after.bias += (after.weight[:, :, 0, 0] * centre).sum(1)
    after.weight /= factor[:, None, None]
    before.bias[:channels] = (before.bias[:channels] - centre) * factor
    before.weight[:channels] *= factor[:, None, None, None]
    before.bias[channels:] += 2 * factor.log()  # of the variance
    vae.register_to_config(scaling_factor=1.0)


def train_unet(out: Path, work: Path, pictures, labels, steps: int, batch: int, device, precision) -> dict:
    vae = AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32).to(device).eval()
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(out / "text_encoder", dtype=torch.float32).to(device).eval()
    noise_scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", steps_offset=1, clip_sample=False,
    )  # fmt: skip
    DDIMScheduler.from_config(noise_scheduler.config, set_alpha_to_one=True).save_pretrained(out / "scheduler")

    def latents_of(pictures, resolution: int) -> torch.Tensor:
        found = []
        for start in tqdm(range(0, len(pictures), 50), f"latents of {resolution}"):
            pixel_values = torch.from_numpy(pictures[start : start + 50].copy()).to(device) / 127.5 - 1
            pixel_values = F.interpolate(pixel_values, size=(resolution,) * 2, mode="bilinear", antialias=True)
            mean, _ = encode_posterior(vae, pixel_values)
            found.append((mean * vae.config.scaling_factor).half().cpu())
        return torch.cat(found)

    with torch.no_grad(), autocast(device, precision):
        small, large = latents_of(pictures, RESOLUTION // 2), latents_of(pictures[:LARGE], RESOLUTION)
        captions = [caption for label in labels for caption in label["captions"]]

        def states_of(captions: list[str]) -> torch.Tensor:
            return text_encoder(tokenize(tokenizer, captions).to(device)).last_hidden_state.half().cpu()

        starts = tqdm(range(0, len(captions), 100), "text states")
        states = torch.cat([states_of(captions[start : start + 100]) for start in starts]).unflatten(0, (-1, CAPTIONS))
        nothing = states_of([""])[0]

    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // PATCH, in_channels=8, out_channels=8, layers_per_block=1,
        block_out_channels=(32, 80, 128), cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    ).to(device, memory_format=torch.channels_last)  # fmt: skip
    ema = EMAModel(unet.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)

    def loss_fn(step):
        rng = np.random.default_rng([4, step])
        latents, count = (small, 2 * batch) if step < SMALL_SHARE * steps else (large, batch)
        count = min(count, len(latents))
        rows = rng.choice(len(latents), count, replace=False)
        clean = latents[rows].to(device).float()
        encoder_hidden_states = states[rows, rng.integers(0, CAPTIONS, count)]
        encoder_hidden_states[torch.rand(count) < 0.1] = nothing
        noise = torch.randn(clean.shape).to(device)
        timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (count,)).to(device)
        noisy_latents = noise_scheduler.add_noise(clean, noise, timesteps)
        noisy_latents = noisy_latents.contiguous(memory_format=torch.channels_last)
        with autocast(device, precision):
            noise_pred = unet(noisy_latents, timesteps, encoder_hidden_states.to(device).float()).sample
        return F.mse_loss(noise_pred.float(), training_target(noise_scheduler, clean, noise, timesteps))

    summary = train_stage("unet", work, {"unet": unet}, loss_fn, steps, lr=8e-4, ema=ema)
    ema.copy_to(unet.parameters())
    unet.half().save_pretrained(out / "unet")
    return summary


MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.0",
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"], "safety_checker": [None, None], "requires_safety_checker": False,
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
}  # fmt: skip


MODEL_CARD = """# The embedded base

A Stable Diffusion in small, so that everything runs where there is no model hub and no GPU. {megabytes:.1f} MB in half
precision: UNet {unet:.1f} M parameters on 32x32x8 latents of 256x256 pictures, autoencoder {vae:.1f} M, text encoder
{text_encoder:.1f} M, image encoder {image_encoder:.1f} M, a byte-level BPE of the prompts' own words.

Trained from nothing by `python -m embedded.pretrain` on {renders} captioned pictures, a quarter of them renders of
procedurally dressed bodies (Anny), the rest textures of such bodies in {layouts} UV layouts that are not Anny's own
(captions end with ", uv 0" to ", uv 11"); for the encoders on {outfits} further outfits in {views} poses each; for the
autoencoder on patchworks of fabric too. It never saw a texture in the layout that joint training teaches. The encoders
learned contrastively, two views of an outfit against each other and against captions, some of them nearly right; then
each learned to tell in words what the outfits are, the text encoder from captions, the image encoder from pictures. It
is no use for anything but this project's demonstration and tests.

| stage | steps | seconds ({device}, {precision}) | first loss | last loss |
| --- | --- | --- | --- | --- |
{stages}
"""


def model_card(out: Path, summary: dict) -> str:
    base = load_base(str(out))
    sizes = {name: sum(p.numel() for p in module.parameters()) / 1e6 for name, module in base.modules().items()}
    stages = [
        f"| {name} | {stage['steps']} | {stage['seconds']} | {stage['first_loss']:.3f} | {stage['last_loss']:.3f} |"
        for name, stage in summary.items() if isinstance(stage, dict)
    ]  # fmt: skip
    megabytes = sum(path.stat().st_size for path in out.rglob("*.safetensors")) / 1e6
    facts = {key: value for key, value in summary.items() if not isinstance(value, dict)}
    return MODEL_CARD.format(megabytes=megabytes, stages="\n".join(stages), **sizes, **facts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("embedded/base"))
    parser.add_argument("--work", type=Path, default=Path("data_cache/pretrain"), help="renders and resumable state")
    parser.add_argument("--renders", type=int, default=8000)
    parser.add_argument("--outfits", type=int, default=4000, help="outfits rendered in several poses")
    parser.add_argument("--clip-steps", type=int, default=750)
    parser.add_argument("--text-steps", type=int, default=1200)
    parser.add_argument("--image-steps", type=int, default=4800)
    parser.add_argument("--vae-steps", type=int, default=2600)
    parser.add_argument("--unet-steps", type=int, default=3600)
    parser.add_argument("--mixed-precision", choices=("auto", "no", "bf16", "fp16"), default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    precision = resolve_precision(args.mixed_precision, device)
    outfits = load_renders(args.work, "outfits", render_outfit, args.outfits, seed=0)
    pictures, labels = load_renders(args.work, "renders", render_scene, args.renders, seed=0)
    train_tokenizer(args.out)
    common = dict(device=device, precision=precision)
    summary = {"renders": args.renders, "outfits": args.outfits, "views": VIEWS, "layouts": LAYOUTS,
               "device": device.type, "precision": str(precision or torch.float32)}  # fmt: skip
    summary["clip"] = train_clip(args.out, args.work, *outfits, args.clip_steps, 64, **common)
    summary["text"] = train_text(args.out, args.work, *outfits, args.text_steps, 96, **common)
    parts, _ = load_renders(args.work, "parts", render_parts, args.outfits * 3 // 5, seed=0)
    summary["image"] = train_image(args.out, args.work, *outfits, parts, args.image_steps, 24, **common)
    summary["vae"] = train_vae(args.out, args.work, pictures, args.vae_steps, 24, **common)
    summary["unet"] = train_unet(args.out, args.work, pictures, labels, args.unet_steps, 24, **common)
    (args.out / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")
    (args.out / "README.md").write_text(model_card(args.out, summary))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
