// Loss curves of the runs that pass the filter.

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

const families = [...new Set(report.runs.map((run) => run.cells.family[0]))];
const familyColour = (run) => paletteColour(families.indexOf(run.cells.family[0]));
const isBaseline = (run) => run.cells.tag[0] === byId("baseline").value;

const MOST_MARKERS = 50;

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

// Mean, smallest and largest of several curves at each step, over those that have come to it: {x, mean, low, high, count}.
// x is the mean of theirs; where a value is not finite, so is the mean, and there is a gap. A step that a curve passed over,
// such as the last one of a run that was stopped between two evaluations, is left out, if others are whole.
function band(curves) {
  const places = new Map();
  for (const { steps, x, y } of curves) {
    steps.forEach((step, i) => {
      if (!places.has(step)) places.set(step, { x: [], y: [] });
      places.get(step).x.push(x[i]);
      places.get(step).y.push(y[i]);
    });
  }
  const all = [...places].sort(([one], [other]) => one - other);
  const passed = (step) => curves.filter(({ steps }) => steps[0] <= step && step <= steps.at(-1)).length;
  const whole = all.filter(([step, { x }]) => x.length === passed(step));
  const columns = (whole.length > 1 ? whole : all).map(([, values]) => values);
  const over = (measure) => columns.map(({ y }) => (y.includes(null) ? null : measure(y)));
  return {
    x: columns.map(({ x }) => mean(x)),
    mean: over(mean),
    low: over((values) => Math.min(...values)),
    high: over((values) => Math.max(...values)),
    count: columns.map(({ y }) => y.length),
  };
}

// A filled range is drawn between gaps, stretch by stretch.
function filled({ x, low, high }) {
  const ends = x.map((_, i) => i).filter((i) => low[i] === null);
  const stretches = [...ends, x.length].map((end, i) => [i ? ends[i - 1] + 1 : 0, end]).filter(([from, to]) => to - from > 1);
  const outline = ([from, to]) => [x.slice(from, to), x.slice(from, to).reverse(), high.slice(from, to), low.slice(from, to).reverse()];
  const parts = stretches.map(outline);
  return { x: parts.flatMap(([there, back]) => [...there, ...back, null]), y: parts.flatMap(([, , top, bottom]) => [...top, ...bottom, null]) };
}

function drawCurves(runs) {
  const [split, measure, xKind, seeds, colouring] = ["split", "measure", "x", "seeds", "colour"].map((name) => byId(`curve-${name}`).value);
  const weight = Number(byId("curve-smoothing").value);
  const isLog = byId("curve-log").checked;
  byId("curve-smoothing-value").textContent = weight.toFixed(2);
  const variants = Map.groupBy(runs.filter((run) => run.curves[split].step.length > 0), (run) => run.cells.tag[0]);
  const [traces, legend] = [[], []];
  let thinned = 0;
  for (const [name, members] of variants) {
    const stroke = colouring === "family" ? familyColour(members[0]) : paletteColour(report.variants.indexOf(name));
    const line = { color: stroke, width: isBaseline(members[0]) ? 4 : 1.6, dash: isBaseline(members[0]) ? "dash" : "solid" };
    const isJoined = seeds === "band" && members.length > 1;
    const isThinned = split === "train" && members.some(({ curves }) => curves.is_thinned);
    thinned += isThinned ? members.length : 0;
    const drawn = members.map((run) => {
      const source = isThinned && (weight > 0 || isJoined) && run.curves.means ? "means" : split;
      const held = points(run, source, xKind, measure);
      return { label: run.cells.run[0], steps: run.curves[source].step, x: held.x, y: weight > 0 ? smooth(held.y, weight) : held.y };
    });
    const isSparse = split === "eval" && drawn.every(({ x }) => x.length <= MOST_MARKERS);
    const common = { type: "scatter", mode: isSparse ? "lines+markers" : "lines", line, marker: { size: 4, color: stroke } };
    // customdata is shown as it is, where %{y} would be rounded.
    const hover = `<b>%{fullData.meta}</b><br>${xKind} %{x:,}<br>${measure} %{customdata}`;
    if (isJoined) {
      const joined = band(drawn);
      const area = { type: "scatter", mode: "lines", fill: "toself", fillcolor: withAlpha(stroke, Number(colour("band"))), line: { width: 0 }, hoverinfo: "skip" };
      traces.push({ ...area, ...filled(joined), uid: uidOf(`${name} range`), legendgroup: name });
      traces.push({
        ...common, x: joined.x, y: joined.mean, customdata: joined.mean, text: joined.count.map(String), uid: uidOf(`${name} mean`), legendgroup: name,
        name: shortText(name), meta: plainText(name), hovertemplate: `${hover}<br>mean of %{text}<extra></extra>`,
      });
      legend.push({ group: name, name, stroke, dash: line.dash });
      continue;
    }
    for (const { label, x, y } of drawn) {
      traces.push({
        ...common, x, y, customdata: y, connectgaps: false, uid: uidOf(`${label} run`), legendgroup: label, name: shortText(label), meta: plainText(label),
        hovertemplate: `${hover}<extra></extra>`,
      });
      legend.push({ group: label, name: label, stroke, dash: line.dash });
    }
  }
  const parts = ["The buttons hide and show lines. The baseline is dashed."];
  if (seeds === "band") parts.push("A mean is over the seeds that have been at its step, and has a gap where one of them is not finite.");
  if (thinned) {
    parts.push(`Of ${thinned} long training curves the smallest and largest values in each of ${report.notes.buckets} stretches are drawn, so no extreme is lost.`);
    parts.push("Means over seeds and smoothing start from the stretches' means.");
  }
  byId("curve-note").textContent = parts.join(" ");
  return {
    traces,
    legend,
    empty: "No run has such a curve.",
    layout: {
      hovermode: "closest",
      xaxis: { title: { text: xKind === "seconds" ? "seconds of work" : xKind }, uirevision: xKind },
      yaxis: { title: { text: measure === "ppl" ? "perplexity" : "nats per real token" }, type: isLog ? "log" : "linear", uirevision: `${measure} ${isLog}` },
    },
  };
}
