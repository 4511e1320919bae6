"use strict";
// A picture with one row per head and one column per token, which scrolls with the text.
class Strips {
  static gutter = 92;  // pixels for the names of rows
  static numbers = 46;  // pixels for the numbers after them

  // `rows` are {layer, mixer, head, heads}; `column` is the width of a token; `select` as in TextPane.
  constructor(box, rows, column, select) {
    Object.assign(this, {box, rows, column, length: 0, selected: null});
    this.row = rows.length > 32 ? 7 : 13;
    this.canvas = document.createElement("canvas");
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", "One row per head, one column per token");
    this.spacer = document.createElement("div");
    this.spacer.append(this.canvas);
    box.append(this.spacer);
    box.addEventListener("scroll", () => this.draw());
    new ResizeObserver(() => requestAnimationFrame(() => this.draw())).observe(box);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    this.canvas.addEventListener("pointermove", event => {
      const i = Math.floor((event.offsetX - Strips.gutter + box.scrollLeft) / column);
      if (event.offsetX > Strips.gutter && i < this.length) select(i);
    });
    this.canvas.addEventListener("pointerleave", () => select(null));
  }

  // Show values in [0, 1]: value(i, row) of token i, whose characters are text(i). The selected token also has its
  // number(i, row) written beside each row.
  show({length, value, text, number}, selected, follow) {
    Object.assign(this, {length, value, text, number, selected});
    this.spacer.style.width = `${Strips.gutter + length * this.column + Strips.numbers}px`;
    const left = selected * this.column, visible = this.box.clientWidth - Strips.gutter - Strips.numbers;
    if (follow) this.box.scrollLeft = left + this.column - visible;
    else if (left < this.box.scrollLeft || left + this.column > this.box.scrollLeft + visible) {
      this.box.scrollLeft = left - visible / 2;
    }
    this.draw();
  }

  draw() {
    const width = this.box.clientWidth, top = 18;
    const right = Math.min(width - Strips.numbers, Strips.gutter + this.length * this.column);
    let y = top;
    const places = this.rows.map(({head}, i) => {
      if (head === 0 && i) y += 5;
      y += this.row;
      return y - this.row;
    });
    const height = y + 1, scale = devicePixelRatio;
    if (!width || !this.rows.length) return;
    this.canvas.width = width * scale;
    this.canvas.height = height * scale;
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    const style = getComputedStyle(this.box), pen = this.canvas.getContext("2d");
    const color = name => style.getPropertyValue(`--${name}`);
    pen.scale(scale, scale);
    pen.textBaseline = "middle";
    pen.font = `11px ${style.fontFamily}`;
    pen.fillStyle = color("muted");
    this.rows.forEach(({layer, mixer, head, heads}, i) => {
      if (head === 0) pen.fillText(`${layer + 1} ${mixer}`, 0, places[i] + this.row / 2 + 0.5, Strips.gutter - 22);
      if (this.row < 9) return;
      if (heads > 1) pen.fillText(`${head + 1}`, Strips.gutter - 16, places[i] + this.row / 2 + 0.5);
      if (this.length) pen.fillText(this.number(this.selected, i), right + 4, places[i] + this.row / 2 + 0.5);
    });
    pen.beginPath();
    pen.rect(Strips.gutter, 0, right - Strips.gutter, height);
    pen.clip();
    const first = Math.max(0, Math.floor(this.box.scrollLeft / this.column));
    const last = Math.min(this.length, Math.ceil((this.box.scrollLeft + width) / this.column));
    pen.font = "11px ui-monospace, Menlo, Consolas, monospace";
    for (let i = first; i < last; i++) {
      const x = Strips.gutter + i * this.column - this.box.scrollLeft;
      pen.fillStyle = color(i === this.selected ? "ink" : "muted");
      pen.save();
      pen.beginPath();
      pen.rect(x, 0, this.column - 1, top);
      pen.clip();
      pen.fillText(this.text(i).replace("\n", "↵"), x + 2, 8);
      pen.restore();
      places.forEach((place, row) => {
        pen.globalAlpha = 1;
        pen.fillStyle = color("panel");
        pen.fillRect(x, place, this.column - 1, this.row - 1);
        pen.globalAlpha = this.value(i, row);
        pen.fillStyle = color("line-0");
        pen.fillRect(x, place, this.column - 1, this.row - 1);
      });
      pen.globalAlpha = 1;
      if (i === this.selected) {
        pen.strokeStyle = color("ink");
        pen.strokeRect(x - 0.5, top - 1.5, this.column, height - top + 1.5);
      }
    }
  }
}
