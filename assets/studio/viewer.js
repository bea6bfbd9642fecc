// Shows a GLB of render/export.py on a canvas by WebGL 2: one textured mesh, with or without a skin.

const VERTEX = `#version 300 es
in vec3 position; in vec3 normal; in vec2 uv;
uniform mat4 view, projection;
out vec3 facing; out vec2 texel;
void main() {
  facing = mat3(view) * normal;
  texel = uv;
  gl_Position = projection * view * vec4(position, 1.0);
}`;

// The light comes from above the eye, so that a turned body is never dark.
const FRAGMENT = `#version 300 es
precision mediump float;
in vec3 facing; in vec2 texel;
uniform sampler2D colours, painted;
out vec4 colour;
void main() {
  vec3 n = normalize(gl_FrontFacing ? facing : -facing);
  float light = 0.62 + 0.1 * n.y + 0.34 * max(dot(n, normalize(vec3(0.25, 0.45, 1.0))), 0.0);
  vec3 stripes = mod(gl_FragCoord.x + gl_FragCoord.y, 10.0) < 5.0 ? vec3(0.04, 0.4, 0.34) : vec3(1.0);
  colour = vec4(mix(texture(colours, texel).rgb * light, stripes, 0.6 * texture(painted, texel).a), 1.0);
}`;

// Where on the texture each pixel of the body is: two bytes for u, two for v.
const WHERE = `#version 300 es
precision highp float;
in vec2 texel;
out vec4 place;
void main() {
  vec2 scaled = clamp(texel, 0.0, 1.0) * 255.0;
  place = vec4(floor(scaled.x) / 255.0, fract(scaled.x), floor(scaled.y) / 255.0, fract(scaled.y));
}`;

const ARRAYS = { 5123: Uint16Array, 5125: Uint32Array, 5126: Float32Array };
const SIZES = { SCALAR: 1, VEC2: 2, VEC3: 3, VEC4: 4, MAT4: 16 };

// A GLB's bytes → positions, normals (posed, in metres), uvs, faces, and its texture as a Blob.
export function readGlb(buffer) {
  const words = new DataView(buffer), length = words.getUint32(12, true);
  const gltf = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 20, length)));
  const start = 28 + length;  // past both chunks' headers
  const bytes = (view) => [start + (view.byteOffset || 0), view.byteLength];
  const array = (index) => {
    const accessor = gltf.accessors[index], [offset] = bytes(gltf.bufferViews[accessor.bufferView]);
    const kind = ARRAYS[accessor.componentType];
    const count = accessor.count * SIZES[accessor.type], first = offset + (accessor.byteOffset || 0);
    return new kind(buffer.slice(first, first + count * kind.BYTES_PER_ELEMENT));
  };
  const primitive = gltf.meshes[0].primitives[0], attributes = primitive.attributes;
  const mesh = {
    positions: array(attributes.POSITION), normals: array(attributes.NORMAL),
    uvs: array(attributes.TEXCOORD_0), faces: array(primitive.indices),
  };
  const node = gltf.nodes.find((each) => each.mesh !== undefined);
  if (node.skin !== undefined) {
    const skin = gltf.skins[node.skin], inverse = array(skin.inverseBindMatrices), worlds = worldMatrices(gltf);
    const bones = skin.joints.map((joint, index) => multiply(worlds[joint], inverse.subarray(16 * index, 16 * index + 16)));
    const sets = [];
    for (let set = 0; `JOINTS_${set}` in attributes; set++)
      sets.push([array(attributes[`JOINTS_${set}`]), array(attributes[`WEIGHTS_${set}`])]);
    bend(mesh, bones, sets);
  }
  const [offset, size] = bytes(gltf.bufferViews[gltf.images[0].bufferView]);
  return { ...mesh, picture: new Blob([new Uint8Array(buffer, offset, size)], { type: gltf.images[0].mimeType }) };
}

