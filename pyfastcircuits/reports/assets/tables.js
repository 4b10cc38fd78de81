// Tables that are sorted by a click on a column, and searched.

// A table into a holder. columns: {name, value(row), show(row), left}; rows: anything. sort: [column, descending].
function sortableTable(id, columns, rows, sort) {
  const holder = byId(id);
  let [by, descending] = sort;
  const sorted = () => {
    const key = columns[by].value, order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      const less = typeof x === "string" ? x.localeCompare(y) : x - y;
      return descending ? -less : less;
    };
    return [...rows].sort(order);
  };
  const draw = (focused) => {
    const head = el("tr", {}, ...columns.map((column, i) => {
      const arrow = i === by ? (descending ? " ↓" : " ↑") : "";
      const button = el("button", { type: "button", onclick: () => {
        descending = i === by ? !descending : !column.left;
        by = i;
        draw(i);
      } }, column.name, el("span", { "aria-hidden": "true" }, arrow));
      return el("th", { scope: "col", class: column.left ? "left" : null, "aria-sort": i === by ? (descending ? "descending" : "ascending") : "none" }, button);
    }));
    const body = sorted().map((row) => el("tr", {}, ...columns.map((column) => el("td", { class: column.left ? "left" : null, style: null }, column.show(row)))));
    holder.replaceChildren(el("table", {}, el("thead", {}, head), el("tbody", {}, ...body)));
    if (focused !== undefined) holder.querySelectorAll("th button")[focused].focus();
  };
  draw();
  saving(id, { csv: () => [columns.map((c) => c.name), ...sorted().map((row) => columns.map((c) => c.value(row)))] });
}

// A plain table. head: names; rows: lists of strings or elements; left: how many columns are text.
function plainTable(head, rows, left) {
  const kind = (i) => ({ class: i < left ? "left" : null });
  return el("table", {},
    el("thead", {}, el("tr", {}, ...head.map((name, i) => el("th", { scope: "col", ...kind(i) }, name)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((cell, i) => el("td", kind(i), ...[cell].flat()))))));
}
