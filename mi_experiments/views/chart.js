// One chart of points and lines, and one of columns.
const height = 330, margin = { left: 58, right: 18, top: 26, bottom: 42 };

function empty(host, text) {
  host.replaceChildren(html("p", { class: "empty" }, text));
}

function canvas(host, description, size = height) {
  const width = Math.max(host.clientWidth, 260);
  return svg("svg", {
    class: "plot", viewBox: `0 0 ${width} ${size}`, width, height: size, tabindex: 0,
    role: "group", "aria-label": `${description}. Arrow keys move between points.`,
  });
}

function axes(plot, x, y, box, names) {
  const grid = svg("g", { class: "grid" });
  for (const tick of y.ticks) {
    grid.append(svg("line", { x1: box.left, x2: box.right, y1: y(tick), y2: y(tick) }),
      svg("text", { x: box.left - 9, y: y(tick) + 4, "text-anchor": "end", "data-y": tick },
        tickText(tick)));
  }
  for (const tick of x.ticks) {
    grid.append(svg("line", { x1: x(tick), x2: x(tick), y1: box.bottom, y2: box.bottom + 4 }),
      svg("text", { x: x(tick), y: box.bottom + 18, "text-anchor": "middle", "data-x": tick },
        tickText(tick)));
  }
  grid.append(svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  plot.append(grid,
    svg("text", { class: "name", x: 0, y: 12 }, names.y),
    svg("text", { class: "name", x: box.right, y: box.bottom + 37, "text-anchor": "end" }, names.x));
}

// series: {name, look, wire, variant, points: [{x, y, low, high, left, right, run, title, lines}]}
function chart(host, { x, y, series, guides = [], frontier = false, faint = [], hidden, redraw, key }) {
  const shown = series.filter((one) => !hidden.has(one.name));
  // Noise is far below what it is compared with, or it is in the picture: it never widens an axis.
  const all = series.filter((one) => one.variant !== "noise").flatMap((one) => one.points);
  const points = shown.flatMap((one) => one.points);
  const plot = canvas(host, `${y.label} against ${x.label}`);
  const width = Number(plot.getAttribute("width"));
  const box = { left: margin.left, right: width - margin.right, top: margin.top, bottom: height - margin.bottom };
  const xs = all.flatMap((point) => [point.x, point.left, point.right]).filter(known);
  const ys = within(all, [...faint, ...guides].map((one) => one.y));
  const distinct = [...new Set(all.map((point) => point.x))].sort((a, b) => a - b);
  const few = x.discrete && distinct.length <= 9 ? distinct : null;
  const toX = makeScale([...xs, ...faint.map((one) => one.x)], [box.left, box.right],
    { log: x.log ?? (x.discrete && wide(distinct)), ticks: few, count: Math.max(3, Math.floor(width / 95)) });
  const toY = makeScale(ys, [box.bottom, box.top], { log: y.log ?? wide(ys), zero: y.zero });
  axes(plot, toX, toY, box, { x: x.label, y: y.label });
  for (const guide of guides)
    plot.append(svg("line", { class: "guide", x1: box.left, x2: box.right, y1: toY(guide.y), y2: toY(guide.y), "data-y": guide.y }));
  if (frontier) plot.append(stairs(points, toX, toY, box));
  for (const one of faint) {
    plot.append(svg("g", { class: "faint", transform: `translate(${toX(one.x)} ${toY(one.y)})` },
      svg("path", { class: "mark", d: one.look.shape, fill: one.look.colour, transform: "scale(0.7)" })));
  }
  const items = [];
  const size = points.length > 150 ? 0.62 : points.length > 60 ? 0.8 : 1;
  for (const one of shown) {
    const inside = one.points.filter((point) => one.variant !== "noise" || (toY(point.y) <= box.bottom && toY(point.y) >= box.top));
    if (one.wire) {
      const path = inside.map((point, i) => `${i ? "L" : "M"}${toX(point.x)} ${toY(point.y)}`);
      plot.append(svg("path", { class: `wire ${one.variant ?? ""}`, d: path.join(""), stroke: one.look.colour }));
    }
    for (const point of inside) {
      const place = { x: toX(point.x), y: toY(point.y) };
      const parts = [];
      if (known(point.low)) parts.push(whisker(one.look, toY(point.low) - place.y, toY(point.high) - place.y, box.top - place.y, box.bottom - place.y));
      if (known(point.left)) parts.push(svg("line", { class: "whisker", stroke: one.look.colour, y1: 0, y2: 0, x1: toX(point.left) - place.x, x2: toX(point.right) - place.x }));
      if (!one.variant) parts.push(svg("path", { class: "mark", d: one.look.shape, fill: one.look.colour, transform: size < 1 ? `scale(${size})` : null }));
      if (known(point.run) && point.run === state.run && point.ring) parts.push(svg("circle", { class: "ring", r: 8.5 }));
      plot.append(svg("g", {
        class: "point", transform: `translate(${place.x} ${place.y})`, role: "img",
        "data-x": point.x, "data-y": point.y, "data-run": point.run, "data-low": point.low, "data-high": point.high,
        "aria-label": [point.title, ...point.lines.map((line) => line.join(" "))].join(", "),
      }, parts));
      items.push({ ...place, title: point.title, lines: point.lines, pick: point.pick });
    }
  }
  for (const guide of guides) plot.append(svg("text", { class: "label", x: box.left + 6, y: toY(guide.y) - 5 }, guide.label));
  host.replaceChildren(legend(series, hidden, redraw, key), plot);
  interactive(plot, items);
}

// The values that the axis spans. An interval of few samples is wide: it counts for no more than
// the spread of the points themselves, and ends in an arrow where it leaves the plot.
function within(points, others) {
  const values = [...points.map((point) => point.y), ...others];
  const low = Math.min(...values), high = Math.max(...values), room = (high - low) * 0.35 || Infinity;
  const ends = points.flatMap((point) => [point.low, point.high]).filter(known);
  return [...values, ...ends.map((end) => Math.min(Math.max(end, low - room), high + room))];
}

function whisker(look, low, high, top, bottom) {
  const [down, up] = [Math.min(low, bottom), Math.max(high, top)];
  const arrows = (low > bottom ? `M-4 ${down - 5}L0 ${down}L4 ${down - 5}` : "") + (high < top ? `M-4 ${up + 5}L0 ${up}L4 ${up + 5}` : "");
  return svg("path", { class: "whisker", stroke: look.colour, fill: "none", d: `M0 ${down}V${up}${arrows}` });
}

// The lowest value at that many bits or fewer.
function stairs(points, toX, toY, box) {
  const order = [...points].sort((a, b) => a.x - b.x || a.y - b.y);
  let least = Infinity, path = "", last = null;
  for (const point of order) {
    if (point.y >= least) continue;
    path += last === null ? `M${toX(point.x)} ${box.top}V${toY(point.y)}` : `H${toX(point.x)}V${toY(point.y)}`;
    [least, last] = [point.y, point];
  }
  if (last) path += `H${box.right}`;
  return svg("path", { class: "step", d: path });
}

// What each look stands for; a button that hides a series where `redraw` can follow it.
function legend(series, hidden, redraw, key) {
  const named = new Map(series.filter((one) => known(one.name)).map((one) => [one.name, one]));
  if (redraw && named.size < 2) return "";
  return html("div", { class: "legend", role: "group", "aria-label": key ?? "Series" }, key ? html("span", { class: "key" }, key) : null, [...named.values()].map((one) => {
    const swatch = svg("svg", { viewBox: "-11 -6 22 12", "aria-hidden": "true" },
      one.wire ? svg("line", { x1: -11, x2: 11, y1: 0, y2: 0, stroke: one.look.colour, "stroke-width": 1.75 }) : null,
      svg("path", { d: one.look.shape, fill: one.look.colour }));
    if (!redraw) return html("span", {}, swatch, one.name);
    const flip = () => {
      if (!hidden.delete(one.name)) hidden.add(one.name);
      redraw();
    };
    return html("button", { type: "button", "aria-pressed": String(!hidden.has(one.name)), onclick: flip }, swatch, one.name);
  }));
}

// A column a run: parts stacked as bars, or each as a mark at its own height.
function columns(host, { rows, parts, label: name, stacked, write }) {
  const plot = canvas(host, name, 280);
  const width = Number(plot.getAttribute("width"));
  const box = { left: margin.left, right: width - margin.right, top: margin.top, bottom: 280 - margin.bottom };
  const heights = rows.map((row) => {
    const values = parts.map((part) => row.values[part] ?? 0);
    return stacked ? values.reduce((a, b) => a + b, 0) : Math.max(...values);
  });
  const toY = makeScale([0, ...heights], [box.bottom, box.top], { zero: true });
  const step = (box.right - box.left) / Math.max(rows.length, 8);
  const named = step > 26;
  const toX = (i) => box.left + i * step;
  toX.ticks = [];
  axes(plot, toX, toY, box, { x: named ? "run" : `${rows.length} runs`, y: name });
  const items = [];
  const look = new Map(parts.map((part, i) => [part, { colour: `var(--s${i % 7})`, shape: stacked ? shapes[1] : shapes[i % shapes.length] }]));
  rows.forEach((row, i) => {
    let below = 0;
    parts.forEach((part) => {
      const value = row.values[part];
      if (!known(value)) return;
      const data = { fill: look.get(part).colour, "data-run": row.run, "data-part": part, "data-value": row.exact?.[part] ?? value };
      plot.append(stacked
        ? svg("rect", { ...data, x: toX(i) + 0.12 * step, width: Math.max(0.76 * step, 0.8), y: toY(below + value), height: Math.max(toY(below) - toY(below + value), 0) })
        : svg("path", { ...data, class: "mark", d: look.get(part).shape, transform: `translate(${toX(i) + step / 2} ${toY(value)}) scale(${step < 8 ? 0.6 : 1})` }));
      if (stacked) below += value;
    });
    if (named) plot.append(svg("text", { x: toX(i) + step / 2, y: box.bottom + 18, "text-anchor": "middle" },
      row.run.length * 7 > step ? `…${row.run.slice(-Math.max(1, Math.floor(step / 7.5) - 2))}` : row.run));
    items.push({
      x: toX(i) + step / 2, y: stacked ? toY(heights[i] / 2) : toY(heights[i]), title: row.run, pick: () => choose(row.run), wide: step,
      lines: parts.filter((part) => known(row.values[part])).map((part) => [part, write(row.values[part])]),
    });
  });
  host.replaceChildren(legend(parts.map((part) => ({ name: part, look: look.get(part) }))), plot);
  interactive(plot, items, {
    reach: 400,
    outline: (item) => svg("rect", { class: "cursor", x: item.x - item.wide / 2, width: item.wide, y: box.top, height: box.bottom - box.top }),
  });
}
