const element = (tag, parent, className, text) => {
  const node = parent.appendChild(document.createElement(tag));
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};
const slider = (parent, max, value, label, onInput) => {
  const node = element("input", parent);
  Object.assign(node, { type: "range", min: 0, max, value, oninput: () => onInput(+node.value) });
  node.setAttribute("aria-label", label);
  return node;
};

// --- curves: small charts in SVG
const draw = (tag, parent, attributes, text) => {
  const node = parent.appendChild(document.createElementNS("http://www.w3.org/2000/svg", tag));
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
};
const short = v => Math.abs(v) >= 1e6 ? +(v / 1e6).toPrecision(3) + "M"
  : Math.abs(v) >= 1e4 ? +(v / 1e3).toPrecision(3) + "k" : String(+v.toPrecision(3));
function ticks(low, high, log) {
  const found = [];
  if (log) {
    const multiples = high / low > 1e3 ? [1] : [1, 2, 5];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
      for (const m of multiples) if (m * 10 ** e >= low && m * 10 ** e <= high) found.push(m * 10 ** e);
    if (found.length > 1) return found;
    found.length = 0;
  }
  const rough = (high - low) / 6, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= rough * 0.999);
  for (let i = Math.ceil(low / step); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return found;
}
function smooth(points, weight) {
  let sum = 0, norm = 0;
  return points.map(p => {
    sum = weight * sum + (1 - weight) * p.value;
    norm = weight * norm + 1 - weight;
    return { ...p, value: sum / norm };
  });
}
const over = document.getElementById("over"), logarithmic = document.getElementById("log");
const smoothing = document.getElementById("smooth");
const W = 400, H = 210, LEFT = 48, RIGHT = 10, TOP = 8, BOTTOM = 24;

function chart(spec, host) {
  const figure = element("figure", host, "card chart"), caption = element("figcaption", figure);
  element("b", caption, "", spec.title);
  const names = Object.keys(spec.lines);
  const color = i => `var(--c${(names.length === 1 && names[0] === "val" ? 1 : i) % 8})`;
  names.forEach((name, i) => {
    const key = element("span", caption, "key");
    element("i", key).style.background = color(i);
    key.append(name);
  });
  const svg = draw("svg", figure, { viewBox: `0 0 ${W} ${H}`, role: "img" });
  draw("title", svg, {}, spec.title);
  const tip = element("div", figure, "tip");
  tip.hidden = true;

  function render() {
    svg.querySelectorAll(":scope > :not(title)").forEach(node => node.remove());
    const minutes = over && over.value === "1", weight = smoothing ? +smoothing.value : 0;
    const raw = names.map(n => spec.lines[n].map(([step, seconds, value]) =>
      ({ x: minutes ? seconds / 60 : step, value })));
    const values = raw.flat().map(p => p.value), xs = raw.flat().map(p => p.x);
    const log = logarithmic && logarithmic.checked && Math.min(...values) > 0;
    let low = Math.min(...values), high = Math.max(...values);
    if (low === high) { low -= Math.abs(low) / 2 || 1; high += Math.abs(high) / 2 || 1; }
    if (!log) { const room = (high - low) * 0.04; low -= room; high += room; }
    const left = Math.min(...xs, minutes ? 0 : 1), right = Math.max(...xs, left + 1e-9);
    const f = log ? Math.log : v => v;
    const px = x => LEFT + (x - left) / (right - left) * (W - LEFT - RIGHT);
    const py = v => H - BOTTOM - (f(v) - f(low)) / (f(high) - f(low)) * (H - TOP - BOTTOM);
    for (const v of ticks(low, high, log)) {
      draw("line", svg, { x1: LEFT, x2: W - RIGHT, y1: py(v), y2: py(v), stroke: "var(--line)" });
      draw("text", svg, { x: LEFT - 6, y: py(v) + 4, "text-anchor": "end" }, short(v));
    }
    for (const x of ticks(left, right))
      draw("text", svg, { x: Math.min(px(x), W - RIGHT - 10), y: H - 7, "text-anchor": "middle" },
        short(x) + (minutes ? " min" : ""));
    const lines = raw.map(points => weight ? smooth(points, weight) : points);
    const path = points => points.map((p, i) =>
      `${i ? "L" : "M"}${px(p.x).toFixed(1)},${py(p.value).toFixed(1)}`).join("");
    raw.forEach((points, i) => {
      const style = { fill: "none", stroke: color(i), "stroke-linejoin": "round" };
      if (weight) draw("path", svg, { ...style, d: path(points), "stroke-width": 1, opacity: 0.3 });
      draw("path", svg, { ...style, d: path(lines[i]), "stroke-width": 1.8 });
      if (points.length < 12) for (const p of lines[i])
        draw("circle", svg, { cx: px(p.x), cy: py(p.value), r: 2.6, fill: color(i) });
    });
    const ends = { y1: TOP, y2: H - BOTTOM };
    const cursor = draw("line", svg, { ...ends, stroke: "var(--faint)", visibility: "hidden" });
    svg.onpointerleave = () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); };
    svg.onpointermove = event => {
      const box = svg.getBoundingClientRect();
      const part = ((event.clientX - box.left) / box.width * W - LEFT) / (W - LEFT - RIGHT);
      const x = left + part * (right - left);
      const near = lines.map(l => l.reduce((a, b) => Math.abs(b.x - x) < Math.abs(a.x - x) ? b : a));
      const at = near.reduce((a, b) => Math.abs(b.x - x) < Math.abs(a.x - x) ? b : a).x;
      cursor.setAttribute("x1", px(at));
      cursor.setAttribute("x2", px(at));
      cursor.setAttribute("visibility", "visible");
      tip.hidden = false;
      tip.replaceChildren();
      element("div", tip, "faint", minutes ? at.toFixed(1) + " min" : "step " + Math.round(at));
      near.forEach((p, i) => element("div", tip, "", `${names[i]}  ${+p.value.toPrecision(4)}`));
      const place = svg.offsetLeft || 12, where = place + px(at) / W * box.width;
      tip.style.top = "44px";
      tip.style.left = px(at) > W / 2 ? "auto" : where + 10 + "px";
      tip.style.right = px(at) > W / 2 ? figure.clientWidth - where + 10 + "px" : "auto";
    };
  }
  render();
  return render;
}
const renders = DATA.charts.map(spec =>
  chart(spec, document.getElementById(DATA.cost.includes(spec.name) ? "cost-charts" : "charts")));
