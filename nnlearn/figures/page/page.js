// The report of runs.
const groups = data.groups, runs = data.runs, sign = data.mode === "max" ? -1 : 1;
const scoreOf = (run) => runs[run].scores[data.metric] ?? null;

function summary(group, name) {
  const values = group.runs.map((run) => runs[run].scores[name]).filter((value) => value !== undefined);
  const good = values.filter((value) => value !== null);
  const mean = good.reduce((sum, value) => sum + value, 0) / good.length;
  const variance = good.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (good.length - 1);
  return { mean: good.length ? mean : null, sd: good.length > 1 ? Math.sqrt(variance) : null, failed: values.length - good.length, isMissing: !values.length };
}
for (const group of groups) group.score = summary(group, data.metric);
const worst = (group) => group.score.isMissing ? Infinity : group.score.failed * 1e300 + (group.score.mean === null ? 1e299 : sign * group.score.mean);
const order = groups.map((_, index) => index).sort((a, b) => worst(groups[a]) - worst(groups[b]) || a - b);
order.forEach((index, rank) => { groups[index].rank = rank; });

const state = { shown: new Set(groups.keys()), active: null, smooth: 0, bands: true, zoom: null };
const byRank = groups.length > 3 * PALETTES.light.length;
const isVaried = data.varied.length > 0;

function colorOf(index) {
  if (!byRank) return palette()[index % palette().length];
  const unit = groups[index].rank / Math.max(groups.length - 1, 1);
  return css(mix(SEQUENCE, theme === "dark" ? 1 - 0.8 * unit : 0.85 * unit));
}
const dashOf = (index) => (byRank ? [] : DASHES[Math.floor(index / PALETTES.light.length) % DASHES.length]);

function nameOf(index, run = null) {
  const group = groups[index], named = groups.some((other) => other.name !== group.name);
  const words = data.varied.filter((name) => name in group.config).map((name) => `${name} ${show(group.config[name])}`);
  if (named || !words.length) words.unshift(group.name);
  if (run !== null && group.runs.length > 1) words.push(`seed ${show(runs[run].seed)}`);
  return words.join(", ");
}

// The table of runs, which is also the legend.
function makeTable() {
  const section = document.getElementById("runs");
  const several = groups.some((other) => other.name !== groups[0].name);
  const seeds = groups.some((group) => group.runs.length > 1);
  const columns = [...(several || !isVaried ? [["run", (g) => g.name]] : []),
    ...data.varied.map((name) => [name, (g) => g.config[name] ?? null]),
    ...data.scores.map((name) => [name, (g) => summary(g, name)]),
    ["steps", (g) => Math.max(...g.runs.map((run) => runs[run].steps))],
    ["stopped by", (g) => [...new Set(g.runs.map((run) => runs[run].stopped))].join(", ")],
    ...(seeds ? [["seeds", (g) => g.runs.length]] : [])];
  const plain = (value) => (value && typeof value === "object" && !value.isMissing ? (value.failed ? 1e300 * sign : value.mean) : value?.isMissing ? null : value);
  const text = (value) => {
    if (!value || typeof value !== "object") return show(value);
    if (value.isMissing) return show(null);
    const failed = value.failed ? `${value.mean === null ? "" : ", "}${value.failed > 1 ? value.failed + " " : ""}failed` : "";
    return (value.mean === null ? "" : show(value.mean)) + (value.sd === null ? "" : ` ± ${show(+value.sd.toPrecision(2))}`) + failed;
  };
  const body = element("tbody"), head = element("tr", {}, element("th", { scope: "col" }, "show"));
  const rows = groups.map((group, index) => {
    const box = element("input", { type: "checkbox", checked: true, "aria-label": `show ${nameOf(index)}`,
      onchange: () => { box.checked ? state.shown.add(index) : state.shown.delete(index); later(); } });
    const swatch = element("span", { class: "swatch" });
    const row = element("tr", { onpointerenter: () => activate(index), onpointerleave: () => activate(null) },
      element("td", {}, box, " ", swatch));
    for (const [, value] of columns) {
      const found = value(group), isNumber = typeof plain(found) === "number" || (found && typeof found === "object");
      row.append(element("td", { class: isNumber ? "number" : null }, text(found)));
    }
    redraws.push(() => {
      swatch.style.borderTopColor = colorOf(index);
      swatch.style.borderTopStyle = dashOf(index).length ? "dashed" : "solid";
      row.classList.toggle("active", state.active === index);
      box.checked = state.shown.has(index);
    });
    return { row, index };
  });
  let sorted = null, rising = true;
  columns.forEach(([name, value], at) => {
    const column = element("th", { scope: "col", class: typeof plain(value(groups[0])) === "number" ? "number" : null },
      element("button", { type: "button", title: `sort by ${name}`, onclick: () => {
        rising = sorted === at ? !rising : true;
        sorted = at;
        const key = (entry) => plain(value(groups[entry.index]));
        rows.sort((a, b) => {
          const [one, other] = [key(a), key(b)];
          const way = typeof one === "number" && typeof other === "number" ? one - other : String(one).localeCompare(String(other));
          return rising ? way : -way;
        });
        body.replaceChildren(...rows.map((entry) => entry.row));
        for (const each of head.children) each.removeAttribute("aria-sort");
        column.setAttribute("aria-sort", rising ? "ascending" : "descending");
      } }, name));
    head.append(column);
  });
  rows.sort((a, b) => groups[a.index].rank - groups[b.index].rank);
  body.append(...rows.map((entry) => entry.row));
  section.append(element("h2", {}, isVaried ? "Runs and what differs" : groups.length > 1 ? "Runs" : "Run"));
  if (groups.length > 1) section.append(makeFilter());
  section.append(element("div", { class: "table", tabindex: "0", role: "region", "aria-label": "table of runs" },
    element("table", {}, element("thead", {}, head), body)));
}

