// The table: sorted by any column, filtered by text, a row a run (or a mean) and text.
const sorting = { name: null, falling: false };

function tableRows() {
  return state.means
    ? { rows: DATA.means, names: DATA.mean_columns }
    : { rows: DATA.rows, names: DATA.columns };
}

function sortRows(rows) {
  if (!sorting.name) return rows;
  const sign = sorting.falling ? -1 : 1;
  return [...rows].sort((a, b) => {
    const [left, right] = [a[sorting.name], b[sorting.name]];
    if (!known(left) || !known(right)) return known(right) - known(left);
    return sign * (isNumber(left) && isNumber(right) ? left - right : compareText(left, right));
  });
}

function drawTable() {
  const { rows, names } = tableRows();
  const shown = names.filter((name) => !isPart(name, names));
  const numeric = new Set(shown.filter((name) => rows.every((row) => !known(row[name]) || isNumber(row[name]))));
  const wanted = byId("filter").value.trim().toLowerCase();
  const fits = (row) => !wanted || shown.some((name) => show(name, row[name]).toLowerCase().includes(wanted));
  const kept = sortRows(rows).filter(fits);
  const most = Math.max(...rows.map((row) => row.runs ?? 0));
  const head = html("tr", {}, shown.map((name) => html("th", {
    scope: "col", class: numeric.has(name) ? "number" : null, title: label(name),
    "aria-sort": sorting.name === name ? (sorting.falling ? "descending" : "ascending") : null,
  }, html("button", { type: "button", "data-column": name, onclick: () => sortBy(name) }, name.replaceAll("_", " ")))));
  const body = kept.map((row) => html("tr", {
    class: [row.status === "completed" ? "" : "broken", !state.means && row.run === state.run ? "selected" : ""].join(" ").trim() || null,
    "data-run": state.means ? null : row.run,
  }, shown.map((name) => cell(row, name, numeric, most))));
  byId("table").replaceChildren(kept.length
    ? html("table", {}, html("thead", {}, head), html("tbody", {}, body))
    : html("p", { class: "empty" }, "No row holds this text."));
  const what = state.means ? `means over ${DATA.over.join(", ")} ± half the 95 % interval of Student's t` : "a row for each run and text";
  byId("table-caption").textContent = `${kept.length} of ${rows.length} rows: ${what}.`;
}

const isPart = (name, names) => [DATA.interval, DATA.count].some(
  (end) => name.endsWith(end) && names.includes(name.slice(0, -end.length)));

function cell(row, name, numeric, most) {
  const text = show(name, row[name]);
  const attributes = { class: numeric.has(name) ? "number" : null, "data-column": name, "data-value": row[name] };
  if (name === "run" && linearsOf(row.run))
    return html("td", attributes, html("button", { type: "button", class: "pick", title: "Show its layers", onclick: () => choose(row.run) }, text));
  const width = row[name + DATA.interval], count = row[name + DATA.count];
  return html("td", { ...attributes, title: known(row[name]) ? String(row[name]) : null }, text,
    known(width) ? html("small", { "data-value": width }, ` ± ${show(name, width)}`) : null,
    known(count) && count > 0 && count < most ? html("small", {}, ` (n=${count})`) : null);
}

function sortBy(name) {
  sorting.falling = sorting.name === name && !sorting.falling;
  sorting.name = name;
  drawTable();
  drawCosts();
  byId("table").querySelector(`button[data-column="${CSS.escape(name)}"]`).focus();
}
