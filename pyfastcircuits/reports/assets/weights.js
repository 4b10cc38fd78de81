// Sections 3 to 5: what weights alone say. Composition and virtual heads, eigenvalues, skip-trigrams.

function drawComposition(data) {
  const kinds = ["Q", "K", "V"], found = {};
  for (const kind of kinds) {
    found[kind] = Object.fromEntries(["score", "random", "z"].map((name) => [name, unpack(data[kind][name]).values]));
  }
  const rise = DATA.pairs ? unpack(DATA.pairs.rise).values : null;
  const rowOf = new Map(data.virtual.kept.map((p, row) => [p, row]));
  const value = (p) => {
    const { score, random, z } = found[chosen("kind")];
    return { z: z[p], score: score[p], rest: score[p] - random[p] }[chosen("form")];
  };
  let shown = found.K.z.indexOf(Math.max(...found.K.z)), values = null;
  const drawVirtual = () => {
    values = virtualPattern(...PAIRS[shown]);
    patternInto("virtual-pattern", { get: (q, k) => values[q * values.size + k], size: values.size, label: `Attention pattern of the virtual head ${pairName(shown)}` });
  };
  const onPick = (p) => {
    shown = p;
    const row = rowOf.get(p);
    say("virtual-title", `Virtual head ${pairName(p)}`);
    const copies = row === undefined ? "" : ` The positivity of its OV circuit's eigenvalues is ${figure(data.virtual.positivity[row], true)}.`;
    say("virtual-said", `${rise ? `Without its path the loss changes by ${inNats(rise[p])}.` : ""}${copies}`);
    say("virtual-scores", plainTable(["composition by", "score", "random", "z"], kinds.map((k) => [
      { Q: "Q queries", K: "K keys", V: "V values" }[k], figure(found[k].score[p]), figure(found[k].random[p]), figure(found[k].z[p], true)]), 1));
    if (row === undefined) say("virtual-entries", el("p", { class: "note" }, "Its OV circuit token by token is left out of this page."));
    else say("virtual-entries", plainTable(["it attends to", "and raises", "logit"], data.virtual.entries[row].map(([s, o, v]) => [pieceSpan(s), pieceSpan(o), figure(v, true)]), 2));
    drawVirtual();
  };
  drawn.push(drawVirtual);
  onSequence.push(() => drawVirtual());
  const draw = matrix("composition-matrix", {
    value,
    said: (p) => `${pairName(p)}: ${chosen("kind")}-composition ${figure(found[chosen("kind")].score[p])}, by chance ${figure(found[chosen("kind")].random[p])}, z = ${figure(found[chosen("kind")].z[p], true)}`,
    unit: () => ({ z: "standard deviations", score: "score", rest: "score − random" })[chosen("form")],
    first: shown,
    onPick,
    csv: () => [["source", "destination", ...kinds.flatMap((k) => [`${k}_score`, `${k}_random`, `${k}_z`])], ...PAIRS.map(([i, j], p) => [HEADS[i], HEADS[j], ...kinds.flatMap((k) => [found[k].score[p], found[k].random[p], found[k].z[p]])])],
  });
  onChoice("kind", draw);
  onChoice("form", draw);
  saving("virtual-pattern", {
    svg: () => patternSvg((q, k) => values[q * values.size + k], values.size, `virtual head ${pairName(shown)}`),
    csv: () => patternRows((q, k) => values[q * values.size + k], currentTokens()),
  });
}

