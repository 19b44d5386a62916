// What is shown now, the controls that change it, and the first drawing.
const state = {
  run: DATA.chosen,
  other: "",
  means: DATA.means.length > 0,
  colour: DATA.colour,
  text: DATA.rows.find((row) => known(row[DATA.losses[0]]))?.text ?? DATA.rows[0].text,
  loss: DATA.losses[0],
  axis: DATA.axes[0],
  metric: DATA.layer_metrics[0],
  information: DATA.information[0],
  hidden: { frontier: new Set(), calibration: new Set() },
};

function choose(run) {
  if (!linearsOf(run)) return;
  state.run = run;
  if (state.other === run) state.other = "";
  drawLosses();
  drawTable();
  drawLayers();
}

function choice(name, values, value, onchange, write = (one) => one) {
  const options = values.map((one) => html("option", one === value ? { selected: "" } : {}, write(one)));
  const change = (event) => onchange(values[event.target.selectedIndex]);
  return html("label", {}, name, html("select", { onchange: change }, options));
}

function segments(name, options, value, onchange) {
  const buttons = options.map(([text, one]) =>
    html(
      "button",
      { type: "button", "aria-pressed": String(one === value), onclick: () => onchange(one) },
      text,
    ),
  );
  return html("span", { class: "segments", role: "group", "aria-label": name }, buttons);
}

// Replace controls, and leave the keyboard where it was.
function refill(host, controls) {
  const reach = () => [...host.querySelectorAll("button, select")];
  const place = reach().indexOf(document.activeElement);
  host.replaceChildren(...controls);
  reach()[place]?.focus();
}

function drawControls() {
  const change = (name) => (value) => {
    state[name] = value;
    if (name === "colour") for (const plot of ["frontier", "calibration"]) state.hidden[plot].clear();
    drawControls();
    drawLosses();
    if (name === "means") drawTable();
    if (name === "means") drawCosts();
  };
  const texts = [...new Set(DATA.rows.map((row) => row.text))].filter(known);
  const settings = varyingNow();
  if (!settings.includes(state.colour)) state.colour = settings[0] ?? null;
  const rows = [
    ["Runs", false],
    [`Means over ${DATA.over.join(", ")}`, true],
  ];
  const controls = [];
  if (DATA.means.length) controls.push(segments("Rows", rows, state.means, change("means")));
  if (texts.length > 1) controls.push(choice("Text", texts, state.text, change("text")));
  if (DATA.losses.length > 1) controls.push(choice("Loss", DATA.losses, state.loss, change("loss"), label));
  if (settings.length) controls.push(choice("Colour", settings, state.colour, change("colour")));
  refill(byId("controls"), controls);
}

function drawSummary() {
  const runs = Object.values(DATA.runs);
  const statuses = [...new Set(runs.map((run) => run.status))].map(
    (status) => `${runs.filter((run) => run.status === status).length} ${status}`,
  );
  const differ = DATA.varying.filter((name) => name !== "text");
  const names = differ.flatMap((name, i) => [i ? ", " : "They differ in ", html("b", {}, name)]);
  const count = html("b", {}, `${runs.length} ${runs.length === 1 ? "run" : "runs"}`);
  byId("summary").replaceChildren(count, `: ${statuses.join(", ")}. `, ...names, differ.length ? "." : "");
  byId("common").replaceChildren(
    ...DATA.common.map(([name, value]) => html("div", {}, html("dt", {}, name), html("dd", {}, value))),
  );
  byId("command").textContent = DATA.command;
}

const root = document.documentElement;
function theme() {
  return root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}
const opposite = () => (theme() === "dark" ? "light" : "dark");
function drawTheme() {
  byId("theme").textContent = capital(opposite());
}

byId("theme").addEventListener("click", () => {
  root.dataset.theme = opposite();
  drawTheme();
});
byId("filter").addEventListener("input", drawTable);
byId("controls").addEventListener("submit", (event) => event.preventDefault());
addEventListener("scroll", hideTip, { passive: true });

function drawAll() {
  drawLosses();
  drawTable();
  drawLayers();
  drawCosts();
}
let width = innerWidth;
addEventListener("resize", () => {
  if (width !== innerWidth) requestAnimationFrame(drawAll);
  width = innerWidth;
});
drawTheme();
drawSummary();
drawControls();
drawAll();
