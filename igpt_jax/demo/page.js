"use strict";
// The page: shows what is hidden, sends the image, paints rows as they arrive. serve.py documents the
// lines of the response.

const at = (id) => document.getElementById(id);
const GREY = [200, 200, 200];
const SAVED_SIDE = 256; // smallest side of a downloaded image

let about = null; // response of GET /models
let chosen = null; // the file
let square = null; // its centre, as far as the browser can show it
let stopper = null; // AbortController of the current request

function tell(message) {
  at("error").textContent = message;
  at("error").hidden = !message;
  if (message) at("error").scrollIntoView({ behavior: "smooth", block: "nearest" });
}

// --- what is given ---------------------------------------------------------------------------------

function side() {
  return about.models[at("model").selectedIndex].resolution;
}

function showSettings() {
  const rows = side();
  at("hidden").max = rows - 1;
  const hidden = Number(at("hidden").value);
  at("hidden-shown").value = `${hidden} of ${rows} rows`;
  at("n-shown").value = at("n").value;
  at("temperature-shown").value = Number(at("temperature").value).toFixed(1);
  const preview = at("preview");
  preview.setAttribute("aria-valuemin", "1");
  preview.setAttribute("aria-valuemax", String(rows - 1));
  preview.setAttribute("aria-valuenow", String(hidden));
  paintPreview(hidden / rows);
}

function paintPreview(share) {
  const canvas = at("preview"), pen = canvas.getContext("2d"), { width, height } = canvas;
  pen.fillStyle = "#888";
  pen.fillRect(0, 0, width, height);
  if (square) pen.drawImage(square, 0, 0, width, height);
  const top = height * (1 - share);
  pen.fillStyle = "rgba(40, 40, 40, 0.72)";
  pen.fillRect(0, top, width, height - top);
  pen.fillStyle = "#fff";
  pen.fillRect(0, top - 2, width, 4);
  pen.beginPath();
  pen.arc(width / 2, top, 18, 0, 7);
  pen.fill();
  pen.fillStyle = "#333";
  for (const way of [-1, 1]) {
    pen.beginPath();
    pen.moveTo(width / 2 - 7, top + 4 * way);
    pen.lineTo(width / 2 + 7, top + 4 * way);
    pen.lineTo(width / 2, top + 13 * way);
    pen.fill();
  }
}

function setHidden(rows) {
  at("hidden").value = Math.min(Math.max(rows, 1), side() - 1);
  showSettings();
}

function dragTo(event) {
  const box = at("preview").getBoundingClientRect();
  setHidden(Math.round((1 - (event.clientY - box.top) / box.height) * side()));
}

async function choose(file) {
  if (!file) return;
  tell("");
  chosen = null;
  square = null;
  if (file.size > about.upload_bytes) {
    const megabytes = (bytes) => (bytes / 2 ** 20).toPrecision(3);
    tell(`${file.name} is too large: ${megabytes(file.size)} MB; at most ${megabytes(about.upload_bytes)} MB can be sent.`);
  } else {
    try {
      const bitmap = await createImageBitmap(file);
      const length = Math.min(bitmap.width, bitmap.height);
      square = document.createElement("canvas");
      square.width = square.height = 512;
      const pen = square.getContext("2d");
      pen.fillStyle = "#fff"; // what is transparent is white for the model, too
      pen.fillRect(0, 0, 512, 512);
      pen.drawImage(
        bitmap, (bitmap.width - length) / 2, (bitmap.height - length) / 2, length, length, 0, 0, 512, 512);
      bitmap.close();
    } catch {
      tell(`The browser can't show ${file.name}. It can be sent all the same: the model's side may know its format.`);
    }
    chosen = file;
  }
  at("invite").hidden = chosen !== null;
  at("preview").hidden = chosen === null;
  at("drop").classList.toggle("full", chosen !== null);
  at("complete").disabled = chosen === null || stopper !== null;
  showSettings();
}

// --- what comes back -------------------------------------------------------------------------------

