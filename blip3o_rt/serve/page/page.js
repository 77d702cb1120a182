// The page: draws and edits through the API, shows what comes, and remembers it.
import { readEvents, requestBody, seedsOf } from "/page/api.js";
import { History } from "/page/history.js";

const element = (id) => document.getElementById(id);
const FIELDS = ["prompt", "n", "seed", "steps", "guidance", "temperature", "top_k", "top_p"];
const USUAL = Object.fromEntries(FIELDS.map((name) => [name, element(name).value]));
const history = new History(element("history-section"), element("history"));

let reference = null; // {blob, name, of}: the image to edit; `of` is how it was drawn, null for a file
let running = null; // the AbortController of the request

// What the form says

function parameters() {
  const found = {};
  for (const name of FIELDS) {
    const value = element(name).value.trim();
    if (value !== "" && (name === "prompt" || value !== USUAL[name])) found[name] = value;
  }
  if (reference?.of) found.of = reference.of;
  return found;
}

function fill(found) {
  for (const name of FIELDS) element(name).value = found[name] ?? USUAL[name];
}

function linkOf(found) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(found)) query.set(name, name === "of" ? JSON.stringify(value) : value);
  return `${location.origin}/#${query}`;
}

function fromLink(hash) {
  const found = {};
  for (const [name, value] of new URLSearchParams(hash)) {
    if (FIELDS.includes(name)) found[name] = value;
    if (name === "of") found.of = JSON.parse(value);
  }
  return found;
}

// Errors, where they belong

function clearErrors() {
  for (const place of document.querySelectorAll(".error")) place.textContent = "";
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}

function showError(error) {
  const name = error.code === "invalid_api_key" ? "key" : (error.param ?? "").replace(/\[.*/, "");
  const field = element(name === "image" ? "file" : name);
  const place = element(`${name}-error`) ?? element("form-error");
  place.textContent = sentence(error.message);
  if (place.id === "form-error") return;
  if (element("more").contains(place)) element("more").open = true;
  field?.setAttribute("aria-invalid", "true");
  field?.focus();
  say(place.textContent);
}

function sentence(text) {
  return text ? text[0].toUpperCase() + text.slice(1) + (text.endsWith(".") ? "" : ".") : "";
}

function say(text) {
  element("status").textContent = text;
}

// Drawing

async function request(found, image, handlers, signal) {
  const headers = {};
  if (element("key").value) headers.Authorization = `Bearer ${element("key").value}`;
  const body = requestBody(found, image);
  if (!(body instanceof FormData)) headers["Content-Type"] = "application/json";
  const path = image ? "/v1/images/edits" : "/v1/images/generations";
  const response = await fetch(path, { method: "POST", headers, body, signal });
  if (!response.ok) {
    const answer = await response.json().catch(() => null);
    throw answer?.error ?? { message: `the server answered with status ${response.status}` };
  }
  await readEvents(response, handlers);
}

async function draw() {
  if (running) return;
  clearErrors();
  const found = parameters();
  if (!found.prompt) return showError({ message: "say in words what to draw or change", param: "prompt" });
  const controller = (running = new AbortController());
  const count = Number(found.n ?? 1);
  const cards = [];
  cards.before = element("grid").firstChild; // the newest request stands first, its images in order
  const image = reference;
  const done = {};
  busy(true);
  try {
    await request(found, image, {
      queued: (event) => stage(event.position ? `Waiting, images in front: ${event.position}` : "Waiting", null),
      progress: (event) => {
        done[event.index] = event.stage === "tokens" ? 0.4 * (event.done / event.total) : 0.4 + 0.6 * (event.done / event.total);
        const all = Object.values(done).reduce((sum, part) => sum + part, 0) / count;
        stage(event.stage === "tokens" ? "Planning" : "Drawing", all);
      },
      partial_image: (event) => {
        card(cards, event, found).show(event, true);
        say(`Preview ${event.partial_image_index + 1} of image ${event.index + 1}`);
      },
      completed: (event) => {
        const seed = seedsOf(found, event);
        const drawn = { ...found, seed };
        delete drawn.n;
        card(cards, event, found).show(event, false, drawn, image !== null && !image.of);
        say(`Image ${event.index + 1} of ${count} is done`);
      },
      error: (event) => { throw event.error; },
    }, controller.signal);
    say(count === 1 ? "The image is done" : `${count} images are done`);
  } catch (error) {
    for (const unfinished of cards.filter((entry) => entry && !entry.done)) unfinished.remove();
    if (controller.signal.aborted) say("Cancelled");
    else showError(error.message ? error : { message: String(error) });
    if (!controller.signal.aborted && error instanceof TypeError) element("form-error").textContent = "The server cannot be reached.";
  } finally {
    running = null;
    busy(false);
  }
}

function busy(now) {
  element("draw").disabled = now;
  element("cancel").disabled = !now;
  element("progress").hidden = !now;
  element("results").setAttribute("aria-busy", String(now));
  stage("Waiting", null);
  if (now && document.activeElement === element("draw")) element("cancel").focus();
  else if (!now && document.activeElement === document.body) element("draw").focus();
}

function stage(text, part) {
  element("stage").textContent = text;
  if (part === null) element("bar").removeAttribute("value");
  else element("bar").value = part;
}

// Results

function card(cards, event, found) {
  return (cards[event.index] ??= new Card(found, cards.before));
}

class Card {
  constructor(found, before) {
    this.found = found;
    this.done = false;
    this.item = document.createElement("li");
    this.image = document.createElement("img");
    this.caption = paragraph("caption", found.prompt);
    this.facts = paragraph("facts", "Preview");
    this.actions = document.createElement("div");
    this.actions.className = "card-actions";
    this.item.append(this.image, this.caption, this.facts, this.actions);
    element("grid").insertBefore(this.item, before);
  }

  show(event, preview, drawn, ofFile) {
    this.image.src = `data:image/${event.output_format};base64,${event.b64_json}`;
    this.image.alt = `${preview ? "Preview" : "Image"}: ${this.found.prompt}`;
    this.image.classList.toggle("preview", preview);
    this.image.classList.toggle("small", parseInt(event.size) <= 128);
    if (preview) return;
    this.done = true;
    this.item.dataset.seed = drawn.seed;
    const seconds = Object.values(event.seconds).reduce((sum, part) => sum + part, 0);
    const others = Object.entries(drawn).filter(([name]) => !["prompt", "seed", "of"].includes(name));
    this.facts.textContent = [`seed ${drawn.seed}`, ...others.map((pair) => pair.join(" ")), event.size, `${seconds.toFixed(1)} s`].join(", ");
    this.finish(event, drawn, ofFile);
    if (!ofFile) history.add(drawn, this.image, linkOf(drawn));
  }

  finish(event, drawn, ofFile) {
    const name = `${drawn.prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 48)}-${drawn.seed}.${event.output_format}`;
    const download = document.createElement("a");
    download.href = this.image.src;
    download.download = name;
    download.textContent = "Download";
    const edit = button("Edit this", () => {
      setReference({ blob: dataBlob(this.image.src), name, of: ofFile ? null : drawn });
      element("prompt").value = "";
      element("prompt").focus();
    });
    this.actions.append(download, edit);
    if (!ofFile) {
      const link = document.createElement("a");
      link.href = linkOf(drawn);
      link.textContent = "Link";
      link.title = "Opens this page and draws the image again";
      link.className = "again";
      this.actions.append(link, button("Copy the link", async (event) => {
        await navigator.clipboard.writeText(link.href);
        event.target.textContent = "Copied";
        say("The link was copied");
      }));
    }
  }

  remove() {
    this.item.remove();
  }
}

function dataBlob(url) {
  const [head, text] = url.split(",");
  return new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], { type: head.slice(5).split(";")[0] });
}

