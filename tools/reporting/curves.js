// Loss curves of the runs that pass the filter.

const families = [...new Set(report.runs.map((run) => run.cells.family[0]))];
const familyColour = (run) => paletteColour(families.indexOf(run.cells.family[0]));
const isBaseline = (run) => run.cells.tag[0] === byId("baseline").value;

// The points of a curve: {x, y}, y null where it is not finite.
function points(run, source, xKind, measure) {
  const held = run.curves[source];
  const x = xKind === "epoch" ? held.step.map((step) => step / (run.batches_per_epoch ?? NaN)) : held[xKind];
  const y = measure === "ppl" ? held.loss.map((loss) => (loss === null || loss > 700 ? null : Math.exp(loss))) : held.loss;
  return { x, y };
}

// Exponential average with the bias of its start taken out; gaps stay gaps.
function smooth(y, weight) {
  let average = 0;
  let mass = 0;
  return y.map((value) => {
    if (value === null) return null;
    average = weight * average + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return average / mass;
  });
}

function interpolate({ x, y }, at) {
  let right = x.findIndex((value) => value >= at);
  if (right === -1) right = x.length - 1;
  if (right === 0 || x[right] === at) return y[right];
  const part = (at - x[right - 1]) / (x[right] - x[right - 1]);
  return y[right - 1] + part * (y[right] - y[right - 1]);
}

// Mean, smallest and largest of several curves where all of them are.
function band(curves) {
  const whole = curves.map(({ x, y }) => {
    const kept = x.map((_, i) => i).filter((i) => y[i] !== null && Number.isFinite(x[i]));
    return { x: kept.map((i) => x[i]), y: kept.map((i) => y[i]) };
  });
  if (whole.some(({ x }) => x.length === 0)) return null;
  const from = Math.max(...whole.map(({ x }) => x[0]));
  const to = Math.min(...whole.map(({ x }) => x.at(-1)));
  const grid = [...new Set(whole.flatMap(({ x }) => x))].filter((x) => x >= from && x <= to).sort((a, b) => a - b);
  const columns = grid.map((at) => whole.map((curve) => interpolate(curve, at)));
  return {
    x: grid,
    mean: columns.map((values) => values.reduce((sum, value) => sum + value, 0) / values.length),
    low: columns.map((values) => Math.min(...values)),
    high: columns.map((values) => Math.max(...values)),
  };
}

function drawCurves(runs) {
  const [split, measure, xKind, seeds, colouring] = ["split", "measure", "x", "seeds", "colour"].map((name) => byId(`curve-${name}`).value);
  const weight = Number(byId("curve-smoothing").value);
  byId("curve-smoothing-value").textContent = weight.toFixed(2);
  const variants = Map.groupBy(runs, (run) => run.cells.tag[0]);
  const traces = [];
  let thinned = 0;
  [...variants].forEach(([name, members]) => {
    const place = report.variants.indexOf(name);
    const stroke = colouring === "family" ? familyColour(members[0]) : paletteColour(place);
    const line = { color: stroke, width: isBaseline(members[0]) ? 4 : 1.6, dash: isBaseline(members[0]) ? "dash" : "solid" };
    const mode = split === "eval" ? "lines+markers" : "lines";
    const drawn = members.filter((run) => run.curves[split].step.length > 0).map((run) => {
      const source = split === "train" && weight > 0 && run.curves.means ? "means" : split;
      thinned += split === "train" && run.curves.means !== null;
      const held = points(run, source, xKind, measure);
      return { run, curve: weight > 0 ? { x: held.x, y: smooth(held.y, weight) } : held };
    });
    const joined = seeds === "band" && drawn.length > 1 ? band(drawn.map(({ curve }) => curve)) : null;
    const hover = `<b>%{fullData.meta}</b><br>${xKind} %{x}<br>${measure} %{y:.5g}<extra></extra>`;
    const common = { type: "scatter", legendgroup: name, line, hovertemplate: hover, marker: { size: 4, color: stroke } };
    if (joined) {
      const edge = { type: "scatter", mode: "lines", x: joined.x, legendgroup: name, showlegend: false, hoverinfo: "skip", line: { width: 0 } };
      const fill = { fill: "tonexty", fillcolor: withAlpha(stroke, Number(colour("band"))) };
      traces.push({ ...edge, y: joined.low }, { ...edge, y: joined.high, ...fill });
      traces.push({ ...common, mode, x: joined.x, y: joined.mean, name: shortText(name), meta: plainText(`${name}, mean of ${drawn.length}`) });
      return;
    }
    for (const { run, curve } of drawn) {
      const label = run.cells.run[0];
      traces.push({ ...common, mode, ...curve, connectgaps: false, legendgroup: label, name: shortText(label), meta: plainText(label) });
    }
  });
  const parts = ["A click in the legend hides a line, a double click all others. The baseline is dashed."];
  if (thinned) parts.push(`Of ${thinned} long training curves the smallest and largest values in each of ${report.notes.buckets} stretches are drawn, so no extreme is lost; smoothing starts from the stretches' means.`);
  if (split === "train" && seeds === "band") parts.push("Ranges over seeds hold where all seeds have been.");
  byId("curve-note").textContent = parts.join(" ");
  return {
    traces,
    empty: "No run has such a curve.",
    layout: {
      hovermode: "closest",
      xaxis: { title: { text: xKind === "seconds" ? "seconds of recorded work" : xKind } },
      yaxis: { title: { text: measure === "ppl" ? "perplexity" : "nats per real token" }, type: byId("curve-log").checked ? "log" : "linear" },
    },
  };
}
