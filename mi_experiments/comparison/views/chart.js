// One chart of points and lines: scales, axes, guides, the frontier, series, and a legend.
const height = 330;
const margin = { left: 58, right: 18, top: 26, bottom: 42 };

function empty(host, text) {
  host.replaceChildren(html("p", { class: "empty" }, text));
}

function canvas(host, description, size = height) {
  const width = Math.max(host.clientWidth, 260);
  const name = `${description}. Arrow keys move between points.`;
  return svg("svg", {
    class: "plot",
    viewBox: `0 0 ${width} ${size}`,
    width,
    height: size,
    tabindex: 0,
    role: "group",
    "aria-label": name,
  });
}

function insideOf(plot) {
  const [width, size] = ["width", "height"].map((name) => Number(plot.getAttribute(name)));
  return { left: margin.left, right: width - margin.right, top: margin.top, bottom: size - margin.bottom };
}

function axes(plot, x, y, box, names) {
  const grid = svg("g", { class: "grid" });
  for (const tick of y.ticks) {
    grid.append(
      svg("line", { x1: box.left, x2: box.right, y1: y(tick), y2: y(tick) }),
      svg("text", { x: box.left - 9, y: y(tick) + 4, "text-anchor": "end", "data-y": tick }, tickText(tick)),
    );
  }
  for (const tick of x.ticks) {
    const below = { x: x(tick), y: box.bottom + 18, "text-anchor": "middle", "data-x": tick };
    grid.append(
      svg("line", { x1: x(tick), x2: x(tick), y1: box.bottom, y2: box.bottom + 4 }),
      svg("text", below, tickText(tick)),
    );
  }
  grid.append(svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  const right = { class: "name", x: box.right, y: box.bottom + 37, "text-anchor": "end" };
  plot.append(grid, svg("text", { class: "name", x: 0, y: 12 }, names.y), svg("text", right, names.x));
}

// Draws {name, look, wire, variant, points} and what lies below them; a variant is `other` (a run
// beside the first one) or `noise`, and a point is {x, y, title, lines, run, ring, pick} with the
// ends of its intervals: low, high, left, right.
function chart(host, options) {
  const { x, y, series, guides = [], faint = [], frontier = false, hidden, redraw, key } = options;
  const plot = canvas(host, `${y.label} against ${x.label}`);
  const box = insideOf(plot);
  const shown = series.filter((one) => !hidden.has(one.name));
  const points = shown.flatMap((one) => one.points);
  const [toX, toY] = scales(options, box);
  axes(plot, toX, toY, box, { x: x.label, y: y.label });
  for (const guide of guides) plot.append(level(guide, toY, box));
  if (frontier)
    for (const model of new Set(points.map((point) => point.model)))
      plot.append(stairs(points.filter((point) => point.model === model), toX, toY, box, y.rising));
  for (const { x: across, y: up, look } of faint) {
    const mark = svg("path", { class: "mark", d: look.shape, fill: look.colour, transform: "scale(0.7)" });
    plot.append(svg("g", { class: "faint", transform: `translate(${toX(across)} ${toY(up)})` }, mark));
  }
  const size = points.length > 150 ? 0.62 : points.length > 60 ? 0.8 : 1;
  const items = shown.flatMap((one) => drawSeries(plot, one, toX, toY, box, size));
  for (const guide of guides)
    plot.append(svg("text", { class: "label", x: box.left + 6, y: toY(guide.y) - 5 }, guide.label));
  host.replaceChildren(legend(series, hidden, redraw, key), plot);
  interactive(plot, items);
}

function scales({ x, series, guides = [], faint = [] }, box) {
  // Noise is far below what it is compared with, or it is in the picture: it never widens an axis.
  const all = series.filter((one) => one.variant !== "noise").flatMap((one) => one.points);
  const across = [
    ...all.flatMap((point) => [point.x, point.left, point.right]),
    ...faint.map((one) => one.x),
  ].filter(known);
  const up = within(
    all,
    [...faint, ...guides].map((one) => one.y),
  );
  const distinct = [...new Set(all.map((point) => point.x))].sort((a, b) => a - b);
  const toX = makeScale(across, [box.left, box.right], {
    log: x.discrete && wide(distinct),
    ticks: x.discrete && distinct.length <= 9 ? distinct : null,
    count: Math.max(3, Math.floor((box.right - box.left) / 90)),
  });
  return [toX, makeScale(up, [box.bottom, box.top], { log: wide(up) })];
}

// The values that the axis spans. An interval of few samples is wide: it counts for no more than
// a third of the spread of the points themselves, and ends in an arrow where it leaves the plot.
function within(points, others) {
  const values = [...points.map((point) => point.y), ...others];
  const low = Math.min(...values);
  const high = Math.max(...values);
  const room = (high - low) * 0.35 || Infinity;
  const ends = points.flatMap((point) => [point.low, point.high]).filter(known);
  return [...values, ...ends.map((end) => Math.min(Math.max(end, low - room), high + room))];
}

const level = (guide, toY, box) =>
  svg("line", {
    class: "guide",
    x1: box.left,
    x2: box.right,
    y1: toY(guide.y),
    y2: toY(guide.y),
    "data-y": guide.y,
  });

// The lowest value at that many bits or fewer; the highest, if more is better.
function stairs(points, toX, toY, box, rising) {
  const sign = rising ? -1 : 1;
  const edge = rising ? box.bottom : box.top;
  let [least, path] = [Infinity, ""];
  for (const point of [...points].sort((a, b) => a.x - b.x || sign * (a.y - b.y))) {
    if (sign * point.y >= least) continue;
    path += path ? `H${toX(point.x)}V${toY(point.y)}` : `M${toX(point.x)} ${edge}V${toY(point.y)}`;
    least = sign * point.y;
  }
  return svg("path", { class: "step", d: path && `${path}H${box.right}` });
}

// Returns the points as items that pointer and keys can reach.
function drawSeries(plot, { look, wire, variant = null, points }, toX, toY, box, size) {
  const seen = points.filter(({ y }) => variant !== "noise" || (toY(y) <= box.bottom && toY(y) >= box.top));
  if (wire) {
    const path = seen.map((point, i) => `${i ? "L" : "M"}${toX(point.x)} ${toY(point.y)}`).join("");
    plot.append(svg("path", { class: variant ? `wire ${variant}` : "wire", d: path, stroke: look.colour }));
  }
  return seen.map((point) => {
    const place = { x: toX(point.x), y: toY(point.y) };
    const parts = known(point.low)
      ? [upright(look, toY(point.low) - place.y, toY(point.high) - place.y, box, place)]
      : [];
    if (known(point.left)) {
      const ends = { x1: toX(point.left) - place.x, x2: toX(point.right) - place.x, y1: 0, y2: 0 };
      parts.push(svg("line", { class: "whisker", stroke: look.colour, ...ends }));
    }
    const smaller = size < 1 ? `scale(${size})` : null;
    if (!variant)
      parts.push(svg("path", { class: "mark", d: look.shape, fill: look.colour, transform: smaller }));
    if (point.ring && known(point.run) && point.run === state.run)
      parts.push(svg("circle", { class: "ring", r: 8.5 }));
    plot.append(
      svg(
        "g",
        {
          class: "point",
          transform: `translate(${place.x} ${place.y})`,
          role: "img",
          "data-x": point.x,
          "data-y": point.y,
          "data-low": point.low,
          "data-high": point.high,
          "data-run": point.run,
          "aria-label": [point.title, ...point.lines.map((line) => line.join(" "))].join(", "),
        },
        parts,
      ),
    );
    return { ...place, title: point.title, lines: point.lines, pick: point.pick };
  });
}

// An interval, with an arrow where it leaves the plot.
function upright(look, low, high, box, place) {
  const [bottom, top] = [box.bottom - place.y, box.top - place.y];
  const [down, up] = [Math.min(low, bottom), Math.max(high, top)];
  const arrows =
    (low > bottom ? `M-4 ${down - 5}L0 ${down}L4 ${down - 5}` : "") +
    (high < top ? `M-4 ${up + 5}L0 ${up}L4 ${up + 5}` : "");
  return svg("path", { class: "whisker", stroke: look.colour, fill: "none", d: `M0 ${down}V${up}${arrows}` });
}

// What each look stands for; a button that hides a series where `redraw` can follow it.
function legend(series, hidden, redraw, key) {
  const named = new Map(series.filter((one) => known(one.name)).map((one) => [one.name, one]));
  if (redraw && named.size < 2) return "";
  const entries = [...named.values()].map(({ name, look, wire }) => {
    const line = wire
      ? svg("line", { x1: -11, x2: 11, y1: 0, y2: 0, stroke: look.colour, "stroke-width": 1.75 })
      : null;
    const mark = svg("path", { d: look.shape, fill: look.colour });
    const swatch = svg("svg", { viewBox: "-11 -6 22 12", "aria-hidden": "true" }, line, mark);
    if (!redraw) return html("span", {}, swatch, name);
    const flip = () => {
      if (!hidden.delete(name)) hidden.add(name);
      redraw();
    };
    return html(
      "button",
      { type: "button", "aria-pressed": String(!hidden.has(name)), onclick: flip },
      swatch,
      name,
    );
  });
  const heading = key ? html("span", { class: "key" }, key) : null;
  return html("div", { class: "legend", role: "group", "aria-label": key ?? "Series" }, heading, entries);
}
