"use strict";
// Parts that all pages share: numbers, colours, axes, the theme.
const data = JSON.parse(document.getElementById("data").textContent);

function bytes(text) {
  const raw = atob(text), made = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) made[i] = raw.charCodeAt(i);
  return made;
}
const floats = (text) => new Float32Array(bytes(text).buffer);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function show(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e9) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size >= 1e-3 && size < 1e6 ? String(+value.toPrecision(4)) : (+value.toPrecision(3)).toExponential();
}

// Okabe and Ito's colours, which colour-blind readers can distinguish; brighter ones on black.
const PALETTES = {
  light: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000"],
  dark: ["#56b4e9", "#f08a3c", "#2fc79a", "#e39ac4", "#a5d8f7", "#f0e442", "#ffffff"],
};
const DASHES = [[], [7, 3], [2, 3], [9, 3, 2, 3]];
// Cividis, after Nunez, Anderton and Renslow 2018: even in lightness, for all kinds of colour vision.
const SEQUENCE = [[0, 34, 78], [53, 69, 108], [102, 105, 112], [148, 142, 119], [200, 184, 102], [254, 232, 56]];
const DIVERGING = [[0, 90, 160], [120, 170, 215], [235, 235, 235], [240, 165, 110], [200, 80, 0]];

function mix(stops, unit) {
  const at = Math.min(Math.max(unit, 0), 1) * (stops.length - 1), low = Math.min(Math.floor(at), stops.length - 2);
  return stops[low].map((from, i) => Math.round(from + (at - low) * (stops[low + 1][i] - from)));
}
const css = (rgb) => `rgb(${rgb.join(",")})`;
let theme = "light";
const palette = () => PALETTES[theme];
const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const redraws = [];
function redraw() { for (const draw of redraws) draw(); }
let waiting = false;
function later() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; redraw(); });
}

function setTheme(name) {
  theme = name;
  document.documentElement.dataset.theme = name;
  const button = document.getElementById("theme");
  button.textContent = name === "dark" ? "Light theme" : "Dark theme";
  button.setAttribute("aria-pressed", String(name === "dark"));
  redraw();
}
document.getElementById("theme").addEventListener("click", () => setTheme(theme === "dark" ? "light" : "dark"));
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
prefersDark.addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light"));
addEventListener("resize", later);

// A canvas in the device's pixels; null while it is not visible.
function context(canvas) {
  const width = canvas.clientWidth, height = canvas.clientHeight, scale = devicePixelRatio || 1;
  if (!width || !height) return null;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.clearRect(0, 0, width, height);
  pen.font = "11px system-ui, sans-serif";
  pen.lineJoin = "round";
  return { pen, width, height };
}

function linearTicks(low, high, count) {
  if (!(high > low)) return [low];
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= raw);
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-9; tick += step) {
    ticks.push(Math.abs(tick) < step * 1e-9 ? 0 : tick);
  }
  return ticks;
}

function logTicks(low, high, count) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const within = (parts, every) => {
    const ticks = [];
    for (let power = first; power <= last; power += every) {
      for (const part of parts) {
        const tick = part * 10 ** power;
        if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
      }
    }
    return ticks;
  };
  const choices = [[[1, 2, 3, 5, 7], 1], [[1, 2, 5], 1], [[1, 3], 1], [[1], 1], [[1], 2], [[1], 4], [[1], 10], [[1], 40]];
  const ticks = choices.map(([parts, every]) => within(parts, every)).find((each) => each.length <= count + 1);
  return ticks && ticks.length > 1 ? ticks : linearTicks(low, high, Math.max(2, count - 1)).filter((tick) => tick > 0);
}

// An axis from data to pixels. A logarithmic one needs low > 0.
function axis(low, high, from, to, log) {
  if (!(high > low)) {
    const room = Math.abs(low) * 0.05 || 0.5;
    [low, high] = log ? [low / 1.5, low * 1.5] : [low - room, high + room];
  }
  const forward = log ? Math.log : (value) => value, begin = forward(low), span = forward(high) - begin;
  const place = (value) => from + ((forward(value) - begin) / span) * (to - from);
  place.inverse = (pixel) => {
    const value = begin + ((pixel - from) / (to - from)) * span;
    return log ? Math.exp(value) : value;
  };
  place.isLog = log;
  place.ticks = (count) => (log ? logTicks(low, high, count) : linearTicks(low, high, count));
  return place;
}

function frame(pen, box, x, y, name) {
  pen.strokeStyle = variable("--line");
  pen.fillStyle = variable("--soft");
  pen.lineWidth = 1;
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  for (const tick of y.ticks(Math.max(2, Math.floor((box.bottom - box.top) / 36)))) {
    const at = Math.round(y(tick)) + 0.5;
    pen.globalAlpha = 0.6;
    line(pen, [[box.left, at], [box.right, at]]);
    pen.globalAlpha = 1;
    pen.fillText(show(tick), box.left - 5, at);
  }
  pen.textAlign = "center";
  pen.textBaseline = "top";
  for (const tick of x.ticks(Math.max(2, Math.floor((box.right - box.left) / (x.isLog ? 50 : 70))))) {
    const at = x(tick);
    if (at < box.left - 1 || at > box.right + 1) continue;
    line(pen, [[at, box.bottom], [at, box.bottom + 4]]);
    const half = pen.measureText(show(tick)).width / 2;
    pen.fillText(show(tick), Math.min(at, box.right + 6 - half), box.bottom + 6);
  }
  if (name) pen.fillText(name, (box.left + box.right) / 2, box.bottom + 20);
  line(pen, [[box.left, box.bottom], [box.right, box.bottom]]);
}

function line(pen, points) {
  pen.beginPath();
  for (const [x, y] of points) pen.lineTo(x, y);
  pen.stroke();
}

function cross(pen, x, y, size = 4) {
  line(pen, [[x - size, y - size], [x + size, y + size]]);
  line(pen, [[x - size, y + size], [x + size, y - size]]);
}
