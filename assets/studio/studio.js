// The page: asks the studio for textures and shows them. Asks nobody else for anything.
import { BodyViewer, islandEdges, readGlb } from "/viewer.js";

const $ = (id) => document.getElementById(id);
const EXAMPLES = ["a woman in a yellow dress", "a man in a red hoodie and blue jeans", "an old man in a grey suit"];
const DOWNLOADS = { png: "PNG", glb: "GLB", obj: "OBJ", usdz: "USDZ", gif: "GIF", json: "Settings" };
const TURNING = ["glb", "obj", "usdz", "gif"];  // that show the body in a pose
const MASK_SIDE = 512;  // pixels of the painted region
let defaults, viewer, otherViewer, uploads = [], results = [], shown = null, compared = null, mesh = null, busy = false;
let previews = 0, worn = null;  // previews seen of this order; the shown texture as an ImageBitmap
const descriptions = {};  // of results, by their ids

async function ask(method, path, body) {
  let answer;
  try {
    answer = await fetch(path, { method, body });
  } catch {
    throw new Error("the studio does not answer: is it still running?");
  }
  if (!answer.ok) throw new Error((await answer.json()).error);
  return answer;
}
const askJson = async (...request) => (await ask(...request)).json();

function guarded(action) {
  return async (...values) => {
    $("fault").textContent = "";
    try {
      await action(...values);
    } catch (error) {
      $("fault").textContent = sentence(error.message);
    }
  };
}
const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.?!]$/.test(text) ? "" : ".");

function element(name, properties, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}
const option = (value, text) => element("option", { value, textContent: text });

// Pictures.

async function addPictures(files) {
  for (const file of files) {
    if (uploads.length >= defaults.most_pictures) throw new Error(`${defaults.most_pictures} pictures are the most`);
    if (file.size > defaults.largest_upload)
      throw new Error(`${file.name} is larger than ${defaults.largest_upload / 2 ** 20} MB`);
    const name = file.name || "pasted picture";
    const { id } = await askJson("POST", `/api/pictures?${new URLSearchParams({ name })}`, file);
    uploads.push({ id, name, fit: null, address: URL.createObjectURL(file) });
    showUploads();
  }
}

async function addFit(upload, file) {
  if (file.size > defaults.largest_fit) throw new Error(`${file.name} is larger than ${defaults.largest_fit / 2 ** 20} MB`);
  await ask("POST", `/api/fits/${upload.id}?${new URLSearchParams({ name: file.name })}`, file);
  upload.fit = file.name;
  showUploads();
}

async function addTexture(file) {
  if (file.size > defaults.largest_upload)
    throw new Error(`${file.name} is larger than ${defaults.largest_upload / 2 ** 20} MB`);
  const { id } = await askJson("POST", `/api/results?${new URLSearchParams({ name: file.name })}`, file);
  results.push(id);
  const showing = show(id);
  if ($("region").value === "new") $("region").value = "whole";
  showEdit();
  await showing;
}

function showUploads() {
  $("uploads").replaceChildren(...uploads.map((upload) => {
    const remove = element("button", { type: "button", textContent: "×" });
    remove.setAttribute("aria-label", `Remove ${upload.name}`);
    remove.onclick = guarded(async () => {
      await ask("DELETE", `/api/pictures/${upload.id}`);
      URL.revokeObjectURL(upload.address);
      uploads = uploads.filter((each) => each !== upload);
      showUploads();
    });
    const item = element("li", {}, element("img", { src: upload.address, alt: upload.name }), remove);
    if ($("own").value === "file") {
      const input = element("input", { type: "file", accept: defaults.fit_suffixes.join(",") });
      input.setAttribute("aria-label", `Fit of ${upload.name}`);
      input.onchange = guarded(() => addFit(upload, input.files[0]));
      item.append(element("label", { className: "fit" }, input, upload.fit || "Choose its fit"));
    }
    return item;
  }));
  $("own-row").hidden = !uploads.length;
  if (!uploads.length) $("own").value = "";
  showWeight();
}

function showWeight() {
  $("weight-row").hidden = !(uploads.length && $("prompt").value.trim());
  $("weight-value").textContent = `${Math.round(100 * $("weight").value)} % picture`;
}

// Orders.

function numberIn(id) {
  const field = $(id);
  if (!field.checkValidity() || field.value === "")
    throw new Error(`${field.ariaLabel || field.labels[0].textContent}: give a number from ${field.min} to ${field.max}`);
  return Number(field.value);
}