function worldMatrices(gltf) {
  const worlds = [];
  const walk = (index, parent) => {
    const node = gltf.nodes[index], own = matrixOf(node);
    worlds[index] = parent ? multiply(parent, own) : own;
    for (const child of node.children || []) walk(child, worlds[index]);
  };
  for (const root of gltf.scenes[gltf.scene].nodes) walk(root, null);
  return worlds;
}

// Column after column, as glTF and WebGL have it.
function matrixOf({ translation: [x, y, z] = [0, 0, 0], rotation: [a, b, c, w] = [0, 0, 0, 1] }) {
  return [
    1 - 2 * (b * b + c * c), 2 * (a * b + c * w), 2 * (a * c - b * w), 0,
    2 * (a * b - c * w), 1 - 2 * (a * a + c * c), 2 * (b * c + a * w), 0,
    2 * (a * c + b * w), 2 * (b * c - a * w), 1 - 2 * (a * a + b * b), 0,
    x, y, z, 1,
  ];
}

function multiply(left, right) {
  const product = new Float32Array(16);
  for (let column = 0; column < 4; column++)
    for (let row = 0; row < 4; row++)
      for (let k = 0; k < 4; k++) product[4 * column + row] += left[4 * k + row] * right[4 * column + k];
  return product;
}

// Moves positions and normals with their bones, once: the pose stands still.
function bend(mesh, bones, sets) {
  const { positions, normals } = mesh;
  for (let vertex = 0; vertex < positions.length / 3; vertex++) {
    const matrix = new Float32Array(16);
    for (const [joints, weights] of sets)
      for (let k = 4 * vertex; k < 4 * vertex + 4; k++)
        if (weights[k]) for (let entry = 0; entry < 16; entry++) matrix[entry] += weights[k] * bones[joints[k]][entry];
    for (const [vectors, w] of [[positions, 1], [normals, 0]]) {
      const [x, y, z] = vectors.subarray(3 * vertex, 3 * vertex + 3);
      for (let row = 0; row < 3; row++)
        vectors[3 * vertex + row] = matrix[row] * x + matrix[4 + row] * y + matrix[8 + row] * z + matrix[12 + row] * w;
    }
  }
}

// The edges of a mesh with one face alone, where its UV islands end → [vertex, vertex] each.
export function islandEdges(faces) {
  const edges = new Map();
  for (let corner = 0; corner < faces.length; corner++) {
    const from = faces[corner], to = faces[corner % 3 === 2 ? corner - 2 : corner + 1];
    const key = from < to ? `${from} ${to}` : `${to} ${from}`;
    edges.set(key, edges.has(key) ? null : [from, to]);
  }
  return [...edges.values()].filter(Boolean);
}

export class BodyViewer {
  constructor(canvas) {
    this.canvas = canvas;
    this.gl = canvas.getContext("webgl2", { antialias: true, alpha: true, preserveDrawingBuffer: true });
    if (!this.gl) throw new Error("this browser shows no WebGL 2: the body cannot be turned, its files can be saved");
    this.turn = 0.35; this.tilt = 0.06; this.zoom = 1; this.count = 0;
    this.follower = null;  // a viewer that turns with this one
    this.brush = null;  // where a pointer goes instead of turning: told [x, y] of the page
    const gl = this.gl;
    this.program = this.link(FRAGMENT);
    this.places = this.link(WHERE);
    gl.enable(gl.DEPTH_TEST);
    this.buffers = Object.fromEntries(["position", "normal", "uv", "faces"].map((name) => [name, gl.createBuffer()]));
    this.colours = gl.createTexture();
    this.painted = gl.createTexture();
    this.paintOver(new ImageData(1, 1));
    new ResizeObserver(() => this.draw()).observe(canvas);
    this.listen();
  }

