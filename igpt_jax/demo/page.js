// The page: sends the image, paints pixels as they arrive. serve.py documents the lines of the response.

import { Preview, REGIONS } from "/preview.js";

const at = (id) => document.getElementById(id);
const GREY = 200; // where nothing is drawn yet
const SAVED_SIDE = 256; // smallest side of a downloaded image
const SETTINGS = ["n", "temperature", "top_p", "top_k", "seed", "passes"];
const HOW = {
  true: "Choose an image and paint over what the model is to make up: any part of it. It draws the pixels it is surest of first.",
  false: "Choose an image and drag the line: what lies below it is hidden, and a model that draws pixel after pixel, from the top left, makes something up.",
};

let about = null; // response of GET /models
let chosen = null; // the file
let choices = 0; // made so far: only the newest counts, whichever is ready first
let looking = null; // AbortController of the request for what the model sees
let stopper = null; // AbortController of the current completion

const preview = new Preview(at("preview"), showHidden, (message) => (at("cursor").textContent = message));
const model = () => about.models[at("model").selectedIndex];

function tell(message) {
  at("error").textContent = message;
  at("error").hidden = !message;
  if (message) at("error").scrollIntoView({ behavior: "smooth", block: "nearest" });
}

async function post(path, query, signal) {
  const response = await fetch(`${path}?${new URLSearchParams(query)}`, { method: "POST", body: chosen, signal });
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({ message: `The server answered ${response.status}.` }));
  throw new Error(answer.message);
}

function inWords(error) {
  return error instanceof TypeError ? "The server can't be reached, or refused the file." : error.message;
}

// --- what is given ---------------------------------------------------------------------------------

function showSettings() {
  at("n-shown").value = at("n").value;
  at("temperature-shown").value = Number(at("temperature").value).toFixed(2);
  at("top_p-shown").value = Number(at("top_p").value) < 1 ? Number(at("top_p").value).toFixed(2) : "all colours";
  at("top_k-shown").value = Number(at("top_k").value) ? at("top_k").value : "all colours";
  at("passes-shown").value = at("passes").value;
  at("brush-shown").value = `${at("brush").value}×${at("brush").value}`;
}

function showHidden() {
  const { side, rows, count } = preview;
  at("hidden").value = rows;
  at("hidden-shown").value = `${rows} of ${side} rows`;
  at("masked-shown").value = `${count} of ${side * side}`;
  showButtons();
}

function showButtons() {
  at("complete").disabled = at("again").disabled = chosen === null || stopper !== null || !preview.count;
}

function takeModel() {
  const { resolution, any_region } = model(), share = preview.rows / preview.side;
  preview.setModel(resolution, any_region);
  at("how").textContent = HOW[any_region];
  at("hidden").max = resolution - 1;
  at("brush").max = Math.ceil(resolution / 2);
  at("brush").value = preview.brush = Math.max(1, Math.round(resolution / 8));
  at("rows").hidden = any_region;
  at("brushes").hidden = at("passes-field").hidden = !any_region;
  if (any_region) preview.hideRegion(at("region").value = REGIONS[0]);
  else preview.hideRows(Math.round((share || 0.5) * resolution));
  showSettings();
  look();
}

async function choose(coming) {
  if (!coming) return;
  const mine = ++choices, file = await coming;
  if (mine !== choices) return;
  tell("");
  chosen = null;
  preview.square = null;
  if (file.size > about.upload_bytes) {
    const megabytes = (bytes) => (bytes / 2 ** 20).toPrecision(3);
    tell(`${file.name} is too large: ${megabytes(file.size)} MB; at most ${megabytes(about.upload_bytes)} MB can be sent.`);
  } else {
    try {
      const bitmap = await createImageBitmap(file);
      if (mine !== choices) return;
      const length = Math.min(bitmap.width, bitmap.height);
      preview.square = document.createElement("canvas");
      preview.square.width = preview.square.height = 512;
      const pen = preview.square.getContext("2d");
      pen.fillStyle = "#fff"; // what is transparent is white for the model, too
      pen.fillRect(0, 0, 512, 512);
      pen.drawImage(
        bitmap, (bitmap.width - length) / 2, (bitmap.height - length) / 2, length, length, 0, 0, 512, 512);
      bitmap.close();
    } catch {
      if (mine !== choices) return;
      tell(`The browser can't show ${file.name}. It can be sent all the same: the model's side may know its format.`);
    }
    chosen = file;
  }
  at("invite").hidden = chosen !== null;
  at("preview").hidden = chosen === null;
  at("drop").classList.toggle("full", chosen !== null);
  preview.paint();
  showButtons();
  await look();
}