async function order() {
  if ($("order").seeding.value === "random") $("seed").value = Math.floor(Math.random() * 2 ** 32);
  const region = $("region").value, isBoth = !$("weight-row").hidden, own = uploads.length ? $("own").value : "";
  if (own === "file" && !uploads.every((upload) => upload.fit)) throw new Error("each picture needs its fit: choose its file");
  const mask = region === "painted" ? (await askJson("POST", "/api/masks", await paintedMask())).id : null;
  const asked = {
    prompt: $("prompt").value, negative_prompt: $("negative").value, pictures: uploads.map((upload) => upload.id),
    img_weight: isBoth ? Number($("weight").value) : null, guidance_scale: numberIn("guidance"),
    seed: numberIn("seed"), steps: numberIn("steps"), number: Number($("number").value),
    sampler: $("sampler").value, fits: own ? uploads.map(() => own) : [],
    edited: region === "new" ? null : shown, mask,
    region: ["new", "whole", "painted"].includes(region) ? null : region,
    strength: region === "new" ? null : Number($("strength").value),
  };
  if (defaults.fast) Object.assign(asked, { guidance_scale: null, steps: null, sampler: null, negative_prompt: null });
  if (asked.guidance_scale === defaults.guidance_scale) asked.guidance_scale = null;  // text and picture may differ
  await ask("POST", "/api/textures", JSON.stringify(asked));
  previews = 0;
  setBusy(true);
  if (innerWidth <= 760) $("stage").scrollIntoView();  // below the form there
  watch();
}

// What is edited, and where.

function showEdit() {
  const region = $("region").value;
  $("strength-row").hidden = region === "new";
  $("strength").value = region === "whole" ? 0.6 : 1;
  showStrength();
  $("paint").hidden = $("brush").hidden = region !== "painted";
  setBrush();
}

const showStrength = () => { $("strength-value").textContent = `${Math.round(100 * $("strength").value)} %`; };
const brushing = () => document.querySelector("input[name=brushing]:checked").value;

function setBrush() {
  if (!viewer) return;
  viewer.brush = $("brush").hidden || brushing() === "turn" ? null : (x, y) => {
    const onGrid = (share) => Math.round(share * MASK_SIDE / 2);
    const texels = viewer.texelsAt(x, y, Number($("brush-size").value));
    const apart = new Map(texels.map((texel) => [MASK_SIDE * onGrid(texel[0]) + onGrid(texel[1]), texel]));
    stamp(apart.values(), 2.5);
  };
  viewer.paintOver($("brush").hidden ? new ImageData(1, 1) : $("paint"));
  $("body").classList.toggle("painting", Boolean(viewer.brush));
  showHint();
}

// Paints or erases discs of so many of the mask's pixels around texels [u, v].
function stamp(texels, radius) {
  const pen = $("paint").getContext("2d");
  pen.globalCompositeOperation = brushing() === "erase" ? "destination-out" : "source-over";
  pen.fillStyle = pen.createPattern(stripes, "repeat");
  pen.beginPath();
  for (const [u, v] of texels) {
    pen.moveTo(MASK_SIDE * u + radius, MASK_SIDE * v);
    pen.arc(MASK_SIDE * u, MASK_SIDE * v, radius, 0, 2 * Math.PI);
  }
  pen.fill("nonzero");
  viewer.paintOver($("paint"));
}

const stripes = element("canvas", { width: 16, height: 16 });
for (let row = 0; row < 16; row++)
  for (let column = 0; column < 16; column++) {
    const pen = stripes.getContext("2d");
    pen.fillStyle = (row + column) % 16 < 8 ? "#0a6657" : "#fff";
    pen.fillRect(column, row, 1, 1);
  }

function paintedMask() {
  const mask = element("canvas", { width: MASK_SIDE, height: MASK_SIDE }), pen = mask.getContext("2d");
  pen.drawImage($("paint"), 0, 0);
  pen.globalCompositeOperation = "source-in";
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, MASK_SIDE, MASK_SIDE);
  return new Promise((resolve) => mask.toBlob(resolve));
}

