// The table: sorted by any column, filtered by text, a row a run (or a mean) and text.
const sorting = { name: null, falling: false };

function sortRows(rows) {
  if (!sorting.name) return rows;
  const sign = sorting.falling ? -1 : 1;
  return [...rows].sort((a, b) => {
    const [left, right] = [a[sorting.name], b[sorting.name]];
    if (!known(left) || !known(right)) return known(right) - known(left);
    return sign * compareValues(left, right);
  });
}

function sortBy(name) {
  sorting.falling = sorting.name === name && !sorting.falling;
  sorting.name = name;
  drawTable();
  drawCosts();
  byId("table")
    .querySelector(`button[data-column="${CSS.escape(name)}"]`)
    .focus();
}

function drawTable() {
  const rows = state.means ? DATA.means : DATA.rows;
  const names = state.means ? DATA.mean_columns : DATA.columns;
  const isPart = (name) =>
    [DATA.interval, DATA.count].some(
      (end) => name.endsWith(end) && names.includes(name.slice(0, -end.length)),
    );
  const shown = names.filter((name) => !isPart(name));
  const numeric = new Set(
    shown.filter((name) => rows.every((row) => !known(row[name]) || isNumber(row[name]))),
  );
  const wanted = byId("filter").value.trim().toLowerCase();
  const fits = (row) => shown.some((name) => show(name, row[name]).toLowerCase().includes(wanted));
  const kept = sortRows(rows).filter(fits);
  const most = Math.max(...rows.map((row) => row.runs ?? 0));
  const head = html(
    "tr",
    {},
    shown.map((name) => heading(name, numeric)),
  );
  const body = kept.map((row) => {
    const classes = [row.status === "completed" ? null : "broken", isChosen(row) ? "selected" : null];
    const attributes = { class: classes.filter(known).join(" ") || null, "data-run": row.run };
    return html(
      "tr",
      attributes,
      shown.map((name) => cell(row, name, numeric, most)),
    );
  });
  byId("table").replaceChildren(
    kept.length
      ? html("table", {}, html("thead", {}, head), html("tbody", {}, body))
      : html("p", { class: "empty" }, "No row holds this text."),
  );
  const what = state.means
    ? `means over ${DATA.over.join(", ")} ± half the 95 % interval of Student's t`
    : "a row for each run and text";
  byId("table-caption").textContent = `${kept.length} of ${rows.length} rows: ${what}.`;
}

const isChosen = (row) => known(row.run) && row.run === state.run;

function heading(name, numeric) {
  const direction = sorting.falling ? "descending" : "ascending";
  const attributes = {
    scope: "col",
    class: numeric.has(name) ? "number" : null,
    title: label(name),
    "aria-sort": sorting.name === name ? direction : null,
  };
  const button = { type: "button", "data-column": name, onclick: () => sortBy(name) };
  return html("th", attributes, html("button", button, name.replaceAll("_", " ")));
}

function cell(row, name, numeric, most) {
  const text = show(name, row[name]);
  const attributes = {
    class: numeric.has(name) ? "number" : null,
    "data-column": name,
    "data-value": row[name],
  };
  if (name === "run" && linearsOf(row.run)) {
    const pick = { type: "button", class: "pick", title: "Show its layers", onclick: () => choose(row.run) };
    return html("td", attributes, html("button", pick, text));
  }
  const [width, count] = [row[name + DATA.interval], row[name + DATA.count]];
  const parts = [text];
  if (known(width)) parts.push(html("small", { "data-value": width }, ` ± ${show(name, width)}`));
  if (count > 0 && count < most) parts.push(html("small", {}, ` (n=${count})`));
  return html("td", { ...attributes, title: known(row[name]) ? exact(row[name]) : null }, ...parts);
}