for (const control of [over, logarithmic, smoothing])
  if (control) control.addEventListener("input", () => renders.forEach(render => render()));

// --- previews over time
const time = document.getElementById("time");
if (time) {
  const tools = element("div", time, "tools"), image = element("img", time), last = DATA.previews.length - 1;
  const label = element("label", tools);
  const show = index => {
    image.src = DATA.previews[index].picture;
    image.alt = label.textContent = "step " + DATA.previews[index].step.toLocaleString("en");
  };
  if (last > 0) slider(tools, last, last, "preview", show);
  show(last);
}

// --- volumes: 8-bit voxels out of a PNG, three planes through one point
const AXES = [[1, 2], [0, 2], [0, 1]], NAMES = ["sagittal", "coronal", "axial"];
const LETTERS = [["L", "R"], ["P", "A"], ["I", "S"]];

async function decode(volume) {
  const image = new Image();
  image.src = volume.picture;
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.width, image.height];
  const context = canvas.getContext("2d", { willReadFrequently: true, colorSpace: "srgb" });
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, image.width, image.height).data, [I, J] = volume.shape;
  return (i, j, k) => {
    const across = k % volume.columns, down = Math.floor(k / volume.columns);
    return pixels[4 * ((down * J + j) * image.width + across * I + i)];
  };
}

function paint(canvas, volume, voxel, axis, index) {
  const [a, b] = AXES[axis], wide = volume.shape[a], high = volume.shape[b], at = [0, 0, 0];
  [canvas.width, canvas.height] = [wide, high];
  const context = canvas.getContext("2d"), out = context.createImageData(wide, high);
  at[axis] = index;
  for (let y = 0, n = 0; y < high; y++) for (let x = 0; x < wide; x++, n += 4) {
    at[a] = x;
    at[b] = high - 1 - y;  // up on the screen is where the index grows
    out.data[n] = out.data[n + 1] = out.data[n + 2] = voxel(...at);
    out.data[n + 3] = 255;
  }
  context.putImageData(out, 0, 0);
}

