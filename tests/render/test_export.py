"""Files for other tools: valid, and opened again by another library they show the same picture."""

import io
import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pygltflib
import pytest
import torch
import trimesh
from PIL import Image

from common.errors import UserError
from common.pictures import pixels_from_image
from render.bodies import Body
from render.cameras import orbit_cameras
from render.export import export_body
from render.lights import ambient_light
from render.rigs import AnnyRig, load_rig
from render.shading import render_views

VALIDATOR = Path(__file__).parents[1] / "node_modules" / "gltf-validator"


@pytest.fixture(scope="module")
def texture():
    """Another colour everywhere, and no symmetry: a flip or a swap of axes shows."""
    v, u = np.mgrid[0:128, 0:128] / 127
    return Image.fromarray((np.stack([u, v, (u * 5 % 1)], -1) * 255).astype(np.uint8))


@pytest.fixture(params=["anny", "mesh"])
def rig(request, mesh):
    return load_rig("anny" if request.param == "anny" else f"obj:{mesh}")


def picture(vertices, faces, uvs, image) -> torch.Tensor:
    tensors = (torch.as_tensor(np.asarray(array)) for array in (vertices, faces, uvs, faces))
    return picture_of(Body(*tensors), image)


def picture_of(body: Body, image, vertices=None) -> torch.Tensor:
    cameras = orbit_cameras(body, torch.tensor([35.0]), torch.tensor([10.0]), torch.tensor([30.0]), 0.9, 0.75)
    texture = (pixels_from_image(image.convert("RGB")) + 1) / 2
    lights = ambient_light(torch.ones(1, 3))  # what is split along seams has other normals there
    return render_views(body, texture[None], cameras, 128, 96, lights)[0]


def close(first: torch.Tensor, second: torch.Tensor) -> None:
    error = (first - second).abs()
    assert error.mean() < 0.004 and error.std() < 0.03
    assert first.std() > 0.05


def expected(rig, pose, texture):
    body = rig.body
    return picture_of(Body(rig.vertices([pose])[0], body.faces, body.uvs, body.uv_faces), texture)


def test_glb_and_obj_opened_by_trimesh_look_the_same(rig, texture, tmp_path):
    pose = rig.named_pose("rest", 0)
    for name in ("body.glb", "body.obj"):
        export_body(tmp_path / name, rig, pose, texture)
        loaded = trimesh.load(tmp_path / name, process=False, force="mesh", maintain_order=True)
        material = loaded.visual.material
        image = material.baseColorTexture if name.endswith("glb") else material.image
        is_skinned = name == "body.glb" and isinstance(rig, AnnyRig)  # trimesh shows the mesh as it is bound
        vertices = (skinned(tmp_path / name) if is_skinned else loaded.vertices).astype(np.float32)
        uvs = loaded.visual.uv.astype(np.float32)
        close(picture(vertices, loaded.faces, uvs, image), expected(rig, pose, texture))
        height = float(np.ptp(rig.vertices([pose])[0][:, 1].numpy()))
        assert np.ptp(vertices[:, 1]) == pytest.approx(height, rel=1e-3), "in metres"


def test_usdz_opened_by_usd_looks_the_same(rig, texture, tmp_path):
    from pxr import Usd, UsdGeom, UsdShade

    pose = rig.named_pose("rest", 0)
    export_body(tmp_path / "body.usdz", rig, pose, texture)
    stage = Usd.Stage.Open(str(tmp_path / "body.usdz"))
    assert UsdGeom.GetStageUpAxis(stage) == "Y" and UsdGeom.GetStageMetersPerUnit(stage) == 1
    mesh = UsdGeom.Mesh(stage.GetPrimAtPath("/body/mesh"))
    uvs = UsdGeom.PrimvarsAPI(mesh).GetPrimvar("st").Get()
    with zipfile.ZipFile(tmp_path / "body.usdz") as archive:
        name = next(name for name in archive.namelist() if name.endswith(".png"))
        image = Image.open(io.BytesIO(archive.read(name)))
    faces = np.array(mesh.GetFaceVertexIndicesAttr().Get()).reshape(-1, 3)
    points = np.array(mesh.GetPointsAttr().Get())
    close(picture(points, faces, np.array(uvs), image), expected(rig, pose, texture))
    bound, _ = UsdShade.MaterialBindingAPI(mesh.GetPrim()).ComputeBoundMaterial()
    assert bound.GetPath() == "/body/material"