function drawSpectra(data) {
  const parts = {};
  for (const circuit of ["OV", "QK"]) parts[circuit] = [unpack(data[circuit].real), unpack(data[circuit].imaginary)];
  const scores = () => data[`${chosen("circuit")} positivity`];
  const best = data["OV positivity"].indexOf(Math.max(...data["OV positivity"]));
  const select = fill("spectrum-head", HEADS, best);
  const head = () => Number(select.value);
  const points = () => {
    const [re, im] = parts[chosen("circuit")].map((part) => at(part, head()));
    const largest = Math.max(...re.map((x, i) => Math.hypot(x, im[i]))) || 1;
    return Array.from(re, (x, i) => ({ x, y: im[i], size: Math.hypot(x, im[i]), largest }));
  };
  const DECADES = 4;
  const place = ({ x, y, size, largest }) => {
    if (chosen("radius") === "linear" || !size) return [x, y];
    const r = Math.max(0, 1 + Math.log10(size / largest) / DECADES);
    return [(r * x) / size, (r * y) / size];
  };
  const said = () => `${chosen("circuit")} circuit of head ${HEADS[head()]}: ${points().length} eigenvalues, ${points().filter((p) => p.x > 0).length} with a positive real part; ${chosen("circuit") === "OV" ? "copying score" : "positivity"} ${figure(scores()[head()], true)}.`;
  const drawSpectrum = chart("spectrum", () => {
    const all = points(), log = chosen("radius") === "log", bound = log ? 1.08 : all[0].largest * 1.08;
    const rings = log ? [0.25, 0.5, 0.75, 1] : [];
    const axis = { range: [-bound, bound], ...(log ? { showticklabels: false, showgrid: false } : { tickformat: ".2~g", nticks: 5 }) };
    return {
      height: 360,
      traces: [{
        x: all.map((p) => place(p)[0]), y: all.map((p) => place(p)[1]), mode: "markers", type: "scatter",
        marker: { size: 8, color: all.map((p) => (p.x > 0 ? themed("series-1") : themed("series-2"))), symbol: all.map((p) => (p.x > 0 ? "circle" : "diamond")), line: { width: 0.5, color: themed("card") } },
        customdata: all.map((p) => [figure(p.x), figure(p.y)]), hovertemplate: "%{customdata[0]} + %{customdata[1]}i<extra></extra>",
      }],
      layout: {
        margin: { l: 40, r: 10, t: 8, b: 40 },
        shapes: rings.map((r) => ({ type: "circle", x0: -r, x1: r, y0: -r, y1: r, layer: "below", line: { color: themed("line"), width: 1 } })),
        annotations: rings.slice(1).map((r, i) => ({ x: 0.03, y: r, text: i === 2 ? `${figure(all[0].largest)}` : `10<sup>−${2 - i}</sup>`, showarrow: false, xanchor: "left", yanchor: "top", font: { size: 10, color: themed("muted") } })),
        xaxis: { ...axis, title: { text: "real part" } }, yaxis: { ...axis, title: { text: "imaginary part" }, scaleanchor: "x" },
      },
    };
  }, {
    text: said,
    csv: () => [["head", "circuit", "real", "imaginary"], ...points().map(({ x, y }) => [HEADS[head()], chosen("circuit"), x, y])],
  });
  const pick = (i) => {
    select.value = String(i);
    drawSpectrum();
    drawCopying();
  };
  const drawCopying = chart("copying", () => ({
    height: 360,
    traces: [{
      type: "bar", x: HEADS.map((_, i) => i), y: scores(),
      marker: { color: scores().map((x) => themed(x > 0 ? "series-1" : "series-2")), opacity: HEADS.map((_, i) => (i === head() ? 1 : 0.55)), line: { width: HEADS.map((_, i) => (i === head() ? 2 : 0)), color: themed("text") } },
      customdata: HEADS, hovertemplate: "head %{customdata}: %{y:.3f}<extra></extra>",
    }],
    layout: {
      bargap: 0.2, margin: { l: 44, r: 10, t: 8, b: 44 }, yaxis: { range: [-1.05, 1.05], title: { text: chosen("circuit") === "OV" ? "copying score" : "positivity of QK" } },
      xaxis: { ...headTicks(HEADS.map((_, i) => i), Math.max(4, byId("copying").clientWidth / 34)), title: { text: "head" } },
    },
  }), {
    text: () => {
      const order = scores().map((x, i) => [x, i]).sort((a, b) => b[0] - a[0]);
      return `Largest: ${order.slice(0, 3).map(([x, i]) => `${HEADS[i]} (${figure(x, true)})`).join(", ")}. Smallest: ${order.slice(-3).reverse().map(([x, i]) => `${HEADS[i]} (${figure(x, true)})`).join(", ")}.`;
    },
    csv: () => [["head", "copying_score", "qk_positivity"], ...HEADS.map((name, i) => [name, data["OV positivity"][i], data["QK positivity"][i]])],
    onPick: (point) => pick(point.pointIndex),
  });
  select.addEventListener("change", () => pick(head()));
  onChoice("circuit", () => pick(head()));
  onChoice("radius", drawSpectrum);
}

const ROWS_SHOWN = 60;

