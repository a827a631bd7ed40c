// Variants at an equal budget, best against last, throughput.

const column = (key, label, digits, note = "") => ({ key, label, digits, note });
const cell = (value, text) => [value, text];

// The place of the last evaluation up to a budget; -1 = none.
function placeAt(run, kind, budget) {
  const x = run.curves.eval[kind];
  let [from, to] = [0, x.length];
  while (from < to) {
    const middle = (from + to) >> 1;
    if (x[middle] <= budget) from = middle + 1;
    else to = middle;
  }
  return from - 1;
}

const isNear = (run, kind, budget, place) => place >= 0 && run.curves.eval[kind][place] >= (1 - report.tolerance) * budget;

function lossAt(run, kind, budget) {
  const place = placeAt(run, kind, budget);
  return isNear(run, kind, budget, place) ? run.curves.eval.loss[place] : null;
}

// Mean and half the 95 % interval of Student's t, as tools/study.py has it: null with one pair.
function interval(differences) {
  if (differences.length === 0) return { mean: null, half: null };
  const centre = mean(differences);
  const freedom = differences.length - 1;
  if (freedom === 0) return { mean: centre, half: null };
  const deviation = Math.sqrt(differences.reduce((sum, value) => sum + (value - centre) ** 2, 0) / freedom);
  const quantile = report.t_95[Math.min(freedom, Math.max(...Object.keys(report.t_95).map(Number)))];
  return { mean: centre, half: (quantile * deviation) / Math.sqrt(differences.length) };
}

// Seed to loss and data; of several runs of a seed the first counts.
function lossesBySeed(runs, kind, budget) {
  const found = new Map();
  for (const run of runs) {
    const loss = lossAt(run, kind, budget);
    const seed = run.cells.seed[0];
    if (loss !== null && seed !== null && !found.has(seed)) found.set(seed, { loss, data: run.data });
  }
  return found;
}

function compared(runs, kind, budget, baselineName) {
  const reference = lossesBySeed(report.runs.filter((run) => run.cells.tag[0] === baselineName), kind, budget);
  const rows = [...Map.groupBy(runs, (run) => run.cells.tag[0])].map(([name, members]) => {
    const ours = lossesBySeed(members, kind, budget);
    const losses = [...ours.values()].map(({ loss }) => loss);
    const seeds = [...ours.keys()].filter((s) => name !== baselineName && reference.get(s)?.data === ours.get(s).data).sort((a, b) => a - b);
    const differences = seeds.map((seed) => ours.get(seed).loss - reference.get(seed).loss);
    const centre = losses.length ? mean(losses) : null;
    return { name, losses, mean: centre, differences, ...Object.fromEntries(Object.entries(interval(differences)).map(([key, value]) => [`difference_${key}`, value])) };
  });
  rows.sort((a, b) => compareCells(a.mean, b.mean, false));
  return rows;
}

const compareTable = new SortableTable(byId("compare-table"), [
  column("name", "Variant", null), column("rank", "Rank", 0), column("seeds", "Seeds", 0), column("mean", "Mean loss", 4),
  column("low", "Lowest", 4), column("high", "Highest", 4), column("ppl", "Ppl", 2, "of the mean loss"),
  column("difference", "Minus baseline", 4, "mean over pairs of equal seed and validation data"),
  column("half", "± 95 %", 4, "half of Student's interval over the pairs; none with one pair"),
  column("pairs", "By seed", null),
], { key: "mean", descending: false }, (row, { key }, element) => {
  if (key === "name" && row.cells.name[0] === byId("baseline").value) element.append(make("span", { className: "mark", textContent: " (baseline)" }));
});

