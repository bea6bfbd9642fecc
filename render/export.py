"""A textured body as a file for other tools: GLB (Anny with its skeleton and skin), OBJ, USDZ.

Metres, y up, the body looks along +z. One material, rough and not metallic, with the texture as its colour.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pygltflib as gltf
import torch
from PIL import Image

from common.errors import UserError, reason
from common.files import write_whole
from common.pictures import encode_image, image_from_pixels
from render.bodies import load_anny, vertex_normals
from render.poses import anny_in_our_axes
from render.rigs import AnnyRig, StillRig
from render.uv_space import texture_pixels

SUFFIXES = (".glb", ".obj", ".usdz")
# Bones that move a vertex in a GLB, at most: Anny has up to 9. glTF asks no loader for more than 4, with which
# vertices are up to 19 mm away in Anny's poses (0.1 on average); with 8 of which 4 are read, up to 360 mm.
INFLUENCES = (4, 8)
# Wavefront's MTL, illumination model 1: ambient and diffuse light, no highlight. Its colours multiply the texture,
# so that white leaves it as it is.
MATERIAL = """\
newmtl {name}
Ka 1 1 1
Kd 1 1 1
Ks 0 0 0
d 1
illum 1
map_Kd {name}.png
"""
COMPONENT_TYPES = {"f": gltf.FLOAT, "I": gltf.UNSIGNED_INT, "H": gltf.UNSIGNED_SHORT}  # by numpy's letter


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
    vertex, uv = pairs.T
    return Surface(
        positions=vertices.numpy()[vertex].astype(np.float32),
        normals=normals[vertex].astype(np.float32),
        uvs=body.uvs.numpy()[uv].astype(np.float32),
        faces=faces.reshape(-1, 3).astype(np.uint32),
        vertex=vertex,
    )


def export_body(
    path: str | Path, rig: StillRig, pose: dict, texture: Image.Image, influences: int = INFLUENCES[0]
) -> None:
    """Writes a body in a pose (of `rig.named_pose` or `rig.sample`) with its texture; whole or not at all.

    influences: bones that move a vertex of a GLB, at most; 8 is nearer, where a loader reads as many. An OBJ
    comes with its .mtl and .png beside it. Raises UserError for another suffix or number of bones.
    """
    path = Path(path)
    if influences not in INFLUENCES:
        raise UserError(f"{influences} bones a vertex: a GLB is written with {' or '.join(map(str, INFLUENCES))}")
    pixels = texture_pixels(texture, texture.width)  # opaque: colours run on outside the islands
    picture = encode_image(image_from_pixels(pixels), format="PNG")
    if path.suffix == ".glb":
        write_whole(path, glb(rig, pose, picture, influences))
    elif path.suffix == ".obj":
        write_obj(path, surface(rig.body, rig.vertices([pose])[0]), picture)
    elif path.suffix == ".usdz":
        try:
            write_usdz(path, surface(rig.body, rig.vertices([pose])[0]), picture)
        except (OSError, RuntimeError) as error:  # OpenUSD's own are the latter
            place = tempfile.gettempdir()
            raise UserError(f"cannot write {path}: {reason(error)}; make room there and in {place}") from None
    else:
        raise UserError(f"{path}: a textured body is written as {', '.join(SUFFIXES)}")


class GlbWriter:
    """Collects a glTF 2.0 document and its one buffer."""

    def __init__(self):
        self.document = gltf.GLTF2(asset=gltf.Asset(version="2.0", generator="TexDreamer Joint"))
        self.blob = bytearray()

    def add_bytes(self, data: bytes, target: int | None = None) -> int:
        """A stretch of the buffer → its buffer view's index."""
        self._align()
        start, length = len(self.blob), len(data)
        view = gltf.BufferView(buffer=0, byteOffset=start, byteLength=length, target=target)
        self.document.bufferViews.append(view)
        self.blob.extend(data)
        return len(self.document.bufferViews) - 1

    def add_array(self, array: np.ndarray, kind: str, target: int | None = gltf.ARRAY_BUFFER) -> int:
        """An array of glTF's kind (SCALAR, VEC3, ...) → its accessor's index."""
        accessor = gltf.Accessor(
            bufferView=self.add_bytes(np.ascontiguousarray(array).tobytes(), target),
            componentType=COMPONENT_TYPES[array.dtype.char],
            count=len(array),
            type=kind,
        )
        self.document.accessors.append(accessor)
        return len(self.document.accessors) - 1

    def add_mesh(self, mesh: Surface) -> gltf.Attributes:
        """Positions, normals and UVs as glTF has them, its v downwards, with the faces as a mesh of material 0."""
        uvs = mesh.uvs * np.float32([1, -1]) + np.float32([0, 1])
        attributes = gltf.Attributes(
            POSITION=self.add_array(mesh.positions, gltf.VEC3),
            NORMAL=self.add_array(mesh.normals, gltf.VEC3),
            TEXCOORD_0=self.add_array(uvs, gltf.VEC2),
        )
        positions = self.document.accessors[attributes.POSITION]
        positions.min, positions.max = mesh.positions.min(0).tolist(), mesh.positions.max(0).tolist()
        indices = self.add_array(mesh.faces.ravel(), gltf.SCALAR, gltf.ELEMENT_ARRAY_BUFFER)
        primitive = gltf.Primitive(attributes=attributes, material=0, indices=indices)
        self.document.meshes.append(gltf.Mesh(primitives=[primitive], name="body"))
        return attributes

    def add_skeleton(self, skeleton: "Skeleton") -> list[int]:
        """A node for each bone, and the skin → the indices of the nodes without a parent."""
        first = len(self.document.nodes)
        bones = zip(skeleton.names, skeleton.translations.tolist(), skeleton.rotations.tolist())
        for bone, (name, translation, rotation) in enumerate(bones):
            children = (np.flatnonzero(skeleton.parents == bone) + first).tolist() or None
            node = gltf.Node(name=name, translation=translation, rotation=rotation, children=children)
            self.document.nodes.append(node)
        roots = (np.flatnonzero(skeleton.parents < 0) + first).tolist()
        by_columns = skeleton.inverse_bind.transpose(0, 2, 1).reshape(-1, 16)
        matrices = self.add_array(by_columns, gltf.MAT4, target=None)
        joints = list(range(first, len(self.document.nodes)))
        skin = gltf.Skin(joints=joints, inverseBindMatrices=matrices, skeleton=roots[0], name="Anny")
        self.document.skins.append(skin)
        return roots

    def add_material(self, picture: bytes) -> None:
        """Rough, not metallic, of the colours of a PNG."""
        image = gltf.Image(bufferView=self.add_bytes(picture), mimeType="image/png", name="texture")
        sampler = gltf.Sampler(
            magFilter=gltf.LINEAR,
            minFilter=gltf.LINEAR_MIPMAP_LINEAR,
            wrapS=gltf.CLAMP_TO_EDGE,
            wrapT=gltf.CLAMP_TO_EDGE,
        )
        texture, colour = gltf.Texture(source=0, sampler=0), gltf.TextureInfo(index=0)
        surface = gltf.PbrMetallicRoughness(baseColorTexture=colour, metallicFactor=0, roughnessFactor=1)
        material = gltf.Material(name="texture", pbrMetallicRoughness=surface, alphaMode=gltf.OPAQUE)
        document = self.document
        document.images, document.samplers, document.textures = [image], [sampler], [texture]
        document.materials = [material]

    def to_bytes(self) -> bytes:
        self._align()
        self.document.buffers.append(gltf.Buffer(byteLength=len(self.blob)))
        self.document.set_binary_blob(bytes(self.blob))
        return b"".join(self.document.save_to_bytes())

    def _align(self) -> None:
        self.blob.extend(b"\0" * (-len(self.blob) % 4))