function pixelsOf(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

function paint(canvas, pixels, first) {
  const pen = canvas.getContext("2d");
  const rows = pixels.length / 3 / canvas.width;
  const image = pen.createImageData(canvas.width, rows);
  for (let i = 0; i < pixels.length / 3; i++) {
    image.data.set(pixels.subarray(3 * i, 3 * i + 3), 4 * i);
    image.data[4 * i + 3] = 255;
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

function save(sheet, name) {
  sheet.toBlob((blob) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });
}

function addFigure(resolution, caption, name) {
  const figure = document.createElement("figure");
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = resolution;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", caption);
  const text = document.createElement("figcaption");
  const label = document.createElement("span");
  label.textContent = caption;
  const link = document.createElement("a");
  link.href = "#";
  link.textContent = "save";
  link.setAttribute("aria-label", `save ${caption}`);
  link.addEventListener("click", (event) => {
    event.preventDefault();
    save(enlarged([canvas], 1), name);
  });
  text.append(label, link);
  figure.append(canvas, text);
  at("results").append(figure);
  return { canvas, label };
}

function receiver(n) {
  let samples = [], resolution = 0, given = 0;
  return {
    waiting: ({ ahead }) => (at("status").textContent = `In line: ${ahead} before you.`),
    preparing: () => (at("status").textContent = "Preparing the model for this shape; the first time takes a while."),
    given(event) {
      ({ resolution, rows_given: given } = event);
      at("results").replaceChildren();
      const original = pixelsOf(event.picture);
      const shown = original.slice();
      for (let i = given * resolution * 3; i < shown.length; i++) shown[i] = GREY[i % 3];
      samples = Array.from({ length: n }, (_, i) => addFigure(resolution, `sample ${i + 1}`, `completion-${i + 1}.png`));
      for (const { canvas } of samples) paint(canvas, shown, 0);
      paint(addFigure(resolution, "original", "original.png").canvas, original, 0);
    },
    rows(event) {
      const pixels = pixelsOf(event.pixels), length = pixels.length / n;
      samples.forEach(({ canvas }, i) => paint(canvas, pixels.subarray(i * length, (i + 1) * length), event.first));
      const done = event.first + length / 3 / resolution;
      at("progress").value = (done - given) / (resolution - given);
      at("status").textContent = `Row ${done} of ${resolution}.`;
    },
    done(event) {
      samples.forEach(({ label }, i) => (label.textContent = `${event.nats_per_token[i].toFixed(2)} nats/pixel`));
      at("status").textContent = "Done. Fewer nats per pixel: likelier, as the model sees it.";
      at("download").hidden = false;
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

async function complete() {
  const n = Number(at("n").value), rows = side();
  const query = new URLSearchParams({
    model: at("model").selectedIndex,
    keep: (rows - Number(at("hidden").value)) / rows,
    n,
    temperature: at("temperature").value,
    seed: Math.floor(Math.random() * 2 ** 31),
  });
  tell("");
  stopper = new AbortController();
  at("complete").disabled = true;
  at("stop").hidden = false;
  at("download").hidden = true;
  at("progress").hidden = false;
  at("progress").value = 0;
  at("status").textContent = "Sending the image.";
  if (innerWidth < 768) at("made").scrollIntoView({ behavior: "smooth" });
  let last = "";
  try {
    const response = await fetch(`/complete?${query}`, { method: "POST", body: chosen, signal: stopper.signal });
    if (!response.ok) {
      const answer = await response.json().catch(() => ({ message: `The server answered ${response.status}.` }));
      throw new Error(answer.message);
    }
    const receive = receiver(n);
    for await (const event of linesOf(response)) {
      last = event.event;
      receive[last](event);
    }
    if (last !== "done") throw new Error("The connection ended before the image was complete.");
  } catch (error) {
    const stopped = error.name === "AbortError";
    at("status").textContent = stopped ? "Stopped." : "Not completed.";
    if (!stopped) tell(error instanceof TypeError ? "The server can't be reached, or refused the file." : error.message);
  } finally {
    stopper = null;
    at("complete").disabled = chosen === null;
    at("stop").hidden = true;
    at("progress").hidden = true;
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
  for (const id of ["hidden", "n", "temperature"]) at(id).addEventListener("input", showSettings);
  at("model").addEventListener("change", () => {
    const share = Number(at("hidden").value) / (Number(at("hidden").max) + 1);
    at("hidden").max = side() - 1;
    setHidden(Math.round(share * side()));
  });
  const preview = at("preview");
  preview.addEventListener("pointerdown", (event) => {
    preview.setPointerCapture(event.pointerId);
    dragTo(event);
  });
  preview.addEventListener("pointermove", (event) => preview.hasPointerCapture(event.pointerId) && dragTo(event));
  preview.addEventListener("keydown", (event) => {
    const way = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (!way) return;
    event.preventDefault();
    setHidden(Number(at("hidden").value) + way);
  });
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
  at("stop").addEventListener("click", () => stopper?.abort());
  at("download").addEventListener("click", () => {
    const canvases = [...document.querySelectorAll("#results canvas")];
    save(enlarged(canvases, Math.ceil(Math.sqrt(canvases.length))), "completions.png");
  });
}

async function begin() {
  try {
    about = await (await fetch("/models")).json();
  } catch {
    tell("The server can't be reached; load the page again once it runs.");
    return;
  }
  for (const model of about.models) {
    const size = new Intl.NumberFormat("en", { notation: "compact" }).format(model.parameters);
    at("model").add(new Option(`${model.name}: ${model.resolution}×${model.resolution}, ${size} parameters`));
  }
  at("n").max = about.samples;
  at("n").value = Math.min(4, about.samples);
  at("temperature").max = about.temperature;
  at("hidden").max = side() - 1;
  listen();
  setHidden(Math.round(side() / 2));
}

begin();
