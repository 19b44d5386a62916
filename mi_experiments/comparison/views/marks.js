// Elements, numbers as text, colours, scales, and the one tooltip.
const svgSpace = "http://www.w3.org/2000/svg";

// Text only ever enters the page as text nodes and attributes, never as markup.
function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}
const html = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
const svg = (name, attributes = {}, ...children) =>
  fill(document.createElementNS(svgSpace, name), attributes, children);
const byId = (name) => document.getElementById(name);
const label = (name) => DATA.labels[name] ?? name;
const known = (value) => value !== null && value !== undefined;
const isNumber = (value) => typeof value === "number";

function short(value) {
  if (!known(value)) return "null";
  if (!isNumber(value)) return String(value);
  return String(Number(value.toPrecision(6)));
}

// A cell of the table: results with 4 decimals, as mi-compare prints them.
function show(name, value) {
  if (!known(value)) return "–";
  const bare = name.endsWith(DATA.interval) ? name.slice(0, -DATA.interval.length) : name;
  if (bare === "peak_memory") return `${(value / 1e9).toFixed(2)} GB`;
  if (bare === "seconds") return value.toFixed(1);
  if (bare === "tokens_sha256") return String(value).slice(0, 12);
  if (isNumber(value) && DATA.results.includes(bare))
    return Math.abs(value) < 1e6 ? value.toFixed(4) : value.toExponential(4);
  return short(value);
}

function withInterval(row, name) {
  const parts = [show(name, row[name])];
  if (known(row[name + DATA.interval])) parts.push(`± ${show(name, row[name + DATA.interval])}`);
  return parts.join(" ");
}

const shapes = [
  "M4.6 0A4.6 4.6 0 1 1-4.6 0A4.6 4.6 0 1 1 4.6 0Z", // circle
  "M-4-4H4V4H-4Z", // square
  "M0-5.4L5 4H-5Z", // triangle
  "M0-5.8L5.4 0L0 5.8L-5.4 0Z", // diamond
  "M0 5.4L5-4H-5Z", // triangle that points down
  "M-1.7-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z", // plus
];
const viridis = [
  "#440154",
  "#482878",
  "#3e4a89",
  "#31688e",
  "#26828e",
  "#1f9e89",
  "#35b779",
  "#6ece58",
  "#b5de2b",
  "#fde725",
].map((code) => [1, 3, 5].map((start) => parseInt(code.slice(start, start + 2), 16)));

function shade(share) {
  const place = Math.min(Math.max(share, 0), 1) * (viridis.length - 1);
  const low = Math.min(Math.floor(place), viridis.length - 2);
  return viridis[low].map((part, i) => part + (viridis[low + 1][i] - part) * (place - low));
}
const css = (colour) => `rgb(${colour.map(Math.round).join(" ")})`;
const isLight = (colour) => 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140;

// A look for each value of a setting: colour and shape, so that colour is never alone.
function looks(values) {
  const unique = [...new Set(values.map((value) => value ?? null))];
  const numeric = unique.every((value) => value === null || isNumber(value));
  unique.sort((a, b) => (numeric ? (a ?? Infinity) - (b ?? Infinity) : compareText(a, b)));
  return new Map(
    unique.map((value, i) => [
      value,
      {
        colour: `var(--s${i % 7})`,
        shape: shapes[(i + Math.floor(i / 7)) % shapes.length],
      },
    ]),
  );
}

const compareText = (a, b) => String(a).localeCompare(String(b), "en", { numeric: true });
const compareValues = (a, b) => (isNumber(a) && isNumber(b) ? a - b : compareText(a, b));
const capital = (text) => text[0].toUpperCase() + text.slice(1);
const exact = (value) => (known(value) ? String(value) : "–");

function brief(value, digits = 3) {
  if (!known(value)) return "–";
  return value !== 0 && Math.abs(value) < 0.01 ? value.toExponential(digits - 2) : value.toPrecision(digits);
}

function niceTicks(low, high, count = 5) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((s) => s >= raw * 0.999);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++)
    ticks.push(Number((k * step).toPrecision(12)));
  return ticks;
}

function logTicks(low, high) {
  const all = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const factor of [1, 2, 5]) all.push(Number((factor * 10 ** power).toPrecision(3)));
  const inside = all.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
  const tens = inside.filter((tick) => /^1(0*|e.*)$|^0\.0*1$/.test(String(tick)));
  if (inside.length > 8 && tens.length > 1) return tens;
  return inside.length > 1 ? inside : niceTicks(low, high, 4);
}

