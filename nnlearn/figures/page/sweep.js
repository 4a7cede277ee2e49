// Sensitivity to each hyper-parameter, parallel coordinates, and heat maps of the layers.
function scaleOf(name, from, to) {
  const values = groups.map((group) => group.config[name]).filter((value) => value !== undefined && value !== null);
  if (values.length && values.every((value) => typeof value === "number")) {
    const low = Math.min(...values), high = Math.max(...values);
    const log = low > 0 && (data.logarithmic.includes(name) || high / low > 50);
    const place = axis(low, high, from, to, log);
    return place;
  }
  const words = [...new Set(values.map(String))], place = (value) => from + ((words.indexOf(String(value)) + 0.5) / words.length) * (to - from);
  place.words = words;
  place.ticks = () => [];
  place.inverse = () => null;
  return place;
}

function scoreScale(from, to) {
  const values = runs.map((_, run) => scoreOf(run)).filter((value) => value !== null);
  if (!values.length) return null;
  const low = Math.min(...values), high = Math.max(...values), log = low > 0 && high / low > 30;
  const room = (high - low) * 0.05;
  return log ? axis(low / 1.1, high * 1.1, from, to, true) : axis(low - room, high + room, from, to, false);
}

function words(pen, place, box) {
  pen.textAlign = "center";
  pen.textBaseline = "top";
  pen.fillStyle = variable("--soft");
  for (const word of place.words || []) pen.fillText(word.slice(0, 14), place(word), box.bottom + 6);
}

function drawSensitivity(canvas, name) {
  const made = context(canvas);
  if (!made) return;
  const { pen, width, height } = made, box = { left: 58, right: width - 14, top: 14, bottom: height - 24 };
  const x = scaleOf(name, box.left + 8, box.right - 8), y = scoreScale(box.bottom, box.top);
  if (!y) return;
  frame(pen, box, x, y, "");
  words(pen, x, box);
  const best = groups[order[0]];
  groups.forEach((group, index) => {
    if (!(name in group.config)) return;
    const shown = state.shown.has(index);
    pen.fillStyle = pen.strokeStyle = shown ? colorOf(index) : variable("--line");
    pen.globalAlpha = state.active === null || state.active === index ? 0.9 : 0.35;
    pen.lineWidth = 1.5;
    for (const run of group.runs) {
      if (!(data.metric in runs[run].scores)) continue;
      const score = scoreOf(run), px = x(group.config[name]);
      if (score === null) cross(pen, px, box.top, 3.5);
      else {
        pen.beginPath();
        pen.arc(px, y(score), state.active === index ? 5 : 3.2, 0, 2 * Math.PI);
        pen.fill();
      }
    }
    pen.globalAlpha = 1;
  });
  if (best.score.mean !== null) {
    pen.strokeStyle = variable("--text");
    pen.lineWidth = 2;
    pen.beginPath();
    pen.arc(x(best.config[name]), y(best.score.mean), 8, 0, 2 * Math.PI);
    pen.stroke();
  }
}

function drawParallel(canvas) {
  const made = context(canvas);
  if (!made) return;
  const { pen, width, height } = made, box = { top: 26, bottom: height - 12 }, names = [...data.varied, data.metric];
  const gap = (width - 110) / Math.max(names.length - 1, 1), at = (index) => 45 + index * gap;
  const scales = data.varied.map((name) => scaleOf(name, box.bottom, box.top)), y = scoreScale(box.bottom, box.top);
  if (!y) return;
  scales.push(y);
  const value = (group, column) => (column < data.varied.length ? group.config[data.varied[column]] : group.score.mean);
  const draw = (index) => {
    const group = groups[index], points = [];
    for (let column = 0; column < names.length; column++) {
      const found = value(group, column);
      if (found !== null && found !== undefined) points.push([at(column), scales[column](found)]);
    }
    line(pen, points);
  };
  pen.strokeStyle = variable("--line");
  pen.globalAlpha = 0.6;
  groups.forEach((_, index) => { if (!state.shown.has(index)) draw(index); });
  const shown = order.filter((index) => state.shown.has(index)).reverse();
  for (const index of [...shown.filter((each) => each !== state.active), ...shown.filter((each) => each === state.active)]) {
    pen.strokeStyle = colorOf(index);
    pen.globalAlpha = state.active === null || state.active === index ? 0.9 : 0.3;
    pen.lineWidth = state.active === index ? 3 : index === order[0] ? 2.4 : 1.2;
    draw(index);
  }
  pen.globalAlpha = 1;
  names.forEach((name, column) => {
    pen.strokeStyle = variable("--soft");
    pen.lineWidth = 1;
    line(pen, [[at(column), box.top], [at(column), box.bottom]]);
    pen.textAlign = column ? (column === names.length - 1 ? "right" : "center") : "left";
    pen.textBaseline = "bottom";
    pen.fillStyle = variable("--text");
    pen.fillText(name.slice(0, 20), at(column) + (column ? (column === names.length - 1 ? 60 : 0) : -40), box.top - 8);
    pen.textAlign = "left";
    pen.textBaseline = "middle";
    pen.fillStyle = variable("--soft");
    for (const word of scales[column].words || []) pen.fillText(word.slice(0, 12), at(column) + 4, scales[column](word));
    for (const tick of scales[column].ticks(5)) pen.fillText(show(tick), at(column) + 4, scales[column](tick));
  });
}

