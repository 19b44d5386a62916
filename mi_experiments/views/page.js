// What is shown now, and the controls that change it.
const state = {
  run: DATA.chosen, other: "", means: DATA.means.length > 0, colour: DATA.colour,
  text: DATA.rows.find((row) => known(row.compressed))?.text ?? DATA.rows[0].text,
  loss: DATA.losses[0], axis: DATA.axes[0], metric: DATA.layer_metrics[0],
  information: DATA.information[0], hidden: { frontier: new Set(), calibration: new Set() },
};

function choose(run) {
  if (!linearsOf(run)) return;
  state.run = run;
  if (state.other === run) state.other = "";
  drawPlots();
  drawTable();
  drawLayers();
}

function choice(name, values, value, onchange, write = (one) => one) {
  return html("label", {}, name, html("select", { onchange: (event) => onchange(values[event.target.selectedIndex]) },
    values.map((one) => html("option", one === value ? { selected: "" } : {}, write(one)))));
}

function segments(name, options, value, onchange) {
  return html("span", { class: "segments", role: "group", "aria-label": name }, options.map(([text, one]) =>
    html("button", { type: "button", "aria-pressed": String(one === value), onclick: () => onchange(one) }, text)));
}

function drawControls() {
  const change = (name) => (value) => {
    state[name] = value;
    if (name === "colour") for (const plot of ["frontier", "calibration"]) state.hidden[plot].clear();
    drawControls();
    drawPlots();
    if (name === "means") drawTable();
    if (name === "means") drawCosts();
  };
  const texts = [...new Set(DATA.rows.map((row) => row.text))].filter(known);
  const settings = varyingNow().filter((name) => name !== "text");
  if (state.colour && !settings.includes(state.colour)) state.colour = settings[0] ?? null;
  const parts = [
    DATA.means.length ? segments("Rows", [["Runs", false], [`Means over ${DATA.over.join(", ")}`, true]], state.means, change("means")) : null,
    texts.length > 1 ? choice("Text", texts, state.text, change("text")) : null,
    DATA.losses.length > 1 ? choice("Loss", DATA.losses, state.loss, change("loss"), label) : null,
    settings.length ? choice("Colour", settings, state.colour, change("colour")) : null,
  ];
  const focused = [...byId("controls").querySelectorAll("button, select")].indexOf(document.activeElement);
  byId("controls").replaceChildren(...parts.filter(known));
  byId("controls").querySelectorAll("button, select")[focused]?.focus();
}

const varyingNow = () => (state.means ? DATA.mean_varying : DATA.varying);

function pointOf(row, x) {
  const y = state.loss, spread = row[y + DATA.interval], aside = row[x + DATA.interval];
  const facts = varyingNow().filter((name) => name !== "text").map((name) => [name, show(name, row[name])]);
  const lines = [...facts, [label("effective_bits"), withInterval(row, "effective_bits")], [label(y), withInterval(row, y)]];
  if (!varyingNow().includes(x) && x !== "effective_bits") lines.push([label(x), show(x, row[x])]);
  return {
    x: row[x], y: row[y], row, run: row.run, ring: true, lines,
    title: state.means ? `Mean of ${row[y + DATA.count]} runs` : row.run,
    low: known(spread) ? row[y] - spread : null, high: known(spread) ? row[y] + spread : null,
    left: known(aside) ? row[x] - aside : null, right: known(aside) ? row[x] + aside : null,
    pick: row.run ? () => choose(row.run) : null,
  };
}

const drawable = (rows, x) => rows.filter((row) => row.text === state.text && row.status === "completed" && known(row[state.loss]) && known(row[x]));

function guidesOf(rows) {
  // Zero has no place on the logarithmic axis that widely spread values get.
  if (state.loss !== "compressed") return wide(rows.map((row) => row[state.loss])) ? [] : [{ y: 0, label: state.loss === "excess" ? "dense" : "baseline" }];
  return ["dense", "floor"].flatMap((name) => {
    const values = [...new Set(rows.map((row) => row[name]).filter(known))];
    return values.length === 1 ? [{ y: values[0], label: `${name} ${values[0].toFixed(4)}` }] : [];
  });
}

function drawPlots() {
  const look = looks(DATA.rows.map((row) => row[state.colour]));
  const named = (row) => (state.colour ? show(state.colour, row[state.colour]) : null);
  const plain = (row) => (state.colour ? look.get(row[state.colour] ?? null) : { colour: "var(--s0)", shape: shapes[0] });
  drawFrontier(named, plain);
  drawCalibration(named, plain);
}

function drawFrontier(named, look) {
  const host = byId("frontier"), x = "effective_bits";
  const rows = drawable(state.means ? DATA.means : DATA.rows, x);
  const text = known(state.text) ? ` on ${state.text}` : "";
  byId("frontier-caption").textContent = `${capital(label(state.loss))}${text} against all that is stored. Lower left is better; ` +
    (state.loss === "difference" ? "zero is the baseline." : "the stepped line is the lowest at that many bits or fewer.");
  if (!rows.length) return empty(host, "No completed run has a perplexity yet.");
  const series = new Map();
  for (const row of sortByColour(rows)) {
    const name = named(row);
    if (!series.has(name)) series.set(name, { name, look: look(row), points: [] });
    series.get(name).points.push(pointOf(row, x));
  }
  chart(host, {
    x: { label: label(x) }, y: { label: label(state.loss) }, series: [...series.values()], frontier: rows.length > 1 && state.loss !== "difference",
    guides: guidesOf(drawable(DATA.rows, x)), hidden: state.hidden.frontier, redraw: drawPlots, key: state.colour,
    faint: faintPoints(x, look),
  });
}