function drawTrigrams(data) {
  const direct = HEADS.length + 1, names = ["all heads", ...HEADS, "direct path (bigrams)"];
  const select = fill("trigram-head", names), search = byId("trigram-search");
  const unpacked = data.heads.map((x) => Object.fromEntries(["destinations", "attention", "outputs", "logits"].map((name) => [name, unpack(x[name])])));
  const bigram = { outputs: unpack(data.bigrams.outputs), logits: unpack(data.bigrams.logits) };
  const wanted = () => search.value.replaceAll("·", " ").replaceAll("↵", "\n").toLowerCase();
  const holds = (piece, text) => rawPiece(piece).toLowerCase().includes(text);
  const heads = () => {
    const i = Number(select.value);
    return i === 0 ? HEADS.map((_, h) => h) : i === direct ? [] : [i - 1];
  };
  const withBigrams = () => Number(select.value) === direct || !HEADS.length;
  const triples = () => {
    const text = wanted();
    const all = withBigrams()
      ? data.bigrams.best.map(([s, o, v]) => ({ head: "direct", tokens: [s, o], attention: null, logit: v, score: v }))
      : heads().flatMap((h) => data.heads[h].best.map(([s, d, o, a, l]) => ({ head: HEADS[h], tokens: [s, d, o], attention: a, logit: l, score: a * l })));
    return all.filter((row) => row.tokens.some((piece) => holds(piece, text))).sort((a, b) => b.score - a.score);
  };
  const sources = () => {
    const text = wanted(), rows = [];
    data.sources.forEach((piece, s) => {
      if (!holds(piece, text)) return;
      if (withBigrams()) rows.push({ head: "direct", piece, seen: [], raised: beside(bigram.outputs, bigram.logits, s) });
      for (const h of heads()) {
        const { destinations, attention, outputs, logits } = unpacked[h];
        rows.push({ head: HEADS[h], piece, seen: beside(destinations, attention, s), raised: beside(outputs, logits, s) });
      }
    });
    return rows;
  };
  const beside = (tokens, values, s) => Array.from(at(tokens, s), (piece, i) => [piece, at(values, s)[i]]);
  const strengths = (list) => list.flatMap(([piece, value]) => [el("span", { class: "strength" }, pieceSpan(piece), ` ${figure(value, true)}`), " "]);
  const draw = () => {
    const best = triples(), rows = sources(), all = (n) => (n > ROWS_SHOWN ? `${ROWS_SHOWN} of ${n}` : `${n}`);
    say("title-trigram-table", withBigrams() ? "Largest bigrams" : "Largest skip-trigrams");
    say("trigram-count", `${best.length} ${withBigrams() ? "bigrams" : "skip-trigrams"} and ${rows.length} rows of source tokens${search.value ? " have that text" : ""}; the first ${all(best.length)} and ${all(rows.length)} are shown.`);
    say("trigram-table", withBigrams()
      ? plainTable(["path", "token", "raised next", "logit"], best.slice(0, ROWS_SHOWN).map((x) => [x.head, ...x.tokens.map((t) => pieceSpan(t)), figure(x.logit, true)]), 3)
      : plainTable(["head", "source …", "destination", "→ output", "attention", "logit", "product"], best.slice(0, ROWS_SHOWN).map((x) => [x.head, ...x.tokens.map((t) => pieceSpan(t)), figure(x.attention, true), figure(x.logit, true), figure(x.score)]), 4));
    say("source-table", plainTable(["source token", "head", "destinations that attend to it", "outputs it raises"], rows.slice(0, ROWS_SHOWN).map((x) => [pieceSpan(x.piece), x.head, x.seen.length ? strengths(x.seen) : "–", strengths(x.raised)]), 4));
  };
  saving("trigram-table", { csv: () => [["head", "source", "destination", "output", "attention", "logit"], ...triples().map((x) => [x.head, rawPiece(x.tokens[0]), x.tokens.length === 3 ? rawPiece(x.tokens[1]) : null, rawPiece(x.tokens.at(-1)), x.attention, x.logit])] });
  saving("source-table", { csv: () => [["source", "head", "rank", "destination", "attention", "output", "logit"], ...sources().flatMap((x) => x.raised.map(([piece, value], i) => [rawPiece(x.piece), x.head, i, x.seen[i] ? rawPiece(x.seen[i][0]) : null, x.seen[i] ? x.seen[i][1] : null, rawPiece(piece), value]))] });
  search.addEventListener("input", draw);
  select.addEventListener("change", draw);
  draw();
}