function listenToPaint() {
  const canvas = $("paint"), cursor = [0.5, 0.25];
  const reach = () => Number($("brush-size").value) * MASK_SIDE / canvas.clientWidth;
  let last = null;
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };
  const strokeTo = (point) => {  // discs close enough to be a line
    const from = last || point, gap = Math.hypot(point[0] - from[0], point[1] - from[1]) * MASK_SIDE;
    const count = Math.max(1, Math.ceil(4 * gap / reach()));
    stamp(Array.from({ length: count + 1 }, (_, step) =>
      [0, 1].map((axis) => from[axis] + (point[axis] - from[axis]) * step / count)), reach());
    last = point;
  };
  canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); last = null; strokeTo(at(event)); });
  canvas.addEventListener("pointermove", (event) => { if (last) strokeTo(at(event)); });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { last = null; });
  const keys = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const showCursor = () => {
    $("cursor").style.left = `${100 * cursor[0]}%`;
    $("cursor").style.top = `${100 * cursor[1]}%`;
    $("cursor").style.width = $("cursor").style.height = `${200 * reach() / MASK_SIDE}%`;
  };
  canvas.addEventListener("focus", showCursor);
  canvas.addEventListener("keydown", (event) => {
    const by = keys[event.key];
    if (!by && event.key !== " ") return;
    event.preventDefault();
    if (by) by.forEach((step, axis) => { cursor[axis] = Math.max(0, Math.min(1, cursor[axis] + 0.03 * step)); });
    else stamp([cursor], reach());
    showCursor();
  });
}

function setBusy(isBusy) {
  busy = isBusy;
  $("make").disabled = isBusy;
  $("cancel").hidden = $("progress").hidden = !isBusy;
  $("making").classList.toggle("busy", isBusy);
  $("cancel").disabled = false;
}

const watch = guarded(async () => {
  const state = await askJson("GET", "/api/state"), { task } = state;
  const news = state.results.filter((id) => !results.includes(id));
  results = state.results;
  if (news.length) {
    showGallery();
    await show(news[0]);
  }
  if (!task) return;
  if (task.previews > previews && task.state === "running" && !news.length) {
    previews = task.previews;
    const preview = await createImageBitmap(await (await ask("GET", "/api/preview")).blob());
    viewer?.wear(preview);
    showHint(`Preview after step ${task.step}`);
  }
  const isOver = !["waiting", "running"].includes(task.state);
  $("progress").value = task.step / task.steps;
  $("status").textContent = isOver ? { done: "Done.", cancelled: "Cancelled.", failed: "" }[task.state]
    : task.cancelled ? "Cancelling …"
    : task.state === "waiting" && task.ahead ? `Waiting: ${task.ahead} before you`
    : `Step ${task.step} of ${task.steps}`;
  if (isOver) {
    setBusy(false);
    if (worn) viewer?.wear(worn);
    showHint();
    if (task.state === "failed") throw new Error(task.message);
  } else {
    setBusy(true);
    $("cancel").disabled = task.cancelled;
    setTimeout(watch, 300);
  }
});

// Results.

const fileAddress = (id, format, save) => {
  const query = new URLSearchParams(TURNING.includes(format) ? { pose: $("pose").value } : {});
  if (save) query.set("save", "1");
  return `/api/results/${id}/${format}?${query}`;
};

const nameOf = (id) => `Texture ${results.indexOf(id) + 1}`;
const describe = async (id) => descriptions[id] ||= await askJson("GET", `/api/results/${id}/json`);
const titleOf = (told) => told.uploaded || told.prompt || "from a picture";

// What is told of a texture: name → value; empty values are left out.
function toldOf(told) {
  if (told.uploaded) return { Uploaded: told.uploaded };
  const values = {
    Prompt: told.prompt, Pictures: told.images.length, "Own pixels": told.fits.length ? "kept" : null,
    "Of the picture": told.prompt && told.images.length && told.img_weight !== null ? `${Math.round(100 * told.img_weight)} %` : null,
    "Made anew": !told.init_texture ? null : !told.mask ? "all of it"
      : defaults.regions.includes(told.mask) ? told.mask : "what was painted",
    "How much": told.init_texture ? `${Math.round(100 * told.strength)} %` : null, Seed: String(told.seed),
    Guidance: told.guidance_scale, Steps: told.num_inference_steps, Sampler: told.sampler, "Away from": told.negative_prompt,
  };
  return Object.fromEntries(Object.entries(values).filter(([, value]) => value));
}

