// What is drawn from the readings. A reading is one answer of the data route with the time that it came.

const STATES = ["live", "cached", "leased", "in_flight", "free"];
const MOST_WORKERS = 24; // of a role; a rack has more than a page
const STEPS = [
  ["prepare", "template, tokens"], ["deliver", "on the way"], ["queue", "queue"], ["compute", "prefill"],
  ["move", "KV transfer"], ["first", "first step"], ["output", "output"],
];

function drawTiles(points, running, waiting) {
  const last = points[points.length - 1];
  const values = (name) => points.map((point) => point[name]);
  const tile = (name, value, unit, more, series, tint) => el("div", { cls: "tile" },
    el("div", { cls: "name" }, name),
    el("div", { cls: "value" }, value, el("small", {}, unit)),
    el("div", { cls: "more" }, more), spark(series, tint));
  const ms = (value) => (value === null ? ["–", ""] : duration(value).split(" "));
  $("tiles").replaceChildren(
    tile("Requests", short(last.requests), "/s", `${short(last.failures)} /s failed`, values("requests"), "live"),
    tile("Output", short(last.output), "tokens/s", `${short(last.prompt)} prompt tokens/s`, values("output"), "cached"),
    tile("First token, median", ...ms(last.first50), `p99 ${duration(last.first99)}`, values("first50"), "first"),
    tile("Between tokens, median", ...ms(last.token50), `p99 ${duration(last.token99)}`, values("token50"), "in_flight"),
    tile("Prefix hit rate", percent(last.hits).replace(" %", ""), last.hits === null ? "" : "%", `${percent(last.hitsEver)} since start`, values("hits"), "cached"),
    tile("Running", short(running), "sequences", `${short(waiting)} waiting`, values("running"), "leased"),
  );
}

function drawCharts(points, seconds) {
  const values = (name) => points.map((point) => point[name]);
  chart($("latency"), [
    { name: "p50", color: "live", values: values("first50") },
    { name: "p90", color: "leased", values: values("first90") },
    { name: "p99", color: "in_flight", values: values("first99") },
  ], duration, seconds);
  chart($("throughput"), [{ name: "output", color: "cached", values: values("output") }], (v) => short(v), seconds);
}

function card(worker) {
  const where = [worker.device, worker.host].filter(Boolean).join(" · ");
  const state = worker.role === "decode" && worker.state === "ready" && !worker.reached ? "unreached" : worker.state;
  const load = [`${short(worker.running)} of ${short(worker.slots)} running`];
  if (worker.waiting) load.push(`${short(worker.waiting)} waiting`);
  if (worker.tokens_per_s) load.push(`${short(worker.tokens_per_s)} tok/s`);
  return el("div", { cls: `worker ${state === "unreached" ? "unready" : state}`, "data-worker": worker.id, title: worker.transports.join(", ") },
    el("div", { cls: "top" }, el("b", {}, worker.id), el("span", { cls: `pill state-${state === "unreached" ? "unready" : state}` }, state)),
    el("div", { cls: "sub one", title: where }, where), el("div", { cls: "sub" }, load.join(" · ")));
}

function drawTopology(workers, requests) {
  const of = (role) => workers.filter((worker) => worker.role === role).sort((a, b) => a.id.localeCompare(b.id, undefined, { numeric: true }));
  for (const role of ["prefill", "decode"]) {
    const all = of(role), rest = all.length - MOST_WORKERS;
    const cards = all.slice(0, MOST_WORKERS).map(card);
    if (rest > 0) cards.push(el("p", { cls: "dim empty" }, `and ${rest} more`));
    $(role).replaceChildren(...(cards.length ? cards : [el("p", { cls: "dim empty" }, `No ${role} worker.`)]));
  }
  $("topology").classList.toggle("alone", !of("prefill").length);
  drawEdges(requests);
}

function drawEdges(requests) {
  const pairs = new Map();
  for (const request of requests) {
    const from = request.stats && request.stats.prefill_worker;
    if (!from || !request.decode_worker) continue;
    const name = JSON.stringify([from, request.decode_worker]);
    const pair = pairs.get(name) || { from, to: request.decode_worker, requests: 0, tokens: 0 };
    pair.requests += 1;
    pair.tokens += request.stats.transferred_tokens;
    pairs.set(name, pair);
  }
  const box = $("topology").getBoundingClientRect();
  const most = Math.max(...[...pairs.values()].map((pair) => pair.requests), 1);
  const spot = (id) => $("topology").querySelector(`[data-worker="${CSS.escape(id)}"]`)?.getBoundingClientRect();
  const lines = [];
  for (const pair of pairs.values()) {
    const from = spot(pair.from), to = spot(pair.to);
    if (!from || !to) continue;
    const x1 = from.right - box.left, y1 = from.top + from.height / 2 - box.top;
    const x2 = to.left - box.left, y2 = to.top + to.height / 2 - box.top, middle = (x1 + x2) / 2;
    lines.push(svg("path", { d: `M${x1} ${y1}C${middle} ${y1} ${middle} ${y2} ${x2} ${y2}`, fill: "none", stroke: color("move"), "stroke-opacity": 0.75, "stroke-width": (1 + (4 * pair.requests) / most).toFixed(1) }));
  }
  $("edges").replaceChildren(...lines);
}