function makeSweep() {
  if (groups.length < 3 || !data.varied.length || !runs.some((_, run) => scoreOf(run) !== null)) return;
  const section = document.getElementById("sweep"), grid = element("div", { class: "small grid" });
  for (const name of data.varied.slice(0, 12)) {
    const canvas = element("canvas", { role: "img", "aria-label": `${data.metric} against ${name}` });
    grid.append(element("div", { class: "panel" }, element("h3", {}, `${data.metric} against ${name}`), canvas));
    redraws.push(() => drawSensitivity(canvas, name));
  }
  section.append(element("h2", {}, "Sensitivity"), grid);
  if (data.varied.length > 1) {
    const canvas = element("canvas", { role: "img", "aria-label": `parallel coordinates of ${data.varied.join(", ")} and ${data.metric}` });
    section.append(element("h2", {}, "Parallel coordinates"), element("div", { class: "panel wide" }, canvas));
    redraws.push(() => drawParallel(canvas));
  }
  section.append(element("p", { class: "note" }, "A dot is a run, a cross a run that failed, the ring the best setting. " +
    "Grey are the settings that are not shown; the slider above the table of runs chooses."));
}

// Rows are parameters, columns are steps.
function makeLayers() {
  if (!data.layers.length) return;
  const section = document.getElementById("layers"), grid = element("div", { class: "grid" });
  const choose = element("select", { "aria-label": "run", onchange: () => fill(data.layers[+choose.value]) },
    ...data.layers.map((each, index) => element("option", { value: index }, nameOf(groupOfRun[each.run], each.run))));
  let draws = [];
  redraws.push(() => draws.forEach((draw) => draw()));
  function fill(chosen) {
    grid.replaceChildren();
    draws = Object.entries(chosen.maps).map(([name, text]) => {
      const map = new HeatMap(name, chosen, floats(text));
      grid.append(map.root);
      return () => map.draw();
    });
    later();
  }
  section.append(element("h2", {}, "Parameters over time"));
  if (data.layers.length > 1) section.append(element("div", { class: "bar" }, element("label", {}, "run", choose)));
  const first = data.layers[0];
  if (first.of > first.leaves.length) section.append(element("p", { class: "note" }, `${first.leaves.length} of ${first.of} parameters.`));
  section.append(grid);
  fill(first);
}

