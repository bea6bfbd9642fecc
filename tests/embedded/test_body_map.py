"""What the body map is trained on: renders with the exact place on the body of each pixel."""

import numpy as np
import torch

from embedded.pretrain.body_map import SEED, VIEWS, map_loss, mirrored, render_answer, unpacked
from models.body_map import CENTRE, MAP_SIZE, OUTPUTS, SCALE
from render.projection import merge, sight_map
from render.rigs import load_rig


def test_an_answer_puts_the_picture_onto_the_body_and_its_mirror_image_too():
    rows, _ = render_answer(SEED, 0)
    assert rows.shape == (VIEWS, 16, *MAP_SIZE) and rows.dtype == np.uint8
    pictures, is_body, answers = unpacked(rows)
    body = load_rig("anny").body
    inside = is_body[0, 0] > 0
    places = answers[0, :3].permute(1, 2, 0) * SCALE + torch.tensor(CENTRE)
    low, high = body.vertices.amin(0) - 1e-3, body.vertices.amax(0) + 1e-3
    assert 0.05 < inside.float().mean() < 0.9
    assert ((places[inside] >= low) & (places[inside] <= high)).all()
    sighting = sight_map(body, places, inside, 64)
    assert len(sighting.texel) > 100
    shown, sure = merge(body, [pictures[0]], [sighting], relight=False)

    flipped_pictures, flipped_body, flipped = mirrored(pictures, is_body, answers)
    flipped_places = flipped[0, :3].permute(1, 2, 0) * SCALE + torch.tensor(CENTRE)
    assert torch.allclose(flipped_places.flip(1) * torch.tensor([-1.0, 1, 1]), places, atol=1e-4)
    assert torch.equal(flipped_body.flip(-1), is_body) and torch.equal(flipped_pictures.flip(-1), pictures)
    assert shown[:, sure > 0].std() > 0.05

    perfect = torch.cat([(is_body * 2 - 1) * 20, answers], dim=1)
    assert perfect.shape[1] == OUTPUTS and map_loss(perfect, is_body, answers) < 1e-4
    assert map_loss(torch.cat([perfect[:, :1], answers + 0.1], dim=1), is_body, answers) > 0.1
