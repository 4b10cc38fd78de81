// Section 6: attention patterns. Each is kept as its lower triangle, row by row.

let viewer = null; // of the text: patterns of shown heads in the chosen sequence
const onSequence = [];

const triangle = (q, k) => (q * (q + 1)) / 2 + k;
const currentTokens = () => DATA.attention.text.tokens[viewer.sequence];

// The patterns of one run: entries(h) is a function of destination and source, of the h-th of its heads in the chosen
// sequence; value-weighted if that is chosen.
function patternsOf({ heads, patterns, values, tokens }) {
  const all = unpack(patterns), lengths = unpack(values), size = tokens[0].length;
  const found = { heads, tokens, size, sequence: 0, weighted: false };
  found.entries = (h) => {
    const plain = at(all, found.sequence, h);
    const out = found.weighted ? valueWeighted(plain, at(lengths, found.sequence, h), size) : plain;
    return (q, k) => (k > q ? 0 : out[triangle(q, k)]);
  };
  return found;
}

// A pattern times the lengths of the sources' values, with rows that sum to 1.
function valueWeighted(plain, lengths, size) {
  const out = plain.slice();
  for (let q = 0; q < size; q++) {
    let sum = 0;
    for (let k = 0; k <= q; k++) sum += out[triangle(q, k)] *= lengths[k];
    for (let k = 0; k <= q && sum; k++) out[triangle(q, k)] /= sum;
  }
  return out;
}

// The pattern of a virtual head: the product of the plain patterns of two heads in the chosen sequence.
function virtualPattern(first, second) {
  const size = viewer.size, out = new Float32Array(size * size), plain = viewer.plain;
  const [before, after] = [plain.entries(first), plain.entries(second)];
  out.size = size;
  for (let q = 0; q < size; q++) {
    for (let m = 0; m <= q; m++) {
      const a = after(q, m);
      if (a) for (let k = 0; k <= m; k++) out[q * size + k] += a * before(m, k);
    }
  }
  return out;
}

// Draw a pattern, one pixel an entry. Small values are raised by a square root, so that they are seen.
function paintPattern(canvas, get, size) {
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d"), image = context.createImageData(size, size), stops = sequential();
  const table = Array.from({ length: 65 }, (_, i) => onScale(stops, Math.sqrt(i / 64))), beyond = channels(themed("beyond"));
  for (let q = 0; q < size; q++) {
    for (let k = 0; k < size; k++) {
      const colour = k > q ? beyond : table[Math.min(64, Math.round(64 * get(q, k)))], place = 4 * (q * size + k);
      image.data.set(colour, place);
      image.data[place + 3] = 255;
    }
  }
  context.putImageData(image, 0, 0);
}

function patternInto(id, { get, size, label, row = null }) {
  const holder = byId(id);
  let canvas = holder.querySelector("canvas");
  if (!canvas) holder.append((canvas = el("canvas", { role: "img" })));
  canvas.setAttribute("aria-label", label);
  paintPattern(canvas, get, size);
  markRow(holder, row, size);
  return canvas;
}

// Frame the row of a destination.
function markRow(holder, row, size) {
  holder.classList.toggle("marked", row !== null);
  holder.style.setProperty("--row", row ?? 0);
  holder.style.setProperty("--rows", size);
}

function patternRows(get, tokens) {
  const out = [["destination", "source", "destination_token", "source_token", "attention"]];
  for (let q = 0; q < tokens.length; q++) {
    for (let k = 0; k <= q; k++) out.push([q, k, rawPiece(tokens[q]), rawPiece(tokens[k]), get(q, k)]);
  }
  return out;
}

// --- as SVG: an image of one pixel an entry, and words -----------------------------------------------------------------
const escapeXml = (text) => String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`).replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]|[\ud800-\udfff](?![\udc00-\udfff])/g, "\ufffd");

function svgOf(width, height, content) {
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" font-family="sans-serif"><rect width="100%" height="100%" fill="${themed("card")}"/>${content}</svg>`;
}

function patternImage(get, size, x, y, side) {
  const canvas = document.createElement("canvas");
  paintPattern(canvas, get, size);
  return `<image x="${x}" y="${y}" width="${side}" height="${side}" style="image-rendering:pixelated" href="${canvas.toDataURL()}"/>`;
}

const svgText = (x, y, text, size = 12) => `<text x="${x}" y="${y}" font-size="${size}" fill="${themed("text")}">${escapeXml(text)}</text>`;

function patternSvg(get, size, title) {
  const side = Math.max(320, 6 * size);
  return svgOf(side + 20, side + 40, svgText(10, 18, `Attention pattern of ${title}`) + patternImage(get, size, 10, 28, side));
}

function headsSvg(found) {
  const side = 110, across = Math.min(8, found.heads.length), down = Math.ceil(found.heads.length / across);
  const tiles = found.heads.map((head, h) => {
    const x = 10 + (h % across) * (side + 12), y = 10 + Math.floor(h / across) * (side + 26);
    return svgText(x, y + 11, HEADS[head], 11) + patternImage(found.entries(h), found.size, x, y + 16, side);
  });
  return svgOf(across * (side + 12) + 10, down * (side + 26) + 10, tiles.join(""));
}

