"use strict";
// The list of episodes, its filters, and an episode as it was played: what the agent saw, how far it looked,
// what it imagined beside what then happened, what it did.  Texts become nodes, never markup.

const AT_ONCE = 100;  // rows of the list; "more" adds as many
const index = JSON.parse(document.getElementById("index").textContent);
const episodes = index.episodes.map((episode, id) => ({...episode, id, method: index.results[episode.r],
  text: `${episode.task} ${episode.game}`.toLowerCase()}));
const field = id => document.getElementById(id);
let found = [];

// el("p", "note", "text", node, ...): an element with a class and children.
function el(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.filter(child => child !== null));
  return node;
}

const count = (n, what) => `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;
const mark = won => el("span", `mark ${won ? "won" : "lost"}`, won ? "✓" : "✗");

// Filters

const SORTS = {
  "": (a, b) => a.id - b.id,
  game: (a, b) => a.game.localeCompare(b.game) || a.r - b.r,
  steps: (a, b) => b.steps - a.steps,
  k: (a, b) => b.k - a.k,
  tokens: (a, b) => b.tokens - a.tokens,
};

function applyFilters() {
  const method = field("by-method").value, type = field("by-type").value, outcome = field("by-outcome").value;
  const words = field("by-text").value.toLowerCase().split(/\s+/).filter(Boolean);
  found = episodes.filter(e => (!method || e.method === method) && (!type || e.type === type)
    && (!outcome || e.won === Number(outcome)) && words.every(word => e.text.includes(word)));
  found.sort(SORTS[field("sort").value]);
  const won = found.filter(e => e.won).length;
  const share = found.length ? ` (${(100 * won / found.length).toFixed(1)} %)` : "";
  field("count").textContent = `${count(found.length, "episode")}, ${won} solved${share}`;
  field("list").replaceChildren();
  showMore();
}

function showMore() {
  const list = field("list"), next = found.slice(list.children.length, list.children.length + AT_ONCE);
  list.append(...next.map(row));
  const left = found.length - list.children.length;
  field("more").hidden = !left;
  field("more").textContent = `Show ${Math.min(left, AT_ONCE)} more of ${left.toLocaleString("en")}`;
}

// The list

// The method, and which trial of the game, where there are several.
const named = episode => episode.method + (episode.trial ? `, trial ${episode.trial}` : "");

function row(episode) {
  const figure = (name, text) => el("span", `figure ${name}`, text);
  const summary = el("summary", "", mark(episode.won), el("span", "method", named(episode)),
    el("span", "type", episode.type), el("span", "task", episode.task || episode.game),
    figure("steps", count(episode.steps, "step")), figure("k", `k ${episode.k.toFixed(2)}`),
    figure("tokens", count(episode.tokens, "token")));
  const details = el("details", "episode", summary);
  details.dataset.id = episode.id;
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(inside(episode));
    if (details.open) history.replaceState(null, "", linkOf(episode));
  });
  return details;
}

function inside(episode) {
  const record = JSON.parse(field(`e${episode.id}`).textContent);
  const steps = record.steps;
  return el("div", "inside", facts(episode, record),
    el("p", "saw", el("b", "", "Task: "), episode.task), el("p", "saw", record.first),
    ...steps.map((step, t) => stepNode(steps, t)),
    record.note ? el("p", "note", el("b", "", "Looking back: "), record.note) : null);
}

function facts(episode, record) {
  const usage = Object.entries(record.usage).map(([role, u]) => el("span", "",
    `${role.replace("_", " ")}: ${count(u.calls, "call")}, ${u.prompt_tokens.toLocaleString("en")} prompt tokens `
    + `(${Math.round(100 * (u.cached_tokens || 0) / Math.max(1, u.prompt_tokens))} % from the cache), `
    + `${u.completion_tokens.toLocaleString("en")} generated`));
  const seconds = record.steps.reduce((sum, step) => sum + (step.s || 0), 0);
  const end = `${record.why.replace("_", " ")} after ${count(record.steps.length, "step")}`
    + `, score ${Number(episode.score.toFixed(1))}, ${seconds.toFixed(1)} s of deciding`
    + (record.golden ? `; the expert's solution has ${count(record.golden, "step")}` : "");
  const link = el("a", "", el("code", "", `#${episode.i} ${episode.game}`));
  link.href = linkOf(episode);
  link.title = "link to this episode";
  return el("div", "facts", el("span", "", link), el("span", "", end),
    ...usage, sameGame(episode));
}

// The other methods on this game, as buttons that open theirs.
function sameGame(episode) {
  const others = episodes.filter(e => e.game === episode.game && e.id !== episode.id);
  if (!others.length) return null;
  return el("span", "others", "The same game by ", ...others.map(other => {
    const button = el("button", "", mark(other.won), named(other));
    button.type = "button";
    button.addEventListener("click", () => open(other));
    return button;
  }));
}

// The part of the address that leads to an episode: its method, its game and its trial.
const linkOf = episode => "#episode=" + [episode.method, episode.game, episode.trial || 1].map(encodeURIComponent).join("&");

function openLinked() {
  const episode = location.hash.startsWith("#episode=") && episodes.find(e => linkOf(e) === location.hash);
  if (episode) open(episode);
}

function open(episode) {
  for (const id of ["by-method", "by-type", "by-outcome"]) field(id).value = "";
  field("by-text").value = episode.game;
  applyFilters();
  const details = [...field("list").children].find(node => Number(node.dataset.id) === episode.id);
  details.open = true;
  details.firstChild.focus({preventScroll: true});
  details.scrollIntoView({block: "start"});
}

// Keys

