// The image that is given and what of it is hidden: all rows below a line, or any pixels, by a brush.

const HALVES = {
  "lower half": (row, column) => row >= 0.5,
  "upper half": (row) => row < 0.5,
  "left half": (row, column) => column < 0.5,
  "right half": (row, column) => column >= 0.5,
  "centre": (row, column) => Math.max(Math.abs(row - 0.5), Math.abs(column - 0.5)) < 0.3,
};
export const REGIONS = [...Object.keys(HALVES), "nothing", "by the brush"];

export class Preview {
  /** `changed` is called when something else is hidden, `said` with what the keyboard's brush is at. */
  constructor(canvas, changed, said) {
    Object.assign(this, { canvas, changed, said, square: null, side: 1, free: false, brush: 1, at: [0, 0] });
    this.hidden = new Uint8Array(1); // 1 where a pixel is hidden, row by row
    canvas.addEventListener("pointerdown", (event) => this.#press(event));
    canvas.addEventListener("pointermove", (event) => canvas.hasPointerCapture(event.pointerId) && this.#drag(event));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => this.paint());
    canvas.addEventListener("focus", () => this.paint());
  }

  /** Takes another model's side; the same part stays hidden. free: any pixels may be. */
  setModel(side, free) {
    const before = this.hidden, scale = this.side / side, old = this.side;
    this.hidden = Uint8Array.from({ length: side * side }, (_, i) =>
      before[Math.floor(Math.floor(i / side) * scale) * old + Math.floor((i % side) * scale)]);
    Object.assign(this, { side, free, at: [side >> 1, side >> 1] });
    const canvas = this.canvas;
    canvas.setAttribute("role", free ? "application" : "slider");
    canvas.setAttribute("aria-label", free
      ? "Brush. Arrow keys move it; the space bar hides the pixels under it, or shows them again."
      : "rows hidden");
    for (const name of ["aria-valuemin", "aria-valuemax", "aria-valuenow", "aria-orientation"]) canvas.removeAttribute(name);
    canvas.style.touchAction = free ? "none" : "pan-x";
    canvas.style.cursor = free ? "crosshair" : "ns-resize";
  }

  get rows() { // hidden ones, of a model that reads row by row
    return this.side - this.hidden.findLastIndex((value, i) => !value && i % this.side === 0) / this.side - 1;
  }

  get count() {
    return this.hidden.reduce((sum, value) => sum + value, 0);
  }

  /** Hides the lower rows. */
  hideRows(rows) {
    const given = this.side - Math.min(Math.max(rows, 1), this.side - 1);
    this.hidden = this.hidden.map((_, i) => Number(i >= given * this.side));
    this.#done();
  }

  /** Hides one of REGIONS. */
  hideRegion(name) {
    const within = HALVES[name] ?? (() => false), side = this.side;
    this.hidden = this.hidden.map((_, i) =>
      Number(within((Math.floor(i / side) + 0.5) / side, ((i % side) + 0.5) / side)));
    this.#done();
  }

  /** What is hidden as bits, in base64 that may stand in a URL. */
  packed() {
    const bytes = new Uint8Array(Math.ceil(this.hidden.length / 8));
    this.hidden.forEach((value, i) => (bytes[i >> 3] |= value << (7 - (i & 7))));
    return btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_");
  }

  paint() {
    const { canvas, side } = this, pen = canvas.getContext("2d"), size = canvas.width, cell = size / side;
    pen.fillStyle = "#888";
    pen.fillRect(0, 0, size, size);
    if (this.square) pen.drawImage(this.square, 0, 0, size, size);
    pen.fillStyle = "rgba(120, 120, 120, 0.85)"; // seen on black and on white
    this.hidden.forEach((value, i) => {
      if (value) pen.fillRect((i % side) * cell, Math.floor(i / side) * cell, cell, cell);
    });
    if (!this.free) return this.#paintHandle(pen, (side - this.rows) * cell, size);
    if (document.activeElement !== canvas) return;
    const [row, column] = this.#corner(this.at);
    for (const [colour, width] of [["#222", 8], ["#fff", 4]]) {
      pen.strokeStyle = colour;
      pen.lineWidth = width;
      pen.strokeRect(column * cell, row * cell, this.brush * cell, this.brush * cell);
    }
  }

  #paintHandle(pen, top, size) {
    pen.fillStyle = "#fff";
    pen.fillRect(0, top - 2, size, 4);
    pen.beginPath();
    pen.arc(size / 2, top, 22, 0, 7);
    pen.fill();
    pen.fillStyle = "#333";
    for (const way of [-1, 1]) {
      pen.beginPath();
      pen.moveTo(size / 2 - 9, top + 5 * way);
      pen.lineTo(size / 2 + 9, top + 5 * way);
      pen.lineTo(size / 2, top + 16 * way);
      pen.fill();
    }
  }

  #done() {
    if (!this.free) {
      const values = { "aria-valuemin": 1, "aria-valuemax": this.side - 1, "aria-valuenow": this.rows, "aria-orientation": "vertical" };
      for (const [name, value] of Object.entries(values)) this.canvas.setAttribute(name, String(value));
    }
    this.paint();
    this.changed();
  }

  #corner([row, column]) { // of the brush, whose middle is at a pixel
    const most = this.side - this.brush, half = (this.brush - 1) >> 1;
    return [row - half, column - half].map((value) => Math.min(Math.max(value, 0), most));
  }

  #brushed(at, value) {
    const [top, left] = this.#corner(at);
    for (let row = top; row < top + this.brush; row++) {
      this.hidden.fill(value, row * this.side + left, row * this.side + left + this.brush);
    }
  }

  #pixelOf(event) {
    const box = this.canvas.getBoundingClientRect();
    const place = [(event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width];
    return place.map((share) => Math.min(Math.max(Math.floor(share * this.side), 0), this.side - 1));
  }

  #press(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.at = this.#pixelOf(event);
    // A stroke that begins on a hidden pixel shows again.
    this.stroke = 1 - this.hidden[this.at[0] * this.side + this.at[1]];
    this.#drag(event);
  }

  #drag(event) {
    if (!this.free) {
      const box = this.canvas.getBoundingClientRect();
      this.hideRows(Math.round((1 - (event.clientY - box.top) / box.height) * this.side));
      return;
    }
    const [from, to] = [this.at, this.#pixelOf(event)];
    const steps = Math.max(Math.abs(to[0] - from[0]), Math.abs(to[1] - from[1]), 1);
    for (let i = 0; i <= steps; i++) { // no gaps in a fast stroke
      this.#brushed([0, 1].map((axis) => Math.round(from[axis] + ((to[axis] - from[axis]) * i) / steps)), this.stroke);
    }
    this.at = to;
    this.#done();
  }

  #key(event) {
    const way = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    const toggles = this.free && (event.key === " " || event.key === "Enter");
    if (!toggles && !(way && (this.free || way[0]))) return;
    event.preventDefault();
    if (!this.free) return this.hideRows(this.rows - way[0]);
    const hiddenAt = () => this.hidden[this.at[0] * this.side + this.at[1]];
    if (way) this.at = this.at.map((value, axis) => Math.min(Math.max(value + way[axis], 0), this.side - 1));
    else this.#brushed(this.at, 1 - hiddenAt());
    this.said(`row ${this.at[0] + 1}, column ${this.at[1] + 1}: ${hiddenAt() ? "hidden" : "shown"}`);
    this.#done();
  }
}