const capital = (text) => text[0].toUpperCase() + text.slice(1);
const sortByColour = (rows) => state.colour ? [...rows].sort((a, b) => order(a[state.colour], b[state.colour])) : rows;
const order = (a, b) => (isNumber(a) && isNumber(b) ? a - b : compareText(a, b));
const faintPoints = (x, look) => state.means
  ? drawable(DATA.rows, x).map((row) => ({ x: row[x], y: row[state.loss], look: look(row) })) : [];

function drawCalibration(named, look) {
  const host = byId("calibration"), x = state.axis;
  const rows = drawable(state.means ? DATA.means : DATA.rows, x);
  const values = new Set(rows.map((row) => row[x]));
  const others = DATA.axes.filter((name) => new Set(DATA.rows.map((row) => row[name]).filter(known)).size > 1);
  const axes = [...new Set(["nsamples", ...others])].filter((name) => DATA.axes.includes(name));
  const caption = byId("calibration-caption");
  caption.replaceChildren(`${capital(label(state.loss))} against `, axes.length > 1
    ? html("select", { "aria-label": "Setting on the axis", onchange: (event) => { state.axis = axes[event.target.selectedIndex]; drawPlots(); } },
      axes.map((name) => html("option", name === x ? { selected: "" } : {}, label(name))))
    : label(x), "; lines join what differs in nothing else.");
  byId("calibration-title").textContent = x === "nsamples" ? "Calibration" : capital(x);
  if (values.size < 2) {
    const one = [...values][0];
    return empty(host, known(one) ? `Every run here has ${x} = ${show(x, one)}: nothing to compare along this axis yet.` : "No completed run has a perplexity yet.");
  }
  const series = new Map();
  for (const row of sortByColour(rows)) {
    const key = JSON.stringify(varyingNow().filter((name) => name !== x).map((name) => row[name] ?? null));
    if (!series.has(key)) series.set(key, { name: named(row), look: look(row), wire: true, points: [] });
    series.get(key).points.push(pointOf(row, x));
  }
  for (const one of series.values()) one.points.sort((a, b) => a.x - b.x);
  chart(host, {
    x: { label: label(x), discrete: true }, y: { label: label(state.loss) }, series: [...series.values()],
    guides: guidesOf(drawable(DATA.rows, x)), hidden: state.hidden.calibration, redraw: drawPlots, key: state.colour, faint: faintPoints(x, look),
  });
}

function drawCosts() {
  const order = [...new Set((state.means ? DATA.rows : sortRows(DATA.rows)).map((row) => row.run))];
  for (const [name, unit, stacked, write] of [
    ["time", "seconds", true, (value) => `${value.toFixed(2)} s`],
    ["memory", "memory", false, (value) => `${value.toFixed(2)} GB`]]) {
    const rows = order.map((run) => {
      const values = DATA.runs[run][unit];
      return { run, exact: values, values: name === "memory" ? Object.fromEntries(Object.entries(values).map(([part, bytes]) => [part, bytes / 1e9])) : values };
    });
    const parts = [...new Set(rows.flatMap((row) => Object.keys(row.values)))];
    if (!parts.length) empty(byId(name), "No run has recorded this yet.");
    else columns(byId(name), { rows, parts, stacked, write, label: name === "time" ? "seconds" : "GB" });
  }
}

function drawSummary() {
  const counts = new Map();
  for (const run of Object.values(DATA.runs)) counts.set(run.status, (counts.get(run.status) ?? 0) + 1);
  const total = Object.keys(DATA.runs).length;
  const differ = DATA.varying.filter((name) => name !== "text");
  byId("summary").replaceChildren(html("b", {}, `${total} ${total === 1 ? "run" : "runs"}`), ": ",
    [...counts].map(([status, count]) => `${count} ${status}`).join(", "), ". ",
    differ.length ? "They differ in " : total > 1 ? "They differ in no setting." : "",
    ...differ.flatMap((name, i) => [i ? ", " : "", html("b", {}, name)]), differ.length ? "." : "");
  byId("common").replaceChildren(...DATA.common.map(([name, value]) =>
    html("div", {}, html("dt", {}, name), html("dd", {}, value))));
  byId("command").textContent = DATA.command;
}

const root = document.documentElement;
const dark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
function drawTheme() {
  byId("theme").textContent = dark() ? "Light" : "Dark";
}
byId("theme").addEventListener("click", () => {
  root.dataset.theme = dark() ? "light" : "dark";
  drawTheme();
});
byId("filter").addEventListener("input", drawTable);
byId("controls").addEventListener("submit", (event) => event.preventDefault());

function drawAll() {
  drawTheme();
  drawPlots();
  drawTable();
  drawLayers();
  drawCosts();
}
let width = innerWidth;
addEventListener("resize", () => {
  if (width !== innerWidth) requestAnimationFrame(drawAll);
  width = innerWidth;
});
addEventListener("scroll", hideTip, { passive: true });
drawSummary();
drawControls();
drawAll();
