"""Text and image encoder together, contrastively (CLIP, Radford et al. 2021), with two views of an outfit (SLIP, Mu et
al. 2022), captions that are nearly right, and the outfit's colours to tell."""

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from embedded.pretrain.encoders import CLIP_MEAN, CLIP_STD, augment, clip_normalise, region_colours
from embedded.pretrain.scenes import CAPTIONS, CLIP_RESOLUTION, REGIONS, VIEWS, load_outfits
from embedded.pretrain.stage import Run, train_stage
from embedded.pretrain.tokenizer import CONTEXT, tokenize
from models.diffusion import autocast

BATCH = 64  # outfits, in two views each
EMBEDDING = 128  # width in which texts and pictures meet
TEXT_SHAPE = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
IMAGE_SHAPE = dict(hidden_size=192, intermediate_size=576, num_hidden_layers=3, num_attention_heads=6)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    end = tokenizer.eos_token_id
    markers = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end)
    config = CLIPTextConfig(vocab_size=len(tokenizer), projection_dim=EMBEDDING, **TEXT_SHAPE, **markers)
    return CLIPTextModelWithProjection(config)


def new_image_encoder() -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(image_size=CLIP_RESOLUTION, patch_size=16, projection_dim=EMBEDDING, **IMAGE_SHAPE)
    return CLIPVisionModelWithProjection(config)


def caption_ids(tokenizer: CLIPTokenizer, labels: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right and nearly right captions of the N' outfits that have any → (N', CAPTIONS, L) each, L tokens at most."""
    right, nearly = (
        tokenize(tokenizer, [caption for label in labels for caption in label[key]]).view(-1, CAPTIONS, CONTEXT)
        for key in ("captions", "confusions")
    )
    # Attention is causal: padding behind the end changes nothing before it.
    longest = max(int((ids != tokenizer.eos_token_id).sum(-1).max()) for ids in (right, nearly)) + 1
    return right[..., :longest], nearly[..., :longest]


def train_contrastive(run: Run, steps: int) -> dict:
    """Needs out/tokenizer; writes out/text_encoder, out/image_encoder and out/feature_extractor."""
    device = run.device
    pictures, labels = load_outfits(run)
    tokenizer = CLIPTokenizer.from_pretrained(run.out / "tokenizer")
    right_ids, nearly_ids = caption_ids(tokenizer, labels)
    captioned = torch.tensor([bool(label["captions"]) for label in labels])
    place = captioned.cumsum(0) - 1  # of an outfit among the captioned ones
    colours, has_colour = region_colours(labels)
    torch.manual_seed(0)
    text_encoder = new_text_encoder(tokenizer).to(device)
    image_encoder = new_image_encoder().to(device)
    width = IMAGE_SHAPE["hidden_size"]
    heads = {"views": torch.nn.Linear(width, EMBEDDING), "colours": torch.nn.Linear(width, 3 * len(REGIONS))}
    heads = torch.nn.ModuleDict(heads).to(device)
    scale = torch.nn.ParameterDict({"log": torch.nn.Parameter(torch.tensor([2.66, 2.66]))}).to(device)

    def loss_fn(step):
        rng = np.random.default_rng([1, step])
        rows = rng.choice(len(pictures), BATCH, replace=False)
        views = rng.permuted(np.tile(range(VIEWS), (BATCH, 1)), axis=1)
        first_and_second = np.concatenate([pictures[rows, views[:, 0]], pictures[rows, views[:, 1]]])
        pixel_values = torch.from_numpy(first_and_second).to(device) / 255  # (2B, 3, 128, 128)
        pixel_values = clip_normalise(augment(pixel_values, torch.Generator().manual_seed(step)))
        has_caption = captioned[rows]
        captions = place[rows][has_caption]
        form = torch.from_numpy(rng.integers(0, CAPTIONS, len(captions)))
        input_ids = torch.cat([right_ids[captions, form], nearly_ids[captions, form]]).to(device)
        with autocast(device, run.precision):
            encoded = image_encoder.vision_model(pixel_values=pixel_values)
            image_embeds = image_encoder.visual_projection(encoded.pooler_output)
            image_embeds = F.normalize(image_embeds.float(), dim=-1)
            view_embeds = F.normalize(heads["views"](encoded.pooler_output).float(), dim=-1)
            guessed = heads["colours"](encoded.pooler_output).float().view(2 * BATCH, -1, 3)
            text_embeds = F.normalize(text_encoder(input_ids=input_ids).text_embeds.float(), dim=-1)
        view_scale, text_scale = scale["log"].exp().clamp(max=60)
        own = torch.arange(BATCH, device=device)  # the row that matches each row
        logits = view_embeds[:BATCH] @ view_embeds[BATCH:].T * view_scale
        same_outfit = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        own = own[: len(captions)]
        captioned_embeds = image_embeds[has_caption.repeat(2).to(device)]
        logits = captioned_embeds @ text_embeds.T * text_scale  # right captions, then nearly right ones
        matching = F.cross_entropy(logits, own.repeat(2))
        for view_logits in logits[:, : len(captions)].chunk(2):
            matching = matching + F.cross_entropy(view_logits.T, own) / 2
        error = (guessed - colours[rows].repeat(2, 1, 1).to(device)).abs().mean(-1)
        colour_error = error[has_colour[rows].repeat(2, 1).to(device)].mean()
        return matching / 2 + 0.5 * same_outfit + 3 * colour_error

    modules = {"text": text_encoder, "image": image_encoder, "heads": heads, "scale": scale}
    summary = train_stage("contrastive", run.work, modules, loss_fn, steps, lr=1e-3)
    text_encoder.half().save_pretrained(run.out / "text_encoder")
    image_encoder.half().save_pretrained(run.out / "image_encoder")
    size, crop = {"shortest_edge": CLIP_RESOLUTION}, {"height": CLIP_RESOLUTION, "width": CLIP_RESOLUTION}
    image_processor = CLIPImageProcessorPil(size=size, crop_size=crop, image_mean=CLIP_MEAN, image_std=CLIP_STD)
    image_processor.save_pretrained(run.out / "feature_extractor")
    return summary
