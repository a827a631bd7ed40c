// Charts: colours from the styles, drawn when they come into sight and again when light turns to dark.

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const PALETTE = 8;
const paletteColour = (place) => colour(`c${place % PALETTE}`);

function withAlpha(hex, alpha) {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  return `rgba(${red},${green},${blue},${alpha})`;
}

// Plotly reads a few tags and entities in its texts; names from files are to be read as they are.
const plainText = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const shortText = (text, most = 34) => plainText(text.length > most ? `${text.slice(0, most - 1)}…` : text);

const nameLength = () => (window.innerWidth < 700 ? 16 : 34);

// Of light and dark, the end that stands out is the large one.
function scale() {
  return [[0, colour("panel")], [0.5, colour("c0")], [1, colour("text")]];
}

const drawings = new Map();
const inSight = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const drawing = drawings.get(target.id);
    drawing.isInSight = isIntersecting;
    if (isIntersecting && drawing.isDue && window.Plotly) perform(drawing, target);
  }
}, { rootMargin: "300px" });

// Which trace is which, for Plotly to keep what was done to it; it makes selectors of uids, so they are no names from files.
const uids = new Map();
function uidOf(trace) {
  if (!uids.has(trace)) uids.set(trace, `trace${uids.size}`);
  return uids.get(trace);
}

function perform(drawing, target) {
  drawing.isDue = false;
  const made = drawing.draw();
  showLegend(target.id, made?.legend ?? []);
  if (made === null || made.traces.length === 0) {
    Plotly.purge(target);
    target.replaceChildren(make("p", { className: "empty", textContent: made?.empty ?? "Nothing to show." }));
    return;
  }
  target.querySelector(".empty")?.remove();
  const traces = made.traces.map((trace, place) => ({ uid: `place${place}`, ...trace, visible: !drawing.hidden.has(trace.legendgroup) }));
  Plotly.react(target, traces, layout(made.layout ?? {}), { responsive: true, displaylogo: false, displayModeBar: false });
}

// A legend of buttons, since Plotly's own takes no keys. entries: [{group, name, stroke, dash}, ...]
function showLegend(id, entries) {
  const { hidden, draw } = drawings.get(id);
  const list = byId(`${id}-legend`);
  if (list === null) return;
  const focused = [...list.querySelectorAll("button")].indexOf(document.activeElement);
  const item = (textContent, react) => {
    const button = make("button", { type: "button", textContent });
    button.addEventListener("click", () => { react(); chart(id, draw); });
    return button;
  };
  const lines = entries.map(({ group, name, stroke, dash }) => {
    const button = item(name, () => hidden[hidden.has(group) ? "delete" : "add"](group));
    button.setAttribute("aria-pressed", String(!hidden.has(group)));
    const sample = make("span", { className: "sample" });
    Object.assign(sample.style, { borderTopColor: stroke, borderTopStyle: dash === "dash" ? "dashed" : "solid" });
    button.prepend(sample);
    return button;
  });
  const all = item("show all", () => hidden.clear());
  const none = item("hide all", () => entries.forEach(({ group }) => hidden.add(group)));
  list.replaceChildren(...(lines.length > 1 ? [...lines, all, none] : lines).map((button) => make("li", {}, button)));
  list.querySelectorAll("button")[focused]?.focus();
}

// draw() returns {traces, layout, empty}, or null for nothing.
function chart(id, draw) {
  const drawing = drawings.get(id);
  if (drawing === undefined) {
    drawings.set(id, { draw, isDue: true, isInSight: false, hidden: new Set() });
    inSight.observe(byId(id));
    return;
  }
  Object.assign(drawing, { draw, isDue: true });
  if (drawing.isInSight && window.Plotly) perform(drawing, byId(id));
}

// Plotly is most of the page's code: it is read once the tables are there.
function loadPlotly() {
  const source = byId("plotly");
  source.replaceWith(make("script", { textContent: source.textContent }));
  for (const [id, { draw }] of drawings) chart(id, draw);
  document.documentElement.dataset.charts = "true";
}

function layout(own) {
  const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("line"), automargin: true };
  return {
    paper_bgcolor: colour("page"),
    plot_bgcolor: colour("page"),
    font: { color: colour("text"), family: "system-ui, sans-serif", size: 12 },
    margin: { l: 55, r: 15, t: 15, b: 45 },
    hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("line"), font: { color: colour("text") }, namelength: -1 },
    showlegend: false,
    uirevision: "kept",
    ...own,
    xaxis: { ...axis, ...own.xaxis },
    yaxis: { ...axis, ...own.yaxis },
  };
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const [id, drawing] of drawings) chart(id, drawing.draw);
});