// From values to pixels, with ticks; logarithmic where that is asked and all values are positive.
function makeScale(values, pixels, { log = false, ticks = null, zero = false, count = 5 } = {}) {
  let low = Math.min(...values),
    high = Math.max(...values);
  const logarithmic = log && low > 0;
  const to = logarithmic ? Math.log : (value) => value;
  const from = logarithmic ? Math.exp : (value) => value;
  if (zero) low = Math.min(0, low);
  if (low === high) {
    const around = logarithmic ? 2 : Math.abs(low) * 0.05 || 1;
    [low, high] = logarithmic ? [low / around, high * around] : [low - around, high + around];
  } else {
    const margin = (to(high) - to(low)) * 0.07;
    if (!(zero && low === 0)) low = from(to(low) - margin);
    high = from(to(high) + margin);
  }
  const [start, end] = pixels;
  const scale = (value) => start + ((to(value) - to(low)) / (to(high) - to(low))) * (end - start);
  scale.ticks = ticks ?? (logarithmic ? logTicks(low, high) : niceTicks(low, high, count));
  scale.ticks = scale.ticks.filter((tick) => tick >= low && tick <= high);
  return scale;
}

const wide = (values) => Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) > 5;

function tickText(value) {
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5))
    return value.toExponential().replace("e+", "e");
  return short(value);
}

// The tooltip: a title and lines of name and value; also read out when reached by keyboard.
const tip = byId("tip");
function showTip(anchor, title, lines) {
  tip.replaceChildren(
    html("b", {}, title),
    ...lines.map(([name, value]) => html("span", {}, html("i", {}, name), value)),
  );
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = anchor.x + 14 + box.width > innerWidth ? anchor.x - 14 - box.width : anchor.x + 14;
  const top = Math.min(Math.max(anchor.y - box.height / 2, 6), innerHeight - box.height - 6);
  tip.style.left = `${Math.max(left, 6)}px`;
  tip.style.top = `${top}px`;
}
const hideTip = () => {
  tip.hidden = true;
};

// Pointer and arrow keys over items {x, y, title, lines, pick}: nearest one wins.
function interactive(plot, items, { reach = 28, outline = null } = {}) {
  if (!items.length) return;
  let current = null;
  const cursor = svg("g", { "aria-hidden": "true" });
  plot.append(cursor);
  const visit = (item) => {
    current = item;
    cursor.replaceChildren();
    if (!item) return hideTip();
    cursor.append(outline ? outline(item) : svg("circle", { class: "cursor", cx: item.x, cy: item.y, r: 8 }));
    const frame = plot.getBoundingClientRect();
    showTip({ x: frame.left + item.x, y: frame.top + item.y }, item.title, item.lines);
  };
  const nearest = (x, y) => {
    let best = null,
      least = reach ** 2;
    for (const item of items) {
      const apart = (item.x - x) ** 2 + (item.y - y) ** 2;
      if (apart < least) [best, least] = [item, apart];
    }
    return best;
  };
  plot.addEventListener("pointermove", (event) => {
    const frame = plot.getBoundingClientRect();
    visit(nearest(event.clientX - frame.left, event.clientY - frame.top));
  });
  plot.addEventListener("pointerleave", () => visit(null));
  plot.addEventListener("blur", () => visit(null));
  plot.addEventListener("click", () => current?.pick?.());
  plot.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (steps[event.key]) {
      event.preventDefault();
      visit(current ? (towards(items, current, steps[event.key]) ?? current) : leftmost(items));
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      current?.pick?.();
    } else if (event.key === "Escape") visit(null);
  });
}

const leftmost = (items) => items.reduce((a, b) => (b.x < a.x || (b.x === a.x && b.y < a.y) ? b : a));

// The item in a direction that is nearest, steps aside counting double.
function towards(items, from, [dx, dy]) {
  let best = null,
    least = Infinity;
  for (const item of items) {
    const along = (item.x - from.x) * dx + (item.y - from.y) * dy;
    if (item === from || along < 0.01) continue;
    const aside = Math.abs((item.x - from.x) * dy) + Math.abs((item.y - from.y) * dx);
    if (along + 2 * aside < least) [best, least] = [item, along + 2 * aside];
  }
  return best;
}