class HeatMap {
  constructor(name, chosen, values) {
    Object.assign(this, { name, values, leaves: chosen.leaves, step: floats(chosen.step), isSigned: name === "cosine", cursor: null });
    const title = name.replaceAll("_", " ");
    this.canvas = element("canvas", { tabindex: "0", role: "img", "aria-label": `${title} of each parameter over steps. Arrow keys read values.` });
    this.canvas.style.height = `${Math.max(9, Math.min(30, 4 + this.leaves.length * 1.05))}rem`;
    this.out = element("output", { "aria-live": "polite" });
    this.root = element("div", { class: "panel" }, element("h3", {}, title), this.canvas, this.out);
    const good = [...values].filter((value) => value === value && (this.isSigned || value > 0));
    this.high = this.isSigned ? 1 : Math.max(...good);
    this.low = this.isSigned ? -1 : Math.max(Math.min(...good), this.high / 1e6);
    this.isLog = !this.isSigned && this.high / this.low > 10;
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.read(null));
    this.canvas.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!way) return;
      event.preventDefault();
      const [row, column] = this.cursor || [0, -way[1]];
      this.read([Math.min(Math.max(row + way[0], 0), this.leaves.length - 1), Math.min(Math.max(column + way[1], 0), this.step.length - 1)]);
    });
  }

  unit(value) {
    if (this.isLog) return Math.log(Math.max(value, this.low) / this.low) / Math.log(this.high / this.low);
    return (value - this.low) / (this.high - this.low || 1);
  }

  draw() {
    const made = context(this.canvas);
    if (!made) return;
    const { pen, width, height } = made, labels = Math.min(130, width * 0.34), columns = this.step.length, rows = this.leaves.length;
    const box = { left: labels, right: width - 52, top: 4, bottom: height - 22 };
    const wide = (box.right - box.left) / columns, tall = (box.bottom - box.top) / rows, stops = this.isSigned ? DIVERGING : SEQUENCE;
    this.box = box;
    if (!this.cells) this.cells = this.paint(stops);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(this.cells, box.left, box.top, box.right - box.left, box.bottom - box.top);
    if (this.cursor) {
      pen.strokeStyle = variable("--text");
      pen.lineWidth = 2;
      pen.strokeRect(box.left + this.cursor[1] * wide, box.top + this.cursor[0] * tall, Math.max(wide, 3), Math.max(tall, 3));
    }
    this.labels(pen, box, tall, stops, height);
  }

  // One pixel for each value, enlarged by drawing.
  paint(stops) {
    const made = document.createElement("canvas");
    made.width = this.step.length;
    made.height = this.leaves.length;
    const pen = made.getContext("2d"), image = pen.createImageData(made.width, made.height);
    this.values.forEach((value, at) => { if (value === value) image.data.set([...mix(stops, this.unit(value)), 255], 4 * at); });
    pen.putImageData(image, 0, 0);
    return made;
  }

  labels(pen, box, tall, stops, height) {
    pen.fillStyle = variable("--soft");
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    const every = Math.max(1, Math.ceil(12 / tall)), room = Math.floor(box.left / 6);
    this.leaves.forEach((leaf, row) => {
      const text = leaf.length > room ? `…${leaf.slice(1 - room)}` : leaf;
      if (row % every === 0) pen.fillText(text, box.left - 5, box.top + (row + 0.5) * tall);
    });
    pen.textAlign = "center";
    pen.textBaseline = "top";
    const x = axis(this.step[0], this.step[this.step.length - 1], box.left, box.right, false);
    for (const tick of x.ticks(Math.max(2, (box.right - box.left) / 50))) pen.fillText(show(tick), x(tick), box.bottom + 6);
    const bar = { left: box.right + 8, width: 10 };
    for (let y = box.top; y < box.bottom; y++) {
      pen.fillStyle = css(mix(stops, 1 - (y - box.top) / (box.bottom - box.top)));
      pen.fillRect(bar.left, y, bar.width, 1.5);
    }
    pen.fillStyle = variable("--soft");
    pen.textAlign = "left";
    pen.textBaseline = "middle";
    const say = (value) => (value !== 0 && Math.abs(value) < 0.01 ? value.toExponential(0) : String(+value.toPrecision(2)));
    pen.fillText(say(this.high), bar.left - 2 + bar.width + 4, box.top + 6);
    pen.fillText(say(this.low), bar.left - 2 + bar.width + 4, box.bottom - 6);
  }

  point(event) {
    if (!this.box) return;
    const place = this.canvas.getBoundingClientRect(), { left, right, top, bottom } = this.box;
    const column = Math.floor(((event.clientX - place.left - left) / (right - left)) * this.step.length);
    const row = Math.floor(((event.clientY - place.top - top) / (bottom - top)) * this.leaves.length);
    const isInside = column >= 0 && row >= 0 && column < this.step.length && row < this.leaves.length;
    this.read(isInside ? [row, column] : null);
  }

  read(cursor) {
    this.cursor = cursor;
    this.out.textContent = cursor ? `${this.leaves[cursor[0]]}, step ${show(this.step[cursor[1]])}: ${show(this.values[cursor[0] * this.step.length + cursor[1]])}` : "";
    this.draw();
  }
}

makeTable();
makeCurves();
makeSweep();
makeLayers();
setTheme(prefersDark.matches ? "dark" : "light");
