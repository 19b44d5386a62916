// One run, or two, layer by layer: a map of bits, and curves of error and information.
function linearsOf(run) {
  const linears = DATA.runs[run]?.linears;
  return linears ? { ...DATA.shapes[linears.shape], ...linears } : null;
}

function describeLinear(linears, i) {
  const widths = Object.entries(linears.bits[i]).map(([width, count]) => `${count} × ${width} bit`);
  const others = ["average_bits", "effective_bits", "output_error"].filter((name) => name !== state.metric);
  return [...others.map((name) => [label(name), known(linears[name][i]) ? linears[name][i].toPrecision(4) : "–"]),
    ["channels", widths.join(", ")], ["shape", `${linears.rows[i]} × ${linears.columns[i]}`]];
}

function drawLayers() {
  const runs = Object.keys(DATA.runs).filter((run) => linearsOf(run));
  const host = byId("layer-controls");
  if (!runs.length) {
    for (const name of ["map", "error", "information"]) empty(byId(name), "No run has compressed its linears yet.");
    host.replaceChildren();
    return;
  }
  const measured = DATA.layer_metrics.filter((name) => linearsOf(state.run)?.[name]?.some(known));
  if (!measured.includes(state.metric)) state.metric = measured[0];
  const told = DATA.information.filter((name) => measured.includes(name));
  if (!told.includes(state.information)) state.information = told[0];
  host.replaceChildren(
    choice("Run", runs, state.run, choose),
    choice("beside", ["", ...runs.filter((run) => run !== state.run)], state.other,
      (run) => { state.other = run; drawLayers(); }, (run) => run || "none"),
    choice("Map of", measured, state.metric, (name) => { state.metric = name; drawLayers(); }, label),
    told.length > 1 ? choice("Information", told, state.information,
      (name) => { state.information = name; drawLayers(); }, label) : "");
  byId("layers-caption").textContent = "Blocks from left to right, the linears of a block from top to bottom. " +
    (state.other ? `Dashed: ${state.other}.` : "Choose a run here, in the table, or on a plot.");
  describeRun();
  const pair = [state.run, state.other].filter((run) => linearsOf(run));
  drawMaps(byId("map"), pair);
  curves(byId("error"), pair, "output_error", "kind");
  if (told.length) curves(byId("information"), pair, state.information, "site_kind");
  else empty(byId("information"), "This run measured no information between channels.");
}

function describeRun() {
  const rows = DATA.rows.filter((row) => row.run === state.run);
  const facts = DATA.varying.filter((name) => name !== "text").map((name) => `${name} ${show(name, rows[0][name])}`);
  const losses = rows.map((row) => `${row.text ?? ""} ${show("compressed", row.compressed)} (dense ${show("dense", row.dense)})`);
  const command = DATA.runs[state.run].command;
  byId("chosen").replaceChildren(html("b", {}, state.run), facts.length ? ` · ${facts.join(", ")}` : "",
    ` · perplexity ${losses.join(", ")} · effective bits ${show("effective_bits", rows[0].effective_bits)}`,
    command ? html("code", {}, command) : "");
}

function drawMaps(host, runs) {
  const values = runs.flatMap((run) => linearsOf(run)[state.metric] ?? []).filter(known);
  const range = [Math.min(...values), Math.max(...values)];
  const log = state.metric === "output_error" && range[0] > 0 && wide(values);
  host.replaceChildren(...runs.map((run) => heatMap(run, range, log, leftOf(runs))), ramp(range, log, leftOf(runs)));
}

// Room for the names of the linears.
const leftOf = (runs) => Math.min(Math.max(...runs.flatMap((run) => linearsOf(run).kind.map((kind) => kind.length))) * 6.9 + 14, 230);

const placeIn = ([low, high], log) => (value) =>
  low === high ? 0.5 : log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);

