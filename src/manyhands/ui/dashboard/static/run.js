// The page of one run. State is one merged view: the latest scalars and clients, all rounds and incidents so far.

import { LossChart } from "./chart.js";
import { ago, byId, bytes, bytesParts, clock, count, duration, el, loss, phase, setText, shortKey } from "./dom.js";
import { follow, showLink } from "./stream.js";

const SHOWN_ROUNDS = 30;
const COLORS = 8;
const runId = decodeURIComponent(location.pathname.split("/").filter(Boolean).at(-1));
const state = { view: null, rounds: new Map(), incidents: [], colors: new Map(), skew: 0, all: false, waiting: false, drawn: false };
const chart = new LossChart(byId("chart"));

const api = `/api/runs/${encodeURIComponent(runId)}`;
follow(`${api}/changes`, receive, connection);
setInterval(() => state.view && renderTime(), 1000);
byId("more").addEventListener("click", () => { state.all = true; renderLedger(); });

function receive(view) {
  state.view = view;
  state.skew = Date.now() - view.now_ms;
  for (const round of view.rounds) state.rounds.set(round.round, round);
  const known = new Set(state.incidents.map(identity));
  state.incidents.push(...view.incidents.filter((i) => !known.has(identity(i)))); // after a loss all come again
  for (const client of view.clients) if (!state.colors.has(client.key)) state.colors.set(client.key, state.colors.size % COLORS);
  if (state.waiting) return;
  state.waiting = true; // several changes between two frames are drawn once
  requestAnimationFrame(() => { state.waiting = false; render(); });
}

const identity = (incident) => `${incident.ms} ${incident.client} ${incident.what}`;

async function connection(now) {
  showLink(now);
  const lost = byId("lost");
  lost.hidden = now !== "lost";
  if (now !== "lost") return;
  lost.textContent = "Connection to the server lost. What you see may be out of date; trying again.";
  if (state.view) return;
  try {
    const answer = await fetch(api);
    if (answer.status === 404) lost.textContent = `This server has no run '${runId}'.`;
  } catch { /* the server is away; the text above says so */ }
}

const now = () => Date.now() - state.skew;
const rounds = () => [...state.rounds.values()].sort((a, b) => a.round - b.round);
const client = (key) => state.view.clients.find((c) => c.key === key);
const name = (key) => client(key)?.label || shortKey(key);

function render() {
  renderHead();
  renderFigures();
  renderChart();
  renderClients();
  renderLedger();
  renderIncidents();
  renderTime();
}

function renderHead() {
  const v = state.view;
  const [words, color] = phase(v.phase);
  document.title = `${v.name} ${v.closed_rounds}/${v.total_rounds} · manyhands`;
  setText(byId("crumb"), v.run_id);
  setText(byId("name"), v.name);
  byId("phase").className = `pill ${color}`;
  setText(byId("phase"), words);
  byId("reason").hidden = !v.reason || !["waiting", "paused", "failed"].includes(v.phase);
  byId("reason").className = v.phase === "failed" ? "notice bad" : "notice";
  setText(byId("reason"), v.reason);
  byId("facts").replaceChildren(
    el("span", { class: "mono", text: v.run_id }),
    ...[v.preset && `preset ${v.preset}`, `${v.topology} topology`, `started ${clock(v.started_ms)}`].filter(Boolean).map((text) => el("span", { text })),
  );
  byId("progress").setAttribute("aria-valuenow", v.closed_rounds);
  byId("progress").setAttribute("aria-valuemax", v.total_rounds);
  byId("filled").className = `filled ${color}${state.drawn ? " moving" : ""}`;
  state.drawn = true; // the bar moves from here on, but does not grow from nothing when the page opens
  byId("filled").style.setProperty("width", `${(100 * v.closed_rounds) / Math.max(1, v.total_rounds)}%`);
  byId("rounds-done").replaceChildren(el("b", { text: `${v.closed_rounds}` }), ` of ${v.total_rounds} rounds`);
  setText(byId("footer"), v.checkpoint ? `Latest checkpoint: ${v.checkpoint}` : "");
}