function drawPools(workers) {
  const rows = [];
  for (const worker of workers.filter((one) => one.kv.length).slice(0, 2 * MOST_WORKERS)) {
    for (const pool of worker.kv) {
      const name = worker.kv.length > 1 ? `${worker.id} · ${pool.group}` : worker.id;
      const bar = el("div", { cls: "bar", title: STATES.map((state) => `${state.replace("_", " ")} ${pool[state]}`).join(", ") },
        ...STATES.filter((state) => pool[state]).map((state) => el("i", { style: { background: color(state), flex: `${pool[state]} 0 0px` } })));
      const used = pool.total - pool.free;
      rows.push(el("div", { cls: "pool" }, el("span", { title: name }, name), bar, el("span", {}, `${short(used)} of ${short(pool.total)}`)));
    }
  }
  $("kv").replaceChildren(...(rows.length ? rows : [el("p", { cls: "dim empty" }, "No worker has told of its KV yet.")]));
  const sums = Object.fromEntries(STATES.map((state) => [state, workers.flatMap((w) => w.kv).reduce((sum, pool) => sum + pool[state], 0)]));
  $("kv-legend").replaceChildren(...STATES.map((state) => key(state, `${state.replace("_", " ")} ${short(sums[state])}`)));
}

// Milliseconds of each step, one after the other; what the worker did not account for was on the way.
function flow(request) {
  const stats = request.stats, first = request.first_token_ms || request.total_ms;
  const prepare = Math.min(request.prepared_ms, first);
  if (!stats) return [["prepare", prepare], ["deliver", first - prepare], ["output", request.total_ms - first]];
  const move = Math.min(stats.transfer_ms, stats.decode_queue_ms);
  const known = stats.queue_ms + stats.prefill_ms + stats.decode_queue_ms;
  const queue = stats.queue_ms + stats.prefill_queue_ms, compute = stats.prefill_ms - stats.prefill_queue_ms;
  return [
    ["prepare", prepare], ["deliver", Math.max(first - prepare - known, 0)], ["queue", queue], ["compute", compute],
    ["move", move], ["first", stats.decode_queue_ms - move], ["output", Math.max(request.total_ms - first, 0)],
  ];
}

function fall(request) {
  const parts = flow(request), total = Math.max(parts.reduce((sum, [, ms]) => sum + ms, 0), 1e-6);
  let at = 0;
  const rows = parts.filter(([, ms]) => ms > 0.0005).map(([step, ms]) => {
    const place = { left: `${(100 * at) / total}%`, width: `${(100 * ms) / total}%`, background: color(step) };
    at += ms;
    return el("div", { cls: "step" }, el("span", {}, STEPS.find(([name]) => name === step)[1]), el("div", { cls: "track" }, el("i", { style: place })), el("span", {}, duration(ms)));
  });
  const stats = request.stats, said = [];
  said.push(`${request.prompt_tokens} prompt tokens: ${request.cached_tokens} cached` + (stats ? `, ${stats.computed_tokens} computed by the decode worker, ${stats.transferred_tokens} transferred` : ""));
  said.push(`${request.completion_tokens} output tokens`, request.finish.join(", "));
  if (request.decode_worker) said.push(`decode ${request.decode_worker}`);
  if (stats && stats.prefill_worker) said.push(`prefill ${stats.prefill_worker}`);
  if (stats && stats.transport) said.push(`${stats.transport}, ${short(stats.transfer_bytes)}B at ${short(stats.transfer_gbps)} GB/s`);
  if (stats && stats.fallback) said.push(`prefilled in its place: ${stats.fallback}`);
  if (stats && stats.draft_tokens) said.push(`${stats.accepted_draft_tokens} of ${stats.draft_tokens} draft tokens right`);
  return el("div", { cls: "fall" }, ...rows, el("p", {}, said.filter(Boolean).join(" · ")), el("p", {}, "request ", el("code", {}, request.request_id)));
}

function requestRow(request) {
  const when = new Date(1000 * request.ended).toLocaleTimeString([], { hour12: false });
  if (request.code) {
    return el("details", { cls: "request", "data-number": request.number },
      el("summary", {}, el("span", { cls: "dim" }, when), el("span", { cls: "bad" }, request.code), el("span", {}, ""), el("span", {}, duration(request.total_ms))),
      el("div", { cls: "fall" }, el("p", {}, "request ", el("code", {}, request.request_id))));
  }
  const parts = flow(request).filter(([, ms]) => ms > 0);
  const bar = el("span", { cls: "bar" }, ...parts.map(([step, ms]) => el("i", { style: { background: color(step), flex: `${ms} 0 0px` } })));
  const row = el("details", { cls: "request", "data-number": request.number },
    el("summary", {}, el("span", { cls: "dim" }, when), bar, el("span", {}, `${short(request.prompt_tokens)} → ${short(request.completion_tokens)}`), el("span", {}, duration(request.total_ms))));
  row.addEventListener("toggle", () => { if (row.open && row.childElementCount === 1) row.append(fall(request)); });
  return row;
}

// New rows go on top; those that are open stay as they are.
function drawRequests(fresh, kept) {
  if (!fresh.length) return;
  const holder = $("requests");
  holder.querySelector(".empty")?.remove();
  for (const request of fresh) holder.prepend(requestRow(request));
  while (holder.childElementCount > kept) holder.lastElementChild.remove();
}
