"""The Python API step by step: a texture from words, its top repainted, and the body for a 3D program.

python examples/textures_for_a_crowd.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from infer_uv import TexturePipeline
from render.export import export_body
from render.rigs import load_rig


def main():
    out = Path("outputs/crowd")
    out.mkdir(parents=True, exist_ok=True)
    pipeline = TexturePipeline.from_pretrained()  # your newest checkpoint, or the embedded one

    # One person in three seeds: the words stay, what they leave open changes.
    people = pipeline(prompt="a young woman with black hair in a red sweater and blue jeans", seeds=[0, 1, 2])
    # The first of them in another top; everything outside the region stays as it was.
    (changed,) = pipeline(
        prompt="a young woman with black hair in a yellow sweater and blue jeans", init_texture=people[0], mask="top"
    )

    rig = load_rig("anny")
    for number, texture in enumerate([*people, changed]):
        texture.save(out / f"{number}.png")
        pose = rig.named_pose("walking", seed=number)
        export_body(out / f"{number}.glb", rig, pose, texture)  # with its skeleton: open it in Blender or on the web
    print(f"four textures and bodies in {out}")


if __name__ == "__main__":
    main()