  link(fragment) {
    const gl = this.gl, program = gl.createProgram();
    ["position", "normal", "uv"].forEach((name, place) => gl.bindAttribLocation(program, place, name));
    for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, fragment]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program));
    return program;
  }

  // mesh: of readGlb; picture: its texture as an ImageBitmap.
  show(mesh, picture) {
    const gl = this.gl;
    [["position", mesh.positions, 3], ["normal", mesh.normals, 3], ["uv", mesh.uvs, 2]].forEach(([name, values, size], place) => {
      gl.bindBuffer(gl.ARRAY_BUFFER, this.buffers[name]);
      gl.bufferData(gl.ARRAY_BUFFER, values, gl.STATIC_DRAW);
      gl.enableVertexAttribArray(place);
      gl.vertexAttribPointer(place, size, gl.FLOAT, false, 0, 0);
    });
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, this.buffers.faces);
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, mesh.faces, gl.STATIC_DRAW);
    const low = [Infinity, Infinity, Infinity], high = [-Infinity, -Infinity, -Infinity];
    mesh.positions.forEach((value, index) => {
      low[index % 3] = Math.min(low[index % 3], value);
      high[index % 3] = Math.max(high[index % 3], value);
    });
    this.centre = low.map((value, axis) => (value + high[axis]) / 2);
    this.size = high.map((value, axis) => value - low[axis]);
    this.count = mesh.faces.length;
    this.wear(picture);
  }

  wear(picture) {
    this.fill(this.colours, picture);
    this.draw();
  }

  // picture: of which the alpha says what is painted.
  paintOver(picture) {
    this.fill(this.painted, picture);
    this.draw();
  }

  fill(texture, picture) {
    const gl = this.gl;
    gl.bindTexture(gl.TEXTURE_2D, texture);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, picture);
    gl.generateMipmap(gl.TEXTURE_2D);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.LINEAR_MIPMAP_LINEAR);
    for (const side of [gl.TEXTURE_WRAP_S, gl.TEXTURE_WRAP_T]) gl.texParameteri(gl.TEXTURE_2D, side, gl.CLAMP_TO_EDGE);
  }

  // The texels, as [u, v], that are seen within radius pixels of a point of the page.
  texelsAt(pageX, pageY, radius) {
    const { gl, canvas } = this, box = canvas.getBoundingClientRect(), ratio = canvas.width / box.width;
    const reach = Math.max(1, Math.round(radius * ratio)), side = 2 * reach + 1;
    const left = Math.round((pageX - box.left) * ratio) - reach;
    const low = canvas.height - 1 - Math.round((pageY - box.top) * ratio) - reach;
    const target = gl.createFramebuffer(), buffers = [gl.createRenderbuffer(), gl.createRenderbuffer()];
    gl.bindFramebuffer(gl.FRAMEBUFFER, target);
    [[gl.COLOR_ATTACHMENT0, gl.RGBA8], [gl.DEPTH_ATTACHMENT, gl.DEPTH_COMPONENT24]].forEach(([use, format], index) => {
      gl.bindRenderbuffer(gl.RENDERBUFFER, buffers[index]);
      gl.renderbufferStorage(gl.RENDERBUFFER, format, canvas.width, canvas.height);
      gl.framebufferRenderbuffer(gl.FRAMEBUFFER, use, gl.RENDERBUFFER, buffers[index]);
    });
    gl.enable(gl.SCISSOR_TEST);  // nothing but the brush's square is drawn
    gl.scissor(left, low, side, side);
    this.render(this.places);
    gl.disable(gl.SCISSOR_TEST);
    const bytes = new Uint8Array(4 * side * side), texels = [];
    gl.readPixels(left, low, side, side, gl.RGBA, gl.UNSIGNED_BYTE, bytes);
    gl.bindFramebuffer(gl.FRAMEBUFFER, null);
    gl.deleteFramebuffer(target);
    for (const buffer of buffers) gl.deleteRenderbuffer(buffer);
    for (let row = -reach; row <= reach; row++)
      for (let column = -reach; column <= reach; column++) {
        const [a, b, c, d] = bytes.subarray(4 * ((row + reach) * side + column + reach));
        if ((a || b || c || d) && row * row + column * column <= reach * reach)
          texels.push([(a + b / 255) / 255, (c + d / 255) / 255]);
      }
    return texels;
  }

  draw() {
    const { canvas } = this, ratio = Math.min(window.devicePixelRatio || 1, 2);
    canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio));
    canvas.height = Math.max(1, Math.round(canvas.clientHeight * ratio));
    this.render(this.program);
  }

  render(program) {
    const { gl, canvas } = this;
    gl.useProgram(program);
    [["colours", this.colours], ["painted", this.painted]].forEach(([name, texture], unit) => {
      gl.activeTexture(gl.TEXTURE0 + unit);
      gl.bindTexture(gl.TEXTURE_2D, texture);
      gl.uniform1i(gl.getUniformLocation(program, name), unit);
    });
    gl.viewport(0, 0, canvas.width, canvas.height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    if (!this.count) return;
    const aspect = canvas.width / canvas.height, slope = Math.tan(Math.PI / 12);  // half of 30 degrees
    const across = Math.hypot(this.size[0], this.size[2]);
    const distance = (Math.max(this.size[1], across / aspect) / (2 * slope) * 1.08 + this.size[2] / 2) / this.zoom;
    const [s, c, u, v] = [Math.sin(this.turn), Math.cos(this.turn), Math.sin(this.tilt), Math.cos(this.tilt)];
    const rotation = [c, u * s, -v * s, 0, 0, v, u, 0, s, -u * c, v * c, 0, 0, 0, 0, 1];
    const away = matrixOf({ translation: [0, 0, -distance] }), centred = matrixOf({ translation: this.centre.map((x) => -x) });
    const near = distance / 50, far = distance + 2 * Math.hypot(...this.size);
    const projection = [
      1 / (slope * aspect), 0, 0, 0, 0, 1 / slope, 0, 0,
      0, 0, (near + far) / (near - far), -1, 0, 0, 2 * near * far / (near - far), 0,
    ];
    gl.uniformMatrix4fv(gl.getUniformLocation(program, "view"), false, multiply(away, multiply(rotation, centred)));
    gl.uniformMatrix4fv(gl.getUniformLocation(program, "projection"), false, projection);
    gl.drawElements(gl.TRIANGLES, this.count, gl.UNSIGNED_INT, 0);
  }

  move(turn, tilt, zoom = 1) {
    this.turn += turn;
    this.tilt = Math.max(-1.2, Math.min(1.2, this.tilt + tilt));
    this.zoom = Math.max(0.6, Math.min(6, this.zoom * zoom));
    this.draw();
    this.follower?.standAs(this);
  }

  standAs({ turn, tilt, zoom }) {
    Object.assign(this, { turn, tilt, zoom });
    this.draw();
  }

  listen() {
    const { canvas } = this, pointers = new Map();
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, event);
      this.brush?.(event.clientX, event.clientY);
    });
    canvas.addEventListener("pointermove", (event) => {
      const before = pointers.get(event.pointerId);
      if (!before) return;
      const other = [...pointers.values()].find((each) => each.pointerId !== event.pointerId);
      if (other) {
        const gap = (from) => Math.hypot(from.clientX - other.clientX, from.clientY - other.clientY) || 1;
        this.move(0, 0, gap(event) / gap(before));
      } else if (this.brush) this.brush(event.clientX, event.clientY);
      else this.move((event.clientX - before.clientX) / 120, (event.clientY - before.clientY) / 240);
      pointers.set(event.pointerId, event);
    });
    for (const name of ["pointerup", "pointercancel"])
      canvas.addEventListener(name, (event) => pointers.delete(event.pointerId));
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.move(0, 0, Math.exp(-event.deltaY / 600));
    }, { passive: false });
    const keys = {
      ArrowLeft: [-0.2, 0], ArrowRight: [0.2, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1], "+": [0, 0, 1.15], "-": [0, 0, 1 / 1.15],
    };
    canvas.addEventListener("keydown", (event) => {
      if (!(event.key in keys)) return;
      event.preventDefault();
      this.move(...keys[event.key]);
    });
  }
}
