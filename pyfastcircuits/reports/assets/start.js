// Sections 7 and 8: head scores and direct logit attribution; and the start of every section that there is.

function drawScores({ columns }) {
  const kinds = Object.keys(columns), rows = HEADS.map((_, i) => i);
  const names = { ablated: "rise of the loss without it (nats)", copying: "copying by attention" };
  const spectra = DATA.spectra ? { "copying score": DATA.spectra["OV positivity"], "QK positivity": DATA.spectra["QK positivity"] } : {};
  const all = { ...columns, ...spectra };
  const bound = Object.fromEntries(Object.entries(all).map(([kind, x]) => [kind, Math.max(...x.map((v) => Math.abs(v ?? 0))) || 1]));
  const bar = (kind, i) => {
    const value = all[kind][i], cell = el("span", { class: "bar" }, figure(value));
    cell.style.setProperty("--share", `${(100 * Math.abs(value ?? 0)) / bound[kind]}%`);
    cell.style.setProperty("--bar", `var(--${value > 0 ? "series-1" : "series-2"})`);
    return cell;
  };
  const numbers = [...kinds.filter((k) => k !== "ablated"), ...Object.keys(spectra), "ablated"];
  sortableTable("score-table", [
    { name: "head", left: true, value: (i) => i, show: (i) => HEADS[i] },
    ...numbers.map((kind) => ({ name: names[kind] ?? kind.replace("_", " "), value: (i) => all[kind][i], show: (i) => bar(kind, i) })),
  ], rows, [1, true]);
  const csv = SAVED["score-table"].csv;
  SAVED["score-table"].csv = () => csv().map((row, r) => (r ? [HEADS[row[0]], ...row.slice(1)] : row.map((name) => name.replaceAll(" ", "_"))));
}

const BARS = 40;

function drawAttribution({ labels, values }) {
  const all = unpack(values), sequences = all.shape[1];
  const select = fill("attribution-sequence", sequenceNames(sequences));
  let sequence = 0, place = 1;
  const tokens = () => DATA.tokens[sequence];
  const parts = () => labels.map((label, c) => [label, at(all, c, sequence)[place - 1]]);
  const shownParts = () => {
    const kept = parts().map((x, i) => [...x, i]).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, BARS).sort((a, b) => a[2] - b[2]);
    return kept;
  };
  const total = () => parts().reduce((sum, x) => sum + x[1], 0);
  const lossOf = (i) => (i ? DATA.losses[sequence][i - 1] : null);
  const draw = chart("attribution-bars", () => {
    const kept = shownParts();
    return {
      height: Math.max(220, 18 * kept.length + 60),
      traces: [{
        type: "bar", orientation: "h", y: kept.map((_, i) => i), x: kept.map((x) => x[1]), customdata: kept.map((x) => x[0]),
        marker: { color: kept.map((x) => themed(x[1] > 0 ? "series-1" : "series-2")) }, hovertemplate: "%{customdata}: %{x:.3f}<extra></extra>",
      }],
      layout: { margin: { l: 76, r: 16, t: 6, b: 40 }, bargap: 0.25, xaxis: { title: { text: "logit" } }, yaxis: { tickvals: kept.map((_, i) => i), ticktext: kept.map((x) => x[0]), autorange: "reversed", showgrid: false, zeroline: false } },
    };
  }, {
    text: () => {
      const best = parts().sort((a, b) => b[1] - a[1]).slice(0, 3).map(([label, value]) => `${label} (${figure(value, true)})`).join(", ");
      return `The logit of ${shownPiece(tokens()[place])} at position ${place} is ${figure(total(), true)} above the mean, and its loss ${figure(lossOf(place))} nats. Most is written by ${best}.`;
    },
    csv: () => [["component", "token", "position", "logit"], ...parts().map(([label, value]) => [label, rawPiece(tokens()[place]), place, value])],
  });
  const show = (i) => {
    place = Math.max(1, i ?? place);
    text.mark(place);
    draw();
  };
  const text = tokenList("attribution-text", { onPick: show, first: 1 });
  const shade = (i) => [shareShade(Math.min(1, (lossOf(i) ?? 0) / 14)), i ? `loss ${figure(lossOf(i))}` : ""];
  const start = () => {
    text.set(tokens());
    text.paint(shade);
    // The token that is predicted best among those that were not obvious from the one before: most is written by heads.
    const heads = labels.map((label, c) => (/^\d+\.\d+$/.test(label) ? c : -1)).filter((c) => c >= 0);
    const byHeads = tokens().map((_, i) => (i ? heads.reduce((sum, c) => sum + at(all, c, sequence)[i - 1], 0) : -Infinity));
    show(byHeads.indexOf(Math.max(...byHeads)) || 1);
  };
  drawn.push(() => text.paint(shade));
  select.addEventListener("change", () => ((sequence = Number(select.value)), start()));
  start();
}

const DRAWS = { orders: drawOrders, attention: drawAttention, pairs: drawPairs, composition: drawComposition, spectra: drawSpectra, trigrams: drawTrigrams, scores: drawScores, attribution: drawAttribution };
for (const [name, draw] of Object.entries(DRAWS)) if (DATA[name]) draw(DATA[name]);
document.body.classList.toggle("ids", !DATA.words);
document.documentElement.dataset.ready = "yes";