function makeFilter() {
  const count = element("output", {}), range = element("input", { type: "range", min: 1, max: groups.length,
    value: groups.length, "aria-label": `show the best by ${data.metric}`, oninput: () => pick(order.slice(0, +range.value)) });
  const pick = (chosen) => { state.shown = new Set(chosen); later(); };
  redraws.push(() => { count.textContent = `${state.shown.size} of ${groups.length}`; });
  return element("div", { class: "bar" }, element("label", {}, `best by ${data.metric}`, range), count,
    element("button", { type: "button", onclick: () => { range.value = groups.length; pick(groups.keys()); } }, "all"),
    element("button", { type: "button", onclick: () => pick([]) }, "none"));
}

function activate(index) {
  if (state.active === index) return;
  state.active = index;
  later();
}

// Exponential moving average over the points that have a value.
function smoothed(values, weight) {
  if (!weight) return values;
  const out = new Float32Array(values.length).fill(NaN);
  let sum = 0, mass = 0;
  for (let i = 0; i < values.length; i++) {
    if (Number.isNaN(values[i])) continue;
    sum = weight * sum + (1 - weight) * values[i];
    mass = weight * mass + 1 - weight;
    out[i] = sum / mass;
  }
  return out;
}

function meanOf(lines) {
  const size = lines[0].length, mean = new Float32Array(size), low = new Float32Array(size), high = new Float32Array(size);
  for (let i = 0; i < size; i++) {
    let sum = 0, count = 0;
    low[i] = Infinity;
    high[i] = -Infinity;
    for (const each of lines) {
      const value = each[i];
      if (value !== value) continue;
      sum += value;
      count++;
      if (value < low[i]) low[i] = value;
      if (value > high[i]) high[i] = value;
    }
    mean[i] = count ? sum / count : NaN;
    if (!count) low[i] = high[i] = NaN;
  }
  return { mean, low, high };
}

const groupOfRun = [];
groups.forEach((group, index) => group.runs.forEach((run) => { groupOfRun[run] = index; }));

class Panel {
  constructor(source) {
    this.source = source;
    this.log = source.log;
    this.step = floats(source.step);
    this.lines = source.lines.map((each) => ({ run: each.run, group: groupOfRun[each.run], bad: each.bad, mean: floats(each.mean),
      low: each.low ? floats(each.low) : null, high: each.high ? floats(each.high) : null, limit: each.limit ? floats(each.limit) : null }));
    this.canvas = element("canvas", { tabindex: "0", role: "img", "aria-label":
      `${source.title} over steps. Arrow keys read values, plus and minus zoom, Escape shows everything.` });
    this.out = element("output", { "aria-live": "polite" });
    this.cursor = null;
    this.cache = null;
    const switchLog = element("input", { type: "checkbox", checked: this.log, onchange: () => { this.log = switchLog.checked; this.draw(); } });
    const unit = source.steps_per_point > 1 ? `, ${source.steps_per_point} steps per point` : "";
    this.root = element("div", { class: "panel" }, element("div", { class: "head" }, element("h3", { title: source.title + unit }, source.title),
      element("label", {}, switchLog, " log")), this.canvas, this.out);
    this.listen();
    redraws.push(() => this.draw());
  }

