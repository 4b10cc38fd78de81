// Section 6: attention patterns. Each is kept as its lower triangle, row by row.

let viewer = null; // of the text: patterns of shown heads in the chosen sequence
const onSequence = [];

const triangle = (q, k) => (q * (q + 1)) / 2 + k;
const currentTokens = () => DATA.attention.text.tokens[viewer.sequence];

// The patterns of one run: get(h, q, k) of the h-th of its heads, value-weighted if that is chosen.
function patternsOf({ heads, patterns, values, tokens }, weighted) {
  const all = unpack(patterns), lengths = unpack(values), size = tokens[0].length;
  const found = { heads, tokens, size, sequence: 0 };
  let kept = new Map();
  const rows = (h) => {
    const key = `${found.sequence} ${h} ${weighted()}`;
    if (!kept.has(key)) {
      const plain = at(all, found.sequence, h);
      let out = plain;
      if (weighted()) {
        const norm = at(lengths, found.sequence, h);
        out = plain.slice();
        for (let q = 0; q < size; q++) {
          let sum = 0;
          for (let k = 0; k <= q; k++) sum += out[triangle(q, k)] *= norm[k];
          for (let k = 0; k <= q && sum; k++) out[triangle(q, k)] /= sum;
        }
      }
      if (kept.size > 400) kept = new Map();
      kept.set(key, out);
    }
    return kept.get(key);
  };
  found.get = (h, q, k) => (k > q ? 0 : rows(h)[triangle(q, k)]);
  return found;
}

// The pattern of a virtual head: the product of the plain patterns of two heads in the chosen sequence.
function virtualPattern(first, second) {
  const size = viewer.size, out = new Float32Array(size * size), triangles = viewer.plain;
  out.size = size;
  for (let q = 0; q < size; q++) {
    for (let m = 0; m <= q; m++) {
      const a = triangles.get(second, q, m);
      if (a) for (let k = 0; k <= m; k++) out[q * size + k] += a * triangles.get(first, m, k);
    }
  }
  return out;
}

// Draw a pattern, one pixel an entry. Small values are raised by a square root, so that they are seen.
function paintPattern(canvas, get, size, row = -1) {
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d"), image = context.createImageData(size, size), stops = sequential();
  const table = Array.from({ length: 65 }, (_, i) => onScale(stops, Math.sqrt(i / 64))), beyond = channels(themed("beyond"));
  for (let q = 0; q < size; q++) {
    for (let k = 0; k < size; k++) {
      const colour = k > q ? beyond : table[Math.min(64, Math.round(64 * get(q, k)))], place = 4 * (q * size + k);
      image.data.set(colour, place);
      image.data[place + 3] = row < 0 || row === q ? 255 : 110;
    }
  }
  context.putImageData(image, 0, 0);
}

function patternInto(id, { get, size, label, row }) {
  const holder = byId(id);
  let canvas = holder.querySelector("canvas");
  if (!canvas) holder.append((canvas = el("canvas", { role: "img" })));
  canvas.setAttribute("aria-label", label);
  paintPattern(canvas, get, size, row);
  return canvas;
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
    return svgText(x, y + 11, HEADS[head], 11) + patternImage((q, k) => found.get(h, q, k), found.size, x, y + 16, side);
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
function mostAttended(found, h, q) {
  let best = 0;
  for (let k = 1; k <= q; k++) if (found.get(h, q, k) > found.get(h, q, best)) best = k;
  return [best, found.get(h, q, best)];
}

function lookingText(found, h, q, tokens) {
  const order = Array.from({ length: q + 1 }, (_, k) => k).sort((a, b) => found.get(h, q, b) - found.get(h, q, a));
  const parts = order.slice(0, 3).flatMap((k, i) => [i ? ", " : "", pieceSpan(tokens[k]), ` ${figure(found.get(h, q, k))} (position ${k})`]);
  return ["From ", pieceSpan(tokens[q]), ` (position ${q}) head ${HEADS[found.heads[h]]} looks at `, ...parts, "."];
}

// The large pattern of one head, whose rows follow the pointer and lead to the token of the text.
function largePattern(id, found, { head, destination, onRow }) {
  const draw = () => patternInto(id, {
    get: (q, k) => found.get(head(), q, k), size: found.size, row: destination() ?? -1,
    label: `Attention pattern of head ${HEADS[found.heads[head()]]}: destinations down, sources across`,
  });
  const canvas = draws(draw)();
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    onRow(Math.min(found.size - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * found.size))));
  });
  return draw;
}

