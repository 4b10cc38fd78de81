// Sections 1 and 2: term importance, and the ablation of pairs of heads.

function drawOrders({ uniform, losses, full, article, marginals, article_marginals: theirs }) {
  const names = ["uniform", ...losses.map((_, k) => (k ? `order ≤ ${k}` : "order 0"))];
  const values = [uniform, ...losses];
  const falls = values.map((loss, i) => (i ? values[i - 1] - loss : null));
  const articles = article && names.map((_, i) => uniform - article.slice(0, i).reduce((a, b) => a + b, 0));
  chart("curve", () => ({
    height: 300,
    traces: [
      { x: names, y: values, name: "this model", mode: "lines+markers", line: { color: themed("series-1"), width: 2.5 }, marker: { size: 9 } },
      ...(article ? [{ x: names, y: articles, name: "the article's", mode: "lines+markers", line: { color: themed("series-2"), dash: "dot", width: 1.5 }, marker: { symbol: "square-open", size: 9 } }] : []),
    ],
    layout: { showlegend: Boolean(article), margin: { l: 48, r: 12, t: article ? 30 : 8, b: 40 }, yaxis: { title: { text: "loss (nats)" }, rangemode: "tozero" }, xaxis: { type: "category", nticks: 12 } },
  }), {
    csv: () => [["paths", "loss", "fall", "article_fall"], ...names.map((name, i) => [name, values[i], falls[i], i && article ? article[i - 1] : null])],
    text: () => {
      const steps = losses.map((x, k) => [x, k]).filter(([, k]) => losses.length < 5 || k < 2 || k === losses.length - 1);
      return `The loss is ${figure(uniform)} nats for a uniform guess, ${steps.map(([x, k]) => `${figure(x)} with order ${k}`).join(", ")}; the whole model's is ${figure(full)}.`;
    },
  });
  if (!marginals[0].length) return;
  const layers = marginals[0].map((_, l) => `${l}`), parts = ["given the direct path alone", "given all other layers too"];
  chart("marginals", () => ({
    height: 300,
    traces: parts.flatMap((name, i) => [
      { type: "bar", x: layers, y: marginals[i], name, marker: { color: themed(`series-${i + 1}`) } },
      ...(theirs ? [{ type: "bar", x: layers, y: theirs.map((pair) => pair[i]), name: `article's, ${name}`, showlegend: false, opacity: 0.45, marker: { color: themed(`series-${i + 1}`) } }] : []),
    ]),
    layout: { showlegend: true, barmode: "group", bargap: 0.35, margin: { l: 48, r: 12, t: 30, b: 40 }, yaxis: { title: { text: "fall of the loss (nats)" } }, xaxis: { type: "category", nticks: 16, title: { text: "layer" } } },
  }), {
    csv: () => [["layer", "given_direct", "given_rest", "article_given_direct", "article_given_rest"], ...layers.map((_, l) => [l, marginals[0][l], marginals[1][l], ...(theirs ? theirs[l] : [null, null])])],
    text: () => {
      const most = layers.map((_, l) => l).sort((a, b) => marginals[0][b] - marginals[0][a]).slice(0, 3).sort((a, b) => a - b);
      return most.map((l) => `The heads of layer ${l} bring ${figure(marginals[0][l])} nats given the direct path alone and ${figure(marginals[1][l])} given all other layers.`).join(" ");
    },
  });
}

// The largest unit in which a value reaches 1.
function inNats(value, signed = true) {
  const size = Math.abs(value);
  if (!Number.isFinite(size)) return "–";
  const [scale, unit] = size >= 1 || size === 0 ? [1, "nats"] : size >= 1e-3 ? [1e3, "millinats"] : [1e6, "micronats"];
  return `${figure(value * scale, signed)} ${unit}`;
}

const CONTEXTS = 10, BEFORE = 7;