  // What to draw: curves with an optional band, made again only if a setting has changed.
  curves() {
    const key = [state.smooth, state.bands, [...state.shown].join(",")].join("|");
    if (this.cache && this.cache.key === key) return this.cache.curves;
    const curves = [];
    for (const index of state.shown) {
      const own = this.lines.filter((each) => each.group === index);
      if (!own.length) continue;
      const bad = own.filter((each) => each.bad !== null).map((each) => each.bad), limit = own[0].limit;
      if (state.bands && own.length > 1) {
        const { mean, low, high } = meanOf(own.map((each) => smoothed(each.mean, state.smooth)));
        if (own[0].low && !state.smooth) {  // so that spikes between the points are seen
          low.set(meanOf(own.map((each) => each.low)).low);
          high.set(meanOf(own.map((each) => each.high)).high);
        }
        curves.push({ group: index, run: null, mean, low, high, bad, limit });
      } else {
        for (const each of own) {
          curves.push({ group: index, run: each.run, mean: smoothed(each.mean, state.smooth), low: each.low, high: each.high,
            bad: each.bad === null ? [] : [each.bad], limit: each.limit });
        }
      }
    }
    this.cache = { key, curves };
    return curves;
  }

  limits(curves, first, last) {
    let low = Infinity, high = -Infinity;
    const take = (values) => {
      if (!values) return;
      for (let i = first; i <= last; i++) {
        const value = values[i];
        if (value !== value || (this.log && value <= 0)) continue;
        if (value < low) low = value;
        if (value > high) high = value;
      }
    };
    for (const each of curves) { take(each.mean); take(each.low); take(each.high); }
    if (high > low && this.source.kind === "sharpness") for (const each of curves) {
      const near = each.limit && each.limit.filter((value) => value < 3 * high);
      for (const value of near || []) { if (value > high) high = value; }
    }
    if (!(high >= low)) return null;
    if (this.log) return [low / 1.05, high * 1.05];
    const room = (high - low) * 0.04;
    return [low - room, high + room];
  }

  draw() {
    const made = context(this.canvas);
    if (!made) return;
    const { pen, width, height } = made, curves = this.curves(), steps = this.step;
    const [begin, end] = state.zoom || [steps[0] ?? 0, steps[steps.length - 1] ?? 1];
    let first = steps.findIndex((step) => step >= begin), last = steps.length - 1;
    if (first < 0) first = 0;
    while (last > first && steps[last] > end) last--;
    const box = { left: 58, right: width - 8, top: 8, bottom: height - 24 };
    const limits = this.limits(curves, first, last);
    if (!limits) {
      pen.fillStyle = variable("--soft");
      pen.textAlign = "center";
      pen.fillText(curves.length ? "no finite value here" : "nothing is shown", width / 2, height / 2);
      this.view = null;
      return;
    }
    const x = axis(begin, end, box.left, box.right, false), y = axis(limits[0], limits[1], box.bottom, box.top, this.log);
    this.view = { x, y, box, first, last, curves };
    frame(pen, box, x, y, "");
    pen.save();
    pen.beginPath();
    pen.rect(box.left, 0, box.right - box.left, box.bottom + 1);
    pen.clip();
    const active = (each) => each.group === state.active;
    for (const each of [...curves].sort((a, b) => active(a) - active(b))) this.drawCurve(pen, each, active(each));
    if (this.cursor) this.drawCursor(pen);
    pen.restore();
    if (this.drag) {
      pen.fillStyle = variable("--accent");
      pen.globalAlpha = 0.2;
      pen.fillRect(Math.min(...this.drag), box.top, Math.abs(this.drag[1] - this.drag[0]), box.bottom - box.top);
    }
  }

