// Tokens as text: each part is written as text alone.

function pieceNodes(token) {
  return pieceParts(token).map((part, i) => (i % 2 ? el("span", { class: "mark" }, part) : document.createTextNode(part)));
}

// A token among words.
const pieceSpan = (token, kind = "piece") => el("bdi", { class: kind }, ...pieceNodes(token));

// A list of tokens to point at and to choose from, with mouse or arrow keys; a line ends behind a token that ends one.
//   onPoint(i): the token that is pointed at; onPick(i): the one that is chosen, or null where it is let go.
function tokenList(id, { onPoint = () => {}, onPick = () => {}, first = 0 }) {
  const holder = byId(id);
  let spans = [], current = first, locked = null;

  const focus = (i) => {
    if (!spans.length) return;
    spans[current].tabIndex = -1;
    current = Math.min(spans.length - 1, Math.max(0, i));
    spans[current].tabIndex = 0;
  };
  const lock = (i) => {
    if (locked !== null) spans[locked].setAttribute("aria-selected", "false");
    locked = i;
    if (i !== null) spans[i].setAttribute("aria-selected", "true");
    onPick(i);
  };
  const placeOf = (event) => {
    const span = event.target.closest(".token");
    return span ? Number(span.dataset.place) : null;
  };
  holder.addEventListener("pointerover", (event) => {
    const i = placeOf(event);
    if (i !== null && locked === null) onPoint(i);
  });
  holder.addEventListener("click", (event) => {
    const i = placeOf(event);
    if (i === null) return;
    focus(i);
    lock(locked === i ? null : i);
    if (locked === null) onPoint(i);
  });
  const line = (i, step) => {
    // The token above or below: the nearest by its place on the screen.
    const from = spans[i].getBoundingClientRect(), rows = [];
    for (let j = i + step; j >= 0 && j < spans.length; j += step) {
      const box = spans[j].getBoundingClientRect();
      if (Math.abs(box.top - from.top) < 4) continue;
      if (rows.length && Math.abs(box.top - rows[0].top) > 4) break;
      rows.push({ top: box.top, gap: Math.abs(box.left - from.left), j });
    }
    return rows.length ? rows.reduce((a, b) => (b.gap < a.gap ? b : a)).j : i;
  };
  holder.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: () => current - 1, ArrowRight: () => current + 1, ArrowUp: () => line(current, -1), ArrowDown: () => line(current, 1), Home: () => 0, End: () => spans.length - 1 };
    if (moves[event.key]) {
      focus(moves[event.key]());
      spans[current].focus();
      if (locked === null) onPoint(current);
    } else if (event.key === "Enter" || event.key === " ") lock(locked === current ? null : current);
    else if (event.key === "Escape") lock(null);
    else return;
    event.preventDefault();
  });
  return {
    set(tokens) {
      locked = null;
      current = Math.min(current, tokens.length - 1);
      spans = tokens.map((piece, i) =>
        el("span", { class: "token", role: "option", "aria-selected": "false", tabindex: -1, "data-place": i }, pieceSpan(piece)),
      );
      holder.replaceChildren();
      tokens.forEach((piece, i) => {
        holder.append(spans[i]);
        if (rawPiece(piece).endsWith("\n")) holder.append(el("br"));
      });
      focus(current);
    },
    // Shade each token: shade(i) is [background colour or "", said or ""].
    paint(shade) {
      spans.forEach((span, i) => {
        const [colour, said] = shade(i);
        span.style.backgroundColor = colour;
        if (said) span.title = said;
        else span.removeAttribute("title");
      });
    },
    mark(i) {
      spans.forEach((span, j) => span.classList.toggle("pointed", i === j));
    },
    choose: lock,
    get locked() {
      return locked;
    },
    get current() {
      return current;
    },
  };
}

// A shade for a signed value, of which `most` is the largest.
function signedShade(value, most) {
  const share = Math.min(1, Math.sqrt(Math.abs(value) / (most || 1)));
  const [r, g, b] = channels(themed(value > 0 ? "div-4" : "div-0"));
  return share < 0.04 ? "" : `rgba(${r}, ${g}, ${b}, ${(0.75 * share).toFixed(3)})`;
}

// A shade for a share of 1.
function shareShade(share) {
  const [r, g, b] = channels(themed("seq-2"));
  return share < 0.01 ? "" : `rgba(${r}, ${g}, ${b}, ${(0.85 * share).toFixed(3)})`;
}