function showGallery() {
  $("gallery-box").hidden = !results.length;
  $("gallery").replaceChildren(...results.map((id) => {
    const button = element("button", { type: "button" }, element("img", { src: `/api/results/${id}/png`, alt: "" }));
    button.setAttribute("aria-label", nameOf(id));
    button.setAttribute("aria-pressed", id === shown);
    button.onclick = guarded(() => show(id));
    const caption = element("p", {}), beside = element("button", { type: "button", className: "quiet", textContent: "Beside" });
    describe(id).then((told) => {
      const { Prompt, Uploaded, Seed, Steps, "Made anew": anew } = toldOf(told);
      const settings = [anew && `anew: ${anew}`, Seed && `seed ${Seed}`, Steps && `${Steps} steps`].filter(Boolean);
      caption.replaceChildren(element("b", { textContent: Uploaded || Prompt || "from a picture" }), settings.join(", "));
    }).catch(() => {});
    beside.setAttribute("aria-label", `Show ${nameOf(id)} beside`);
    beside.setAttribute("aria-pressed", id === compared);
    beside.disabled = id === shown;
    beside.onclick = guarded(() => compare(id === compared ? null : id));
    return element("li", {}, button, caption, beside);
  }).reverse());
}

async function show(id) {
  shown = id;
  if (compared === id) compared = null;
  showGallery();
  $("details").hidden = false;
  $("texture").src = `/api/results/${id}/png`;
  for (const each of $("region").options) each.disabled = false;
  await describe(id);
  if (shown !== id) return;
  showDownloads();
  await Promise.all([showSettings(), showBody()]);
}

async function compare(id) {
  compared = id;
  showGallery();
  await Promise.all([showSettings(), showOther()]);
}

async function showSettings() {
  const ids = [shown, compared].filter(Boolean), described = await Promise.all(ids.map(describe));
  if (ids[0] !== shown) return;
  $("texture").alt = `The UV texture: ${titleOf(described[0])}`;
  const told = described.map(toldOf), names = [...new Set(told.flatMap(Object.keys))];
  const rows = names.map((name) => {
    const values = told.map((each) => String(each[name] ?? "–"));
    const row = element("tr", { className: new Set(values).size > 1 ? "differs" : "" },
      element("th", { scope: "row", textContent: name }), ...values.map((textContent) => element("td", { textContent })));
    return row;
  });
  if (ids.length > 1) {
    const heads = ids.map((id) => element("th", { scope: "col", textContent: nameOf(id) }));
    rows.unshift(element("tr", {}, element("td"), ...heads));
  }
  $("settings").replaceChildren(...rows);
}

function showDownloads() {
  const formats = Object.entries(DOWNLOADS).filter(([format]) => format !== "json" || !descriptions[shown]?.uploaded);
  $("downloads").replaceChildren(...formats.map(([format, name]) =>
    element("a", { className: "button", href: fileAddress(shown, format, true), textContent: name, download: "" })));
}

async function loadGlb(address) {
  const glb = readGlb(await (await ask("GET", address)).arrayBuffer());
  return [glb, await createImageBitmap(glb.picture, { colorSpaceConversion: "none", premultiplyAlpha: "none" })];
}

async function showBody() {
  const id = shown, pose = $("pose").value;
  const blank = `/api/body?${new URLSearchParams({ pose })}`;
  const [glb, picture] = await loadGlb(id ? fileAddress(id, "glb") : blank);
  if (shown !== id || $("pose").value !== pose) return;  // another was chosen meanwhile
  [mesh, worn] = [glb, picture];
  viewer ||= new BodyViewer($("body"));
  viewer.show(mesh, worn);
  if (id) $("body").dataset.shows = `${id} ${pose}`;
  setBrush();
  showOutlines();
  await showOther();
}

// The compared texture's body, beside the shown one's.
async function showOther() {
  const id = compared, pose = $("pose").value;
  $("other-box").hidden = $("other-sheet").hidden = !id;
  if (viewer) viewer.follower = id ? otherViewer : null;
  showHint();
  if (!id) return;
  $("other-texture").src = `/api/results/${id}/png`;
  $("other-name").textContent = nameOf(id);
  const [glb, picture] = await loadGlb(fileAddress(id, "glb"));
  if (compared !== id || $("pose").value !== pose) return;
  otherViewer ||= new BodyViewer($("other-body"));
  otherViewer.show(glb, picture);
  otherViewer.standAs(viewer);
  [viewer.follower, otherViewer.follower] = [otherViewer, viewer];
  $("other-body").dataset.shows = `${id} ${pose}`;
}