  drawCurve(pen, curve, isActive) {
    const { x, y, box, first, last } = this.view, steps = this.step;
    const from = Math.max(first - 1, 0), to = Math.min(last + 1, steps.length - 1), floor = this.log ? 0 : -Infinity;
    const dim = state.active !== null && !isActive ? 0.25 : 1, many = this.view.curves.length > 12 ? 0.75 : 1;
    pen.strokeStyle = pen.fillStyle = colorOf(curve.group);
    if (curve.low) {
      pen.globalAlpha = (curve.run === null ? 0.2 : 0.28) * dim * many;
      pen.beginPath();
      for (let i = from; i <= to; i++) if (curve.high[i] > floor) pen.lineTo(x(steps[i]), y(curve.high[i]));
      for (let i = to; i >= from; i--) if (curve.low[i] === curve.low[i]) {
        pen.lineTo(x(steps[i]), curve.low[i] > floor ? y(curve.low[i]) : box.bottom);
      }
      pen.fill();
    }
    pen.globalAlpha = dim * many;
    pen.lineWidth = isActive ? 2.6 : this.view.curves.length > 12 ? 1 : 1.5;
    pen.setLineDash(dashOf(curve.group));
    pen.beginPath();
    for (let i = from; i <= to; i++) if (curve.mean[i] > floor) pen.lineTo(x(steps[i]), y(curve.mean[i]));
    pen.stroke();
    if (from === to || this.step.length < 3) for (let i = from; i <= to; i++) if (curve.mean[i] > floor) {
      pen.fillRect(x(steps[i]) - 2, y(curve.mean[i]) - 2, 4, 4);
    }
    if (curve.limit) {
      pen.setLineDash([3, 4]);
      pen.beginPath();
      for (let i = from; i <= to; i++) if (curve.limit[i] > floor) pen.lineTo(x(steps[i]), y(curve.limit[i]));
      pen.stroke();
    }
    pen.setLineDash([]);
    for (const step of curve.bad) cross(pen, Math.min(x(step), box.right - 5), box.top + 5);
    pen.globalAlpha = 1;
  }

  drawCursor(pen) {
    const { x, y, box } = this.view, { at, curve } = this.cursor, value = curve.mean[at];
    pen.strokeStyle = variable("--soft");
    pen.lineWidth = 1;
    line(pen, [[x(this.step[at]), box.top], [x(this.step[at]), box.bottom]]);
    if (value === value && !(this.log && value <= 0)) {
      pen.fillStyle = colorOf(curve.group);
      pen.beginPath();
      pen.arc(x(this.step[at]), y(value), 4, 0, 2 * Math.PI);
      pen.fill();
    }
  }

  say() {
    if (!this.cursor) { this.out.textContent = ""; return; }
    const { at, curve } = this.cursor;
    let text = `step ${show(this.step[at])}: ${show(curve.mean[at])}`;
    if (curve.low && (curve.low[at] !== curve.mean[at] || curve.high[at] !== curve.mean[at])) text += ` (${show(curve.low[at])} to ${show(curve.high[at])})`;
    if (curve.limit) text += `, 2 / rate ${show(curve.limit[at])}`;
    this.out.textContent = `${text}, ${nameOf(curve.group, curve.run)}`;
  }

  point(px, py) {
    if (!this.view) return;
    const { x, y, first, last, curves } = this.view, wanted = x.inverse(px);
    let at = first;
    for (let i = first; i <= last; i++) if (Math.abs(this.step[i] - wanted) < Math.abs(this.step[at] - wanted)) at = i;
    let best = null, distance = Infinity;
    for (const curve of curves) {
      let near = at;  // the nearest point of this curve that has a value
      for (let reach = 0; reach <= last - first && curve.mean[near] !== curve.mean[near]; reach++) {
        near = curve.mean[at - reach] === curve.mean[at - reach] ? at - reach : at + reach;
      }
      const value = curve.mean[near];
      if (!(value === value) || (this.log && value <= 0)) continue;
      const away = Math.hypot(y(value) - py, x(this.step[near]) - px);
      if (away < distance) [best, distance] = [{ at: near, curve }, away];
    }
    this.cursor = best;
    this.say();
    const group = best ? best.curve.group : null;
    if (group === state.active) this.draw();
    else activate(group);
  }

  leave() {
    this.cursor = null;
    this.say();
    activate(null);
    this.draw();
  }