function showComparison(runs) {
  const kind = byId("budget-kind").value;
  const budget = Number(byId("budget").value);
  const rows = compared(runs, kind, budget, byId("baseline").value);
  compareTable.show(rows.map((row, place) => {
    const low = row.losses.length ? Math.min(...row.losses) : null;
    const high = row.losses.length ? Math.max(...row.losses) : null;
    const rank = row.mean === null ? null : place + 1;
    const ppl = row.mean === null || row.mean > 700 ? null : Math.exp(row.mean);
    const pairs = row.differences.map((value) => signed(value, 4)).join("  ");
    return { cells: {
      name: cell(row.name, row.name), rank: cell(rank, figure(rank, 0)), seeds: cell(row.losses.length, String(row.losses.length)),
      mean: cell(row.mean, figure(row.mean, 4)), low: cell(low, figure(low, 4)), high: cell(high, figure(high, 4)), ppl: cell(ppl, figure(ppl, 2)),
      difference: cell(row.difference_mean, signed(row.difference_mean, 4)), half: cell(row.difference_half, figure(row.difference_half, 4)),
      pairs: cell(pairs || null, pairs),
    } };
  }));
  byId("compare-note").textContent = `Losses of the last evaluation up to this budget, if it is not more than ${100 * report.tolerance} % before it; empty where a variant has none.`;
  chart("compare-chart", () => drawComparison(rows.filter((row) => row.mean !== null)));
}

function drawComparison(rows) {
  const reference = rows.find((row) => row.name === byId("baseline").value);
  const label = (row, place) => `${place + 1}. ${shortText(row.name, nameLength())}`;
  const names = rows.map(label);
  const colours = rows.map((row) => familyColour(report.runs.find((run) => run.cells.tag[0] === row.name)));
  byId("compare-chart").style.height = `${Math.max(200, 26 * rows.length + 80)}px`;
  const lowest = Math.min(...rows.flatMap((row) => row.losses));
  const highest = Math.max(...rows.flatMap((row) => row.losses));
  const margin = 0.08 * (highest - lowest) || 0.1;
  return {
    traces: rows.length === 0 ? [] : [{
      type: "scatter", mode: "markers", x: rows.map((row) => row.mean), y: names, marker: { color: colours, size: 10 },
      error_x: {
        type: "data", symmetric: false, color: colour("quiet"), thickness: 1.5,
        array: rows.map((row) => Math.max(...row.losses) - row.mean), arrayminus: rows.map((row) => row.mean - Math.min(...row.losses)),
      },
      meta: rows.map((row) => plainText(row.name)), customdata: rows.map((row) => row.mean), hovertemplate: "<b>%{meta}</b><br>%{customdata}<extra></extra>",
    }],
    empty: "No variant was evaluated at this budget.",
    layout: {
      height: Math.max(200, 26 * rows.length + 80),
      xaxis: { title: { text: "nats per real token" }, range: [lowest - margin, highest + margin] },
      yaxis: { autorange: "reversed", type: "category" },
      shapes: reference ? [{ type: "line", x0: reference.mean, x1: reference.mean, yref: "paper", y0: 0, y1: 1, line: { color: colour("quiet"), dash: "dash", width: 1.5 } }] : [],
    },
  };
}

const bestTable = new SortableTable(byId("best-table"), [
  column("run", "Run", null), column("best", "Best loss", 4), column("at", "At step", 0), column("last", "Last loss", 4),
  column("step", "Step", 0), column("gap", "Last minus best", 4),
], { key: "best", descending: false });

const speedTable = new SortableTable(byId("speed-table"), [
  column("run", "Run", null), column("ranks", "Ranks", 0), column("rate", "Tokens/s", 0, "median over the steps up to the budget"), column("per_rank", "A rank", 0),
  column("ratio", "Times the baseline", 2, "tokens/s over the median of the baseline's runs"), column("seconds", "Seconds", 0, "of steps and evaluations up to the budget"),
  column("device", "Device", null),
], { key: "rate", descending: true });

// The lowest loss up to a budget, where it was, and the last: {best, at, last, step}; null = none.
function bestAndLast({ curves }, kind, budget) {
  const { loss, step, [kind]: x } = curves.eval;
  const held = loss.map((value, i) => ({ value, step: step[i] })).filter((_, i) => x[i] <= budget);
  const best = held.filter(({ value }) => value !== null).reduce((least, one) => (least === null || one.value < least.value ? one : least), null);
  const last = held.at(-1) ?? null;
  return { best: best?.value ?? null, at: best?.step ?? null, last: last?.value ?? null, step: last?.step ?? null };
}

// Tokens/s and seconds up to a budget; null where a run was not evaluated there.
function speedAt(run, kind, budget) {
  const place = placeAt(run, kind, budget);
  const { rate, seconds } = run.curves.eval;
  return isNear(run, kind, budget, place) ? { rate: rate[place], seconds: seconds[place] } : { rate: null, seconds: null };
}

