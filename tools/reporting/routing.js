// How one run routes: measures over layers and steps, usage of every expert, pairs, maps of the keys, and what runs cost.

const runOf = (id) => report.runs.find((run) => run.cells.run[0] === byId(id).value);
const layerNames = (count) => Array.from({ length: count }, (_, layer) => `layer ${layer}`);

// The usage of every expert: of validation tokens where the run recorded it, else the average in its checkpoints.
function usageOf(run) {
  if (run.routing?.counts.steps.length) return { ...run.routing.counts, what: "choices by real validation tokens" };
  if (run.maps) {
    const values = run.maps.steps.map((_, place) => run.maps.layers.map((layer) => layer.usage[place]));
    return { steps: run.maps.steps, values, what: "training usage average in the checkpoint" };
  }
  return null;
}

const fillRuns = (id, runs, fits) => keepChoice(byId(id), runs.filter(fits).map((run) => [run.cells.run[0], run.cells.run[0]]));

function keepChoice(select, options) {
  const before = select.value;
  fillSelect(select, options);
  if (options.some(([value]) => String(value) === before)) select.value = before;
}

function setSlider(id, steps, moveToEnd) {
  const slider = byId(id);
  slider.max = Math.max(0, steps.length - 1);
  if (moveToEnd) slider.value = slider.max;
  slider.disabled = steps.length < 2;
  const step = steps[Number(slider.value)];
  byId(`${id}-value`).textContent = step === undefined ? "none" : String(step);
  slider.setAttribute("aria-valuetext", `step ${step}`);
}

function routingRunChanged() {
  const run = runOf("routing-run");
  const measures = Object.keys(run?.routing?.measures ?? {});
  keepChoice(byId("routing-measure"), measures.map((name) => [name, report.measures[name]]));
  keepChoice(byId("usage-layer"), layerNames(run?.routing?.layers ?? 0).map((name, layer) => [layer, name]));
  setSlider("usage-step", (run && usageOf(run)?.steps) ?? [], true);
  showRouting();
}

function showRouting() {
  const run = runOf("routing-run");
  const usage = run ? usageOf(run) : null;
  setSlider("usage-step", usage?.steps ?? [], false);
  chart("routing-chart", () => drawMeasure(run));
  chart("usage-map", () => drawUsageMap(usage));
  chart("usage-histogram", () => drawHistogram(usage));
  byId("usage-note").textContent = usage ? `Expert by layer: ${usage.what}. A page holds this for the best run of each variant, at ${report.notes.counts} steps at most.` : "";
  const pairs = run?.served?.pairs[Number(byId("usage-layer").value)] ?? [];
  const when = run?.served ? ` at step ${figure(run.served.step, 0)}, the newest evaluation,` : "";
  byId("pair-note").textContent = `Expert by expert,${when} in the layer chosen above. A run names the ${report.notes.pairs} pairs that most validation tokens chose; where it has so many, of others nothing is known. A page holds this for the best run of each variant.`;
  chart("pair-chart", () => drawPairs(run, pairs));
  pairTable.show(pairs.map(([left, right, tokens]) => ({
    cells: { pair: cell(`${left} and ${right}`, `${left} and ${right}`), tokens: cell(tokens, figure(tokens, 0)) },
  })));
}

const pairTable = new SortableTable(byId("pair-table"), [
  column("pair", "Experts", null), column("tokens", "Validation tokens that chose both", 0),
], { key: "tokens", descending: true });

function drawPairs(run, pairs) {
  const both = pairs.flatMap(([left, right, tokens]) => [[left, right, tokens], [right, left, tokens]]);
  const experts = run?.cells.num_experts[0];
  const axis = { range: [-0.5, experts - 0.5], constrain: "domain", title: { text: "expert" } };
  const size = Math.max(3, Math.min(18, 260 / experts));
  return {
    traces: both.length === 0 ? [] : [{
      type: "scatter", mode: "markers", x: both.map(([left]) => left), y: both.map(([, right]) => right), customdata: both.map(([, , tokens]) => tokens),
      marker: { symbol: "square", size, color: both.map(([, , tokens]) => tokens), colorscale: scale(), cmin: 0, line: { width: 1, color: colour("quiet") }, colorbar: { thickness: 12, title: { text: "tokens" } } },
      hovertemplate: "experts %{x} and %{y}<br>%{customdata} tokens<extra></extra>",
    }],
    empty: "No pairs of experts are known of this run and layer.",
    layout: { hovermode: "closest", xaxis: axis, yaxis: { ...axis, autorange: false, range: [experts - 0.5, -0.5], scaleanchor: "x" } },
  };
}

