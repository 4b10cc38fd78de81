// Elements, figures and their buttons, themes.

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const byId = (id) => document.getElementById(id);

function say(id, ...content) {
  byId(id).replaceChildren(...content);
}

// A number with three significant digits, whatever its size.
function figure(value, signed = false) {
  if (value === null || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value), sign = value < 0 ? "−" : signed ? "+" : "";
  if (size >= 1e-3 && size < 1e6) return sign + size.toFixed(Math.min(6, Math.max(0, 2 - Math.floor(Math.log10(size)))));
  return sign + size.toExponential(1).replace("e-", "e−").replace("e+", "e");
}

// --- saving ---------------------------------------------------------------------------------------------------------
const SAVED = {}; // by figure: svg() and csv()

function saving(id, { svg, csv }) {
  SAVED[id] = { svg, csv };
  const numbers = byId(`numbers-${id}`);
  if (!numbers || numbers.dataset.ready) return;
  numbers.dataset.ready = "yes";
  const details = numbers.parentElement;
  details.addEventListener("toggle", () => {
    if (details.open) numbers.replaceChildren(numbersTable(SAVED[id].csv()));
  });
}

const MOST_NUMBERS = 200;

function numbersTable([names, ...rows]) {
  const cell = (x) => (typeof x === "number" ? figure(x) : x === null ? "–" : String(x));
  const table = el("table", {}, el("thead", {}, el("tr", {}, ...names.map((x) => el("th", { scope: "col" }, x)))));
  const body = el("tbody");
  for (const row of rows.slice(0, MOST_NUMBERS)) body.append(el("tr", {}, ...row.map((x) => el("td", {}, cell(x)))));
  table.append(body);
  if (rows.length <= MOST_NUMBERS) return table;
  const more = `The first ${MOST_NUMBERS} of ${rows.length} rows; the CSV has all.`;
  return el("div", {}, table, el("p", { class: "note" }, more));
}

// Text is written as JSON has it, so that a token such as "=1+1" is no formula to a spreadsheet.
function csvText(rows) {
  const cell = (x) => {
    if (x === null || x === undefined || Number.isNaN(x)) return "";
    return typeof x === "number" ? String(x) : `"${JSON.stringify(x).replace(/"/g, '""')}"`;
  };
  const [names, ...rest] = rows;
  return [names.join(","), ...rest.map((row) => row.map(cell).join(","))].join("\n") + "\n";
}

function download(name, content, type) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  const link = el("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button.save");
  if (!button) return;
  const { svg, csv } = button.dataset;
  if (csv) download(`${csv}.csv`, csvText(SAVED[csv].csv()), "text/csv");
  else download(`${svg}.svg`, await SAVED[svg].svg(), "image/svg+xml");
});

// --- themes ---------------------------------------------------------------------------------------------------------
const drawn = []; // what is drawn again in another theme
const darkWanted = matchMedia("(prefers-color-scheme: dark)");

const isDark = () => document.documentElement.dataset.theme === "dark";
const themed = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  byId("theme").setAttribute("aria-pressed", String(dark));
  for (const draw of drawn) draw();
}

byId("theme").addEventListener("click", () => setTheme(!isDark()));
darkWanted.addEventListener("change", (event) => setTheme(event.matches));
document.documentElement.dataset.theme = darkWanted.matches ? "dark" : "light";
byId("theme").setAttribute("aria-pressed", String(darkWanted.matches));

// Draw now, and again in another theme.
function draws(draw) {
  drawn.push(draw);
  draw();
  return draw;
}

// --- colours --------------------------------------------------------------------------------------------------------
const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

// The colour at a place from 0 to 1 of a scale of stops, as red, green and blue.
function onScale(stops, place) {
  const x = Math.min(1, Math.max(0, place)) * (stops.length - 1), i = Math.min(stops.length - 2, Math.floor(x));
  const low = channels(stops[i]), high = channels(stops[i + 1]);
  return low.map((c, k) => Math.round(c + (high[k] - c) * (x - i)));
}

const sequential = () => ["seq-0", "seq-1", "seq-2", "seq-3"].map(themed);
const diverging = () => ["div-0", "div-1", "div-2", "div-3", "div-4"].map(themed);
const plotScale = (stops) => stops.map((colour, i) => [i / (stops.length - 1), colour]);

// --- choices --------------------------------------------------------------------------------------------------------
const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;
const onChoice = (name, run) => byId(`choice-${name}`).addEventListener("change", run);

function fill(id, labels, selected = 0) {
  const select = byId(id);
  select.replaceChildren(...labels.map((label, i) => el("option", { value: i }, label)));
  select.selectedIndex = selected;
  return select;
}

const sequenceNames = (count) => Array.from({ length: count }, (_, i) => `${i + 1} of ${count}`);
