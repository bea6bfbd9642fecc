"""The image encoder, which is shown where the regions of an outfit are, and learns to say what they are."""

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from embedded.pretrain.encoders import (
    ALL_TOLD,
    CLIP_MEAN,
    CLIP_STD,
    attributes,
    augment,
    clip_normalise,
    region_colours,
    telling_heads,
    telling_loss,
)
from embedded.pretrain.scenes import CAPTIONS, CLIP_RESOLUTION, REGIONS, VIEWS, load_outfits, load_regions, outfit_of
from embedded.pretrain.stage import Run, train_stage
from embedded.pretrain.text_encoder import EMBEDDING
from embedded.pretrain.tokenizer import tokenize
from models.diffusion import autocast

BATCH = 20  # pictures
IMAGE_SHAPE = dict(hidden_size=192, intermediate_size=576, num_hidden_layers=4, num_attention_heads=6, patch_size=16)


def new_image_encoder() -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(image_size=CLIP_RESOLUTION, projection_dim=EMBEDDING, **IMAGE_SHAPE)
    return CLIPVisionModelWithProjection(config)


@torch.no_grad()
def embed_captions(text_encoder, tokenizer, captions: list[str]) -> torch.Tensor:
    """(N, EMBEDDING), of length 1."""
    batches = [captions[start : start + 100] for start in range(0, len(captions), 100)]
    embeds = [text_encoder(tokenize(tokenizer, batch).to(text_encoder.device)).text_embeds for batch in batches]
    return F.normalize(torch.cat(embeds), dim=-1)


def train_image_encoder(run: Run, steps: int) -> dict:
    """Its patches tell where REGIONS are, which colour each has and what words name the outfit; its embedding finds
    the outfit's caption (CLIP, Radford et al. 2021) among others and among captions that are nearly right.

    Needs out/tokenizer and out/text_encoder; writes out/image_encoder and out/feature_extractor.
    """
    device = run.device
    pictures, labels = load_outfits(run)
    region_shares, _ = load_regions(run)
    tokenizer = CLIPTokenizer.from_pretrained(run.out / "tokenizer")
    text_encoder = CLIPTextModelWithProjection.from_pretrained(run.out / "text_encoder", dtype=torch.float32)
    text_encoder.to(device).eval()
    captioned = np.array([bool(label["captions"]) for label in labels])
    place = captioned.cumsum() - 1  # of an outfit among the captioned ones
    right, nearly_right = (
        embed_captions(text_encoder, tokenizer, [caption for label in labels for caption in label[key]])
        for key in ("captions", "confusions")
    )
    right, nearly_right = right.unflatten(0, (-1, CAPTIONS)), nearly_right.unflatten(0, (-1, CAPTIONS))
    colours, has_colour = region_colours(labels)
    torch.manual_seed(3)
    image_encoder, width = new_image_encoder().to(device), IMAGE_SHAPE["hidden_size"]
    where, colour = torch.nn.Linear(width, len(REGIONS)), torch.nn.Linear(width, 3 * len(REGIONS))
    heads = torch.nn.ModuleDict({"where": where, "colours": colour, "words": telling_heads(width)}).to(device)
    outfits = [outfit_of(0, row) for row in range(len(labels))]
    targets = attributes(outfits, [ALL_TOLD] * len(outfits))
    targets[~torch.from_numpy(captioned)] = -1  # recoloured beyond words

    batch = min(BATCH * run.batch_scale, len(pictures))

    def loss_fn(step):
        rng = np.random.default_rng([5, step])
        rows, views = rng.choice(len(pictures), batch, replace=False), rng.integers(0, VIEWS, batch)
        pixels = torch.from_numpy(np.stack([pictures[row, view] for row, view in zip(rows, views)])).to(device).float()
        shares = F.interpolate(torch.from_numpy(region_shares[rows, views]).to(device).float(), size=pixels.shape[2:])
        both = augment(torch.cat([pixels, shares], 1) / 255, torch.Generator().manual_seed(step))
        if rng.uniform() < 0.2:  # a square, as other tools make it
            bars = (both.shape[2] - both.shape[3]) // 2
            both = F.pad(both, (bars, bars))
        pixel_values = clip_normalise(both[:, :3])
        shares = F.avg_pool2d(both[:, 3:], image_encoder.config.patch_size)
        shares = shares.flatten(2).transpose(1, 2)  # (B, patches, REGIONS)
        with autocast(device, run.precision):
            encoded = image_encoder.vision_model(pixel_values=pixel_values, interpolate_pos_encoding=True)
            tokens = image_encoder.vision_model.post_layernorm(encoded.last_hidden_state[:, 1:])
            image_embeds = image_encoder.visual_projection(encoded.pooler_output)
            image_embeds = F.normalize(image_embeds.float(), dim=-1)
            located, guessed = heads["where"](tokens).float(), heads["colours"](tokens).float()
        location_error = F.binary_cross_entropy_with_logits(located, shares)
        # Each patch tells the colour of what it shows; of each region all its patches together count alike.
        guessed = guessed.unflatten(-1, (len(REGIONS), 3))  # (B, patches, REGIONS, 3)
        error = (guessed - colours[rows, None].to(device)).abs().mean(-1)
        error = (error * shares).sum(1) / shares.sum(1).clamp(min=0.1)
        seen = has_colour[rows].to(device) & (shares.sum(1) > 0.1)
        colour_error = error[seen].mean()
        has_caption = torch.from_numpy(captioned[rows]).to(device)
        captions, form = place[rows[captioned[rows]]], rng.integers(0, CAPTIONS)
        embeds = torch.cat([right[captions, form], nearly_right[captions, form]])
        logits = 30 * image_embeds[has_caption] @ embeds.T
        matching = F.cross_entropy(logits, torch.arange(len(logits), device=device))
        telling = telling_loss(heads["words"], tokens.float(), targets[rows])
        return 5 * location_error + 5 * colour_error + 0.1 * matching + 0.2 * telling

    modules = {"image": image_encoder, "heads": heads}
    summary = train_stage("image_encoder", run.work, modules, loss_fn, steps, lr=1e-3)
    image_encoder.half().save_pretrained(run.out / "image_encoder")
    size, crop = {"shortest_edge": CLIP_RESOLUTION}, {"height": CLIP_RESOLUTION, "width": CLIP_RESOLUTION}
    image_processor = CLIPImageProcessorPil(size=size, crop_size=crop, image_mean=CLIP_MEAN, image_std=CLIP_STD)
    image_processor.save_pretrained(run.out / "feature_extractor")
    return summary
