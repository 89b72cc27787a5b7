// The list of runs: asked for every two seconds, since it is short and changes seldom.

import { byId, duration, el, loss, phase, setText } from "./dom.js";
import { showLink } from "./stream.js";

const EVERY_MS = 2000;

async function refresh() {
  try {
    const answer = await fetch("/api/runs", { signal: AbortSignal.timeout(8000) });
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    render(await answer.json());
    showLink("live");
  } catch {
    showLink("lost");
  }
  setTimeout(refresh, EVERY_MS);
}

function render(runs) {
  setText(byId("sub"), runs.length === 1 ? "One run on this server." : `${runs.length} runs on this server.`);
  const going = (run) => (["finished", "failed"].includes(run.phase) ? 1 : 0);
  runs.sort((a, b) => going(a) - going(b) || b.started_ms - a.started_ms);
  byId("runs").replaceChildren(...runs.map(row));
}

function row(run) {
  const [words, color] = phase(run.phase);
  const filled = el("div", { class: `filled ${color}` });
  filled.style.setProperty("width", `${(100 * run.closed_rounds) / Math.max(1, run.total_rounds)}%`);
  const fact = (value, text) => el("div", { class: "fact", text: value }, [el("small", { text })]);
  return el("a", { class: "run", href: `/runs/${encodeURIComponent(run.run_id)}` }, [
    el("div", {}, [
      el("div", { class: "title" }, [el("b", { text: run.name }), el("span", { class: `pill ${color}`, text: words })]),
      el("span", { class: "mono", text: [run.run_id, run.preset, run.topology].filter(Boolean).join(" · ") }),
    ]),
    el("div", {}, [
      el("div", { class: "progress" }, [filled]),
      el("div", { class: "under" }, [el("span", { text: `${run.closed_rounds} of ${run.total_rounds} rounds` }), el("span", { text: duration(run.now_ms - run.started_ms) })]),
    ]),
    fact(loss(run.mean_loss), "training loss"),
    fact(String(run.live_clients), run.live_clients === 1 ? "client" : "clients"),
  ]);
}

refresh();
