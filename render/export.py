"""A textured body as a file for other tools: GLB (Anny with its skeleton and skin), OBJ, USDZ.

Metres, y up, the body looks along +z. One material, rough and not metallic, with the texture as its colour.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.errors import UserError
from common.files import write_whole
from common.pictures import encode_image, image_from_pixels
from render.bodies import load_anny, vertex_normals
from render.poses import anny_in_our_axes
from render.rigs import AnnyRig, StillRig
from render.uv_space import texture_pixels

SUFFIXES = (".glb", ".obj", ".usdz")
INFLUENCES = 8  # bones that move a vertex, at most


@dataclass(frozen=True)
class Surface:
    """A mesh with one texture coordinate a vertex, as files want it: vertices on UV seams stand several times.

    positions, normals: (K, 3); uvs: (K, 2), v up; faces: (F, 3); vertex: (K,) of the body's vertices.
    """

    positions: np.ndarray
    normals: np.ndarray
    uvs: np.ndarray
    faces: np.ndarray
    vertex: np.ndarray


def surface(body, vertices: torch.Tensor) -> Surface:
    """A body's surface with its vertices (V, 3) somewhere else."""
    corners = np.stack([body.faces.numpy().ravel(), body.uv_faces.numpy().ravel()], axis=1)
    pairs, faces = np.unique(corners, axis=0, return_inverse=True)
    normals = vertex_normals(vertices, body.faces).numpy()
    vertex = pairs[:, 0]
    return Surface(
        vertices.numpy()[vertex].astype(np.float32), normals[vertex].astype(np.float32),
        body.uvs.numpy()[pairs[:, 1]].astype(np.float32), faces.reshape(-1, 3).astype(np.uint32), vertex,
    )  # fmt: skip


def export_body(path: str | Path, rig: StillRig, pose: dict, texture: Image.Image) -> None:
    """Writes a body in a pose (of `rig.named_pose` or `rig.sample`) with its texture; whole or not at all.

    An OBJ comes with its .mtl and .png beside it. Raises UserError for another suffix.
    """
    path = Path(path)
    pixels = texture_pixels(texture, texture.width)  # opaque: colours run on outside the islands
    picture = encode_image(image_from_pixels(pixels), format="PNG")
    if path.suffix == ".glb":
        write_whole(path, glb(rig, pose, picture))
    elif path.suffix == ".obj":
        write_obj(path, surface(rig.body, rig.vertices([pose])[0]), picture)
    elif path.suffix == ".usdz":
        write_usdz(path, surface(rig.body, rig.vertices([pose])[0]), picture)
    else:
        raise UserError(f"{path}: a textured body is written as {', '.join(SUFFIXES)}")