/** Shows the image as the model sees it: small, in the colours of its palette. */
async function look() {
  looking?.abort();
  const canvas = at("seen");
  canvas.width = canvas.height = model().resolution;
  if (chosen === null) return;
  looking = new AbortController();
  try {
    const response = await post("/look", { model: at("model").selectedIndex }, looking.signal);
    paint(canvas, pixelsOf((await response.json()).picture), 0);
    preview.square ??= canvas; // of a format that the browser can't show
    preview.paint();
  } catch (error) {
    if (error.name !== "AbortError") tell(inWords(error));
  }
}

async function example(address, name) {
  const blob = await (await fetch(address)).blob();
  return new File([blob], name, { type: blob.type });
}

function showExamples() {
  for (const { name, title } of about.examples) {
    const button = document.createElement("button"), image = document.createElement("img");
    image.src = `/examples/${name}`;
    image.alt = title;
    button.append(image);
    button.addEventListener("click", () => choose(example(image.src, name)));
    at("examples").append(button);
  }
}

// --- what comes back -------------------------------------------------------------------------------

function pixelsOf(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

/** Paints rows of pixels from row `first` on; grey where `settled` is 0. */
function paint(canvas, pixels, first, settled = null) {
  const pen = canvas.getContext("2d"), n = pixels.length / 3;
  const image = pen.createImageData(canvas.width, n / canvas.width);
  for (let i = 0; i < n; i++) {
    const colour = settled === null || settled[i] ? pixels.subarray(3 * i, 3 * i + 3) : [GREY, GREY, GREY];
    image.data.set([...colour, 255], 4 * i);
  }
  pen.putImageData(image, 0, first);
}

function enlarged(canvases, columns) {
  const scale = Math.max(1, Math.ceil(SAVED_SIDE / canvases[0].width));
  const length = canvases[0].width * scale, gap = canvases.length > 1 ? 8 : 0;
  const sheet = document.createElement("canvas");
  sheet.width = columns * (length + gap) + gap;
  sheet.height = Math.ceil(canvases.length / columns) * (length + gap) + gap;
  const pen = sheet.getContext("2d");
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, sheet.width, sheet.height);
  pen.imageSmoothingEnabled = false;
  canvases.forEach((canvas, i) => {
    const left = gap + (i % columns) * (length + gap), top = gap + Math.floor(i / columns) * (length + gap);
    pen.drawImage(canvas, left, top, length, length);
  });
  return sheet;
}

function save(canvases, name) {
  enlarged(canvases, Math.ceil(Math.sqrt(canvases.length))).toBlob((blob) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });
}

function enlarge(canvas, caption, name) {
  const large = at("large").querySelector("canvas");
  large.width = large.height = canvas.width;
  large.getContext("2d").drawImage(canvas, 0, 0);
  at("large-name").textContent = caption;
  at("large-save").onclick = () => save([large], name);
  at("large").showModal();
}

function addFigure(resolution, caption, name) {
  const figure = document.createElement("figure"), open = document.createElement("button");
  const canvas = document.createElement("canvas"), label = document.createElement("figcaption");
  canvas.width = canvas.height = resolution;
  canvas.className = "pixels";
  label.textContent = caption;
  open.setAttribute("aria-label", `enlarge ${caption}`);
  open.addEventListener("click", () => enlarge(canvas, label.textContent, name));
  open.append(canvas);
  figure.append(open, label);
  at("results").append(figure);
  return { canvas, label };
}

function receiver(n) {
  let samples = [], resolution = 0;
  return {
    waiting: ({ ahead }) => (at("status").textContent = `In line: ${ahead} before you.`),
    preparing: () => (at("status").textContent = "Reading the image."),
    given(event) {
      resolution = event.resolution;
      at("status").textContent = about.compiled < about.programs
        ? "Waiting for the model, which is being prepared." : "Drawing.";
      at("results").replaceChildren();
      const original = pixelsOf(event.picture), known = pixelsOf(event.known);
      samples = Array.from({ length: n }, (_, i) => addFigure(resolution, `sample ${i + 1}`, `completion-${i + 1}.png`));
      for (const { canvas } of samples) paint(canvas, original, 0, known);
      paint(addFigure(resolution, "original", "original.png").canvas, original, 0);
    },
    drawn({ first, pixels, settled, done, of }) {
      const length = (bytes) => bytes.length / n;
      [pixels, settled] = [pixelsOf(pixels), pixelsOf(settled)];
      const part = (bytes, i) => bytes.subarray(i * length(bytes), (i + 1) * length(bytes));
      samples.forEach(({ canvas }, i) => paint(canvas, part(pixels, i), first, part(settled, i)));
      at("progress").value = done / of;
      const until = first + length(settled) / resolution;
      at("status").textContent = model().any_region ? `Pass ${done} of ${of}.` : `Row ${until} of ${resolution}.`;
    },
    done({ nats_per_token: nats }) {
      samples.forEach(({ label }, i) => (label.textContent = `sample ${i + 1}: ${nats[i].toFixed(2)} nats/pixel`));
      at("status").textContent = "Done. Fewer nats per pixel: likelier, as the model sees it.";
      at("download").hidden = at("again").hidden = false;
    },
    error({ message }) {
      throw new Error(message);
    },
  };
}

