"""The text encoder, whose tokens are to tell who wears what; CLIP's form, without a picture."""

import numpy as np
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from embedded.captions import Caption, atlas_caption, sentence
from embedded.grammar import sample_outfit
from embedded.pretrain.encoders import TOLD, attributes, telling_heads, telling_loss, word_loss
from embedded.pretrain.scenes import LAYOUTS, layout_words
from embedded.pretrain.stage import Run, train_stage
from embedded.pretrain.tokenizer import tokenize
from models.diffusion import autocast

BATCH = 96  # captions
EMBEDDING = 128  # width in which texts and pictures meet
TEXT_SHAPE = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)


def train_text_encoder(run: Run, steps: int) -> dict:
    """As a UNet's attention would, one query an attribute reads from the states what the attribute's word was; the
    pooled embedding tells them all. New outfits and captions at every step.

    Needs out/tokenizer; writes out/text_encoder, which stays as it is: pictures are matched to it (Zhai et al. 2022,
    the other way round).
    """
    device = run.device
    tokenizer = CLIPTokenizer.from_pretrained(run.out / "tokenizer")
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    markers = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end)
    config = CLIPTextConfig(vocab_size=len(tokenizer), projection_dim=EMBEDDING, **TEXT_SHAPE, **markers)
    text_encoder = CLIPTextModelWithProjection(config).to(device)
    heads = {"states": telling_heads(config.hidden_size), "pooled": telling_heads(EMBEDDING)}
    heads = torch.nn.ModuleDict(heads).to(device)

    batch = BATCH * run.batch_scale

    def loss_fn(step):
        rng = np.random.default_rng([6, step])
        outfits = [sample_outfit(rng) for _ in range(batch)]
        captions = [caption_of(outfit, rng) for outfit in outfits]
        targets = attributes(outfits, [caption.told for caption in captions])
        layouts = rng.integers(0, 2 * LAYOUTS, batch)  # half of the captions name one
        endings = [layout_words(layout) if layout < LAYOUTS else "" for layout in layouts]
        input_ids = tokenize(tokenizer, [caption.text + ending for caption, ending in zip(captions, endings)])
        longest = int((input_ids != end).sum(-1).max()) + 1  # attention is causal: what follows changes nothing before
        with autocast(device, run.precision):
            encoded = text_encoder.text_model(input_ids=input_ids[:, :longest].to(device))
            text_embeds = text_encoder.text_projection(encoded.pooler_output).float()
        loss = telling_loss(heads["states"], encoded.last_hidden_state.float(), targets)
        return loss + 0.5 * word_loss(heads["pooled"], [text_embeds] * len(TOLD), targets)

    modules = {"text": text_encoder, "heads": heads}
    summary = train_stage("text_encoder", run.work, modules, loss_fn, steps, lr=1e-3)
    text_encoder.half().save_pretrained(run.out / "text_encoder")
    return summary


def caption_of(outfit, rng: np.random.Generator) -> Caption:
    return sentence(outfit, rng) if rng.uniform() < 0.8 else atlas_caption(outfit)