def glb(rig: StillRig, pose: dict, picture: bytes) -> bytes:
    """glTF 2.0 in one file; Anny stands at rest in its mesh, and its skeleton holds the pose."""
    import pygltflib as gltf

    skeleton = anny_skeleton(rig, pose) if isinstance(rig, AnnyRig) else None
    mesh = surface(rig.body, skeleton["vertices"] if skeleton else rig.vertices([pose])[0])
    out, blob = gltf.GLTF2(asset=gltf.Asset(version="2.0", generator="TexDreamer Joint")), bytearray()

    def view(data: bytes, target: int | None = None) -> int:
        blob.extend(b"\0" * (-len(blob) % 4))
        out.bufferViews.append(gltf.BufferView(buffer=0, byteOffset=len(blob), byteLength=len(data), target=target))
        blob.extend(data)
        return len(out.bufferViews) - 1

    def accessor(array: np.ndarray, kind: str, target: int | None = gltf.ARRAY_BUFFER, limits: bool = False) -> int:
        code = {"f": gltf.FLOAT, "I": gltf.UNSIGNED_INT, "H": gltf.UNSIGNED_SHORT}[array.dtype.char]
        count = array.size if kind == gltf.SCALAR else len(array)
        low, high = (array.min(0).tolist(), array.max(0).tolist()) if limits else (None, None)
        out.accessors.append(gltf.Accessor(
            bufferView=view(np.ascontiguousarray(array).tobytes(), target), componentType=code, count=count, type=kind,
            min=low, max=high,
        ))  # fmt: skip
        return len(out.accessors) - 1

    uvs = mesh.uvs * np.float32([1, -1]) + np.float32([0, 1])  # glTF's v runs downwards
    attributes = gltf.Attributes(
        POSITION=accessor(mesh.positions, gltf.VEC3, limits=True), NORMAL=accessor(mesh.normals, gltf.VEC3),
        TEXCOORD_0=accessor(uvs, gltf.VEC2),
    )  # fmt: skip
    node = gltf.Node(mesh=0, name="body")
    out.nodes.append(node)
    roots = [0]
    if skeleton:
        for number in range(INFLUENCES // 4):
            part = slice(4 * number, 4 * number + 4)
            setattr(attributes, f"JOINTS_{number}", accessor(skeleton["joints"][mesh.vertex, part], gltf.VEC4))
            setattr(attributes, f"WEIGHTS_{number}", accessor(skeleton["weights"][mesh.vertex, part], gltf.VEC4))
        first = len(out.nodes)
        for bone, name in enumerate(skeleton["names"]):
            children = np.flatnonzero(skeleton["parents"] == bone)
            out.nodes.append(gltf.Node(
                name=name, translation=skeleton["translations"][bone].tolist(),
                rotation=skeleton["rotations"][bone].tolist(), children=(children + first).tolist() or None,
            ))  # fmt: skip
        tops = [first + int(bone) for bone in np.flatnonzero(skeleton["parents"] < 0)]
        roots += tops
        matrices = accessor(skeleton["inverse_bind"].transpose(0, 2, 1).reshape(-1, 16), gltf.MAT4, target=None)
        joints = list(range(first, first + len(skeleton["names"])))
        out.skins.append(gltf.Skin(joints=joints, inverseBindMatrices=matrices, skeleton=tops[0], name="Anny"))
        node.skin = 0
    primitive = gltf.Primitive(
        attributes=attributes, material=0, indices=accessor(mesh.faces.ravel(), gltf.SCALAR, gltf.ELEMENT_ARRAY_BUFFER)
    )
    out.meshes.append(gltf.Mesh(primitives=[primitive], name="body"))
    out.images.append(gltf.Image(bufferView=view(picture), mimeType="image/png", name="texture"))
    out.samplers.append(gltf.Sampler(magFilter=gltf.LINEAR, minFilter=gltf.LINEAR_MIPMAP_LINEAR,
                                     wrapS=gltf.CLAMP_TO_EDGE, wrapT=gltf.CLAMP_TO_EDGE))  # fmt: skip
    out.textures.append(gltf.Texture(source=0, sampler=0))
    colour = gltf.PbrMetallicRoughness(baseColorTexture=gltf.TextureInfo(index=0), metallicFactor=0, roughnessFactor=1)
    out.materials.append(gltf.Material(name="texture", pbrMetallicRoughness=colour, alphaMode=gltf.OPAQUE))
    out.scenes.append(gltf.Scene(nodes=roots))
    out.scene = 0
    blob.extend(b"\0" * (-len(blob) % 4))
    out.buffers.append(gltf.Buffer(byteLength=len(blob)))
    out.set_binary_blob(bytes(blob))
    return b"".join(out.save_to_bytes())


@torch.no_grad()
def anny_skeleton(rig: AnnyRig, pose: dict) -> dict:
    """Anny's mesh at rest and its bones in a pose.

    vertices: (V, 3) at rest. names, parents: (J,), -1 for the root. translations (J, 3) and rotations (J, 4; x y z w)
    of each bone in its parent. inverse_bind: (J, 4, 4). joints, weights: (V, INFLUENCES).
    """
    model, (output, to_ours) = load_anny(), anny_in_our_axes(*rig.parameters([pose]))
    rest, posed = ((to_ours @ output[name][0].float()).double() for name in ("rest_bone_poses", "bone_poses"))
    parents = np.array([-1 if bone == 0 else int(parent) for bone, parent in enumerate(model.bone_parents)])
    local = torch.stack([
        matrix if parent < 0 else torch.linalg.inv(posed[parent]) @ matrix for matrix, parent in zip(posed, parents)
    ])  # fmt: skip
    weights = model.vertex_bone_weights.float()
    kept, order = weights.sort(dim=1, descending=True)
    order, kept = order[:, :INFLUENCES], kept[:, :INFLUENCES]
    joints = model.vertex_bone_indices.gather(1, order)
    missing = INFLUENCES - kept.shape[1]
    kept, joints = (torch.nn.functional.pad(part, (0, max(0, missing))) for part in (kept, joints))
    kept = kept / kept.sum(1, keepdim=True)
    joints = torch.where(kept > 0, joints, torch.zeros_like(joints))  # unused places name bone 0, as glTF asks
    homogeneous = torch.nn.functional.pad(output["rest_vertices"][0].float(), (0, 1), value=1.0)
    return {
        "vertices": (homogeneous @ to_ours.T)[:, :3], "names": list(model.bone_labels), "parents": parents,
        "translations": local[:, :3, 3].numpy(), "rotations": quaternions(local[:, :3, :3]).numpy(),
        "inverse_bind": torch.linalg.inv(rest).float().numpy(), "joints": joints.numpy().astype(np.uint16),
        "weights": kept.numpy().astype(np.float32),
    }  # fmt: skip


def quaternions(matrices: torch.Tensor) -> torch.Tensor:
    """Rotation matrices (J, 3, 3) → unit quaternions (J, 4), x y z w."""
    from scipy.spatial.transform import Rotation

    return torch.from_numpy(Rotation.from_matrix(matrices.numpy()).as_quat())


def write_obj(path: Path, mesh: Surface, picture: bytes) -> None:
    import trimesh

    with tempfile.TemporaryDirectory() as folder:
        material = trimesh.visual.material.SimpleMaterial(image=Image.open(_saved(folder, "in.png", picture)))
        material.name = path.stem
        visual = trimesh.visual.TextureVisuals(uv=mesh.uvs, material=material)
        scene = trimesh.Trimesh(mesh.positions, mesh.faces, vertex_normals=mesh.normals, visual=visual, process=False)
        text, files = trimesh.exchange.obj.export_obj(
            scene, include_normals=True, return_texture=True, mtl_name=f"{path.stem}.mtl"
        )
    for name, data in files.items():
        write_whole(path.with_name(name), picture if name.endswith(".png") else data)
    write_whole(path, text.encode())


def write_usdz(path: Path, mesh: Surface, picture: bytes) -> None:
    from pxr import Gf, Sdf, Usd, UsdGeom, UsdShade, UsdUtils, Vt

    with tempfile.TemporaryDirectory() as folder:
        _saved(folder, "texture.png", picture)
        stage = Usd.Stage.CreateNew(str(Path(folder) / "body.usdc"))
        UsdGeom.SetStageUpAxis(stage, UsdGeom.Tokens.y)
        UsdGeom.SetStageMetersPerUnit(stage, 1.0)
        root = UsdGeom.Xform.Define(stage, "/body")
        stage.SetDefaultPrim(root.GetPrim())
        shape = UsdGeom.Mesh.Define(stage, "/body/mesh")
        shape.CreatePointsAttr(Vt.Vec3fArray.FromNumpy(mesh.positions))
        shape.CreateFaceVertexCountsAttr(Vt.IntArray.FromNumpy(np.full(len(mesh.faces), 3, np.int32)))
        shape.CreateFaceVertexIndicesAttr(Vt.IntArray.FromNumpy(mesh.faces.astype(np.int32).ravel()))
        shape.CreateNormalsAttr(Vt.Vec3fArray.FromNumpy(mesh.normals))
        shape.SetNormalsInterpolation(UsdGeom.Tokens.vertex)
        shape.CreateSubdivisionSchemeAttr(UsdGeom.Tokens.none)
        low, high = mesh.positions.min(0).tolist(), mesh.positions.max(0).tolist()
        shape.CreateExtentAttr([Gf.Vec3f(*low), Gf.Vec3f(*high)])
        primvars = UsdGeom.PrimvarsAPI(shape)
        uvs = primvars.CreatePrimvar("st", Sdf.ValueTypeNames.TexCoord2fArray, UsdGeom.Tokens.vertex)
        uvs.Set(Vt.Vec2fArray.FromNumpy(mesh.uvs))
        material = UsdShade.Material.Define(stage, "/body/material")
        shader = UsdShade.Shader.Define(stage, "/body/material/surface")
        shader.CreateIdAttr("UsdPreviewSurface")
        shader.CreateInput("roughness", Sdf.ValueTypeNames.Float).Set(1.0)
        shader.CreateInput("metallic", Sdf.ValueTypeNames.Float).Set(0.0)
        reader = UsdShade.Shader.Define(stage, "/body/material/uv")
        reader.CreateIdAttr("UsdPrimvarReader_float2")
        reader.CreateInput("varname", Sdf.ValueTypeNames.String).Set("st")
        sampler = UsdShade.Shader.Define(stage, "/body/material/texture")
        sampler.CreateIdAttr("UsdUVTexture")
        sampler.CreateInput("file", Sdf.ValueTypeNames.Asset).Set("texture.png")
        sampler.CreateInput("sourceColorSpace", Sdf.ValueTypeNames.Token).Set("sRGB")
        for axis in "ST":
            sampler.CreateInput(f"wrap{axis}", Sdf.ValueTypeNames.Token).Set("clamp")
        sampler.CreateInput("st", Sdf.ValueTypeNames.Float2).ConnectToSource(
            reader.CreateOutput("result", Sdf.ValueTypeNames.Float2)
        )
        shader.CreateInput("diffuseColor", Sdf.ValueTypeNames.Color3f).ConnectToSource(
            sampler.CreateOutput("rgb", Sdf.ValueTypeNames.Float3)
        )
        material.CreateSurfaceOutput().ConnectToSource(shader.CreateOutput("surface", Sdf.ValueTypeNames.Token))
        UsdShade.MaterialBindingAPI.Apply(shape.GetPrim()).Bind(material)
        stage.GetRootLayer().Save()
        packed = Path(folder) / "body.usdz"
        if not UsdUtils.CreateNewUsdzPackage(Sdf.AssetPath(str(Path(folder) / "body.usdc")), str(packed)):
            raise UserError(f"cannot pack {path}; write a .glb instead")
        write_whole(path, packed.read_bytes())


def _saved(folder: str, name: str, data: bytes) -> Path:
    path = Path(folder) / name
    path.write_bytes(data)
    return path