function showRunTables(runs) {
  const [kind, budget] = [byId("budget-kind").value, Number(byId("budget").value)];
  const found = runs.map((run) => ({ run, ...bestAndLast(run, kind, budget) }));
  bestTable.show(found.map(({ run, best, at, last, step }) => {
    const gap = best === null || last === null ? null : last - best;
    return { cells: {
      run: run.cells.run, best: cell(best, figure(best, 4)), at: cell(at, figure(at, 0)), last: cell(last, figure(last, 4)),
      step: cell(step, figure(step, 0)), gap: cell(gap, signed(gap, 4)),
    } };
  }));
  chart("best-chart", () => drawBest(found));
  const rates = report.runs.filter(isBaseline).map((run) => speedAt(run, kind, budget).rate).filter((rate) => rate !== null).sort((a, b) => a - b);
  const reference = rates.length ? rates[Math.floor(rates.length / 2)] : null;
  speedTable.show(runs.map((run) => {
    const [{ rate, seconds }, ranks] = [speedAt(run, kind, budget), run.cells.ranks[0]];
    const each = rate === null || !ranks ? null : rate / ranks;
    const ratio = rate === null || !reference ? null : rate / reference;
    return { cells: {
      run: run.cells.run, ranks: run.cells.ranks, rate: cell(rate, figure(rate, 0)), per_rank: cell(each, figure(each, 0)), ratio: cell(ratio, figure(ratio, 2)),
      seconds: cell(seconds, figure(seconds, 0)), device: run.cells.device,
    } };
  }));
}

// A bar for each variant: the lowest loss of any of its runs.
function drawBest(found) {
  const rows = [...Map.groupBy(found.filter(({ best }) => best !== null), ({ run }) => run.cells.tag[0])]
    .map(([name, members]) => ({ name, ...members.reduce((least, one) => (one.best < least.best ? one : least)) }))
    .sort((a, b) => a.best - b.best);
  const height = Math.max(160, 24 * rows.length + 80);
  byId("best-chart").style.height = `${height}px`;
  return {
    traces: rows.length === 0 ? [] : [{
      type: "bar", orientation: "h", x: rows.map(({ best }) => best), y: rows.map((_, i) => i), marker: { color: rows.map(({ run }) => familyColour(run)) },
      text: rows.map(({ best }) => figure(best, 4)), textposition: "auto", meta: rows.map(({ name, run, at }) => `<b>${plainText(name)}</b><br>${plainText(run.cells.run[0])}, step ${at}`),
      customdata: rows.map(({ best }) => best), hovertemplate: "%{meta}<br>%{customdata}<extra></extra>",
    }],
    empty: "No run was evaluated up to this budget.",
    layout: {
      height,
      xaxis: { title: { text: "nats per real token" }, rangemode: "tozero" },
      yaxis: { autorange: "reversed", tickvals: rows.map((_, i) => i), ticktext: rows.map(({ name }) => shortText(name, nameLength())) },
    },
  };
}

const chosenBudget = {};

// The budgets at which runs were evaluated, how many each. What a reader has chosen stays, whatever is filtered; else it is
// what most runs that are done have, the largest of those.
function fillBudgets(runs) {
  const kind = byId("budget-kind").value;
  const held = [...new Set(runs.flatMap((run) => run.curves.eval[kind]))].filter((x) => x > 0).sort((a, b) => a - b);
  const stride = Math.ceil(held.length / 200);
  const chosen = chosenBudget[kind];
  const all = [...new Set([...held.filter((_, i) => (held.length - 1 - i) % stride === 0), ...(chosen === undefined ? [] : [chosen])])].sort((a, b) => a - b);
  const count = (some) => all.map((x) => some.filter((run) => lossAt(run, kind, x) !== null).length);
  const counted = count(runs);
  const done = runs.filter(({ cells }) => cells.status[0] === "done");
  const decisive = done.length ? count(done) : counted;
  const most = decisive.lastIndexOf(Math.max(...decisive));
  fillSelect(byId("budget"), all.map((x, i) => [x, `${figure(x, 0)} (${counted[i]} run${counted[i] === 1 ? "" : "s"})`]), chosen ?? all[most]);
}