// Go to the next or the previous episode of the list.  One that was open is closed, and its neighbour opened.
function go(step) {
  const list = field("list"), current = document.activeElement.closest(".episode");
  if (current && step > 0 && current === list.lastChild && !field("more").hidden) showMore();
  const next = current ? (step > 0 ? current.nextSibling : current.previousSibling) : list.firstChild;
  if (!next) return;
  if (current && current.open) {
    current.open = false;
    next.open = true;
  }
  next.firstChild.focus({preventScroll: true});
  next.scrollIntoView({block: next.open ? "start" : "nearest"});
}

function onKey(event) {
  const writing = event.target.matches("input, select");
  if (event.key === "Escape" && writing) event.target.blur();
  if (writing || event.ctrlKey || event.altKey || event.metaKey) return;
  const inList = document.activeElement.closest(".episode") !== null;  // elsewhere the arrows scroll
  const step = {j: 1, k: -1, ArrowDown: inList && 1, ArrowUp: inList && -1}[event.key];
  if (event.key === "/") field("by-text").focus();
  else if (step) go(step);
  else return;
  event.preventDefault();
}

// One step of an episode

function stepNode(steps, t) {
  const step = steps[t], body = el("div", "");
  if (step.im || step.pk || step.kraw) body.append(ahead(steps, t));
  for (const [name, text] of [["Reflection", step.re], ["Thought", step.th]]) {
    if (text) body.append(el("p", "note", el("b", "", `${name}: `), text));
  }
  if (step.co) body.append(considered(step));
  const did = el("div", "did", el("b", "", step.a));
  if (step.bad) did.append(el("span", "chip bad", "invalid"));
  const cost = [step.s && `${step.s.toFixed(2)} s`, step.n && count(step.n, "call"), step.tok && count(step.tok, "token")];
  did.append(el("small", "", cost.filter(Boolean).join(" · ")));
  body.append(did, el("p", "saw", step.o || ""));
  return el("div", "step", el("span", "t", String(t + 1)), body);
}

// The actions that a search compared, best first.
function considered(step) {
  const shown = [...step.co].sort((a, b) => b[1] - a[1]).map(([action, value, tries]) =>
    `${action} (${value.toFixed(2)}${tries > 1 ? `, ${tries} tries` : ""})`);
  return el("p", "note", el("b", "", "Compared: "), shown.join(" · "));
}

function ahead(steps, t) {
  const step = steps[t], k = step.k || 0;
  const line = el("p", "", el("span", "chip k", k ? `looked ${count(k, "step")} ahead` : "looked no step ahead"));
  if (step.pk) line.append(el("small", "", "P(k): " + step.pk.map((p, i) => `${i}: ${p.toFixed(2)}`).join(" · ")));
  if (step.v !== undefined) line.append(el("small", "", `V = ${step.v.toFixed(2)}`));
  if (step.kraw) line.append(el("small", "", `said: “${step.kraw}”`));
  const box = el("div", "ahead", line);
  let together = true;  // has it done so far what it had imagined doing?
  (step.im || []).forEach(([action, seen, score], i) => {
    const real = steps[t + i];
    together = together && real !== undefined && real.a === action;
    box.append(pair(i + 1, action, seen, score, real, together));
  });
  return box;
}

function pair(depth, action, seen, score, real, together) {
  const same = together && seen === (real.o || "");
  const verdict = !together ? el("span", "chip", real ? "went another way" : "the episode had ended")
    : same ? el("span", "chip good", "came true") : el("span", "chip bad", `Fact-F1 ${Math.round(100 * score)} %`);
  const [imagined, happened] = together && !same ? diff(seen, real.o || "") : [[seen], [real ? real.o || "" : ""]];
  const other = together ? "" : "elsewhere";
  const actual = el("div", other, el("h4", "", "really"));
  if (real) actual.append(el("code", "", real.a), el("p", "", ...happened));
  return el("div", "pair", el("div", "", el("h4", "", `imagined +${depth}`, verdict), el("code", "", action),
    el("p", "", ...imagined)), actual);
}

// The words that only one of two texts has, marked: [nodes of the first, nodes of the second].
function diff(first, second) {
  const a = first.match(/\s+|[^\s]+/g) || [], b = second.match(/\s+|[^\s]+/g) || [];
  // common[i][j]: length of the longest common subsequence of a[i..] and b[j..]
  const common = Array.from({length: a.length + 1}, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      common[i][j] = a[i] === b[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
    }
  }
  const left = [], right = [];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      left.push([a[i++], false]);
      right.push([b[j++], false]);
    } else if (j === b.length || (i < a.length && common[i + 1][j] >= common[i][j + 1])) left.push([a[i++], true]);
    else right.push([b[j++], true]);
  }
  return [marked(left, "del"), marked(right, "ins")];
}

// Neighbouring words of a kind as one node.
function marked(words, tag) {
  const runs = [];
  for (const [word, only] of words) {
    if (runs.length && runs.at(-1).only === only) runs.at(-1).text += word;
    else runs.push({text: word, only});
  }
  return runs.map(run => run.only && run.text.trim() ? el(tag, "", run.text) : run.text);
}

function start() {
  for (const [id, values] of [["by-method", index.results], ["by-type", index.types]]) {
    field(id).append(...values.map(value => new Option(value, value)));
  }
  field("filters").addEventListener("input", applyFilters);
  field("filters").addEventListener("reset", () => setTimeout(applyFilters));
  field("filters").addEventListener("submit", event => event.preventDefault());
  field("more").addEventListener("click", showMore);
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", openLinked);
  applyFilters();
  openLinked();
}

start();
