"""Regions of any upright body, against Anny's bones, which they do not read."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.errors import UserError
from render.bodies import Body, load_anny, load_anny_body
from render.poses import JOINTS
from render.rasteriser import interpolate, rasterize_uv
from render.regions import BODY_REGIONS, region_mask
from render.rigs import load_rig
from render.uv_space import uv_mask

SIZE = 256
LEAST_IOU = dict.fromkeys(BODY_REGIONS, 0.9) | {"hair": 0.88}
SHAPES = {
    "adult": {},
    "youth": {"age": 0.42},
    "child of 1 m": {"age": 0.15},
    "baby": {"age": 0.0},
    "heavy": {"weight": 0.9},
    "heavy man": {"weight": 1.0, "gender": 0.0, "muscle": 0.3},
    "strong man": {"muscle": 0.9, "gender": 0.0},
    "woman": {"weight": 0.7, "gender": 1.0},
    "old": {"age": 1.0},
}


@pytest.fixture(scope="module")
def bone_regions() -> dict[str, torch.Tensor]:
    """Each region's texels by bones and heights of the adult; all shapes and poses share the layout."""
    model, body = load_anny(), load_anny_body()
    strongest_slot = model.vertex_bone_weights.argmax(1, keepdim=True)
    strongest_bone = model.vertex_bone_indices.gather(1, strongest_slot)[:, 0]
    fragments = rasterize_uv(body, SIZE)
    _, y, z = interpolate(fragments, body.faces, body.vertices).unbind(-1)

    def follows(*names: str) -> torch.Tensor:
        is_named = torch.tensor([label.startswith(names) for label in model.bone_labels])
        return interpolate(fragments, body.faces, is_named[strongest_bone].float()[:, None])[:, 0] > 0.5

    is_hand, is_head = follows("wrist", "finger", "metacarpal"), follows("head", "neck03", "eye")
    is_arm, is_foot = is_hand | follows("upperarm", "lowerarm"), follows("foot", "toe")
    is_trunk, is_face = ~is_arm & ~is_head, is_head & (z > 0.03) & (y < 1.575)
    regions = {
        "face": is_face,
        "hair": is_head & ~is_face,
        "top": (is_trunk & (y > 0.86)) | (is_arm & ~is_hand),
        "bottom": is_trunk & (y < 0.99) & (y > 0.45),
        "arms": is_arm,
        "legs": is_trunk & (y < 0.99) & ~is_foot,
        "feet": is_foot,
    }
    return {name: with_margin(fragments.dense(inside.float())) for name, inside in regions.items()}


def with_margin(mask: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.max_pool2d(mask, 7, stride=1, padding=3)[0]


def overlap(mask: torch.Tensor, other: torch.Tensor) -> float:
    """Intersection over union on Anny's islands."""
    mask, other = (either[uv_mask(load_anny_body(), SIZE)] > 0.5 for either in (mask, other))
    return ((mask & other).sum() / (mask | other).sum()).item()


def with_arms_raised(degrees: float) -> Body:
    """Anny whose arms, 45 degrees below level at rest, are raised sideways."""
    angles = np.zeros((len(JOINTS), 3))
    angles[JOINTS.index("upperarm01.L"), 2], angles[JOINTS.index("upperarm01.R"), 2] = degrees, -degrees
    vertices = load_rig("anny").vertices([{"pose": angles.ravel().tolist(), "shape": []}])[0]
    return replace(load_anny_body(), vertices=vertices)


@pytest.mark.parametrize("shape", SHAPES)
def test_regions_are_where_the_bones_have_them(shape, bone_regions):
    body = load_anny_body(**SHAPES[shape])
    ious = {name: overlap(region_mask(body, name, SIZE), bone_regions[name]) for name in BODY_REGIONS}
    assert all(iou > LEAST_IOU[name] for name, iou in ious.items()), ious


@pytest.mark.parametrize("degrees", [-30, 45, 70])
def test_arms_may_hang_or_be_level_or_raised(degrees, bone_regions):
    resting, posed = load_anny_body(), with_arms_raised(degrees)
    width = (posed.vertices.amax(0) - posed.vertices.amin(0))[0]
    assert (width < 0.6) if degrees < 0 else (width > 1.3), "the pose is what its name says"
    for name in BODY_REGIONS:
        mask = region_mask(posed, name, SIZE)
        assert overlap(mask, region_mask(resting, name, SIZE)) > 0.88, name
        assert overlap(mask, bone_regions[name]) > 0.9, name


def test_regions_cover_annys_texture_and_do_not_mix():
    masks = {name: region_mask(load_anny_body(), name, SIZE) for name in BODY_REGIONS}
    for mask in masks.values():
        assert mask.shape == (SIZE, SIZE) and set(mask.unique().tolist()) == {0, 1}
    assert torch.stack([*masks.values()]).amax(0)[uv_mask(load_anny_body(), SIZE)].min() == 1
    assert (masks["face"] * masks["feet"]).sum() == 0


def test_size_place_and_split_vertices_change_nothing():
    body = load_anny_body()
    moved = replace(body, vertices=body.vertices * 0.6 + torch.tensor([0.5, -1.1, 0.2]))
    corners = body.faces.flatten()
    own_corners = torch.arange(len(corners)).view(-1, 3)
    split = replace(body, vertices=body.vertices[corners], faces=own_corners)
    for name in BODY_REGIONS:
        mask = region_mask(body, name, SIZE)
        assert overlap(region_mask(moved, name, SIZE), mask) > 0.995, name
        assert torch.equal(region_mask(split, name, SIZE), mask), name


def test_hands_apart_from_the_body_are_hands():
    """As in files whose sleeves end open: the hands are pieces of their own."""
    body, model = load_anny_body(), load_anny()
    strongest_slot = model.vertex_bone_weights.argmax(1, keepdim=True)
    strongest_bone = model.vertex_bone_indices.gather(1, strongest_slot)[:, 0]
    is_named = torch.tensor([label.startswith("lowerarm02") for label in model.bone_labels])
    is_left_out = is_named[strongest_bone][body.faces].any(1)
    open_body = replace(body, faces=body.faces[~is_left_out], uv_faces=body.uv_faces[~is_left_out])
    hands = region_mask(open_body, "arms", SIZE) * (1 - region_mask(open_body, "top", SIZE))
    expected = region_mask(body, "arms", SIZE) * (1 - region_mask(body, "top", SIZE))
    assert overlap(hands, expected) > 0.85


def test_what_has_no_regions_is_said(mesh):
    body = load_anny_body()
    with pytest.raises(UserError, match="unknown region 'nose': use face, hair"):
        region_mask(body, "nose", SIZE)
    x, y, z = body.vertices.unbind(-1)
    for axes in ((x, -z, y), (y, x, z)):  # on its back, on its side
        with pytest.raises(UserError, match=r"stands upright.* give a mask picture"):
            region_mask(replace(body, vertices=torch.stack(axes, dim=-1)), "top", SIZE)
    sitting = load_rig("anny").vertices([load_rig("anny").named_pose("sitting", 0)])[0]
    with pytest.raises(UserError, match="stands upright"):
        region_mask(replace(body, vertices=sitting), "top", SIZE)
    box = load_rig(f"obj:{mesh}").body
    for name in ("face", "hair", "arms"):
        with pytest.raises(UserError, match=f"no texels for the region '{name}'; give a mask picture"):
            region_mask(box, name, SIZE)
    assert region_mask(box, "feet", SIZE).sum() > 0
