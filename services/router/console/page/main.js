// Asks for data while the page is seen, keeps what five minutes brought, and has the panels drawn.

const EVERY_MS = 2000;
const KEPT_READINGS = 150;
const KEPT_REQUESTS = 100;
const WINDOW = 15; // readings that percentiles and rates are taken over: half a minute
const view = { readings: [], points: [], requests: [], last: 0, epoch: "", timer: 0, asking: false };

function ask(path, options = {}) {
  const secret = sessionStorage.getItem("nanodeploy-key");
  const headers = { "content-type": "application/json", ...(secret ? { authorization: `Bearer ${secret}` } : {}) };
  return fetch(path, { ...options, headers, cache: "no-store" });
}

function sum(models, name) {
  return Object.values(models).reduce((total, model) => total + (model[name] ?? 0), 0);
}

function buckets(models, name) {
  const found = Object.values(models).map((model) => model[name]).filter(Boolean);
  return found.length ? found[0].map(([bound], i) => [bound, found.reduce((total, one) => total + one[i][1], 0)]) : [];
}

function point(now, before) {
  const seconds = before ? Math.max((now.at - before.at) / 1000, 1e-3) : 1;
  const rate = (name) => (before ? (sum(now.models, name) - sum(before.models, name)) / seconds : 0);
  const window = (name) => since(buckets(now.models, name), before && buckets(before.models, name));
  const first = window("first_token"), token = window("inter_token");
  const prompt = rate("prompt_tokens"), ever = sum(now.models, "prompt_tokens");
  const decode = now.workers.filter((worker) => worker.role === "decode");
  return {
    requests: rate("request_success"), failures: rate("request_failures"), prompt,
    output: decode.reduce((total, worker) => total + worker.tokens_per_s, 0),
    first50: quantile(first, 0.5), first90: quantile(first, 0.9), first99: quantile(first, 0.99),
    token50: quantile(token, 0.5), token99: quantile(token, 0.99),
    hits: prompt > 0 ? rate("cached_tokens") / prompt : null, hitsEver: ever ? sum(now.models, "cached_tokens") / ever : null,
    running: decode.reduce((total, worker) => total + worker.running, 0),
  };
}

function startOver(epoch) {
  Object.assign(view, { readings: [], points: [], requests: [], last: 0, epoch });
  $("requests").replaceChildren(el("p", { cls: "dim empty" }, "None yet. Ask something in the chat."));
}

function take(data) {
  if (data.router.epoch !== view.epoch) startOver(data.router.epoch);
  const now = { at: performance.now(), models: data.models, workers: data.workers };
  const before = view.readings[Math.max(view.readings.length - WINDOW, 0)];
  view.readings.push(now);
  if (view.readings.length > WINDOW) view.readings.shift();
  view.points.push(point(now, before)); // the first covers the time since the router's start
  if (view.points.length > KEPT_READINGS) view.points.shift();
  const fresh = data.requests.filter((request) => request.number > view.last);
  view.last = Math.max(view.last, data.last);
  view.requests = [...view.requests, ...fresh].slice(-KEPT_REQUESTS);
  return fresh;
}

function draw(data, fresh) {
  const decode = data.workers.filter((worker) => worker.role === "decode");
  const able = decode.filter((worker) => worker.reached).length;
  const health = $("health");
  health.className = `pill ${data.router.draining || !able ? "bad" : able < decode.length ? "warn" : "good"}`;
  health.textContent = data.router.draining ? "stopping" : able ? (able < decode.length ? `${able} of ${decode.length} ready` : "ready") : "no decode worker";
  const hours = (Date.now() / 1000 - data.router.started) / 3600;
  $("who").textContent = `router ${data.router.epoch} · version ${data.router.version} · up ${hours < 1 ? Math.round(60 * hours) + " min" : hours.toFixed(1) + " h"}`;
  drawModels(Object.keys(data.models).filter((name) => decode.some((worker) => worker.model === name)));
  const last = view.points[view.points.length - 1];
  drawTiles(view.points, last.running, data.workers.reduce((total, worker) => total + worker.waiting, 0));
  drawCharts(view.points, (Math.max(view.points.length - 1, 1) * EVERY_MS) / 1000);
  drawTopology(data.workers, view.requests);
  drawPools(data.workers);
  drawRequests(fresh, KEPT_REQUESTS);
}

function drawModels(names) {
  const select = $("model");
  if ([...select.options].map((option) => option.value).join("\n") !== names.join("\n")) {
    const chosen = select.value;
    select.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
    if (names.includes(chosen)) select.value = chosen;
  }
  select.hidden = !names.length;
}

function notice(text) {
  $("notice").hidden = !text;
  $("notice").textContent = text;
}

function askForKey(message) {
  const dialog = $("key-dialog");
  $("key-wrong").hidden = !sessionStorage.getItem("nanodeploy-key");
  $("key-wrong").textContent = message;
  if (!dialog.open) dialog.showModal();
}

async function refresh() {
  if (view.asking || document.hidden || $("key-dialog").open) return;
  view.asking = true;
  try {
    const response = await ask(`dashboard/data?epoch=${view.epoch}&since=${view.last}`, { signal: AbortSignal.timeout(10000) });
    const data = await response.json();
    if (response.status === 401) askForKey(data.error.message);
    else if (!response.ok) notice(data.error?.message ?? `The router answered ${response.status}.`);
    else { notice(""); draw(data, take(data)); }
  } catch (error) {
    $("health").className = "pill bad";
    $("health").textContent = "unreachable";
    notice(`The router does not answer (${error.message}); trying again.`);
  } finally {
    view.asking = false;
  }
}

function theme(name) {
  const dark = name === "dark" || (name === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").textContent = name;
}

function chosenTheme() {
  return localStorage.getItem("nanodeploy-theme") ?? "auto";
}

$("theme").addEventListener("click", () => {
  const names = ["auto", "light", "dark"];
  const next = names[(names.indexOf(chosenTheme()) + 1) % names.length];
  localStorage.setItem("nanodeploy-theme", next);
  theme(next);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme(chosenTheme()));
$("key-form").addEventListener("submit", () => {
  sessionStorage.setItem("nanodeploy-key", $("key").value.trim());
  $("key").value = "";
  setTimeout(refresh);
});
$("key-dialog").addEventListener("cancel", (event) => event.preventDefault());
document.addEventListener("visibilitychange", refresh);
addEventListener("resize", () => { if (view.readings.length) { drawEdges(view.requests); drawCharts(view.points, ((view.points.length - 1) * EVERY_MS) / 1000); } });
$("flow-legend").replaceChildren(...STEPS.map(([step, text]) => key(step, text)));
theme(chosenTheme());
setInterval(refresh, EVERY_MS);
refresh();
