// The loss curve: training loss of each round (clients faint, their mean strong) and validation loss of snapshots.
// x: round; the training loss of round r stands at r, the validation loss of the snapshot after n closings at n.

import { el, loss, svg } from "./dom.js";

const MARGIN = { top: 14, right: 22, bottom: 38, left: 58 };

/** Round steps for an axis: about `wanted` of them between low and high. */
export function ticks(low, high, wanted, whole = false) {
  const rough = (high - low) / Math.max(1, wanted) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.72 && (!whole || Number.isInteger(s))) ?? Math.max(1, rough);
  const marks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) marks.push(i * step);
  return { marks, digits: whole ? 0 : Math.max(0, -Math.floor(Math.log10(step) + 1e-9) + (step / power === 2.5 ? 1 : 0)) };
}

export class LossChart {
  constructor(holder) {
    this.holder = holder;
    this.data = null;
    this.at = null;
    this.tip = el("div", { class: "tip", hidden: "" });
    this.surface = svg("svg", { tabindex: "0", role: "img" });
    holder.append(this.surface, this.tip);
    new ResizeObserver(() => this.draw()).observe(holder);
    this.surface.addEventListener("pointermove", (event) => this.hover(this.roundAt(event)));
    this.surface.addEventListener("pointerleave", () => this.hover(null));
    this.surface.addEventListener("blur", () => this.hover(null));
    this.surface.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move || !this.data?.marks.length) return;
      event.preventDefault();
      const marks = this.data.marks;
      const here = this.at === null ? marks.length - 1 : marks.indexOf(this.at) + move;
      this.hover(marks[Math.min(marks.length - 1, Math.max(0, here))]);
    });
  }

  /** rounds: [{round, mean, clients: Map(key -> loss)}], evaluations: [{round, loss}], series: [{key, label, color}] */
  set(rounds, evaluations, series, total, incidents, unit) {
    const marks = [...new Set([...rounds.map((r) => r.round), ...evaluations.map((e) => e.round)])].sort((a, b) => a - b);
    this.data = { rounds, evaluations, series, total, incidents, marks, unit };
    this.draw();
  }

  roundAt(event) {
    const { marks } = this.data ?? { marks: [] };
    if (!marks.length) return null;
    const x = event.clientX - this.surface.getBoundingClientRect().left;
    return marks.reduce((best, m) => (Math.abs(this.x(m) - x) < Math.abs(this.x(best) - x) ? m : best), marks[0]);
  }

  draw() {
    const width = this.holder.clientWidth;
    const height = this.holder.clientHeight;
    if (!this.data || !width) return;
    const { rounds, evaluations, total } = this.data;
    const values = [...evaluations.map((e) => e.loss), ...rounds.flatMap((r) => [r.mean, ...r.clients.values()])]
      .filter((v) => v !== null && v !== undefined);
    this.surface.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.surface.replaceChildren();
    if (!values.length) {
      this.surface.append(svg("text", { x: width / 2, y: height / 2, "text-anchor": "middle", text: rounds.length ? "This run's clients report no loss." : "The curve begins with the first closed round." }));
      return;
    }
    const [low, high] = this.range(values);
    this.x = (r) => MARGIN.left + (r / Math.max(1, total)) * (width - MARGIN.left - MARGIN.right);
    this.y = (v) => MARGIN.top + ((high - v) / (high - low)) * (height - MARGIN.top - MARGIN.bottom);
    this.drawAxes(width, height, low, high, total);
    this.drawCurves(height);
    this.cursor = svg("g");
    this.surface.append(this.cursor);
    this.surface.setAttribute("aria-label", this.inWords());
    if (this.at !== null) this.hover(this.at);
  }

  range(values) {
    const low = Math.min(...values);
    const high = Math.max(...values);
    const pad = (high - low) * 0.08 || Math.max(0.1, Math.abs(high) * 0.1);
    return [low >= 0 ? Math.max(0, low - pad) : low - pad, high + pad];
  }

  drawAxes(width, height, low, high, total) {
    const bottom = height - MARGIN.bottom;
    const right = width - MARGIN.right;
    const up = ticks(low, high, Math.max(3, Math.floor(height / 62)));
    for (const mark of up.marks) {
      const y = Math.round(this.y(mark)) + 0.5;
      this.surface.append(
        svg("line", { class: "grid", x1: MARGIN.left, x2: right, y1: y, y2: y }),
        svg("text", { x: MARGIN.left - 10, y: y + 4, "text-anchor": "end", text: mark.toFixed(up.digits) }),
      );
    }
    for (const mark of ticks(0, total, Math.min(total, Math.max(3, Math.floor(width / 90))), true).marks) {
      this.surface.append(svg("text", { x: this.x(mark), y: bottom + 19, "text-anchor": "middle", text: String(mark) }));
    }
    this.surface.append(
      svg("line", { class: "axis", x1: MARGIN.left, x2: right, y1: bottom + 0.5, y2: bottom + 0.5 }),
      svg("text", { x: (MARGIN.left + right) / 2, y: height - 3, "text-anchor": "middle", text: "round" }),
      svg("text", { transform: `translate(13 ${(MARGIN.top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle", text: this.data.unit ? `loss, ${this.data.unit}` : "loss" }),
    );
  }

  drawCurves(height) {
    const { rounds, evaluations, series, incidents } = this.data;
    for (const round of incidents) {
      const right = this.x(round) + 80 > this.holder.clientWidth;
      this.surface.append(
        svg("line", { class: "incident", x1: this.x(round), x2: this.x(round), y1: MARGIN.top, y2: height - MARGIN.bottom }),
        svg("text", { class: "incident-name", x: this.x(round) + (right ? -5 : 5), y: MARGIN.top + 8, "text-anchor": right ? "end" : "start", text: "client lost" }),
      );
    }
    for (const { key, color } of series) this.line(rounds.map((r) => [r.round, r.clients.get(key)]), `client c${color}`);
    this.line(rounds.map((r) => [r.round, r.mean]), "mean");
    const points = evaluations.filter((e) => e.loss !== null).map((e) => [e.round, e.loss]);
    this.line(points, "validation-line");
    for (const [round, value] of points) this.surface.append(svg("circle", { class: "validation", cx: this.x(round), cy: this.y(value), r: 4.5 }));
    for (const [round, value] of points.length > 1 ? [points[0], points.at(-1)] : points) {
      const end = this.x(round) > this.x(0) + 60;
      this.surface.append(svg("text", { class: "value", x: this.x(round) + (end ? 0 : 10), y: this.y(value) - (end ? 11 : -4), "text-anchor": end ? "middle" : "start", text: loss(value) }));
    }
  }

  /** A polyline with gaps where there is no value; a value between two gaps is a dot. */
  line(points, classes) {
    let run = [];
    const flush = () => {
      if (run.length > 1) this.surface.append(svg("path", { class: classes, d: "M" + run.map(([r, v]) => `${this.x(r).toFixed(1)},${this.y(v).toFixed(1)}`).join("L") }));
      else if (run.length === 1 && !classes.startsWith("validation")) this.surface.append(svg("circle", { class: classes, cx: this.x(run[0][0]), cy: this.y(run[0][1]), r: 2.5 }));
      run = [];
    };
    for (const point of points) {
      if (point[1] === null || point[1] === undefined) flush();
      else run.push(point);
    }
    flush();
  }

  hover(round) {
    this.at = round;
    this.tip.hidden = round === null;
    if (!this.cursor) return;
    this.cursor.replaceChildren();
    if (round === null) return;
    const { rounds, evaluations, series } = this.data;
    const x = this.x(round);
    this.cursor.append(svg("line", { class: "cursor", x1: x, x2: x, y1: MARGIN.top, y2: this.holder.clientHeight - MARGIN.bottom }));
    const row = (key, name, value) => el("div", {}, [el("span", { class: key }), el("span", { text: name }), el("b", { text: loss(value) })]);
    const trained = rounds.find((r) => r.round === round);
    const evaluated = evaluations.find((e) => e.round === round);
    const rows = [];
    if (evaluated) rows.push(row("key ring", "validation", evaluated.loss));
    if (trained) {
      rows.push(row("key mean", "training, mean", trained.mean));
      for (const { key, label, color } of series) {
        if (trained.clients.has(key)) rows.push(row(`key faint c${color}`, label.length > 22 ? label.slice(0, 21) + "…" : label, trained.clients.get(key)));
      }
      if (trained.mean !== null) this.cursor.append(svg("circle", { class: "mean", cx: x, cy: this.y(trained.mean), r: 4 }));
    }
    this.tip.replaceChildren(el("p", { text: `Round ${round}` }), ...rows);
    const width = this.tip.offsetWidth;
    const left = x + 14 + width > this.holder.clientWidth ? x - 14 - width : x + 14;
    this.tip.style.setProperty("left", `${Math.max(0, left)}px`);
    this.tip.style.setProperty("top", `${MARGIN.top}px`);
  }

  inWords() {
    const { rounds, evaluations } = this.data;
    const ends = (points, pick) => (points.length ? `${loss(pick(points[0]))} at first, ${loss(pick(points.at(-1)))} now` : "none yet");
    return `Loss by round. Training, mean: ${ends(rounds, (r) => r.mean)}. Validation: ${ends(evaluations, (e) => e.loss)}.`;
  }
}
