// Charts and matrices, drawn by Plotly.

const CONFIG = { displayModeBar: false, responsive: true, doubleClick: false, scrollZoom: false };

function baseLayout(height, more) {
  const axis = { gridcolor: themed("line"), zerolinecolor: themed("muted"), linecolor: themed("line"), fixedrange: true, automargin: true };
  const layout = {
    height, margin: { l: 52, r: 12, t: 8, b: 44 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: themed("text") }, dragmode: false, showlegend: false,
    hoverlabel: { bgcolor: themed("card"), bordercolor: themed("line"), font: { color: themed("text") } },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    ...more,
  };
  layout.xaxis = { ...axis, ...more.xaxis };
  layout.yaxis = { ...axis, ...more.yaxis };
  return layout;
}

async function chartSvg(id) {
  const chart = byId(id), width = Math.max(480, chart.clientWidth), height = chart._fullLayout.height;
  const url = await Plotly.toImage(chart, { format: "svg", width, height });
  return decodeURIComponent(url.slice(url.indexOf(",") + 1));
}

// A chart whose traces and layout are made anew in each theme. `say` is its text alternative.
function chart(id, make, { csv, text, onPick }) {
  const holder = byId(id);
  holder.setAttribute("role", "img");
  saving(id, { svg: () => chartSvg(id), csv });
  const draw = draws(() => {
    const { traces, height, layout } = make();
    holder.style.height = `${height}px`;
    holder.setAttribute("aria-label", text());
    say(`readout-${id}`, text());
    Plotly.react(holder, traces, baseLayout(height, layout), CONFIG);
  });
  if (onPick) holder.on("plotly_click", (event) => onPick(event.points[0]));
  return draw;
}

// Ticks that have room: names of some of the heads.
function headTicks(heads, most) {
  const step = Math.max(1, Math.ceil(heads.length / most));
  const kept = heads.map((_, i) => i).filter((i) => i % step === 0);
  return { tickvals: kept, ticktext: kept.map((i) => HEADS[heads[i]]), tickmode: "array", ticks: "", showgrid: false, zeroline: false };
}

// Lines between the layers.
function layerLines(heads, along, end) {
  const lines = [];
  heads.forEach((head, i) => {
    if (!i || LAYER[head] === LAYER[heads[i - 1]]) return;
    const place = along === "x" ? { x0: i - 0.5, x1: i - 0.5, y0: -0.5, y1: end - 0.5 } : { y0: i - 0.5, y1: i - 0.5, x0: -0.5, x1: end - 0.5 };
    lines.push({ type: "line", layer: "above", line: { color: themed("line"), width: 1 }, ...place });
  });
  return lines;
}

