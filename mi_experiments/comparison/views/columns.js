// A column a run: parts stacked as bars, or each as a mark at its own height.
function columns(host, { rows, parts, label: name, stacked, write }) {
  const plot = canvas(host, name, 280);
  const box = insideOf(plot);
  const totals = rows.map((row) => {
    const values = parts.map((part) => row.values[part] ?? 0);
    return stacked ? values.reduce((a, b) => a + b, 0) : Math.max(...values);
  });
  const toY = makeScale([0, ...totals], [box.bottom, box.top], { zero: true });
  const step = (box.right - box.left) / Math.max(rows.length, 8);
  const named = step > 26;
  const middle = (i) => box.left + (i + 0.5) * step;
  const toX = Object.assign(middle, { ticks: [] });
  axes(plot, toX, toY, box, { x: named ? "run" : `${rows.length} runs`, y: name });
  const look = (part) => {
    const place = parts.indexOf(part);
    return { colour: `var(--s${place % 7})`, shape: shapes[stacked ? 1 : place % shapes.length] };
  };
  const items = rows.map((row, i) => {
    let below = 0;
    for (const part of parts.filter((one) => known(row.values[one]))) {
      const [value, { colour, shape }] = [row.values[part], look(part)];
      const data = { fill: colour, "data-run": row.run, "data-part": part, "data-value": row.exact[part] };
      if (stacked) {
        const [top, bottom] = [toY(below + value), toY(below)];
        const width = Math.max(0.76 * step, 0.8);
        plot.append(
          svg("rect", {
            ...data,
            x: middle(i) - width / 2,
            width,
            y: top,
            height: Math.max(bottom - top, 0),
          }),
        );
        below += value;
      } else {
        const transform = `translate(${middle(i)} ${toY(value)}) scale(${step < 8 ? 0.6 : 1})`;
        plot.append(svg("path", { ...data, class: "mark", d: shape, transform }));
      }
    }
    if (named)
      plot.append(
        svg("text", { x: middle(i), y: box.bottom + 18, "text-anchor": "middle" }, ending(row.run, step)),
      );
    const lines = parts
      .filter((part) => known(row.values[part]))
      .map((part) => [part, write(row.values[part])]);
    return {
      x: middle(i),
      y: toY(stacked ? totals[i] / 2 : totals[i]),
      title: row.run,
      lines,
      pick: () => choose(row.run),
    };
  });
  host.replaceChildren(legend(parts.map((part) => ({ name: part, look: look(part) }))), plot);
  const frame = (item) => ({ x: item.x - step / 2, width: step, y: box.top, height: box.bottom - box.top });
  interactive(plot, items, {
    reach: 400,
    outline: (item) => svg("rect", { class: "cursor", ...frame(item) }),
  });
}

// As much of the end of a name as there is room for.
function ending(name, room) {
  const letters = Math.max(1, Math.floor(room / 7.5) - 1);
  return name.length <= letters + 1 ? name : `…${name.slice(-letters + 1)}`;
}

function drawCosts() {
  const order = [...new Set((state.means ? DATA.rows : sortRows(DATA.rows)).map((row) => row.run))];
  const giga = (values) =>
    Object.fromEntries(Object.entries(values).map(([part, bytes]) => [part, bytes / 1e9]));
  const seconds = order.map((run) => ({
    run,
    exact: DATA.runs[run].seconds,
    values: DATA.runs[run].seconds,
  }));
  const memory = order.map((run) => ({
    run,
    exact: DATA.runs[run].memory,
    values: giga(DATA.runs[run].memory),
  }));
  drawCost("time", seconds, { label: "seconds", stacked: true, write: (value) => `${value.toFixed(2)} s` });
  drawCost("memory", memory, { label: "GB", stacked: false, write: (value) => `${value.toFixed(2)} GB` });
}

function drawCost(name, rows, options) {
  const parts = [...new Set(rows.flatMap((row) => Object.keys(row.values)))];
  if (parts.length) columns(byId(name), { rows, parts, ...options });
  else empty(byId(name), "No run has recorded this yet.");
}