// Shaded tokens, as many in a line as fit.
function textSvg(tokens, shade) {
  const step = 8.4, wide = 86, boxes = [];
  let x = 0, line = 0;
  tokens.forEach((piece, i) => {
    const shown = shownPiece(piece), width = Array.from(shown).length;
    if (x + width > wide && x) [x, line] = [0, line + 1];
    const [left, top] = [10 + x * step, 10 + line * 24], colour = shade(i);
    if (colour) boxes.push(`<rect x="${left}" y="${top}" width="${width * step}" height="20" fill="${colour}"/>`);
    boxes.push(`<text x="${left}" y="${top + 15}" font-size="14" font-family="monospace" xml:space="preserve" textLength="${width * step}" lengthAdjust="spacingAndGlyphs" fill="${themed("text")}">${escapeXml(shown)}</text>`);
    x += width;
    if (rawPiece(piece).endsWith("\n")) [x, line] = [0, line + 1];
  });
  return svgOf(20 + wide * step, 40 + line * 24, boxes.join(""));
}

// --- the text, its heads, and one head ---------------------------------------------------------------------------------
function mostAttended(entries, q) {
  let best = 0;
  for (let k = 1; k <= q; k++) if (entries(q, k) > entries(q, best)) best = k;
  return [best, entries(q, best)];
}

function lookingText(found, h, q, tokens) {
  const entries = found.entries(h);
  const order = Array.from({ length: q + 1 }, (_, k) => k).sort((a, b) => entries(q, b) - entries(q, a));
  const parts = order.slice(0, 3).filter((k, i) => !i || entries(q, k) >= 0.01).flatMap((k, i) => [i ? ", " : "", pieceSpan(tokens[k]), ` ${figure(entries(q, k))} (position ${k})`]);
  return ["From ", pieceSpan(tokens[q]), ` (position ${q}) head ${HEADS[found.heads[h]]} looks at `, ...parts, "."];
}

function entryText(found, h, q, k, tokens) {
  if (k > q) return ["No token looks at what comes after it."];
  return ["From ", pieceSpan(tokens[q]), ` (position ${q}) to `, pieceSpan(tokens[k]), ` (position ${k}): ${figure(found.entries(h)(q, k))}`];
}

// The large pattern of one head, whose entries are read where the pointer is: onEntry(q, k).
function largePattern(id, found, { head, destination, onEntry }) {
  const draw = () => patternInto(id, {
    get: found.entries(head()), size: found.size, row: destination(),
    label: `Attention pattern of head ${HEADS[found.heads[head()]]}: destinations down, sources across`,
  });
  const canvas = draws(draw)();
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const place = (offset, whole) => Math.min(found.size - 1, Math.max(0, Math.floor((offset / whole) * found.size)));
    onEntry(place(event.clientY - box.top, box.height), place(event.clientX - box.left, box.width));
  });
  return draw;
}