// A matrix of pairs, sources down and destinations across, that mouse and arrow keys walk through.
//   value(p): of a pair. said(p): a pair in words. unit(): what the colour bar measures. onPick(p): a pair is chosen.
function matrix(id, { value, said, unit, csv, onPick, first }) {
  const holder = byId(id);
  const last = Math.max(...LAYER), sources = [], destinations = [];
  HEADS.forEach((_, i) => {
    if (LAYER[i] < last) sources.push(i);
    if (LAYER[i] > LAYER[0]) destinations.push(i);
  });
  let [row, column] = [sources.indexOf(PAIRS[first][0]), destinations.indexOf(PAIRS[first][1])];
  let picked = first, focused = false;
  saving(id, { svg: () => chartSvg(id), csv });
  holder.tabIndex = 0;
  holder.setAttribute("role", "application");
  holder.setAttribute("aria-roledescription", "matrix of pairs of heads");

  const cell = (i, j, colour, width) => ({
    type: "rect", x0: j - 0.5, x1: j + 0.5, y0: i - 0.5, y1: i + 0.5, line: { color: colour, width }, layer: "above",
  });
  const shapes = () => {
    const [i, j] = [sources.indexOf(PAIRS[picked][0]), destinations.indexOf(PAIRS[picked][1])];
    const marks = [cell(i, j, themed("text"), 2)];
    if (focused) marks.push(cell(row, column, themed("focus"), 3));
    return [...layerLines(sources, "y", destinations.length), ...layerLines(destinations, "x", sources.length), ...marks];
  };
  const tell = (i, j) => {
    const p = pairOf(sources[i], destinations[j]);
    const none = `${HEADS[sources[i]]} → ${HEADS[destinations[j]]}: no pair, because the destination does not read what the source writes`;
    say(`readout-${id}`, p === undefined ? none : said(p));
    return p;
  };
  const draw = draws(() => {
    const z = sources.map((i) => destinations.map((j) => (pairOf(i, j) === undefined ? null : value(pairOf(i, j)))));
    const bound = Math.max(...PAIRS.map((_, p) => Math.abs(value(p)) || 0)) || 1;
    const width = holder.clientWidth, narrow = width < 520;
    const size = Math.max(3, Math.min(36, (width - (narrow ? 105 : 140)) / destinations.length));
    const height = Math.max(200, Math.min(640, Math.round(size * sources.length))) + 64;
    const room = (pixels) => Math.max(2, Math.floor(pixels / 30));
    const heat = {
      type: "heatmap", z, zmin: -bound, zmax: bound, colorscale: plotScale(diverging()), hoverinfo: "none", hoverongaps: false,
      xgap: destinations.length > 40 ? 0 : 1, ygap: sources.length > 40 ? 0 : 1,
      colorbar: { thickness: 10, outlinewidth: 0, len: 1, title: { text: unit(), side: "right" }, tickformat: ".2~g", nticks: 5 },
    };
    holder.style.height = `${height}px`;
    holder.setAttribute("aria-label", `${byId(`title-${id}`).textContent}. ${said(picked)}. Arrow keys move through the cells, Enter chooses one.`);
    Plotly.react(holder, [heat], baseLayout(height, {
      margin: { l: 48, r: 8, t: 6, b: 48 }, shapes: shapes(),
      xaxis: { ...headTicks(destinations, room(width - 140)), title: { text: "destination head", standoff: 6 }, tickangle: 0, range: [-0.5, destinations.length - 0.5] },
      yaxis: { ...headTicks(sources, room(height - 64) * 1.5), title: { text: "source head", standoff: 6 }, range: [sources.length - 0.5, -0.5] },
    }), CONFIG);
    tell(row, column);
  });
  const mark = () => Plotly.relayout(holder, { shapes: shapes() });
  const pick = () => {
    const p = tell(row, column);
    if (p === undefined) return;
    picked = p;
    mark();
    onPick(p);
  };
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  holder.addEventListener("keydown", (event) => {
    const clamp = (x, end) => Math.min(end - 1, Math.max(0, x));
    if (steps[event.key]) {
      const far = event.ctrlKey || event.shiftKey ? 8 : 1;
      row = clamp(row + far * steps[event.key][0], sources.length);
      column = clamp(column + far * steps[event.key][1], destinations.length);
      mark();
      tell(row, column);
    } else if (event.key === "Enter" || event.key === " ") pick();
    else return;
    event.preventDefault();
  });
  holder.addEventListener("focus", () => ((focused = holder.matches(":focus-visible")), mark()));
  holder.addEventListener("blur", () => ((focused = false), mark()));
  // The cell under the pointer, by its place: Plotly hears of none of this (report.css), and a finger scrolls the page.
  const under = (event) => {
    const box = holder.querySelector(".nsewdrag").getBoundingClientRect();
    const i = Math.floor(((event.clientY - box.top) / box.height) * sources.length);
    const j = Math.floor(((event.clientX - box.left) / box.width) * destinations.length);
    return i >= 0 && i < sources.length && j >= 0 && j < destinations.length ? [i, j] : null;
  };
  holder.addEventListener("pointermove", (event) => tell(...(under(event) ?? [row, column])));
  holder.addEventListener("pointerleave", () => tell(row, column));
  holder.addEventListener("click", (event) => {
    if (!under(event)) return;
    [row, column] = under(event);
    pick();
  });
  onPick(picked);
  return draw;
}
