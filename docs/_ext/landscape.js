// Paths of descent: pick a function, optimizers, rate and momentum.
const names = Object.keys(data.functions), optimizers = Object.keys(data.functions[names[0]].paths);
const state = { name: names[1], shown: new Set(["sgd", "adam", "lion"]), rate: 4, momentum: 3, step: data.steps.length - 1 };
for (const each of Object.values(data.functions)) {
  each.heights = bytes(each.heights);
  for (const found of Object.values(each.paths)) {
    found.path = new Uint16Array(bytes(found.path).buffer);
    found.last = floats(found.last);
    found.solved = floats(found.solved);
  }
}

const canvas = element("canvas", { role: "img", "aria-label": "contours of the function with the paths of descent" });
const rows = element("tbody"), said = element("output", { "aria-live": "polite" });
const hint = "The shades are logarithmic, the star is a minimum. A path that ends at the edge has left the picture.";

function slider(name, count, key, text) {
  const out = element("output"), input = element("input", { type: "range", min: 0, max: count - 1, step: 1, value: state[key],
    "aria-label": name, oninput: () => { state[key] = +input.value; later(); } });
  redraws.push(() => { out.textContent = text(); input.value = state[key]; });
  return element("label", {}, name, input, out);
}

function build() {
  const choose = element("select", { "aria-label": "function", onchange: () => { state.name = choose.value; later(); } },
    ...names.map((name) => element("option", { value: name, selected: name === state.name }, name)));
  const formula = element("span", { class: "note" });
  redraws.push(() => { formula.textContent = `f(x, y) = ${data.functions[state.name].text}`; });
  const boxes = optimizers.map((name, index) => {
    const swatch = element("span", { class: "swatch" }), box = element("input", { type: "checkbox", checked: state.shown.has(name),
      onchange: () => { box.checked ? state.shown.add(name) : state.shown.delete(name); later(); } });
    redraws.push(() => { swatch.style.borderTopColor = palette()[index]; });
    return element("label", {}, box, swatch, name);
  });
  let timer = null;
  const play = element("button", { type: "button", onclick: () => {
    if (timer) { clearInterval(timer); timer = null; play.textContent = "play"; return; }
    if (state.step >= data.steps.length - 1) state.step = 0;
    play.textContent = "pause";
    timer = setInterval(() => {
      state.step++;
      if (state.step >= data.steps.length - 1) { clearInterval(timer); timer = null; play.textContent = "play"; state.step = data.steps.length - 1; }
      later();
    }, 60);
  } }, "play");
  document.getElementById("main").append(
    element("div", { class: "bar" }, element("label", {}, "function", choose), formula),
    element("div", { class: "bar", role: "group", "aria-label": "optimizers" }, ...boxes),
    element("div", { class: "bar" },
      slider("learning rate", data.rates.length, "rate", () => show(+data.rates[state.rate].toPrecision(2))),
      slider("momentum", data.momenta.length, "momentum", () => String(data.momenta[state.momentum])),
      slider("steps", data.steps.length, "step", () => String(data.steps[state.step])), play),
    element("div", { class: "panel landscape" }, canvas, said),
    element("div", { class: "table" }, element("table", {}, element("thead", {}, element("tr", {},
      ...["optimizer", `steps to f < ${data.solved}`, "f at the end"].map((text) => element("th", { scope: "col" }, text)))), rows)),
    element("p", { class: "note" }, hint + " Momentum is b1 of adam, adopt, lion and schedule-free."));
  canvas.style.height = "auto";
  canvas.style.aspectRatio = "4 / 3";
  canvas.style.maxHeight = "75vh";
}

// Contours, drawn small and enlarged: 18 shades with dark lines between them.
function contours(found) {
  const [width, height] = data.grid, scale = 4, made = document.createElement("canvas");
  made.width = width * scale;
  made.height = height * scale;
  const pen = made.getContext("2d"), image = pen.createImageData(made.width, made.height), shades = 18;
  const at = (x, y) => found.heights[Math.min(y, height - 1) * width + Math.min(x, width - 1)];
  for (let row = 0; row < made.height; row++) for (let column = 0; column < made.width; column++) {
    const x = column / scale, y = row / scale, left = Math.floor(x), top = Math.floor(y), u = x - left, v = y - top;
    const value = (at(left, top) * (1 - u) + at(left + 1, top) * u) * (1 - v) + (at(left, top + 1) * (1 - u) + at(left + 1, top + 1) * u) * v;
    const level = Math.floor((value / 256) * shades) / (shades - 1);
    const soft = theme === "dark" ? [20 + 50 * level, 26 + 56 * level, 36 + 70 * level] : [165 + 88 * level, 185 + 68 * level, 212 + 40 * level];
    image.data.set([...soft, 255], (row * made.width + column) * 4);
  }
  pen.putImageData(image, 0, 0);
  return made;
}

const pictures = new Map();
function draw() {
  const made = context(canvas);
  if (!made) return;
  const { pen, width, height } = made, found = data.functions[state.name], [left, right, bottom, top] = found.view;
  const key = `${state.name} ${theme}`;
  if (!pictures.has(key)) pictures.set(key, contours(found));
  pen.drawImage(pictures.get(key), 0, 0, width, height);
  const place = (x, y) => [((x - left) / (right - left)) * width, ((top - y) / (top - bottom)) * height];
  pen.fillStyle = variable("--text");
  pen.font = "16px system-ui, sans-serif";
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  for (const [x, y] of found.minima) pen.fillText("★", ...place(x, y));
  const points = data.steps.length, run = state.momentum * data.rates.length + state.rate, texts = [];
  rows.replaceChildren();
  optimizers.forEach((name, index) => {
    if (!state.shown.has(name)) return;
    const paths = found.paths[name], path = [];
    for (let at = 0; at <= state.step; at++) {
      const [a, b] = [0, 1].map((axis) => paths.path[(run * points + at) * 2 + axis]);
      if (a === 65535) break;
      path.push(place(2 * left - right + (a / 65534) * 3 * (right - left), 2 * bottom - top + (b / 65534) * 3 * (top - bottom)));
    }
    pen.strokeStyle = pen.fillStyle = palette()[index];
    pen.lineWidth = 2;
    line(pen, path);
    for (const [x, y] of path) { pen.beginPath(); pen.arc(x, y, 2.2, 0, 2 * Math.PI); pen.fill(); }
    if (path.length) { pen.beginPath(); pen.arc(...path[path.length - 1], 5, 0, 2 * Math.PI); pen.fill(); }
    const solved = paths.solved[run], last = paths.last[run];
    const end = !(last < 1e6) ? "diverged" : show(Math.abs(last) < 1e-8 ? 0 : last);
    rows.append(element("tr", {}, element("td", {}, name), element("td", { class: "number" }, solved < 0 ? "–" : show(solved)), element("td", { class: "number" }, end)));
    texts.push(`${name}: ${solved < 0 ? `f ${end}` : `${show(solved)} steps`}`);
  });
  said.textContent = `rate ${show(+data.rates[state.rate].toPrecision(2))}, momentum ${data.momenta[state.momentum]}. ${texts.join("; ")}`;
}

build();
redraws.push(draw);
setTheme(prefersDark.matches ? "dark" : "light");
