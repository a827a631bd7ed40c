// The table of runs and its filter, which decides what all sections show; then what belongs to whom.

const shownColumns = new Set(report.columns.filter((c) => c.is_shown).map((c) => c.key));

const runTable = new SortableTable(byId("run-table"), report.columns, { key: "best_val_loss", descending: false }, (run, { key }, element) => {
  if (key === "run") {
    const swatch = make("span", { className: "swatch" });
    swatch.style.background = `var(--c${families.indexOf(run.cells.family[0]) % PALETTE})`;
    element.prepend(swatch);
    if (isBaseline(run)) element.append(make("span", { className: "mark", textContent: " (baseline)" }));
  }
  if (key === "anomalies" && run.anomalies.length) {
    const list = make("ul", {}, ...run.anomalies.map((textContent) => make("li", { textContent })));
    element.replaceChildren(make("details", { title: run.anomalies.join("\n") }, make("summary", { textContent: run.cells.anomalies[1] }), list));
  }
});

function filtered() {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const [family, status] = [byId("family").value, byId("status").value];
  return report.runs.filter(({ cells }) => {
    const text = Object.values(cells).map(([, shown]) => shown).join(" ").toLowerCase();
    return words.every((word) => text.includes(word)) && (!family || cells.family[0] === family) && (!status || cells.status[0] === status);
  });
}

function showRuns(runs) {
  runTable.show(runs, report.columns.filter((c) => shownColumns.has(c.key)));
  byId("count").textContent = `${runs.length} of ${report.runs.length} runs`;
}

function showAll() {
  const runs = filtered();
  showRuns(runs);
  showCurves();
  fillBudgets(runs);
  showAtBudget(runs);
  fillRuns("routing-run", runs, (run) => run.routing !== null);
  routingRunChanged();
  fillRuns("map-run", runs, (run) => run.maps !== null);
  mapRunChanged();
  showCost(runs);
}

function showAtBudget(runs) {
  showComparison(runs);
  showRunTables(runs);
}

const showCurves = () => chart("curve-chart", () => drawCurves(filtered()));

function csvField(value) {
  const text = value === null ? "" : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function download() {
  const lines = [report.columns.map((c) => c.key), ...runTable.sorted.map(({ cells }) => report.columns.map((c) => cells[c.key][0]))];
  const text = lines.map((line) => line.map(csvField).join(",")).join("\r\n") + "\r\n";
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: "text/csv" })), download: "results.csv" });
  link.click();
  URL.revokeObjectURL(link.href);
}

function fillNotes() {
  const entries = Object.entries(report.notes.statuses).map(([name, rule]) => make("li", {}, make("strong", { textContent: name }), `: ${rule}`));
  byId("notes-body").append(
    make("h3", { textContent: "Status" }), make("ul", {}, ...entries),
    make("h3", { textContent: "Anomalies" }), make("p", { textContent: `Counted are ${report.notes.anomalies}.` }),
    make("h3", { textContent: "Columns" }),
    make("ul", {}, ...report.columns.filter((c) => c.note).map((c) => make("li", {}, make("strong", { textContent: c.label }), `: ${c.note}`))),
  );
}

/* A served page loads itself anew while runs go on: what a reader has done to it stays. */
function keepOverReloads() {
  const touched = new Set();
  document.addEventListener("input", ({ target }) => touched.add(target.id));
  const valueOf = (input) => (input.type === "checkbox" ? input.checked : input.value);
  const kept = JSON.parse(sessionStorage.getItem("kept") ?? "null");
  for (const [id, value] of kept?.inputs ?? []) {
    const input = byId(id);
    const isThere = input !== null && (input.tagName !== "SELECT" || [...input.options].some((option) => option.value === value));
    if (!isThere) continue;
    input[input.type === "checkbox" ? "checked" : "value"] = value;
    input.dispatchEvent(new Event("input", { bubbles: true }));
  }
  for (const [id, sort] of kept?.sorts ?? []) {
    const table = SortableTable.all.get(id);
    if (table?.columns.some(({ key }) => key === sort.key)) Object.assign(table, { sort }).draw();
  }
  for (const [id, groups] of kept?.hidden ?? []) groups.forEach((group) => drawings.get(id)?.hidden.add(group));
  addEventListener("pagehide", () => {
    // In the order of the page: what stands first decides what others offer.
    // A slider at the last step stays at the last.
    const isKept = ({ id, value, max }) => touched.has(id) && !(id.endsWith("-step") && value === max);
    const inputs = [...document.querySelectorAll("input, select")].filter(isKept).map((input) => [input.id, valueOf(input)]);
    const sorts = [...SortableTable.all].map(([id, { sort }]) => [id, sort]);
    const hidden = [...drawings].map(([id, drawing]) => [id, [...drawing.hidden]]);
    sessionStorage.setItem("kept", JSON.stringify({ inputs, sorts, hidden }));
  });
}

function onInput(ids, react) {
  for (const id of ids) byId(id).addEventListener("input", react);
}

function start() {
  const distinct = (key) => [...new Set(report.runs.map((run) => run.cells[key][0]).filter((value) => value !== null))].sort();
  byId("warnings").append(...report.warnings.map((textContent) => make("p", { className: "warning", textContent })));
  byId("summary").textContent = `${report.runs.length} run${report.runs.length === 1 ? "" : "s"} of ${report.variants.length} variant${report.variants.length === 1 ? "" : "s"}, as of ${report.made}.`;
  for (const key of ["family", "status"]) fillSelect(byId(key), [["", "all"], ...distinct(key).map((value) => [value, value])]);
  fillSelect(byId("baseline"), report.variants.map((name) => [name, name]), report.baseline);
  if (report.variants.length === report.runs.length) byId("curve-seeds").value = "each";
  if (families.length === 1) byId("curve-colour").value = "variant";
  byId("columns").append(...report.columns.slice(1).map(({ key, label, note }) => {
    const box = make("input", { type: "checkbox", checked: shownColumns.has(key), name: key, id: `column-${key}` });
    box.addEventListener("input", () => {
      shownColumns[box.checked ? "add" : "delete"](key);
      showRuns(filtered());
    });
    return make("label", { title: note }, box, label);
  }));
  onInput(["filter", "family", "status"], showAll);
  onInput(["split", "measure", "x", "seeds", "colour", "log", "smoothing"].map((name) => `curve-${name}`), showCurves);
  onInput(["budget-kind"], () => { fillBudgets(filtered()); showAtBudget(filtered()); });
  onInput(["budget"], () => { chosenBudget[byId("budget-kind").value] = Number(byId("budget").value); showAtBudget(filtered()); });
  onInput(["baseline"], () => { showRuns(filtered()); showCurves(); showAtBudget(filtered()); });
  onInput(["routing-run"], routingRunChanged);
  onInput(["routing-measure", "usage-layer", "usage-step", "usage-log"], showRouting);
  onInput(["map-run"], mapRunChanged);
  onInput(["map-layer", "map-projection", "map-step"], showMap);
  byId("download").addEventListener("click", download);
  fillNotes();
  showAll();
  document.documentElement.dataset.ready = "true";
  requestAnimationFrame(() => setTimeout(loadPlotly));
  if (location.protocol.startsWith("http")) keepOverReloads();
}

start();