function renderTime() {
  const v = state.view;
  const closed = rounds();
  const going = ["training", "checkpointing", "warming_up", "waiting"].includes(v.phase);
  const end = going || !closed.length ? now() : closed.at(-1).closed_ms;
  let text = `${duration(end - v.started_ms)} so far`;
  if (v.phase === "finished") text = `took ${duration(end - v.started_ms)}`;
  if (v.phase === "training" && closed.length > 1) {
    const latest = closed.slice(-8);
    const mean = latest.reduce((sum, r) => sum + r.duration_ms, 0) / latest.length;
    text += ` · about ${duration(mean * (v.total_rounds - v.closed_rounds))} left`;
  }
  setText(byId("time"), text);
  for (const cell of document.querySelectorAll("[data-heard]")) setText(cell, ago(now() - Number(cell.dataset.heard)));
}

function figure(label, value, unit, note) {
  return el("div", {}, [
    el("dt", { text: label }),
    el("dd", { class: "value", text: value }, unit ? [el("small", { text: unit })] : []),
    el("dd", { class: "note" }, note ? [note] : []),
  ]);
}

/** "from 6.931, −42 %", coloured by whether it fell. */
function change(first, last) {
  if (first === null || first === undefined || last === null || last === undefined || first === last) return null;
  const percent = (100 * (last - first)) / first;
  return el("span", { text: `from ${loss(first)}, ` }, [
    el("span", { class: percent < 0 ? "fell" : "rose", text: `${percent < 0 ? "−" : "+"}${Math.abs(percent).toFixed(0)} %` }),
  ]);
}

function renderFigures() {
  const v = state.view;
  const trained = rounds().filter((r) => r.mean_loss !== null);
  const tested = v.evaluations.filter((e) => e.loss !== null);
  const live = v.clients.filter((c) => ["ready", "catching_up"].includes(c.status));
  const sum = (field) => v.clients.reduce((total, c) => total + (c[field] ?? 0), 0);
  const rate = live.reduce((total, c) => total + (c.tokens_per_s ?? 0), 0);
  const tokens = rounds().reduce((total, r) => total + r.tokens, 0);
  const [up, upUnit] = bytesParts(sum("bytes_up"));
  byId("figures").replaceChildren(
    figure("Validation loss", loss(tested.at(-1)?.loss), "", change(tested[0]?.loss, tested.at(-1)?.loss)),
    figure("Training loss", loss(trained.at(-1)?.mean_loss), "", change(trained[0]?.mean_loss, trained.at(-1)?.mean_loss)),
    figure("Speed", rate ? count(rate) : "–", "tokens/s", document.createTextNode(`${count(tokens)} tokens merged`)),
    figure("Uploaded", up, upUnit, document.createTextNode(`${bytes(sum("bytes_down"))} down`)),
    figure("Clients", String(live.length), `of ${v.clients.length}`, document.createTextNode(`${v.clients.reduce((n, c) => n + c.rejoined, 0)} rejoined`)),
  );
}

function renderChart() {
  const v = state.view;
  const series = v.clients.map((c) => ({ key: c.key, label: c.label || shortKey(c.key), color: state.colors.get(c.key) }));
  const curve = rounds().map((r) => ({
    round: r.round,
    mean: r.mean_loss,
    clients: new Map(r.counted.filter((c) => c.loss !== null).map((c) => [c.client, c.loss])),
  }));
  const lost = new Set(state.incidents.filter((i) => i.what === "lost" && i.round !== null && i.round < v.total_rounds).map((i) => i.round));
  chart.set(curve, v.evaluations, series, v.total_rounds, lost, v.loss_unit);
  const entry = (key, text) => el("li", {}, [el("span", { class: key }), el("span", { text })]);
  byId("legend").replaceChildren(
    entry("key ring", "validation"),
    entry("key mean", "training, mean of clients"),
    ...series.slice(0, COLORS).map((s) => entry(`key faint c${s.color}`, s.label.length > 24 ? s.label.slice(0, 23) + "…" : s.label)),
  );
}

const STATUS = { ready: ["ready", "good"], catching_up: ["catching up", "accent"], left: ["left", ""], lost: ["lost", "bad"], kicked: ["kicked out", "bad"] };