def skinned(path, sets: int = 1) -> np.ndarray:
    """Vertices of a GLB's skinned mesh, posed by its nodes, as the glTF 2.0 specification says (3.7.3.3).

    sets: of joints and weights that are read; the specification asks no loader for more than one.
    """
    from scipy.spatial.transform import Rotation

    gltf = pygltflib.GLTF2().load(str(path))
    blob = gltf.binary_blob()

    def read(index):
        accessor = gltf.accessors[index]
        view = gltf.bufferViews[accessor.bufferView]
        kind = {5126: np.float32, 5123: np.uint16, 5125: np.uint32}[accessor.componentType]
        width = {"VEC3": 3, "VEC4": 4, "MAT4": 16, "VEC2": 2, "SCALAR": 1}[accessor.type]
        return np.frombuffer(blob, kind, accessor.count * width, view.byteOffset).reshape(accessor.count, width)

    world = {}

    def walk(index, parent):
        node = gltf.nodes[index]
        local = np.eye(4)
        local[:3, :3] = Rotation.from_quat(node.rotation or [0, 0, 0, 1]).as_matrix()
        local[:3, 3] = node.translation or [0, 0, 0]
        world[index] = parent @ local
        for child in node.children or []:
            walk(child, world[index])

    for root in gltf.scenes[0].nodes:
        walk(root, np.eye(4))
    skin, attributes = gltf.skins[0], gltf.meshes[0].primitives[0].attributes
    bind = read(skin.inverseBindMatrices).reshape(-1, 4, 4).transpose(0, 2, 1)
    bones = np.stack([world[joint] @ matrix for joint, matrix in zip(skin.joints, bind)])
    points = np.pad(read(attributes.POSITION), ((0, 0), (0, 1)), constant_values=1)
    joints, weights = (
        np.concatenate([read(getattr(attributes, f"{name}_{index}")) for index in range(sets)], 1)
        for name in ("JOINTS", "WEIGHTS")
    )
    assert np.allclose(weights.sum(1), 1, atol=1e-5)
    return np.einsum("vk,vkij,vj->vi", weights, bones[joints], points)[:, :3]


def test_annys_glb_keeps_a_skeleton_that_holds_the_pose(texture, tmp_path):
    rig = load_rig("anny")
    for pose in (rig.named_pose("rest", 0), rig.named_pose("walking", 3)):
        corners = np.stack([rig.body.faces.numpy().ravel(), rig.body.uv_faces.numpy().ravel()], 1)
        vertex = np.unique(corners, axis=0)[:, 0]
        exact = rig.vertices([pose])[0].numpy()[vertex]
        export_body(tmp_path / "body.glb", rig, pose, texture, influences=8)
        assert np.abs(skinned(tmp_path / "body.glb", sets=2) - exact).max() < 1e-3
        export_body(tmp_path / "body.glb", rig, pose, texture)
        away = np.linalg.norm(skinned(tmp_path / "body.glb") - exact, axis=1)
        assert away.max() < 0.02 and away.mean() < 1e-4, "the four strongest bones, for every loader"
        attributes = pygltflib.GLTF2().load(str(tmp_path / "body.glb")).meshes[0].primitives[0].attributes
        assert getattr(attributes, "JOINTS_1", None) is None
    with pytest.raises(UserError, match="5 bones a vertex: a GLB is written with 4 or 8"):
        export_body(tmp_path / "body.glb", rig, pose, texture, influences=5)


def test_the_objs_material_leaves_the_texture_as_it_is(texture, tmp_path, mesh):
    """Wavefront's MTL: colours multiply maps, and illumination model 1 has no highlight."""
    rig = load_rig(f"obj:{mesh}")
    export_body(tmp_path / "body.v1.obj", rig, rig.named_pose("rest", 0), texture)
    lines = [line.split() for line in (tmp_path / "body.v1.mtl").read_text().splitlines()]
    material = {keyword: values for keyword, *values in lines}
    assert len(lines) == len(material) and set(material) == {"newmtl", "Ka", "Kd", "Ks", "d", "illum", "map_Kd"}
    colours = {keyword: [float(value) for value in material[keyword]] for keyword in ("Ka", "Kd", "Ks", "d")}
    assert colours == {"Ka": [1, 1, 1], "Kd": [1, 1, 1], "Ks": [0, 0, 0], "d": [1]} and material["illum"] == ["1"]
    with Image.open(tmp_path / material["map_Kd"][0]) as image:
        assert np.array_equal(np.asarray(image), np.asarray(texture))
    statements = [line.split() for line in (tmp_path / "body.v1.obj").read_text().splitlines()]
    assert ["mtllib", "body.v1.mtl"] in statements and ["usemtl", *material["newmtl"]] in statements


@pytest.mark.skipif(not VALIDATOR.exists() or not shutil.which("node"), reason="npm install --prefix tests")
@pytest.mark.parametrize("influences", [4, 8])
def test_the_khronos_validator_finds_nothing(influences, rig, texture, tmp_path):
    names = ["rest"] if len(rig.body.vertices) < 100 else ["rest", "walking"]
    for name in names:
        export_body(tmp_path / "body.glb", rig, rig.named_pose(name, 1), texture, influences)
        script = (
            f"require({json.dumps(str(VALIDATOR))}).validateBytes(new Uint8Array(require('fs').readFileSync("
            f"{json.dumps(str(tmp_path / 'body.glb'))}))).then(r => console.log(JSON.stringify(r.issues)))"
        )
        output = subprocess.run(["node", "-e", script], capture_output=True, text=True, check=True).stdout
        issues = json.loads(output)
        assert (issues["numErrors"], issues["numWarnings"]) == (0, 0), issues["messages"][:3]


def test_other_suffixes_are_refused(texture, tmp_path, mesh):
    with pytest.raises(UserError, match=r"\.glb"):
        export_body(tmp_path / "body.fbx", load_rig(f"obj:{mesh}"), {}, texture)
    assert not list(tmp_path.iterdir())