function showHint(preview) {
  $("hint").textContent = preview || (!shown ? "Describe a person: this body will wear it"
    : viewer?.brush ? "Paint on the body, or on its texture" : compared ? nameOf(shown)
    : "Drag to turn, scroll or pinch to come nearer");
}

function showOutlines() {
  const canvas = $("outlines");
  canvas.hidden = !$("show-outlines").checked || !mesh;
  if (canvas.hidden) return;
  canvas.width = canvas.height = 1024;
  const pen = canvas.getContext("2d");
  pen.beginPath();
  for (const [from, to] of islandEdges(mesh.faces)) {
    pen.moveTo(1024 * mesh.uvs[2 * from], 1024 * mesh.uvs[2 * from + 1]);
    pen.lineTo(1024 * mesh.uvs[2 * to], 1024 * mesh.uvs[2 * to + 1]);
  }
  for (const [width, colour] of [[5, "#fff"], [2, "#0a6657"]]) {
    pen.lineWidth = width;
    pen.strokeStyle = colour;
    pen.stroke();
  }
}

async function start() {
  defaults = await askJson("GET", "/api/defaults");
  $("sampling").hidden = Boolean(defaults.fast);  // its adapter was made for its own way of sampling
  $("guidance").value = defaults.guidance_scale;
  $("steps").value = defaults.steps;
  $("negative").value = defaults.negative_prompt;
  $("with-pictures").hidden = !defaults.takes_pictures;
  $("number").append(...Array.from({ length: defaults.most_textures }, (_, index) => option(index + 1, index + 1)));
  $("pose").append(...defaults.poses.map((pose) => option(pose, pose)));
  $("sampler").append(...defaults.samplers.map((name) => option(name, name)));
  $("sampler").value = defaults.sampler;
  if (defaults.finds_bodies) $("own").append(option("auto", "kept, the body is looked for"));
  const edits = [["whole", "all of the shown one"], ["painted", "where I paint on it"], ...defaults.regions.map((name) => [name, `its ${name}`])];
  $("region").append(...edits.map(([value, text]) => Object.assign(option(value, text), { disabled: true })));
  $("examples").append(...EXAMPLES.map((text) => element("button", {
    type: "button", textContent: text, onclick: () => { $("prompt").value = text; showWeight(); },
  })));
  $("order").addEventListener("submit", (event) => { event.preventDefault(); if (!busy) guarded(order)(); });
  $("cancel").onclick = guarded(async () => { $("cancel").disabled = true; await ask("POST", "/api/cancel", ""); });
  $("pictures").onchange = guarded(async () => {
    const files = [...$("pictures").files];
    $("pictures").value = "";
    await addPictures(files);
  });
  $("prompt").oninput = $("weight").oninput = showWeight;
  $("prompt").onkeydown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("order").requestSubmit();
  };
  $("own").onchange = showUploads;
  $("own-texture").onchange = guarded(async () => {
    const [file] = $("own-texture").files;
    $("own-texture").value = "";
    await addTexture(file);
  });
  $("region").onchange = showEdit;
  $("strength").oninput = showStrength;
  for (const each of document.querySelectorAll("input[name=brushing]")) each.onchange = setBrush;
  $("unpaint").onclick = () => {
    $("paint").getContext("2d").clearRect(0, 0, MASK_SIDE, MASK_SIDE);
    viewer.paintOver($("paint"));
  };
  listenToPaint();
  $("view-picture").hidden = !defaults.takes_pictures;
  $("view-picture").onclick = guarded(async () => {
    const picture = await new Promise((resolve) => $("body").toBlob(resolve));
    await addPictures([new File([picture], `${nameOf(shown)}.png`)]);
  });
  $("pose").onchange = guarded(async () => { showDownloads(); await showBody(); });
  $("show-outlines").onchange = showOutlines;
  const pictureFiles = (transfer) => [...transfer.files].filter((file) => file.type.startsWith("image/"));
  document.addEventListener("dragover", (event) => { event.preventDefault(); $("order").classList.add("dropping"); });
  document.addEventListener("dragleave", () => $("order").classList.remove("dropping"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    $("order").classList.remove("dropping");
    if (defaults.takes_pictures) guarded(addPictures)(pictureFiles(event.dataTransfer));
  });
  document.addEventListener("paste", (event) => {
    const files = pictureFiles(event.clipboardData);
    if (files.length && defaults.takes_pictures) guarded(addPictures)(files);
  });
  await watch();
  if (!results.length) await showBody();  // bare
}

guarded(start)();
