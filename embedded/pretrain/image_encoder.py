"""The image encoder alone, which is shown where the regions of an outfit are."""

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from embedded.pretrain.encoders import augment, clip_normalise, region_colours, telling_heads, telling_loss
from embedded.pretrain.scenes import CLIP_RESOLUTION, REGIONS, VIEWS, load_outfits, load_regions, outfit_of
from embedded.pretrain.stage import Run, train_stage
from embedded.pretrain.tokenizer import tokenize
from models.diffusion import autocast

BATCH = 24  # pictures


def train_image_encoder(run: Run, steps: int) -> dict:
    """Goes on against the finished text encoder: its patches tell where REGIONS are and which colour each has, and
    what words name them.

    Needs out/tokenizer and both encoders; writes out/image_encoder.
    """
    device = run.device
    pictures, labels = load_outfits(run)
    region_shares, _ = load_regions(run)
    tokenizer = CLIPTokenizer.from_pretrained(run.out / "tokenizer")
    text_encoder = CLIPTextModelWithProjection.from_pretrained(run.out / "text_encoder", dtype=torch.float32)
    text_encoder.to(device).eval()
    image_encoder = CLIPVisionModelWithProjection.from_pretrained(run.out / "image_encoder", dtype=torch.float32)
    image_encoder.to(device)
    captioned = torch.tensor([bool(label["captions"]) for label in labels])
    captions = [label["captions"][0] for label in labels if label["captions"]]
    with torch.no_grad():
        batches = [captions[start : start + 100] for start in range(0, len(captions), 100)]
        caption_embeds = [text_encoder(tokenize(tokenizer, batch).to(device)).text_embeds for batch in batches]
    text_embeds = torch.zeros(len(labels), caption_embeds[0].shape[1], device=device)
    text_embeds[captioned.to(device)] = F.normalize(torch.cat(caption_embeds), dim=-1)
    colours, has_colour = region_colours(labels)
    torch.manual_seed(3)
    width = image_encoder.config.hidden_size
    where, colour = torch.nn.Linear(width, len(REGIONS)), torch.nn.Linear(width, 3 * len(REGIONS))
    heads = torch.nn.ModuleDict({"where": where, "colours": colour, "words": telling_heads(width)}).to(device)
    outfits = [outfit_of(0, row) for row in range(len(region_shares))]

    def loss_fn(step):
        rng = np.random.default_rng([5, step])
        rows, views = rng.choice(len(region_shares), BATCH, replace=False), rng.integers(0, VIEWS, BATCH)
        pixels = torch.from_numpy(np.stack([pictures[row, view] for row, view in zip(rows, views)])).float()
        shares = F.interpolate(torch.from_numpy(region_shares[rows, views]).float(), size=CLIP_RESOLUTION)
        both = augment(torch.cat([pixels, shares], 1).to(device) / 255, torch.Generator().manual_seed(step))
        if rng.uniform() < 0.75:  # larger and 3:4, as sharper pictures will come, with positions interpolated
            margin = CLIP_RESOLUTION // 8
            both = F.interpolate(both[..., margin:-margin], scale_factor=2, mode="bilinear")
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
        has_caption = captioned[rows]
        captioned_rows = torch.from_numpy(rows)[has_caption]
        logits = 30 * image_embeds[has_caption.to(device)] @ text_embeds[captioned_rows.to(device)].T
        matching = F.cross_entropy(logits, torch.arange(len(logits), device=device))
        captioned_outfits = [outfits[row] for row in captioned_rows]
        telling = telling_loss(heads["words"], tokens.float()[has_caption.to(device)], captioned_outfits)
        return 5 * location_error + 5 * colour_error + 0.1 * matching + 0.2 * telling

    modules = {"image": image_encoder, "heads": heads}
    summary = train_stage("image_encoder", run.work, modules, loss_fn, steps, lr=1e-3)
    image_encoder.half().save_pretrained(run.out / "image_encoder")
    return summary