function drawAttention(data) {
  const weighted = () => chosen("weighted") === "values";
  const found = patternsOf(data.text, weighted), plain = patternsOf(data.text, () => false);
  viewer = Object.assign(found, { plain });
  const select = fill("attention-sequence", sequenceNames(data.text.tokens.length));
  let head = bestHead(data), destination = found.size - 1;
  const tokens = () => data.text.tokens[found.sequence];

  const grid = byId("attention-heads");
  const tiles = found.heads.map((_, h) => {
    const canvas = el("canvas", { "aria-hidden": "true" }), where = el("span", { class: "where" });
    const tile = el("div", { class: "tile", role: "option", tabindex: -1, "aria-selected": "false", "data-head": h }, el("span", { class: "name" }, HEADS[found.heads[h]]), canvas, where);
    return { tile, canvas, where };
  });
  grid.replaceChildren(...tiles.map((x) => x.tile));
  const drawTiles = draws(() => tiles.forEach(({ canvas }, h) => paintPattern(canvas, (q, k) => found.get(h, q, k), found.size)));

  const show = () => {
    const pointed = destination, size = found.size;
    tiles.forEach(({ tile, where }, h) => {
      const [source, share] = mostAttended(found, h, pointed);
      where.replaceChildren(pieceSpan(tokens()[source]), ` ${share.toFixed(2)}`);
      tile.setAttribute("aria-selected", String(h === head));
      tile.tabIndex = h === head ? 0 : -1;
      tile.setAttribute("aria-label", `head ${HEADS[found.heads[h]]}: looks most at ${shownPiece(tokens()[source])}, ${share.toFixed(2)}`);
      tile.style.setProperty("--row", `${((pointed + 0.5) / size) * 100}%`);
    });
    text.paint((i) => [i <= pointed ? shareShade(found.get(head, pointed, i)) : "", i <= pointed ? figure(found.get(head, pointed, i)) : ""]);
    text.mark(pointed);
    say("attention-said", ...lookingText(found, head, pointed, tokens()), text.locked === null ? "" : " Kept: Escape or a click lets it go.");
    say("readout-attention-head", ...lookingText(found, head, pointed, tokens()));
    say("title-attention-head", `Pattern of head ${HEADS[found.heads[head]]}`);
    drawLarge();
  };
  const point = (i) => ((destination = i), show());
  const text = tokenList("attention-text", { onPoint: point, onPick: (i) => point(i ?? destination), first: destination });
  text.set(tokens());
  const drawLarge = largePattern("attention-head", found, { head: () => head, destination: () => destination, onRow: (q) => text.locked === null && point(q) });
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
    drawTiles();
    show();
    if (repeated) repeated();
  });
  drawn.push(show);
  show();
  saving("attention-heads", { svg: () => headsSvg(found), csv: () => [["head", "destination", "source", "attention"], ...found.heads.flatMap((name, h) => patternRows((q, k) => found.get(h, q, k), tokens()).slice(1).map(([q, k, , , a]) => [HEADS[name], q, k, a]))] });
  saving("attention-head", { svg: () => patternSvg((q, k) => found.get(head, q, k), found.size, `head ${HEADS[found.heads[head]]}`), csv: () => patternRows((q, k) => found.get(head, q, k), tokens()) });
  const repeated = data.repeated ? drawInduction(data.repeated, weighted) : null;
}

// The head to begin with: the one that looks most at what followed before, if there is such a run.
function bestHead({ text, repeated }) {
  return repeated ? text.heads.indexOf(repeated.heads[0]) : 0;
}

function drawInduction(data, weighted) {
  const found = patternsOf(data, weighted), tokens = data.tokens[0];
  const select = fill("induction-head", data.heads.map((head) => HEADS[head]));
  let destination = found.size - 2;
  const head = () => Number(select.value);
  const show = () => {
    text.paint((i) => [i <= destination ? shareShade(found.get(head(), destination, i)) : "", ""]);
    text.mark(destination);
    const wanted = destination > data.copy ? destination - data.copy + 1 : null;
    const hit = wanted === null ? "" : ` The token behind its first occurrence is at position ${wanted} and gets ${figure(found.get(head(), destination, wanted))}.`;
    say("induction-said", ...lookingText(found, head(), destination, tokens), hit);
    draw();
  };
  const point = (i) => ((destination = i), show());
  const text = tokenList("induction-text", { onPoint: point, onPick: (i) => point(i ?? destination), first: destination });
  text.set(tokens);
  const draw = largePattern("induction", found, { head, destination: () => destination, onRow: (q) => text.locked === null && point(q) });
  select.addEventListener("change", show);
  drawn.push(show);
  show();
  saving("induction", { svg: () => patternSvg((q, k) => found.get(head(), q, k), found.size, `head ${HEADS[found.heads[head()]]} over random tokens that come twice`), csv: () => patternRows((q, k) => found.get(head(), q, k), tokens) });
  return show;
}