function heatMap(run, range, log, left) {
  const linears = linearsOf(run);
  const kinds = [...new Set(linears.kind)], blocks = [...new Set(linears.block)].sort((a, b) => a - b);
  const width = Math.max(byId("map").clientWidth, 300);
  const across = Math.min((width - left) / blocks.length, 84), down = kinds.length > 24 ? 13 : 25;
  const bottom = 24 + kinds.length * down;
  const plot = canvas(byId("map"), `${label(state.metric)} of ${run}`, bottom + 22);
  plot.append(svg("text", { class: "name", x: 0, y: 13 }, `${label(state.metric)} · ${run}`));
  kinds.forEach((kind, row) => plot.append(svg("text", {
    x: left - 10, y: 24 + (row + 0.5) * down + 4, "text-anchor": "end",
  }, kind.length * 6.9 > left ? `…${kind.slice(-Math.floor(left / 6.9) + 2)}` : kind)));
  const every = Math.ceil(24 / across);
  blocks.forEach((block, i) => i % every || plot.append(svg("text", {
    x: left + (i + 0.5) * across, y: bottom + 16, "text-anchor": "middle" }, block)));
  const share = placeIn(range, log), column = new Map(blocks.map((block, i) => [block, i]));
  const row = new Map(kinds.map((kind, i) => [kind, i]));
  const items = linears.kind.map((kind, i) => {
    const value = linears[state.metric]?.[i];
    const x = left + column.get(linears.block[i]) * across, y = 24 + row.get(kind) * down;
    const colour = known(value) ? shade(share(value)) : null;
    plot.append(svg("rect", {
      x: x + 0.75, y: y + 0.75, width: Math.max(across - 1.5, 0.5), height: down - 1.5, rx: Math.min(3, across / 6),
      fill: colour ? css(colour) : "var(--grid)", "data-run": run, "data-linear": linears.name[i],
      "data-metric": state.metric, "data-value": value,
    }));
    if (colour && across >= 40 && down > 20) plot.append(svg("text", {
      class: `cell ${isLight(colour) ? "on-light" : "on-dark"}`, x: x + across / 2, y: y + down / 2 + 4, "text-anchor": "middle",
    }, brief(value)));
    return { x: x + across / 2, y: y + down / 2, title: `${linears.name[i]}`, lines: [
      [label(state.metric), known(value) ? String(value) : "–"], ...describeLinear(linears, i)] };
  });
  interactive(plot, items, {
    reach: Math.max(across, down) * 0.75,
    outline: (item) => svg("rect", { class: "cursor", x: item.x - across / 2, y: item.y - down / 2, width: across, height: down, rx: 3 }),
  });
  return plot;
}

const brief = (value) => (value !== 0 && Math.abs(value) < 0.01 ? value.toExponential(1) : value.toPrecision(3));

function ramp(range, log, left) {
  if (range[0] === range[1]) return html("p", { class: "caption" }, `Every linear: ${brief(range[0])}.`);
  const steps = 60, wide = 200, total = left + wide + 130;
  const plot = svg("svg", { class: "ramp", viewBox: `0 0 ${total} 26`, width: total, height: 26, role: "img",
    "aria-label": `colours from ${brief(range[0])} to ${brief(range[1])}` });
  for (let i = 0; i < steps; i++) plot.append(svg("rect", { x: left + (i * wide) / steps, y: 8, width: wide / steps + 0.5, height: 9, fill: css(shade(i / (steps - 1))) }));
  plot.append(svg("text", { x: left - 8, y: 17, "text-anchor": "end" }, brief(range[0])),
    svg("text", { x: left + wide + 8, y: 17 }, brief(range[1]) + (log ? " (log)" : "")));
  return plot;
}

// A line for each kind of linear, or of site, over the blocks.
function curves(host, runs, metric, kindColumn) {
  const families = (linears) => (kindColumn === "kind" ? linears.family : linears.site_kind.map((kind) => kind.replace(/(?<=\.)\d+(?=\.)/, "*")));
  const look = looks([...new Set(runs.flatMap((run) => families(linearsOf(run))))]);
  const series = [], noisy = metric === "pairwise_information";
  for (const run of runs) {
    const linears = linearsOf(run), named = families(linears), lines = new Map();
    linears[kindColumn].forEach((kind, i) => {
      if (!known(linears[metric][i])) return;
      if (!lines.has(kind)) lines.set(kind, { name: named[i], rows: new Map() });
      const { rows } = lines.get(kind);
      if (!rows.has(linears.block[i])) rows.set(linears.block[i], i);
    });
    for (const { name, rows } of lines.values()) {
      const order = [...rows.entries()].sort((a, b) => a[0] - b[0]);
      const point = (source) => ([block, i]) => ({ x: block, y: linears[source][i], run,
        title: kindColumn === "kind" ? linears.name[i] : `${name}, block ${block}`,
        lines: [["run", run], [label(metric), String(linears[metric][i])],
          ...(noisy && known(linears.information_noise[i]) ? [["noise", String(linears.information_noise[i])]] : [])] });
      series.push({ name, look: look.get(name), wire: true, variant: run === state.run ? null : "other", points: order.map(point(metric)) });
      if (noisy && run === state.run) series.push({ name, look: look.get(name), wire: true, variant: "noise",
        points: order.filter(([, i]) => known(linears.information_noise?.[i])).map(point("information_noise")) });
    }
  }
  if (!series.length) return empty(host, "No number of this kind was recorded.");
  const hidden = state.hidden[metric] ??= new Set();
  chart(host, { x: { label: "block", discrete: false }, y: { label: label(metric) }, series, hidden,
    redraw: () => curves(host, runs, metric, kindColumn) });
}
