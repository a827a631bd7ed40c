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

function perform(drawing, target) {
  drawing.isDue = false;
  const made = drawing.draw();
  if (made === null || made.traces.length === 0) {
    Plotly.purge(target);
    target.replaceChildren(make("p", { className: "empty", textContent: made?.empty ?? "Nothing to show." }));
    return;
  }
  target.querySelector(".empty")?.remove();
  Plotly.react(target, made.traces, layout(made.layout ?? {}), { responsive: true, displaylogo: false, displayModeBar: false });
}

// draw() returns {traces, layout, empty}, or null for nothing.
function chart(id, draw) {
  const drawing = drawings.get(id);
  if (drawing === undefined) {
    drawings.set(id, { draw, isDue: true, isInSight: false });
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
  const isNarrow = window.innerWidth < 700;
  return {
    paper_bgcolor: colour("page"),
    plot_bgcolor: colour("page"),
    font: { color: colour("text"), family: "system-ui, sans-serif", size: 12 },
    margin: { l: 55, r: 15, t: 15, b: 45 },
    hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("line"), font: { color: colour("text") }, namelength: -1 },
    legend: isNarrow ? { orientation: "h", y: -0.18, yanchor: "top", maxheight: 140 } : { x: 1.01, y: 1 },
    ...own,
    xaxis: { ...axis, ...own.xaxis },
    yaxis: { ...axis, ...own.yaxis },
  };
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const [id, drawing] of drawings) chart(id, drawing.draw);
});
