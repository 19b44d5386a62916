// One run, or two, layer by layer: a map of all linears, and curves of error and information.
function linearsOf(run) {
  const linears = DATA.runs[run]?.linears;
  return linears ? { ...DATA.shapes[linears.shape], ...linears } : null;
}

function drawLayers() {
  const runs = Object.keys(DATA.runs).filter((run) => linearsOf(run));
  if (!runs.length) {
    for (const name of ["map", "error", "information"])
      empty(byId(name), "No run has compressed its linears yet.");
    return;
  }
  const measured = DATA.layer_metrics.filter((name) => linearsOf(state.run)[name].some(known));
  const told = DATA.information.filter((name) => measured.includes(name));
  if (!measured.includes(state.metric)) state.metric = measured[0];
  if (!told.includes(state.information)) state.information = told[0];
  drawLayerControls(runs, measured, told);
  drawChosen();
  const pair = [state.run, state.other].filter((run) => linearsOf(run));
  drawMaps(byId("map"), pair);
  curves(byId("error"), pair, "output_error", "kind");
  if (told.length) curves(byId("information"), pair, state.information, "site_kind");
  else empty(byId("information"), "This run measured no information between channels.");
}

function drawLayerControls(runs, measured, told) {
  const change = (name) => (value) => {
    state[name] = value;
    drawLayers();
  };
  const others = ["", ...runs.filter((run) => run !== state.run)];
  const controls = [
    choice("Run", runs, state.run, choose),
    choice("beside", others, state.other, change("other"), (run) => run || "none"),
    choice("Map of", measured, state.metric, change("metric"), label),
  ];
  if (told.length > 1)
    controls.push(choice("Information", told, state.information, change("information"), label));
  refill(byId("layer-controls"), controls);
  const hint = state.other ? `Dashed: ${state.other}.` : "Choose a run here, in the table, or on a plot.";
  byId("layers-caption").textContent =
    `Blocks from left to right, the linears of a block from top to bottom. ${hint}`;
}

function drawChosen() {
  const rows = DATA.rows.filter((row) => row.run === state.run);
  const facts = DATA.varying
    .filter((name) => name !== "text")
    .map((name) => `${name} ${show(name, rows[0][name])}`);
  const measured = DATA.losses
    .filter((name) => name.startsWith("compressed"))
    .map((name) => `${label(name)} ${rows.map((row) => beforeAndAfter(row, name)).join(", ")}`);
  const parts = [
    facts.join(", "),
    ...measured,
    `effective bits ${show("effective_bits", rows[0].effective_bits)}`,
  ];
  const { command } = DATA.runs[state.run];
  const told = parts.filter(Boolean).map((part) => ` · ${part}`);
  byId("chosen").replaceChildren(html("b", {}, state.run), ...told, command ? html("code", {}, command) : "");
}

function beforeAndAfter(row, name) {
  const dense = name.replace("compressed", "dense");
  return `${row.text ?? ""} ${show(name, row[name])} (dense ${show(dense, row[dense])})`;
}

function drawMaps(host, runs) {
  const values = runs.flatMap((run) => linearsOf(run)[state.metric]).filter(known);
  const range = [Math.min(...values), Math.max(...values)];
  const log = state.metric === "output_error" && wide(values);
  const longest = Math.max(...runs.flatMap((run) => linearsOf(run).kind.map((kind) => kind.length)));
  const left = Math.min(longest * 6.9 + 14, 230);
  host.replaceChildren(...runs.map((run) => heatMap(host, run, range, log, left)), ramp(range, log, left));
}

function heatMap(host, run, range, log, left) {
  const linears = linearsOf(run);
  const kinds = [...new Set(linears.kind)];
  const blocks = [...new Set(linears.block)].sort((a, b) => a - b);
  const across = Math.min((Math.max(host.clientWidth, 300) - left) / blocks.length, 84);
  const down = kinds.length > 24 ? 13 : 25;
  const [top, bottom] = [24, 24 + kinds.length * down];
  const plot = canvas(host, `${label(state.metric)} of ${run}`, bottom + 22);
  plot.append(svg("text", { class: "name", x: 0, y: 13 }, `${label(state.metric)} · ${run}`));
  kinds.forEach((kind, row) => {
    const at = { x: left - 10, y: top + (row + 0.5) * down + 4, "text-anchor": "end" };
    plot.append(svg("text", at, ending(kind, left + 6)));
  });
  const every = Math.ceil(24 / across);
  blocks.forEach((block, i) => {
    const at = { x: left + (i + 0.5) * across, y: bottom + 16, "text-anchor": "middle" };
    if (i % every === 0) plot.append(svg("text", at, block));
  });
  const items = linears.kind.map((kind, i) => {
    const value = linears[state.metric][i];
    const x = left + blocks.indexOf(linears.block[i]) * across;
    const y = top + kinds.indexOf(kind) * down;
    const colour = known(value) ? shade(share(value, range, log)) : null;
    plot.append(
      svg("rect", {
        x: x + 0.75,
        y: y + 0.75,
        width: Math.max(across - 1.5, 0.5),
        height: down - 1.5,
        rx: Math.min(3, across / 6),
        fill: colour ? css(colour) : "var(--grid)",
        "data-run": run,
        "data-linear": linears.name[i],
        "data-metric": state.metric,
        "data-value": value,
      }),
    );
    const middle = { x: x + across / 2, y: y + down / 2 };
    if (colour && across >= 40 && down > 20) {
      const ink = isLight(colour) ? "cell on-light" : "cell on-dark";
      plot.append(
        svg("text", { class: ink, x: middle.x, y: middle.y + 4, "text-anchor": "middle" }, brief(value)),
      );
    }
    return { ...middle, title: linears.name[i], lines: describeLinear(linears, i) };
  });
  const frame = ({ x, y }) => ({ x: x - across / 2, y: y - down / 2, width: across, height: down, rx: 3 });
  const outline = (item) => svg("rect", { class: "cursor", ...frame(item) });
  interactive(plot, items, { reach: Math.max(across, down) * 0.75, outline });
  return plot;
}