function renderClients() {
  const v = state.view;
  setText(byId("clients-count"), v.clients.length === 1 ? "1 key has taken part" : `${v.clients.length} keys have taken part`);
  if (!v.clients.length) {
    byId("clients").replaceChildren(el("tbody", {}, [el("tr", {}, [el("td", { class: "empty", text: "Nobody has joined yet." })])]));
    return;
  }
  const heads = ["Client", "Status", "Round", "Merged", "Loss", "Tokens/s", "Up", "Down", "Last heard"];
  const head = el("thead", {}, [el("tr", {}, heads.map((text, i) => el("th", { class: i > 1 ? "n" : null, scope: "col", text })))]);
  byId("clients").replaceChildren(head, el("tbody", {}, v.clients.map((c) => clientRow(c, heads))));
}

function clientRow(c, heads) {
  const [words, color] = c.suspected && c.status === "ready" ? ["suspected", "warn"] : STATUS[c.status] ?? [c.status, ""];
  const number = (i, text, extra) => el("td", { class: "n", "data-head": heads[i], text }, extra ? [extra] : []);
  const merged = number(3, String(c.counted), c.uncounted ? el("small", { text: ` (${c.uncounted} not)` }) : null);
  const heard = number(8, c.last_heard_ms === null ? "not connected" : "");
  if (c.last_heard_ms !== null) heard.dataset.heard = c.last_heard_ms;
  return el("tr", { class: ["ready", "catching_up"].includes(c.status) ? null : "gone" }, [
    el("td", {}, [
      el("div", { class: "who" }, [
        el("span", { class: `dot c${state.colors.get(c.key)}` }),
        el("span", { class: "names" }, [el("span", { class: "label", title: c.label || null, text: c.label || "unnamed" }), el("span", { class: "mono", title: c.key, text: shortKey(c.key) })]),
      ]),
    ]),
    el("td", {}, [el("span", { class: `pill ${color}`, text: words })]),
    number(2, c.round === null ? "–" : String(c.round)),
    merged,
    number(4, loss(c.loss)),
    number(5, count(c.tokens_per_s)),
    number(6, bytes(c.bytes_up)),
    number(7, bytes(c.bytes_down)),
    heard,
  ]);
}

function renderLedger() {
  const closed = rounds().reverse();
  const shown = state.all ? closed : closed.slice(0, SHOWN_ROUNDS);
  const rows = shown.map((r) => el("li", {}, [
    el("div", { class: "round", text: `Round ${r.round}` }, [el("small", { text: clock(r.closed_ms) })]),
    el("div", { class: "chips" }, [
      ...r.counted.map((c) => el("span", { class: "chip good", title: `${c.client}: merged, weight ${c.weight}` }, [el("span", { text: name(c.client) })])),
      ...r.uncounted.map((u) => el("span", { class: `chip ${/lost|kicked|left/.test(u.reason) ? "bad" : "warn"}`, title: `${u.client}: ${u.reason}` }, [el("span", { text: name(u.client) }), el("em", { text: u.reason })])),
      r.counted.length || r.uncounted.length ? null : el("span", { class: "count", text: "nobody had work" }),
    ]),
    el("div", { class: "result" }, [el("span", { text: loss(r.mean_loss) }), el("small", { text: duration(r.duration_ms) })]),
  ]));
  byId("ledger").replaceChildren(...(rows.length ? rows : [el("li", { class: "empty", text: "No round has closed yet." })]));
  byId("more").hidden = shown.length === closed.length;
  setText(byId("more"), `Show all ${closed.length} rounds`);
}

const WEIGHT = [[/lost|kicked|failed|refused/, "bad"], [/suspected|left/, "warn"], [/joined|recovered/, "good"]];

function renderIncidents() {
  const latest = state.incidents.slice(-40).reverse();
  const rows = latest.map((i) => el("li", { class: WEIGHT.find(([pattern]) => pattern.test(i.what))?.[1] ?? null }, [
    el("span", {}, [el("b", { text: name(i.client) }), ` ${i.detail ? `${i.what}: ${i.detail}` : i.what}`]),
    el("small", { text: i.round === null ? clock(i.ms) : `${clock(i.ms)} · round ${i.round}` }),
  ]));
  byId("incidents").replaceChildren(...(rows.length ? rows : [el("li", { class: "empty" }, [el("span", { text: "Nothing yet." })])]));
}