function paragraph(kind, text) {
  const made = document.createElement("p");
  made.className = kind;
  made.textContent = text;
  return made;
}

function button(text, action) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.addEventListener("click", action);
  return made;
}

// The image to edit

function setReference(found) {
  if (element("reference-image").src) URL.revokeObjectURL(element("reference-image").src);
  reference = found;
  element("reference").hidden = found === null;
  if (found === null) {
    element("file").value = "";
    element("reference-image").removeAttribute("src");
    return;
  }
  element("reference-image").src = URL.createObjectURL(found.blob);
  element("reference-image").alt = "The image to edit";
  element("reference-name").textContent = found.name;
  say(`${found.name} is the image to edit`);
}

function takeFile(file) {
  clearErrors();
  if (!file) return;
  if (!file.type.startsWith("image/")) return showError({ message: `${file.name} is not an image`, param: "image" });
  setReference({ blob: file, name: file.name || "image", of: null });
  element("prompt").focus();
}

const drop = element("drop");
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
}
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  takeFile(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => { if (event.clipboardData.files.length) takeFile(event.clipboardData.files[0]); });
element("file").addEventListener("change", (event) => takeFile(event.target.files[0]));
element("reference-remove").addEventListener("click", () => { setReference(null); element("file").focus(); });

// Keys and links

element("form").addEventListener("submit", (event) => { event.preventDefault(); draw(); });
element("cancel").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); draw(); }
  if (event.key === "Escape") running?.abort();
});
element("history-clear").addEventListener("click", () => history.clear());
element("key").value = sessionStorage.getItem("key") ?? "";
element("key").addEventListener("change", () => { sessionStorage.setItem("key", element("key").value); greet(); });

async function open(hash) {
  if (!hash) return;
  let found;
  try {
    found = fromLink(hash);
  } catch {
    return showError({ message: "the link is damaged" });
  }
  if (!found.prompt) return;
  running?.abort();
  fill(found);
  setReference(null);
  if (found.of && !(await openReference(found.of))) return;
  await draw();
}

// The image that a link edits is drawn first, as it was.
async function openReference(of) {
  busy(true);
  try {
    let inner = null;
    if (of.of) {
      if (!(await openReference(of.of))) return false;
      inner = reference;
    }
    let made = null;
    await request(of, inner, { completed: (event) => { made = event; }, error: (event) => { throw event.error; } });
    const blob = dataBlob(`data:image/${made.output_format};base64,${made.b64_json}`);
    setReference({ blob, name: of.prompt, of });
    return true;
  } catch (error) {
    showError(error);
    return false;
  } finally {
    busy(false);
  }
}

window.addEventListener("hashchange", () => open(location.hash.slice(1)));

async function greet() {
  const headers = element("key").value ? { Authorization: `Bearer ${element("key").value}` } : {};
  const response = await fetch("/v1/models", { headers }).catch(() => null);
  if (response?.status === 401) {
    element("more").open = true;
    return;
  }
  const model = response?.ok ? (await response.json()).data[0] : null;
  element("model").textContent = model ? `${model.id}, ${model.size}, ${model.device}` : "The model is being loaded";
  element("reference-field").hidden = model !== null && !model.edits;
  if (model === null) setTimeout(greet, 2000);
}

history.show();
greet();
open(location.hash.slice(1));