function drawMeasure(run) {
  const name = byId("routing-measure").value;
  const held = run?.routing?.measures[name];
  byId("routing-note").textContent = held ? `${report.measures[name]}: layers over steps.${thinning(name, held)}` : "";
  if (!held) return { traces: [], empty: "This run routes nothing, or was not evaluated." };
  const names = layerNames(run.routing.layers);
  const byLayer = names.map((_, layer) => held.values.map((row) => row[layer]));
  if (held.steps.length === 1) {
    return { traces: [{ type: "bar", x: names, y: byLayer.map(([value]) => value), customdata: byLayer.map(([value]) => value), hovertemplate: "%{x}<br>%{customdata}<extra></extra>", marker: { color: colour("c0") } }], layout: { yaxis: { title: { text: name } } } };
  }
  return {
    traces: [{
      type: "heatmap", x: held.steps, y: names, z: byLayer, colorscale: scale(), hoverongaps: false,
      customdata: byLayer, hovertemplate: "step %{x:,}, %{y}<br>%{customdata}<extra></extra>", colorbar: { thickness: 12 },
    }],
    layout: { xaxis: { title: { text: "step" } }, yaxis: { autorange: "reversed" } },
  };
}

function thinning(name, { steps, records }) {
  if (records === steps.length) return "";
  return name === "key_movement"
    ? ` Of ${figure(records, 0)} steps the largest value in each of ${steps.length} stretches is shown, at the stretch's last step.`
    : ` Of ${figure(records, 0)} evaluations ${steps.length}, evenly chosen, are shown.`;
}

const currentUsage = (usage) => usage?.values[Number(byId("usage-step").value)];

function drawUsageMap(usage) {
  const values = currentUsage(usage);
  if (!values) return { traces: [], empty: "No usage of single experts was recorded for this run." };
  const isLog = byId("usage-log").checked;
  return {
    traces: [{
      type: "heatmap", y: layerNames(values.length), z: isLog ? values.map((row) => row.map((value) => Math.log10(1 + value))) : values,
      customdata: values, colorscale: scale(), hovertemplate: "%{y}, expert %{x}<br>%{customdata}<extra></extra>",
      colorbar: { thickness: 12, title: { text: isLog ? "log10(1 + n)" : "n" } },
    }],
    layout: { xaxis: { title: { text: "expert" } }, yaxis: { autorange: "reversed" } },
  };
}

function drawHistogram(usage) {
  const values = currentUsage(usage)?.[Number(byId("usage-layer").value)];
  if (!values) return null;
  const isLog = byId("usage-log").checked;
  const traces = [{
    type: "histogram", x: values, nbinsx: 40, marker: { color: colour("c0") },
    hovertemplate: "%{y} experts used %{x}<extra></extra>",
  }];
  return { traces, layout: { bargap: 0.05, xaxis: { title: { text: "usage" }, rangemode: "tozero" }, yaxis: { title: { text: "experts" }, type: isLog ? "log" : "linear" } } };
}

function mapRunChanged() {
  const run = runOf("map-run");
  keepChoice(byId("map-layer"), layerNames(run?.maps?.layers.length ?? 0).map((name, layer) => [layer, name]));
  keepChoice(byId("map-projection"), Object.keys(run?.maps?.layers[0].projections ?? {}).map((name) => [name, name]));
  setSlider("map-step", run?.maps?.steps ?? [], true);
  showMap();
}

