"use strict";
// The list draws only the rows in sight, so 100,000 pairs scroll and filter at once. All text from the data enters
// the page as text nodes, never as markup.
const HEIGHT = 28;
const columns = ["id", "origin", "stage", "reason", "kept", "margin", "chosen", "rejected", "prompt", "shard"];
const heads = [
  ["kept", "kept", ""], ["origin", "origin", ""], ["reason", "reason", ""], ["margin", "margin", "n"],
  ["chosen", "chosen", "n"], ["rejected", "rejected", "n"], ["prompt", "prompt", ""],
];
const data = {};
const texts = new Map();
let shardPairs = 0, reasons = {}, lowered = [], found = [], selected = -1, order = { by: "margin", up: false };

const element = (id) => document.getElementById(id);

function make(tag, text, kind) {
  const node = document.createElement(tag);
  node.textContent = text;
  if (kind) node.className = kind;
  return node;
}

function seraRows(values, pairsOfShard, meanings) {
  columns.forEach((name, at) => { data[name] = values[at]; });
  shardPairs = pairsOfShard;
  reasons = meanings;
  lowered = data.prompt.map((prompt, at) => `${prompt} ${data.id[at]}`.toLowerCase());
  for (const name of ["origin", "reason"]) {
    for (const value of [...new Set(data[name])].sort()) element(name).append(new Option(value, value));
  }
  for (const [name, title, kind] of heads) {
    const button = make("button", title, kind);
    button.type = "button";
    button.dataset.by = name;
    button.addEventListener("click", () => { order = { by: name, up: order.by === name && !order.up }; filter(); });
    element("head").append(button);
  }
  filter();
  if (location.hash) open(data.id.indexOf(location.hash.slice(1)));
}

function filter() {
  const [search, origin, kept, reason] = ["search", "origin", "kept", "reason"].map((id) => element(id).value);
  const wanted = search.trim().toLowerCase();
  found = [];
  for (let at = 0; at < data.id.length; at++) {
    if (origin && data.origin[at] !== origin) continue;
    if (kept && data.kept[at] !== Number(kept)) continue;
    if (reason && data.reason[at] !== reason) continue;
    if (wanted && !lowered[at].includes(wanted)) continue;
    found.push(at);
  }
  sort();
  const all = data.id.length.toLocaleString("en");
  element("count").textContent = `${found.length.toLocaleString("en")} of ${all} pairs, by ${order.by}`;
  element("rows").style.height = `${found.length * HEIGHT}px`;
  element("list").scrollTop = 0;
  draw();
}

function sort() {
  const values = data[order.by], sign = order.up ? 1 : -1;
  found.sort((one, other) => {
    const a = values[one], b = values[other];
    if (a === b) return one - other;
    if (a === null) return 1; // without a value: last
    if (b === null) return -1;
    return a < b ? -sign : sign;
  });
}

function draw() {
  const list = element("list");
  const first = Math.max(0, Math.floor(list.scrollTop / HEIGHT) - 5);
  const last = Math.min(found.length, first + Math.ceil(list.clientHeight / HEIGHT) + 10);
  element("rows").replaceChildren(...found.slice(first, last).map((at, shown) => row(at, first + shown)));
}

function row(at, place) {
  const line = document.createElement("button");
  line.type = "button";
  line.className = "row";
  line.style.top = `${place * HEIGHT}px`;
  line.setAttribute("aria-current", String(at === selected));
  const number = (value, digits) => (value === null ? "–" : value.toFixed(digits));
  line.append(
    make("span", data.kept[at] ? "trained on" : "dropped", data.kept[at] ? "" : "dropped"), make("span", data.origin[at]),
    make("span", data.reason[at]), make("span", number(data.margin[at], 2), "n"),
    make("span", number(data.chosen[at], 0), "n"), make("span", number(data.rejected[at], 0), "n"),
    make("span", data.prompt[at]),
  );
  line.addEventListener("click", () => open(at));
  return line;
}

function open(at) {
  if (at < 0) return;
  selected = at;
  history.replaceState(null, "", `#${data.id[at]}`);
  draw();
  const shard = data.shard[at];
  if (shard < 0) return read(["", "", ""], "Its text is not among the round's files: it was dropped before.");
  if (texts.has(shard)) return read(texts.get(shard)[at % shardPairs], "");
  const script = document.createElement("script");
  script.src = `texts-${String(shard).padStart(5, "0")}.js`;
  script.addEventListener("error", () => read(["", "", ""], `${script.src} is missing: copy the whole report folder.`));
  document.head.append(script);
}

function seraTexts(shard, pairs) {
  texts.set(shard, pairs);
  if (selected >= 0 && data.shard[selected] === shard) read(pairs[selected % shardPairs], "");
}

function read([prompt, chosen, rejected], note) {
  const at = selected, margin = data.margin[at], reason = data.reason[at];
  const about = document.createElement("p");
  about.append("pair ", make("code", data.id[at]), `, ${data.origin[at]}, ${data.kept[at] ? "trained on" : "dropped"} at `);
  about.append(`${data.stage[at]}: `, make("code", reason), reasons[reason] && reason !== "kept" ? `, ${reasons[reason]}` : "");
  about.append(margin === null ? "" : `; margin ${margin.toFixed(3)} nats`);
  const parts = [about];
  if (note) parts.push(make("p", note, "soft"));
  else {
    const sides = make("div", "", "sides");
    for (const [title, text] of [[`Chosen (${data.chosen[at] ?? "?"} tokens)`, chosen], [`Rejected (${data.rejected[at] ?? "?"} tokens)`, rejected]]) {
      const side = document.createElement("div");
      side.append(make("h2", title), make("pre", text));
      sides.append(side);
    }
    parts.push(make("h2", "Prompt"), make("pre", prompt), sides);
  }
  element("pair").replaceChildren(...parts);
}

element("filters").addEventListener("input", filter);
element("filters").addEventListener("submit", (event) => event.preventDefault());
element("list").addEventListener("scroll", draw);
