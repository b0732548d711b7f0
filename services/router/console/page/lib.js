"use strict";
// Small tools: elements, numbers, percentiles of Prometheus buckets, charts. Nothing is ever set as HTML.

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "style") Object.assign(made.style, value);
    else if (value !== undefined) made.setAttribute(key === "cls" ? "class" : key, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const color = (name) => `var(--${name})`;

function short(value) {
  if (value === null || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e9) return (value / 1e9).toFixed(1) + " G";
  if (size >= 1e6) return (value / 1e6).toFixed(1) + " M";
  if (size >= 1e4) return (value / 1e3).toFixed(1) + " k";
  if (size >= 100 || Number.isInteger(value)) return value.toFixed(0);
  return value.toFixed(size >= 10 ? 1 : 2);
}

function duration(ms) {
  if (ms === null || !Number.isFinite(ms)) return "–";
  if (ms >= 10000) return (ms / 1000).toFixed(1) + " s";
  if (ms >= 1000) return (ms / 1000).toFixed(2) + " s";
  return (ms >= 100 ? ms.toFixed(0) : ms >= 10 ? ms.toFixed(1) : ms.toFixed(2)) + " ms";
}

const percent = (share) => (share === null ? "–" : (100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0) + " %");

// Buckets are [bound in s or null, how many are not above it]. The difference of two readings is a window.
function since(now, before) {
  if (!now) return [];
  return now.map(([bound, count], i) => [bound, count - (before && before[i] ? before[i][1] : 0)]);
}

// In ms, by interpolation inside the bucket; null where nothing was counted.
function quantile(buckets, share) {
  const total = buckets.length ? buckets[buckets.length - 1][1] : 0;
  if (!total) return null;
  const wanted = share * total;
  let low = 0, below = 0;
  for (const [bound, count] of buckets) {
    if (count >= wanted) {
      if (bound === null) return 1000 * low;
      return 1000 * (low + ((bound - low) * (wanted - below)) / Math.max(count - below, 1e-9));
    }
    low = bound;
    below = count;
  }
  return 1000 * low;
}

function line(values, width, height, top) {
  const step = width / Math.max(values.length - 1, 1);
  let path = "", pen = "M";
  values.forEach((value, i) => {
    if (value === null) { pen = "M"; return; }
    path += `${pen}${(i * step).toFixed(1)} ${(height - (height * value) / top).toFixed(1)}`;
    pen = "L";
  });
  return path;
}

function spark(values, name) {
  const top = Math.max(...values.filter((v) => v !== null), 1e-9);
  return svg("svg", { viewBox: "0 0 100 26", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("path", { d: line(values, 100, 24, top * 1.05), fill: "none", stroke: color(name), "stroke-width": 1.5, "vector-effect": "non-scaling-stroke" }));
}

function niceTop(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1e-6)));
  return [1, 2, 5, 10].map((n) => n * power).find((n) => n >= value);
}

// series: [{name, color, values}], all of one length; the newest is at the right. Drawn in the holder's own pixels.
function chart(holder, series, unit, seconds) {
  const width = Math.max(holder.clientWidth, 200), height = 130, left = 44, right = 4, bottom = 18, top = 6;
  const found = series.flatMap((one) => one.values.filter((v) => v !== null));
  const limit = niceTop(Math.max(...found, 1e-3));
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  for (const part of [0, 0.5, 1]) {
    const y = height - bottom - (height - bottom - top) * part;
    root.append(svg("line", { x1: left, x2: width - right, y1: y, y2: y, stroke: color("line") }));
    const text = svg("text", { x: left - 6, y: y + 4, "text-anchor": "end" });
    text.textContent = short(limit * part);
    root.append(text);
  }
  for (const [x, anchor, said] of [[left, "start", `${duration(1000 * seconds)} ago`], [width - right, "end", "now"]]) {
    const text = svg("text", { x, y: height - 3, "text-anchor": anchor });
    text.textContent = said;
    root.append(text);
  }
  for (const one of series) {
    const path = svg("path", { d: line(one.values, width - left - right, height - bottom - top, limit), fill: "none", stroke: color(one.color), "stroke-width": 2, "stroke-linejoin": "round", "stroke-linecap": "round", transform: `translate(${left} ${top})` });
    root.append(path);
  }
  const keys = el("p", { cls: "legend" }, ...series.map((one) => key(one.color, `${one.name} ${unit(one.values[one.values.length - 1])}`)));
  holder.replaceChildren(root, keys);
}

function key(name, text) {
  return el("span", {}, el("i", { style: { background: color(name) } }), text);
}