function drawPairs(data) {
  const rise = unpack(data.rise).values, kl = unpack(data.kl).values, effects = unpack(data.effects), clean = unpack(data.clean);
  const rowOf = new Map(data.kept.map((p, row) => [p, row]));
  const sequences = DATA.tokens.length, length = DATA.tokens[0].length;
  let shown = data.kept[0], sequence = 0, most = 1;
  const select = fill("pair-sequence", sequenceNames(sequences));
  const effect = (s, i) => (i && rowOf.has(shown) ? at(effects, rowOf.get(shown), s)[i - 1] : NaN);
  const tell = (i) => {
    const value = effect(sequence, i), piece = pieceSpan(DATA.tokens[sequence][i]);
    if (Number.isNaN(value)) return say("pair-token", "The first token is predicted by nothing.");
    say("pair-token", "Without the path the loss of ", piece, ` changes by ${inNats(value)}; with it, it is ${inNats(at(clean, sequence)[i - 1], false)}.`);
  };
  const text = tokenList("pair-text", { onPoint: tell, onPick: (i) => i !== null && tell(i) });

  const showText = () => {
    text.set(DATA.tokens[sequence]);
    text.paint((i) => [signedShade(effect(sequence, i) || 0, most), ""]);
    say("pair-token");
  };
  const context = ([s, i, value]) => {
    const tokens = DATA.tokens[s].slice(Math.max(0, i - BEFORE), i);
    const go = () => {
      select.value = String((sequence = s));
      showText();
      text.choose(i);
      document.querySelector("#pair-text .token[aria-selected=true]").scrollIntoView({ block: "nearest" });
    };
    return el("li", {}, el("button", { type: "button", onclick: go },
      el("span", { class: "run" }, ...tokens.map((t) => pieceSpan(t)), pieceSpan(DATA.tokens[s][i], "piece target")),
      el("span", { class: "change" }, inNats(value))));
  };
  const onPick = (p) => {
    shown = p;
    const row = rowOf.get(p);
    say("pair-title", `Where the path ${pairName(p)} matters`);
    const whole = `Without it the loss changes by ${inNats(rise[p])}, and the prediction diverges by ${inNats(kl[p], false)} (KL).`;
    const places = [];
    if (row !== undefined) {
      for (let s = 0; s < sequences; s++) for (let i = 1; i < length; i++) places.push([s, i, effect(s, i)]);
      places.sort((a, b) => b[2] - a[2]);
      most = Math.max(...places.map((place) => Math.abs(place[2])));
    }
    say("pair-said", `${whole} ${row === undefined ? "Its effects on single tokens are left out of this page." : "The tokens that it harms most, each behind what comes before it:"}`);
    say("pair-contexts", ...places.filter((place) => place[2] > 0).slice(0, CONTEXTS).map(context));
    if (places.length) select.value = String((sequence = places[0][0]));
    showText();
  };
  select.addEventListener("change", () => ((sequence = Number(select.value)), showText()));
  drawn.push(() => text.paint((i) => [signedShade(effect(sequence, i) || 0, most), ""]));
  matrix("pair-matrix", {
    value: (p) => rise[p],
    said: (p) => `${pairName(p)}: without its path the loss changes by ${inNats(rise[p])}`,
    unit: () => "nats",
    first: data.kept[0],
    onPick,
    csv: () => [["source", "destination", "rise_nats", "kl_nats"], ...PAIRS.map(([i, j], p) => [HEADS[i], HEADS[j], rise[p], kl[p]])],
  });
  const rows = () => {
    const out = [["source", "destination", "sequence", "position", "token", "clean_loss", "rise"]];
    if (!rowOf.has(shown)) return out;
    const [i, j] = PAIRS[shown];
    for (let s = 0; s < sequences; s++) {
      for (let t = 1; t < length; t++) out.push([HEADS[i], HEADS[j], s, t, rawPiece(DATA.tokens[s][t]), at(clean, s)[t - 1], effect(s, t)]);
    }
    return out;
  };
  const svg = () => textSvg(DATA.tokens[sequence], (i) => signedShade(effect(sequence, i) || 0, most));
  saving("pair-tokens", { svg, csv: rows });
}