  listen() {
    const at = (event) => { const box = this.canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
    this.canvas.addEventListener("pointermove", (event) => {
      const [px, py] = at(event);
      if (this.drag) { this.drag[1] = px; this.draw(); } else this.point(px, py);
    });
    this.canvas.addEventListener("pointerdown", (event) => {
      if (event.pointerType !== "mouse") return;
      const [px] = at(event);
      this.drag = [px, px];
      this.canvas.setPointerCapture(event.pointerId);
    });
    this.canvas.addEventListener("pointerup", () => {
      const drag = this.drag;
      this.drag = null;
      if (drag && this.view && Math.abs(drag[1] - drag[0]) > 6) zoomTo(drag.map(this.view.x.inverse).sort((a, b) => a - b));
    });
    this.canvas.addEventListener("pointercancel", () => { this.drag = null; });
    this.canvas.addEventListener("pointerleave", () => this.leave());
    this.canvas.addEventListener("dblclick", () => zoomTo(null));
    this.canvas.addEventListener("blur", () => this.leave());
    this.canvas.addEventListener("keydown", (event) => { if (this.key(event.key)) event.preventDefault(); });
  }

  key(key) {
    if (!this.view) return false;
    const { first, last, curves, x } = this.view;
    if (key === "Escape") { zoomTo(null); return true; }
    const current = this.cursor || { at: first, curve: curves[0] };
    let { at, curve } = current, place = Math.max(curves.findIndex((each) => each.group === curve.group && each.run === curve.run), 0);
    const has = (index) => curves[place].mean[index] === curves[place].mean[index];
    const walk = (way) => { let next = at + way; while (next > first && next < last && !has(next)) next += way; return next; };
    if (key === "ArrowRight") at = this.cursor ? Math.min(walk(1), last) : at;
    else if (key === "ArrowLeft") at = Math.max(walk(-1), first);
    else if (key === "Home") at = first;
    else if (key === "End") at = last;
    else if (key === "ArrowDown") place = (place + 1) % curves.length;
    else if (key === "ArrowUp") place = (place - 1 + curves.length) % curves.length;
    else if (key === "+" || key === "-") {
      const [begin, end] = state.zoom || [this.step[0], this.step[this.step.length - 1]];
      const middle = this.step[at], factor = key === "+" ? 0.5 : 2;
      const next = [Math.max(middle - (middle - begin) * factor, this.step[0]), Math.min(middle + (end - middle) * factor, this.step[this.step.length - 1])];
      zoomTo(next[1] - next[0] < 2 ? state.zoom : next);
      return true;
    } else return false;
    this.cursor = { at, curve: curves[place] };
    this.say();
    state.active = curves.length > 1 ? curves[place].group : null;
    later();
    return true;
  }
}

function zoomTo(range) {
  state.zoom = range;
  later();
}

function makeCurves() {
  const section = document.getElementById("curves"), main = element("div", { class: "grid" }), more = element("div", { class: "grid" });
  const smooth = element("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: 0,
    oninput: () => { state.smooth = +smooth.value; smoothText.textContent = smooth.value; later(); } });
  const smoothText = element("output", {}, "0"), bands = element("input", { type: "checkbox", checked: true,
    onchange: () => { state.bands = bands.checked; later(); } });
  const bar = element("div", { class: "bar" }, element("label", {}, "smoothing", smooth), smoothText);
  if (groups.some((group) => group.runs.length > 1)) bar.append(element("label", {}, bands, "mean and range over seeds"));
  bar.append(element("button", { type: "button", onclick: () => zoomTo(null) }, "all steps"));
  let others = 0;
  for (const source of data.panels) {
    const panel = new Panel(source), isMain = source.kind !== "other" || data.panels.length <= 6;
    (isMain ? main : more).append(panel.root);
    others += !isMain;
  }
  section.append(element("h2", {}, "Curves"), bar, main);
  if (others) {
    section.append(element("details", { ontoggle: later }, element("summary", {}, `${others} more curves`), more));
  }
  const notes = ["Drag to zoom, double-click for all steps."];
  if (data.panels.some((panel) => panel.steps_per_point > 1)) notes.push("A long curve is the mean over a few steps, with its lowest and highest value as a shade.");
  if (data.panels.some((panel) => panel.lines.some((each) => each.bad !== null))) notes.push("A cross marks the first value that is not finite.");
  if (data.panels.some((panel) => panel.kind === "sharpness")) notes.push("Dashes beside a sharpness are 2 / learning rate.");
  section.append(element("p", { class: "note" }, notes.join(" ")));
}
