// The chat box: a conversation in this tab alone, streamed from the router's own API.

const talk = { messages: [], stop: null };

function say(cls, text) {
  $("talk").querySelector(".empty")?.remove();
  const bubble = el("div", { cls: `said ${cls}` }, text);
  $("talk").append(bubble);
  $("talk").scrollTop = $("talk").scrollHeight;
  return bubble;
}

// Events of a stream, as parsed JSON, until [DONE] or its end.
async function* serverEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((part) => part.startsWith("data:")).map((part) => part.slice(5).trim()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

async function answer(question) {
  talk.messages.push({ role: "user", content: question });
  say("me", question);
  const bubble = say("", "…"), body = document.createTextNode("");
  let thought = null, text = "", firstAt = 0, tokens = 0;
  const started = performance.now();
  talk.stop = new AbortController();
  try {
    const response = await ask("v1/chat/completions", {
      method: "POST", signal: talk.stop.signal,
      body: JSON.stringify({ model: $("model").value || undefined, messages: talk.messages, stream: true, stream_options: { include_usage: true } }),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of serverEvents(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) tokens = event.usage.completion_tokens;
      const delta = event.choices?.[0]?.delta ?? {};
      const reasoning = delta.reasoning_content ?? delta.reasoning;
      if (!reasoning && !delta.content) continue;
      if (!firstAt) { firstAt = performance.now(); bubble.replaceChildren(body); }
      if (reasoning) {
        if (!thought) { thought = el("div"); bubble.prepend(el("details", {}, el("summary", {}, "Reasoning"), thought)); }
        thought.append(reasoning);
      }
      text += delta.content ?? "";
      body.data = text;
      $("talk").scrollTop = $("talk").scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") { bubble.classList.add("wrong"); body.data = text + (text ? "\n" : "") + error.message; bubble.replaceChildren(body); }
  }
  if (!firstAt && bubble.textContent === "…") bubble.textContent = "(no text)";
  talk.stop = null;
  if (text) talk.messages.push({ role: "assistant", content: text });
  else talk.messages.pop();
  const rate = tokens > 1 ? ` · ${short((1000 * (tokens - 1)) / (performance.now() - firstAt))} tokens/s` : "";
  $("chat-rate").textContent = firstAt ? `first token ${duration(firstAt - started)}${rate}` : "";
}

async function submitQuestion() {
  if (talk.stop) { talk.stop.abort(); return; }
  const question = $("question").value.trim();
  if (!question) return;
  $("question").value = "";
  $("send").textContent = "Stop";
  await answer(question);
  $("send").textContent = "Send";
  refresh();
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); submitQuestion(); });
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !talk.stop) { event.preventDefault(); submitQuestion(); }
});
$("clear").addEventListener("click", () => {
  talk.stop?.abort();
  talk.messages = [];
  $("talk").replaceChildren();
  $("chat-rate").textContent = "";
});