function showMap() {
  const run = runOf("map-run");
  setSlider("map-step", run?.maps?.steps ?? [], false);
  const parts = ["A point is an expert's key, coloured by its usage; positions of different steps compare, as one projection holds for all."];
  parts.push("A page has maps for the best run of each variant, at the checkpoints that it still has.");
  if (!report.notes.has_umap) parts.push("--umap adds UMAP.");
  if (run?.served) parts.push(`The tokens that an expert serves most are those of the evaluation at step ${figure(run.served.step, 0)}.`);
  byId("map-note").textContent = parts.join(" ");
  chart("map-chart", () => drawMap(run));
}

function drawMap(run) {
  const layer = run?.maps?.layers[Number(byId("map-layer").value)];
  if (!layer) return { traces: [], empty: "No checkpoint with a key store was found." };
  const [place, name] = [Number(byId("map-step").value), byId("map-projection").value];
  const held = layer.projections[name];
  const usage = layer.usage[place];
  const served = run.served?.tokens[Number(byId("map-layer").value)];
  const tokensOf = (expert) => (served ? `<br>serves ${plainText(served[expert]) || "no validation token"}` : "");
  const [all_x, all_y] = [held.x.flat(), held.y.flat()];
  const range = (values) => {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const margin = 0.05 * (high - low) || 1;
    return [low - margin, high + margin];
  };
  const title = (axis) => (held.explained ? `${name} ${axis + 1} (${(100 * held.explained[axis]).toFixed(0)} % of the last step's variance)` : `${name} ${axis + 1}`);
  return {
    traces: [{
      type: "scatter", mode: "markers", x: held.x[place], y: held.y[place],
      marker: { size: 9, color: usage, colorscale: scale(), line: { width: 1, color: colour("quiet") }, colorbar: { thickness: 12, title: { text: "usage" } } },
      text: usage.map((value, expert) => `expert ${expert}<br>usage ${value}<br>nearest ${layer.near[place][expert].join(", ")}${tokensOf(expert)}`),
      hovertemplate: "%{text}<extra></extra>",
    }],
    layout: { hovermode: "closest", xaxis: { title: { text: title(0) }, range: range(all_x) }, yaxis: { title: { text: title(1) }, range: range(all_y) } },
  };
}

const costTable = new SortableTable(byId("cost-table"), report.cost_columns, { key: "rank_hours", descending: true });
const MOST_BARS = 25;
const TIMES = [["step_seconds", "steps"], ["eval_seconds", "evaluations"], ["checkpoint_seconds", "checkpoints"], ["load_seconds", "resuming"]];

function showCost(runs) {
  const shown = new Set(runs.map((run) => run.cells.run[0]));
  const rows = report.costs.filter((row) => shown.has(row.run[0]));
  const columns = report.cost_columns.filter(({ key }) => key === "run" || report.costs.some((row) => row[key][0] !== null));
  costTable.show(rows.map((cells) => ({ cells })), columns);
  chart("cost-chart", () => drawTimes(rows));
}

function drawTimes(rows) {
  const total = (row) => TIMES.reduce((sum, [key]) => sum + row[key][0], 0);
  const longest = [...rows].sort((a, b) => total(b) - total(a)).slice(0, MOST_BARS);
  const height = 22 * longest.length + 110;
  byId("cost-chart").style.height = `${height}px`;
  return {
    traces: longest.length === 0 ? [] : TIMES.map(([key, label], place) => ({
      type: "bar", orientation: "h", name: label, legendgroup: label, y: longest.map((_, i) => i), x: longest.map((row) => row[key][0]), marker: { color: paletteColour(place) },
      text: longest.map((row) => plainText(row.run[0])), textposition: "none", customdata: longest.map((row) => row[key][0]),
      hovertemplate: `<b>%{text}</b><br>${label} %{customdata} s<extra></extra>`,
    })),
    legend: longest.length === 0 ? [] : TIMES.map(([, label], place) => ({ group: label, name: label, stroke: paletteColour(place) })),
    layout: {
      barmode: "stack", height,
      xaxis: { title: { text: "seconds" } },
      yaxis: { autorange: "reversed", tickvals: longest.map((_, i) => i), ticktext: longest.map((row) => shortText(row.run[0], nameLength())) },
    },
  };
}