async function* linesOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    yield* parts.map((part) => JSON.parse(part));
  }
}

/** On a phone, completions lie below the settings. */
function bringIntoView() {
  if (innerWidth < 768) at("made").scrollIntoView({ behavior: "smooth" });
}

async function complete() {
  const query = { model: at("model").selectedIndex };
  for (const name of SETTINGS) query[name] = at(name).value;
  if (model().any_region) query.hidden = preview.packed();
  else query.keep = 1 - preview.rows / preview.side;
  tell("");
  stopper = new AbortController();
  showButtons();
  at("stop").hidden = at("progress").hidden = false;
  at("download").hidden = true;
  at("progress").value = 0;
  at("status").textContent = "Sending the image.";
  bringIntoView();
  let last = "";
  try {
    const receive = receiver(Number(query.n));
    for await (const event of linesOf(await post("/complete", query, stopper.signal))) {
      last = event.event;
      receive[last](event);
      if (last === "given") bringIntoView(); // there is something to scroll to now
    }
    if (last !== "done") throw new Error("The connection ended before the image was complete.");
  } catch (error) {
    const stopped = error.name === "AbortError";
    at("status").textContent = stopped ? "Stopped." : "Not completed.";
    if (!stopped) tell(inWords(error));
  } finally {
    stopper = null;
    showButtons();
    at("stop").hidden = at("progress").hidden = true;
    if (last === "done") bringIntoView();
  }
}

// --- beginning -------------------------------------------------------------------------------------

function listen() {
  for (const id of ["file", "camera"]) {
    at(id).addEventListener("change", (event) => {
      choose(event.target.files[0]);
      event.target.value = ""; // the same file may be chosen again
    });
  }
  for (const id of [...SETTINGS, "brush"]) at(id).addEventListener("input", showSettings);
  at("hidden").addEventListener("input", () => preview.hideRows(Number(at("hidden").value)));
  at("brush").addEventListener("input", () => (preview.brush = Number(at("brush").value)));
  at("region").addEventListener("change", () => preview.hideRegion(at("region").value));
  at("model").addEventListener("change", takeModel);
  for (const kind of ["pointerdown", "keydown"]) {
    at("preview").addEventListener(kind, () => (at("region").value = REGIONS.at(-1)));
  }
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    at("drop").classList.add("over");
  });
  document.addEventListener("dragleave", () => at("drop").classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    at("drop").classList.remove("over");
    choose(event.dataTransfer.files[0]);
  });
  at("complete").addEventListener("click", complete);
  at("again").addEventListener("click", () => {
    at("seed").value = (Number(at("seed").value) + 1) % 2 ** 32;
    complete();
  });
  at("stop").addEventListener("click", () => stopper?.abort());
  at("large-close").addEventListener("click", () => at("large").close());
  at("download").addEventListener("click", () => save([...document.querySelectorAll("#results canvas")], "completions.png"));
}

/** Tells how far the server's programs are, while it compiles them; images can be chosen meanwhile. */
async function watchPreparation() {
  const nothingAsked = () => stopper === null && !at("results").hasChildNodes();
  while (about.compiled < about.programs) {
    if (nothingAsked()) {
      at("progress").hidden = false;
      at("progress").value = about.compiled / about.programs;
      at("status").textContent = `Preparing: ${about.compiled} of ${about.programs} programs are compiled. You can begin.`;
    }
    await new Promise((resume) => setTimeout(resume, 500));
    about = await (await fetch("/models")).json();
  }
  if (nothingAsked()) {
    at("progress").hidden = true;
    at("status").textContent = "Ready. Completions appear here.";
  }
}

async function begin() {
  try {
    about = await (await fetch("/models")).json();
  } catch {
    tell("The server can't be reached; load the page again once it runs.");
    return;
  }
  for (const { name, resolution, parameters, any_region } of about.models) {
    const size = new Intl.NumberFormat("en", { notation: "compact" }).format(parameters);
    at("model").add(new Option(`${name}: ${resolution}×${resolution}, ${size} parameters${any_region ? ", BERT" : ""}`));
  }
  for (const name of REGIONS) at("region").add(new Option(name));
  at("n").max = about.samples;
  at("n").value = Math.min(4, about.samples);
  at("temperature").max = about.temperature;
  listen();
  showExamples();
  takeModel();
  await watchPreparation().catch(() => {}); // a request will tell that the server has gone
}

begin();
