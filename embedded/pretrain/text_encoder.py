"""The text encoder alone, whose tokens are to tell who wears what."""

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from embedded.grammar import sample_outfit
from embedded.pretrain.encoders import clip_normalise, telling_heads, telling_loss
from embedded.pretrain.scenes import CAPTIONS, LAYOUTS, layout_words, load_outfits
from embedded.pretrain.stage import Run, train_stage
from embedded.pretrain.tokenizer import tokenize
from models.diffusion import autocast

BATCH = 96  # captions to tell from; a quarter as many pictures to match


def train_text_encoder(run: Run, steps: int) -> dict:
    """Goes on against the finished image encoder: as a UNet's attention would, one query an attribute reads from the
    states what the attribute's word was, on new outfits at every step.

    Needs out/tokenizer and both encoders; writes out/text_encoder.
    """
    device = run.device
    pictures, labels = load_outfits(run)
    tokenizer = CLIPTokenizer.from_pretrained(run.out / "tokenizer")
    text_encoder = CLIPTextModelWithProjection.from_pretrained(run.out / "text_encoder", dtype=torch.float32)
    text_encoder.to(device)
    image_encoder = CLIPVisionModelWithProjection.from_pretrained(run.out / "image_encoder", dtype=torch.float32)
    image_encoder.to(device).eval()
    captioned = [row for row, label in enumerate(labels) if label["captions"]]
    image_embeds = []
    with torch.no_grad(), autocast(device, run.precision):
        for start in range(0, len(captioned), 100):
            pixel_values = torch.from_numpy(pictures[captioned[start : start + 100], 0]).to(device) / 255
            embeds = image_encoder(pixel_values=clip_normalise(pixel_values)).image_embeds
            image_embeds.append(F.normalize(embeds.float(), dim=-1))
    image_embeds = torch.cat(image_embeds)
    torch.manual_seed(4)
    heads = telling_heads(text_encoder.config.hidden_size).to(device)

    def loss_fn(step):
        rng = np.random.default_rng([6, step])
        outfits = [sample_outfit(rng) for _ in range(BATCH)]
        captions = [outfit.sentence(rng) if rng.uniform() < 0.7 else outfit.prompt for outfit in outfits]
        rows = rng.choice(len(captioned), BATCH // 4, replace=False)
        form = rng.integers(0, CAPTIONS, len(rows))
        shown = [labels[captioned[row]] for row in rows]
        right, nearly = ([label[key][i] for label, i in zip(shown, form)] for key in ("captions", "confusions"))
        layouts = rng.integers(0, 2 * LAYOUTS, BATCH)  # half of the captions name one
        endings = [layout_words(layout) if layout < LAYOUTS else "" for layout in layouts]
        told = [caption + ending for caption, ending in zip(captions, endings)]
        input_ids = tokenize(tokenizer, [*told, *right, *nearly])
        longest = int((input_ids != tokenizer.eos_token_id).sum(-1).max()) + 1
        with autocast(device, run.precision):
            encoded = text_encoder.text_model(input_ids=input_ids[:, :longest].to(device))
            text_embeds = text_encoder.text_projection(encoded.pooler_output[BATCH:])
            text_embeds = F.normalize(text_embeds.float(), dim=-1)
        states = encoded.last_hidden_state[:BATCH].float()
        # Right captions, then nearly right ones.
        logits = 30 * image_embeds[torch.from_numpy(rows).to(device)] @ text_embeds.T
        matching = F.cross_entropy(logits, torch.arange(len(rows), device=device))
        return 0.2 * matching + telling_loss(heads, states, outfits, captions)

    modules = {"text": text_encoder, "heads": heads}
    summary = train_stage("text_encoder", run.work, modules, loss_fn, steps, lr=1e-3)
    text_encoder.half().save_pretrained(run.out / "text_encoder")
    return summary
