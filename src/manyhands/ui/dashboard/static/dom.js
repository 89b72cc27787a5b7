// Building the page: elements whose text is only ever set as text, and numbers as people read them.
// Nothing here or elsewhere uses innerHTML: names come from clients, and a name is never markup.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element. `attributes`: class, text (as textContent) or any attribute; null and undefined are left out. */
export function el(tag, attributes = {}, children = []) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function svg(tag, attributes = {}, children = []) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined) continue;
    if (name === "text") node.textContent = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

export const byId = (id) => document.getElementById(id);

export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export const shortKey = (key) => key.slice(0, 8);
export const loss = (value) => (value === null || value === undefined ? "–" : value.toFixed(value < 10 ? 3 : 1));

export function count(value) {
  if (value === null || value === undefined) return "–";
  return Math.round(value).toLocaleString("en-US");
}

/** 1 536 -> ["1.5", "KiB"] */
export function bytesParts(size) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (size >= 1024 && i < units.length - 1) { size /= 1024; i += 1; }
  return [i === 0 || size >= 100 ? size.toFixed(0) : size.toFixed(1), units[i]];
}

export const bytes = (size) => (size === null || size === undefined ? "–" : bytesParts(size).join(" "));

export function duration(ms) {
  const seconds = ms / 1000;
  if (seconds < 10) return `${Math.max(0, seconds).toFixed(1)} s`;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const total = Math.round(seconds);
  const hours = Math.floor(total / 3600);
  const minutes = Math.floor(total / 60) % 60;
  if (hours >= 48) return `${Math.floor(hours / 24)} d ${hours % 24} h`;
  return hours ? `${hours} h ${minutes} min` : `${minutes} min ${total % 60} s`;
}

export const ago = (ms) => (ms < 1500 ? "now" : `${duration(ms)} ago`);

export function clock(ms) {
  return new Date(ms).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
}

const PHASES = {
  waiting: ["Waiting for clients", ""],
  warming_up: ["Warming up", "accent"],
  training: ["Training", "accent"],
  checkpointing: ["Saving a checkpoint", "accent"],
  finished: ["Finished", "good"],
  paused: ["Paused", "warn"],
  failed: ["Failed", "bad"],
};

/** A phase in words and the colour class of its pill. */
export const phase = (name) => PHASES[name] ?? [name, ""];