async function viewer(host) {
  const volumes = DATA.volumes, voxels = await Promise.all(volumes.map(decode));
  const thumbs = element("div", host, "thumbs"), row = element("div", host, "planes");
  let chosen = 0, point = volumes[0].shape.map(n => n >> 1);
  const planes = NAMES.map((name, axis) => {
    const figure = element("figure", row, "plane"), stage = element("div", figure, "stage");
    const canvas = element("canvas", stage), h = element("div", stage, "h"), v = element("div", stage, "v");
    const letters = [0, 1, 2, 3].map(() => element("span", stage));
    const control = slider(figure, 1, 0, name + " slice", value => { point[axis] = value; show(); });
    const caption = element("figcaption", figure), [a, b] = AXES[axis];
    const move = event => {
      const box = stage.getBoundingClientRect(), shape = volumes[chosen].shape;
      const clamp = (value, n) => Math.max(0, Math.min(n - 1, Math.floor(value * n)));
      point[a] = clamp((event.clientX - box.left) / box.width, shape[a]);
      point[b] = clamp(1 - (event.clientY - box.top) / box.height, shape[b]);
      show();
    };
    stage.onpointerdown = event => { stage.setPointerCapture(event.pointerId); move(event); };
    stage.onpointermove = event => { if (event.buttons) move(event); };
    stage.addEventListener("wheel", event => {
      event.preventDefault();
      const last = volumes[chosen].shape[axis] - 1;
      point[axis] = Math.max(0, Math.min(last, point[axis] - Math.sign(event.deltaY)));
      show();
    }, { passive: false });
    return { axis, name, stage, canvas, h, v, letters, control, caption };
  });

  function show() {
    const volume = volumes[chosen], { shape, mm } = volume, size = shape.map((n, axis) => n * mm[axis]);
    const room = host.clientWidth - 34 - 2 * 20, wide = size[1] + 2 * size[0];
    const most = Math.min(460 / Math.max(size[1], size[2]), 7 / Math.min(...mm));
    const fits = room < 560 ? (host.clientWidth - 34) / Math.max(size[0], size[1]) : room / wide;
    const scale = Math.min(fits, most);
    for (const { axis, name, stage, canvas, h, v, letters, control, caption } of planes) {
      const [a, b] = AXES[axis];
      paint(canvas, volume, voxels[chosen], axis, point[axis]);
      stage.style.width = size[a] * scale + "px";
      stage.style.height = size[b] * scale + "px";
      v.style.left = (point[a] + 0.5) / shape[a] * 100 + "%";
      h.style.top = (1 - (point[b] + 0.5) / shape[b]) * 100 + "%";
      const places = [["left", a, 0], ["right", a, 1], ["bottom", b, 0], ["top", b, 1]];
      places.forEach(([side, along, end], i) => {
        letters[i].textContent = volume.letters ? LETTERS[along][end] : "";
        const middle = i < 2 ? "top: calc(50% - 6px)" : "left: calc(50% - 4px)";
        letters[i].style.cssText = `${side}: 5px; ${middle}`;
      });
      control.max = shape[axis] - 1;
      control.value = point[axis];
      caption.textContent = `${name} ${point[axis] + 1} / ${shape[axis]}`;
    }
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === chosen));
  }
  const buttons = volumes.map((volume, i) => {
    const button = element("button", thumbs);
    paint(element("canvas", button), volume, voxels[i], 2, volume.shape[2] >> 1);
    button.append(volume.name);
    button.onclick = () => {
      const before = volumes[chosen].shape;
      point = point.map((p, axis) => Math.floor((p + 0.5) / before[axis] * volume.shape[axis]));
      chosen = i;
      show();
    };
    return button;
  });
  show();
  addEventListener("resize", show);
}

function gallery(host) {
  const grid = element("div", host, "gallery");
  for (const volume of DATA.volumes) {
    const figure = element("figure", grid), image = element("img", figure);
    image.src = volume.picture;
    image.alt = volume.name;
    image.style.aspectRatio = volume.shape[1] * volume.mm[1] + " / " + volume.shape[0] * volume.mm[0];
    element("figcaption", figure, "", volume.name);
  }
}
const host = document.getElementById("viewer");
if (host) (DATA.volumes[0].shape.length === 3 ? viewer : gallery)(host);
