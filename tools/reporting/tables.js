"use strict";
// The report's data, small helpers, and tables that sort. Texts reach the page by textContent alone.

const report = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function fillSelect(select, options, chosen) {
  select.replaceChildren(...options.map(([value, label]) => make("option", { value, textContent: label })));
  if (chosen !== undefined) select.value = chosen;
}

// Making a format takes far longer than using it.
const formats = new Map();
function grouped(value, digits) {
  if (!formats.has(digits)) formats.set(digits, new Intl.NumberFormat("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits }));
  return formats.get(digits).format(value);
}
const figure = (value, digits) => (value === null ? "" : grouped(value, digits));
const signed = (value, digits) => (value === null ? "" : (value < 0 ? "" : "+") + grouped(value, digits));

// Missing values come last in both directions.
function compareCells(one, other, descending) {
  if (one === null || other === null) return (one === null) - (other === null);
  const order = typeof one === "number" && typeof other === "number"
    ? one - other
    : String(one).localeCompare(String(other), "en", { numeric: true });
  return descending ? -order : order;
}

/* A table whose headers are buttons that sort.
   columns: [{key, label, note, digits}]; a digits that is not null makes a column of numbers.
   rows: [{cells: {key: [value, text]}, ...}]; decorate(row, column, cell) may put more into a cell. */
class SortableTable {
  static all = new Map();

  constructor(table, columns, sort, decorate = () => {}) {
    Object.assign(this, { table, columns, sort, decorate, rows: [] });
    SortableTable.all.set(table.id, this);
    this.head = table.appendChild(make("thead"));
    this.body = table.appendChild(make("tbody"));
  }

  show(rows, columns = this.columns) {
    Object.assign(this, { rows, columns });
    this.draw();
  }

  get sorted() {
    const { key, descending } = this.sort;
    return [...this.rows].sort((a, b) => compareCells(a.cells[key][0], b.cells[key][0], descending));
  }

  draw() {
    const focused = document.activeElement?.closest?.("thead") === this.head ? document.activeElement.dataset.key : null;
    this.head.replaceChildren(make("tr", {}, ...this.columns.map((column) => this.header(column))));
    this.body.replaceChildren(...this.sorted.map((row) => this.line(row)));
    if (focused) this.head.querySelector(`[data-key="${focused}"]`)?.focus();
  }

  header(column) {
    const button = make("button", { type: "button", textContent: column.label, title: column.note || "" });
    button.dataset.key = column.key;
    button.addEventListener("click", () => {
      const again = this.sort.key === column.key;
      this.sort = { key: column.key, descending: again && !this.sort.descending };
      this.draw();
    });
    const cell = make("th", { scope: "col", className: column.digits === null ? "" : "number" }, button);
    if (this.sort.key === column.key) cell.setAttribute("aria-sort", this.sort.descending ? "descending" : "ascending");
    return cell;
  }

  line(row) {
    const cells = this.columns.map((column, place) => {
      const text = row.cells[column.key][1];
      const cell = make(place === 0 ? "th" : "td", {}, column.digits === null ? make("span", { className: "text", textContent: text }) : text);
      if (place === 0) cell.scope = "row";
      if (column.digits !== null) cell.className = "number";
      this.decorate(row, column, cell);
      return cell;
    });
    return make("tr", {}, ...cells);
  }
}
