// The page: asks the studio for textures and shows them. Asks nobody else for anything.
import { BodyViewer, islandEdges, readGlb } from "/viewer.js";

const $ = (id) => document.getElementById(id);
const EXAMPLES = ["a woman in a yellow dress", "a man in a red hoodie and blue jeans", "an old man in a grey suit"];
const DOWNLOADS = { png: "PNG", glb: "GLB", obj: "OBJ", usdz: "USDZ", gif: "GIF", json: "Settings" };
const TURNING = ["glb", "obj", "usdz", "gif"];  // that show the body in a pose
let defaults, viewer, uploads = [], results = [], shown = null, mesh = null, busy = false;

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
    const { id } = await askJson("POST", "/api/pictures", file);
    uploads.push({ id, name: file.name || "pasted picture", address: URL.createObjectURL(file) });
    showUploads();
  }
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
    return element("li", {}, element("img", { src: upload.address, alt: upload.name }), remove);
  }));
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
    throw new Error(`${field.labels[0].textContent}: give a number from ${field.min} to ${field.max}`);
  return Number(field.value);
}

async function order() {
  if ($("order").seeding.value === "random") $("seed").value = Math.floor(Math.random() * 2 ** 32);
  const region = $("region").value, isBoth = !$("weight-row").hidden;
  const asked = {
    prompt: $("prompt").value, negative_prompt: $("negative").value, pictures: uploads.map((upload) => upload.id),
    img_weight: isBoth ? Number($("weight").value) : null, guidance_scale: numberIn("guidance"),
    seed: numberIn("seed"), steps: numberIn("steps"), number: Number($("number").value),
    edited: region === "new" ? null : shown, region: ["new", "whole"].includes(region) ? null : region,
  };
  if (asked.guidance_scale === defaults.guidance_scale) asked.guidance_scale = null;  // text and picture may differ
  await ask("POST", "/api/textures", JSON.stringify(asked));
  setBusy(true);
  watch();
}

function setBusy(isBusy) {
  busy = isBusy;
  $("make").disabled = isBusy;
  $("cancel").hidden = $("running").hidden = !isBusy;
  $("cancel").disabled = false;
}

const watch = guarded(async () => {
  const state = await askJson("GET", "/api/state"), { task } = state;
  const news = state.results.filter((id) => !results.includes(id));
  results = state.results;
  if (news.length) {
    showGallery();
    await show(news[0]);
    if (busy && innerWidth <= 760) $("stage").scrollIntoView();  // below the form there
  }
  if (!task) return;
  const isOver = !["waiting", "running"].includes(task.state);
  $("progress").value = task.step / task.steps;
  $("status").textContent = isOver ? { done: "Done.", cancelled: "Cancelled.", failed: "" }[task.state]
    : task.cancelled ? "Cancelling …"
    : task.state === "waiting" && task.ahead ? `Waiting: ${task.ahead} before you`
    : `Step ${task.step} of ${task.steps}`;
  if (isOver) {
    setBusy(false);
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

function showGallery() {
  $("gallery-box").hidden = !results.length;
  $("gallery").replaceChildren(...results.map((id, index) => {
    const button = element("button", { type: "button" }, element("img", { src: `/api/results/${id}/png`, alt: "" }));
    button.setAttribute("aria-label", `Texture ${index + 1}`);
    button.setAttribute("aria-pressed", id === shown);
    button.onclick = guarded(() => show(id));
    return element("li", {}, button);
  }).reverse());
}

async function show(id) {
  shown = id;
  showGallery();
  $("details").hidden = false;
  $("texture").src = `/api/results/${id}/png`;
  for (const each of $("region").options) each.disabled = false;
  showDownloads();
  const settings = await askJson("GET", `/api/results/${id}/json`);
  if (shown !== id) return;
  $("texture").alt = `The UV texture: ${settings.prompt || "from a picture"}`;
  const told = {
    Prompt: settings.prompt, Pictures: settings.images.length || null,
    "Of the picture": settings.prompt && settings.images.length ? settings.img_weight : null,
    "Made anew": settings.init_texture ? settings.mask || "all of it" : null, Seed: settings.seed,
    Guidance: settings.guidance_scale, Steps: settings.num_inference_steps, Sampler: settings.sampler,
    "Away from": settings.negative_prompt,
  };
  $("settings").replaceChildren(...Object.entries(told).filter(([, value]) => value !== null && value !== "")
    .flatMap(([name, value]) => [element("dt", { textContent: name }), element("dd", { textContent: value })]));
  await showBody();
}

function showDownloads() {
  $("downloads").replaceChildren(...Object.entries(DOWNLOADS).map(([format, name]) =>
    element("a", { className: "button", href: fileAddress(shown, format, true), textContent: name, download: "" })));
}

async function showBody() {
  const id = shown, pose = $("pose").value;
  const glb = readGlb(await (await ask("GET", fileAddress(id, "glb"))).arrayBuffer());
  const picture = await createImageBitmap(glb.picture, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  if (shown !== id || $("pose").value !== pose) return;  // another was chosen meanwhile
  mesh = glb;
  viewer ||= new BodyViewer($("body"));
  viewer.show(mesh, picture);
  $("empty").hidden = true;
  $("hint").hidden = false;
  $("body").dataset.shows = `${id} ${pose}`;
  showOutlines();
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
  $("guidance").value = defaults.guidance_scale;
  $("steps").value = defaults.steps;
  $("negative").value = defaults.negative_prompt;
  $("with-pictures").hidden = !defaults.takes_pictures;
  $("number").append(...Array.from({ length: defaults.most_textures }, (_, index) => option(index + 1, index + 1)));
  $("pose").append(...defaults.poses.map((pose) => option(pose, pose)));
  const edits = [["whole", "the shown one, all of it"], ...defaults.regions.map((name) => [name, `the shown one's ${name}`])];
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
}

guarded(start)();