def glb(rig: StillRig, pose: dict, picture: bytes, influences: int) -> bytes:
    """glTF 2.0 in one file; Anny stands at rest in its mesh, and its skeleton holds the pose."""
    skeleton = anny_skeleton(rig, pose, influences) if isinstance(rig, AnnyRig) else None
    mesh = surface(rig.body, skeleton.vertices if skeleton else rig.vertices([pose])[0])
    writer = GlbWriter()
    attributes = writer.add_mesh(mesh)
    node = gltf.Node(mesh=0, name="body")
    writer.document.nodes.append(node)
    roots = [0]
    if skeleton:
        for number in range(influences // 4):
            columns = slice(4 * number, 4 * number + 4)
            joints, weights = skeleton.joints[mesh.vertex, columns], skeleton.weights[mesh.vertex, columns]
            setattr(attributes, f"JOINTS_{number}", writer.add_array(joints, gltf.VEC4))
            setattr(attributes, f"WEIGHTS_{number}", writer.add_array(weights, gltf.VEC4))
        roots += writer.add_skeleton(skeleton)
        node.skin = 0
    writer.add_material(picture)
    writer.document.scenes, writer.document.scene = [gltf.Scene(nodes=roots)], 0
    return writer.to_bytes()


@dataclass(frozen=True)
class Skeleton:
    """Anny's mesh at rest and its J bones in a pose.

    vertices: (V, 3) at rest. names, parents: (J,), -1 for the root. translations (J, 3) and rotations
    (J, 4; x y z w) of each bone in its parent. inverse_bind: (J, 4, 4). joints, weights: (V, influences).
    """

    vertices: torch.Tensor
    names: list[str]
    parents: np.ndarray
    translations: np.ndarray
    rotations: np.ndarray
    inverse_bind: np.ndarray
    joints: np.ndarray
    weights: np.ndarray


@torch.no_grad()
def anny_skeleton(rig: AnnyRig, pose: dict, influences: int) -> Skeleton:
    model, (output, to_ours) = load_anny(), anny_in_our_axes(*rig.parameters([pose]))
    bone_poses = (output[name][0].float() for name in ("rest_bone_poses", "bone_poses"))
    resting, posed = ((to_ours @ matrices).double() for matrices in bone_poses)
    parents = np.array([-1 if bone == 0 else int(parent) for bone, parent in enumerate(model.bone_parents)])
    to_parent = [torch.eye(4).double() if parent < 0 else torch.linalg.inv(posed[parent]) for parent in parents]
    in_parent = torch.stack(to_parent) @ posed
    bones = model.vertex_bone_indices, model.vertex_bone_weights.float()
    joints, weights = strongest_bones(*bones, influences)
    homogeneous = torch.nn.functional.pad(output["rest_vertices"][0].float(), (0, 1), value=1.0)
    return Skeleton(
        vertices=(homogeneous @ to_ours.T)[:, :3],
        names=list(model.bone_labels),
        parents=parents,
        translations=in_parent[:, :3, 3].numpy(),
        rotations=quaternions(in_parent[:, :3, :3]).numpy(),
        inverse_bind=torch.linalg.inv(resting).float().numpy(),
        joints=joints.numpy().astype(np.uint16),
        weights=weights.numpy().astype(np.float32),
    )


def strongest_bones(joints: torch.Tensor, weights: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """joints, weights: (V, B) → (V, count) of each vertex's strongest, strongest first, weights of sum 1."""
    weights, order = weights.sort(dim=1, descending=True)
    weights, joints = weights[:, :count], joints.gather(1, order[:, :count])
    missing = max(0, count - weights.shape[1])
    weights, joints = (torch.nn.functional.pad(each, (0, missing)) for each in (weights, joints))
    weights = weights / weights.sum(1, keepdim=True)
    return torch.where(weights > 0, joints, 0), weights  # unused places name bone 0, as glTF asks


def quaternions(matrices: torch.Tensor) -> torch.Tensor:
    """Rotation matrices (J, 3, 3) → unit quaternions (J, 4), x y z w."""
    from scipy.spatial.transform import Rotation

    return torch.from_numpy(Rotation.from_matrix(matrices.numpy()).as_quat())


def write_obj(path: Path, mesh: Surface, picture: bytes) -> None:
    import trimesh

    # The image stands for the texture: what trimesh writes of it and of the material is not used.
    material = trimesh.visual.material.SimpleMaterial(image=Image.new("RGB", (1, 1)), name=path.stem)
    visual = trimesh.visual.TextureVisuals(uv=mesh.uvs, material=material)
    normals = mesh.normals
    scene = trimesh.Trimesh(mesh.positions, mesh.faces, vertex_normals=normals, visual=visual, process=False)
    text, _ = trimesh.exchange.obj.export_obj(
        scene, include_normals=True, return_texture=True, mtl_name=f"{path.stem}.mtl"
    )
    write_whole(path.with_suffix(".png"), picture)
    write_whole(path.with_suffix(".mtl"), MATERIAL.format(name=path.stem).encode())
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