function share(value, [low, high], log) {
  if (low === high) return 0.5;
  return log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
}

function describeLinear(linears, i) {
  const widths = Object.entries(linears.bits[i]).map(([width, count]) => `${count} × ${width} bit`);
  const others = ["average_bits", "effective_bits", "output_error"].filter((name) => name !== state.metric);
  return [
    [label(state.metric), exact(linears[state.metric][i])],
    ...others.map((name) => [label(name), brief(linears[name][i], 5)]),
    ["channels", widths.join(", ")],
    ["shape", `${linears.rows[i]} × ${linears.columns[i]}`],
  ];
}

function ramp(range, log, left) {
  const [low, high] = range.map((value) => brief(value));
  if (range[0] === range[1]) return html("p", { class: "caption" }, `Every linear: ${low}.`);
  const [steps, width] = [60, 200];
  const plot = svg("svg", {
    class: "ramp",
    width: left + width + 130,
    height: 26,
    role: "img",
    "aria-label": `colours from ${low} to ${high}`,
  });
  for (let i = 0; i < steps; i++) {
    const bar = { x: left + (i * width) / steps, y: 8, width: width / steps + 0.5, height: 9 };
    plot.append(svg("rect", { ...bar, fill: css(shade(i / (steps - 1))) }));
  }
  plot.append(
    svg("text", { x: left - 8, y: 17, "text-anchor": "end" }, low),
    svg("text", { x: left + width + 8, y: 17 }, log ? `${high} (log)` : high),
  );
  return plot;
}

// A line for each kind of linear, or of site, over the blocks; experts of one kind share a look.
function curves(host, runs, metric, kindColumn) {
  const kin = (kind) => kind.replace(/(?<=\.)\d+(?=\.|$)/, "*");
  const look = looks(runs.flatMap((run) => linearsOf(run)[kindColumn].map(kin)));
  const series = [];
  for (const run of runs) {
    const linears = linearsOf(run);
    for (const [kind, members] of kindsOf(linears, metric, kindColumn)) {
      const name = kin(kind);
      const point = (source) => (i) => ({
        x: linears.block[i],
        y: linears[source][i],
        run,
        title: kindColumn === "kind" ? linears.name[i] : `${kind}, block ${linears.block[i]}`,
        lines: describePoint(linears, metric, run, i),
      });
      const one = { name, look: look.get(name), wire: true };
      const noise = metric === "pairwise_information" && run === state.run ? members : [];
      const heard = noise.filter((i) => known(linears.information_noise[i]));
      series.push({
        ...one,
        variant: run === state.run ? null : "other",
        points: members.map(point(metric)),
      });
      if (heard.length)
        series.push({ ...one, variant: "noise", points: heard.map(point("information_noise")) });
    }
  }
  if (!series.length) return empty(host, "No number of this kind was recorded.");
  const hidden = (state.hidden[metric] ??= new Set());
  const redraw = () => curves(host, runs, metric, kindColumn);
  return chart(host, { x: { label: "block" }, y: { label: label(metric) }, series, hidden, redraw });
}

// The linears with a number, by kind and in the order of their blocks; of a site, the first.
function kindsOf(linears, metric, kindColumn) {
  const kinds = new Map();
  linears[kindColumn].forEach((kind, i) => {
    if (!known(linears[metric][i])) return;
    if (!kinds.has(kind)) kinds.set(kind, new Map());
    if (!kinds.get(kind).has(linears.block[i])) kinds.get(kind).set(linears.block[i], i);
  });
  return [...kinds].map(([kind, members]) => [
    kind,
    [...members.values()].sort((a, b) => linears.block[a] - linears.block[b]),
  ]);
}

function describePoint(linears, metric, run, i) {
  const lines = [
    ["run", run],
    [label(metric), exact(linears[metric][i])],
  ];
  if (metric === "pairwise_information") lines.push(["noise", exact(linears.information_noise[i])]);
  return lines;
}
