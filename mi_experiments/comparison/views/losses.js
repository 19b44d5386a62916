// What was measured, or what is lost, over effective bits and over calibration.
const varyingNow = () => (state.means ? DATA.mean_varying : DATA.varying).filter((name) => name !== "text");
const drawable = (rows, x) =>
  rows.filter(
    (row) => row.text === state.text && row.status === "completed" && known(row[state.loss]) && known(row[x]),
  );

function drawLosses() {
  state.looks = looks(DATA.rows.map((row) => row[state.colour]));
  drawFrontier();
  drawCalibration();
}

function drawFrontier() {
  const x = "effective_bits";
  const host = byId("frontier");
  const rows = drawable(state.means ? DATA.means : DATA.rows, x);
  const what = known(state.text) ? `${label(state.loss)} on ${state.text}` : label(state.loss);
  const rising = DATA.rising.includes(state.loss);
  const stepped = !state.loss.startsWith("difference");
  const second = stepped
    ? `The stepped line is the ${rising ? "highest" : "lowest"} at that many bits or fewer.`
    : "Zero is the baseline.";
  byId("frontier-caption").textContent =
    `${capital(what)} against all that is stored; ${rising ? "upper" : "lower"} left is better. ${second}`;
  if (!rows.length) return empty(host, `No completed run has a ${label(DATA.losses[0])} yet.`);
  const series = seriesOf(rows, x, (row) => row[state.colour] ?? null, false);
  return drawLoss(host, x, series, {
    frontier: stepped && rows.length > 1,
    discrete: false,
    name: "frontier",
  });
}

function drawCalibration() {
  const host = byId("calibration");
  const x = state.axis;
  const rows = drawable(state.means ? DATA.means : DATA.rows, x);
  const values = new Set(rows.map((row) => row[x]));
  drawAxisChoice(x);
  if (values.size === 0) return empty(host, `No completed run has a ${label(DATA.losses[0])} yet.`);
  if (values.size === 1) {
    const same = `${x} = ${show(x, [...values][0])}`;
    return empty(host, `Every run here has ${same}: nothing to compare along this axis yet.`);
  }
  const others = varyingNow().filter((name) => name !== x);
  const series = seriesOf(rows, x, (row) => JSON.stringify(others.map((name) => row[name] ?? null)), true);
  for (const one of series) one.points.sort((a, b) => a.x - b.x);
  return drawLoss(host, x, series, { frontier: false, discrete: true, name: "calibration" });
}

function drawAxisChoice(x) {
  const varied = DATA.axes.filter(
    (name) => new Set(DATA.rows.map((row) => row[name]).filter(known)).size > 1,
  );
  const axes = DATA.axes.filter((name) => name === "nsamples" || varied.includes(name));
  const change = (event) => {
    state.axis = axes[event.target.selectedIndex];
    drawCalibration();
    byId("calibration-caption").querySelector("select").focus();
  };
  const options = axes.map((name) => html("option", name === x ? { selected: "" } : {}, label(name)));
  const select = html("select", { "aria-label": "Setting on the axis", onchange: change }, options);
  byId("calibration-title").textContent = x === "nsamples" ? "Calibration" : capital(x);
  byId("calibration-caption").replaceChildren(
    `${capital(label(state.loss))} against `,
    axes.length > 1 ? select : label(x),
    "; lines join what differs in nothing else.",
  );
}

function drawLoss(host, x, series, { frontier, discrete, name }) {
  const faint = state.means
    ? drawable(DATA.rows, x).map((row) => ({ x: row[x], y: row[state.loss], look: lookOf(row) }))
    : [];
  chart(host, {
    x: { label: label(x), discrete },
    y: { label: label(state.loss), rising: DATA.rising.includes(state.loss) },
    series,
    faint,
    frontier,
    guides: guidesOf(drawable(DATA.rows, x)),
    hidden: state.hidden[name],
    redraw: drawLosses,
    key: state.colour,
  });
}

const lookOf = (row) => state.looks.get(row[state.colour] ?? null);

// Rows by a key, in the order of their colour.
function seriesOf(rows, x, keyOf, wire) {
  const ordered = [...rows].sort((a, b) => compareValues(a[state.colour], b[state.colour]));
  const series = new Map();
  for (const row of ordered) {
    const key = keyOf(row);
    const name = state.colour ? show(state.colour, row[state.colour]) : null;
    if (!series.has(key)) series.set(key, { name, look: lookOf(row), wire, points: [] });
    series.get(key).points.push(pointOf(row, x));
  }
  return [...series.values()];
}

function pointOf(row, x) {
  const y = state.loss;
  const ends = (name) => {
    const width = row[name + DATA.interval];
    return known(width) ? [row[name] - width, row[name] + width] : [null, null];
  };
  const [[left, right], [low, high]] = [ends(x), ends(y)];
  const settings = varyingNow();
  const lines = settings.map((name) => [name, show(name, row[name])]);
  if (!settings.includes(x) && x !== "effective_bits") lines.push([label(x), show(x, row[x])]);
  lines.push(
    [label("effective_bits"), withInterval(row, "effective_bits")],
    [label(y), withInterval(row, y)],
  );
  const title = state.means ? `Mean of ${row[y + DATA.count]} runs` : row.run;
  const pick = row.run ? () => choose(row.run) : null;
  // What another model reaches is nothing that this one could: each has a frontier of its own.
  const model = JSON.stringify(DATA.models.map((name) => row[name] ?? null));
  return { x: row[x], y: row[y], left, right, low, high, run: row.run, ring: true, title, lines, pick, model };
}

function guidesOf(rows) {
  if (!state.loss.startsWith("compressed")) {
    // Zero has no place on the logarithmic axis that widely spread values get.
    const logarithmic = wide(rows.map((row) => row[state.loss]));
    return logarithmic ? [] : [{ y: 0, label: state.loss === "excess" ? "dense" : "baseline" }];
  }
  const floor = state.loss === "compressed" ? [["floor", "floor"]] : [];
  return [["dense", state.loss.replace("compressed", "dense")], ...floor].flatMap(([name, column]) => {
    const values = [...new Set(rows.map((row) => row[column]).filter(known))];
    return values.length === 1 ? [{ y: values[0], label: `${name} ${values[0].toFixed(4)}` }] : [];
  });
}
