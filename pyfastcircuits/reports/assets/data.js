"use strict";
// The data of the page: arrays unpacked, heads named, tokens ready to be written.

const DATA = JSON.parse(document.getElementById("data").textContent);
const HEADS = DATA.heads.map(([layer, head]) => `${layer}.${head}`);
const LAYER = DATA.heads.map(([layer]) => layer);
const PAIRS = [];
for (let i = 0; i < HEADS.length; i++) {
  for (let j = i + 1; j < HEADS.length; j++) {
    if (LAYER[i] < LAYER[j]) PAIRS.push([i, j]);
  }
}
const PAIR_OF = new Map(PAIRS.map(([i, j], p) => [i * HEADS.length + j, p]));
const pairOf = (i, j) => PAIR_OF.get(i * HEADS.length + j);
const pairName = (p) => `${HEADS[PAIRS[p][0]]} → ${HEADS[PAIRS[p][1]]}`;

function half(bits) {
  const exponent = (bits >> 10) & 31, fraction = bits & 1023, sign = bits & 32768 ? -1 : 1;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : (2 ** -14 * fraction) / 1024);
}

// An array as its shape and flat values.
function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.bytes), (c) => c.charCodeAt(0));
  if (packed.type === "u8") return { shape: packed.shape, values: Float32Array.from(bytes, (x) => x * packed.scale) };
  const view = new DataView(bytes.buffer), values = new Float32Array(bytes.length / 2);
  for (let i = 0; i < values.length; i++) {
    const bits = view.getUint16(2 * i, true);
    values[i] = packed.type === "u16" ? bits : half(bits) * packed.scale;
  }
  return { shape: packed.shape, values };
}

// The part of an array at the first indices.
function at(array, ...indices) {
  const rest = array.shape.slice(indices.length), size = rest.reduce((a, b) => a * b, 1);
  const place = indices.reduce((sum, index, i) => sum * array.shape[i] + index, 0);
  return array.values.subarray(place * size, (place + 1) * size);
}

// The whole text of a token, for searching and for CSV.
const rawPiece = (token) => (Array.isArray(DATA.pieces[token]) ? DATA.pieces[token][0] : DATA.pieces[token]);

// A token as parts that are in turn plain and replaced.
const pieceParts = (token) => (Array.isArray(DATA.pieces[token]) ? DATA.pieces[token].slice(1) : [DATA.pieces[token]]);

// A token as one plain string, for labels.
const shownPiece = (token) => pieceParts(token).join("");