function drawAttention(data) {
  const found = patternsOf(data.text), plain = patternsOf(data.text);
  viewer = Object.assign(found, { plain });
  const select = fill("attention-sequence", sequenceNames(data.text.tokens.length));
  let head = bestHead(data), destination;
  [found.sequence, destination] = farthestLook(found, head, data.text.tokens.length);
  plain.sequence = found.sequence;
  select.value = String(found.sequence);
  const tokens = () => data.text.tokens[found.sequence];

  const grid = byId("attention-heads");
  const tiles = found.heads.map((_, h) => {
    const canvas = el("canvas", { "aria-hidden": "true" }), where = el("span", { class: "where" });
    const picture = el("div", { class: "picture" }, canvas);
    const tile = el("div", { class: "tile", role: "option", tabindex: -1, "aria-selected": "false", "data-head": h }, el("span", { class: "name" }, HEADS[found.heads[h]]), picture, where);
    return { tile, picture, canvas, where };
  });
  grid.replaceChildren(...tiles.map((x) => x.tile));
  const drawTiles = draws(() => tiles.forEach(({ canvas }, h) => paintPattern(canvas, found.entries(h), found.size)));

  const show = () => {
    const pointed = destination, size = found.size;
    tiles.forEach(({ tile, picture, where }, h) => {
      const [source, share] = mostAttended(found.entries(h), pointed);
      where.replaceChildren(pieceSpan(tokens()[source]), ` ${share.toFixed(2)}`);
      tile.setAttribute("aria-selected", String(h === head));
      tile.tabIndex = h === head ? 0 : -1;
      tile.setAttribute("aria-label", `head ${HEADS[found.heads[h]]}: looks most at ${shownPiece(tokens()[source])}, ${share.toFixed(2)}`);
      markRow(picture, pointed, size);
    });
    const entries = found.entries(head);
    text.paint((i) => [i <= pointed ? shareShade(entries(pointed, i)) : "", i <= pointed ? figure(entries(pointed, i)) : ""]);
    text.mark(pointed);
    say("attention-said", ...lookingText(found, head, pointed, tokens()), text.locked === null ? "" : " Kept: Escape or a click lets it go.");
    say("readout-attention-head");
    say("title-attention-head", `Pattern of head ${HEADS[found.heads[head]]}`);
    drawLarge();
  };
  const point = (i) => ((destination = i), show());
  const read = (q, k) => {
    if (text.locked === null && q !== destination) point(q);
    say("readout-attention-head", ...entryText(found, head, q, k, tokens()));
  };
  const text = tokenList("attention-text", { onPoint: point, onPick: (i) => point(i ?? destination), first: destination });
  text.set(tokens());
  const drawLarge = largePattern("attention-head", found, { head: () => head, destination: () => destination, onEntry: read });
  const pick = (h) => {
    head = h;
    show();
  };
  grid.addEventListener("click", (event) => {
    const tile = event.target.closest(".tile");
    if (tile) pick(Number(tile.dataset.head));
  });
  grid.addEventListener("keydown", (event) => {
    const across = Math.max(1, Math.round(grid.clientWidth / tiles[0].tile.offsetWidth));
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across };
    if (event.key === "Escape" && text.locked !== null) return text.choose(null);
    if (!(event.key in steps)) return;
    pick(Math.min(tiles.length - 1, Math.max(0, head + steps[event.key])));
    tiles[head].tile.focus();
    event.preventDefault();
  });
  select.addEventListener("change", () => {
    found.sequence = plain.sequence = Number(select.value);
    text.set(tokens());
    drawTiles();
    show();
    onSequence.forEach((run) => run());
  });
  onChoice("weighted", () => {
    found.weighted = chosen("weighted") === "values";
    drawTiles();
    show();
    if (repeated) repeated(found.weighted);
  });
  drawn.push(show);
  show();
  saving("attention-heads", { svg: () => headsSvg(found), csv: () => [["head", "destination", "source", "attention"], ...found.heads.flatMap((name, h) => patternRows(found.entries(h), tokens()).slice(1).map(([q, k, , , a]) => [HEADS[name], q, k, a]))] });
  saving("attention-head", { svg: () => patternSvg(found.entries(head), found.size, `head ${HEADS[found.heads[head]]}`), csv: () => patternRows(found.entries(head), tokens()) });
  const repeated = data.repeated ? drawInduction(data.repeated) : null;
}

// The head to begin with: the one that looks most at what followed before, if there is such a run.
function bestHead({ text, repeated }) {
  return repeated ? text.heads.indexOf(repeated.heads[0]) : 0;
}

// Where to begin: the sequence in which a head looks most at tokens far behind, and the destination that does so most.
function farthestLook(found, head, sequences) {
  let best = [0, found.size - 1], most = -1;
  for (let s = 0; s < sequences; s++) {
    found.sequence = s;
    const entries = found.entries(head), shares = Array.from({ length: found.size }, () => 0);
    for (let q = 0; q < found.size; q++) for (let k = 1; k < q - 4; k++) shares[q] = Math.max(shares[q], entries(q, k));
    const sum = shares.reduce((a, b) => a + b, 0);
    if (sum > most) [best, most] = [[s, shares.indexOf(Math.max(...shares))], sum];
  }
  return best;
}

function drawInduction(data) {
  const found = patternsOf(data), tokens = data.tokens[0];
  const select = fill("induction-head", data.heads.map((head) => HEADS[head]));
  let destination = found.size - 2;
  const head = () => Number(select.value);
  const show = () => {
    const entries = found.entries(head());
    text.paint((i) => [i <= destination ? shareShade(entries(destination, i)) : "", ""]);
    text.mark(destination);
    const wanted = destination > data.copy ? destination - data.copy + 1 : null;
    const hit = wanted === null ? "" : ` The token behind its first occurrence is at position ${wanted} and gets ${figure(entries(destination, wanted))}.`;
    say("readout-induction");
    say("induction-said", ...lookingText(found, head(), destination, tokens), hit);
    draw();
  };
  const point = (i) => ((destination = i), show());
  const read = (q, k) => {
    if (text.locked === null && q !== destination) point(q);
    say("readout-induction", ...entryText(found, head(), q, k, tokens));
  };
  const text = tokenList("induction-text", { onPoint: point, onPick: (i) => point(i ?? destination), first: destination });
  text.set(tokens);
  const draw = largePattern("induction", found, { head, destination: () => destination, onEntry: read });
  select.addEventListener("change", show);
  drawn.push(show);
  show();
  saving("induction", { svg: () => patternSvg(found.entries(head()), found.size, `head ${HEADS[found.heads[head()]]} over random tokens that come twice`), csv: () => patternRows(found.entries(head()), tokens) });
  return (weighted) => {
    found.weighted = weighted;
    show();
  };
}
