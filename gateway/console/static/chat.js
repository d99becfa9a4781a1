// The chat: the answer as it leaves the gateway, and beside it the checks as they happen.

import { call, events, Failure } from "./api.js";
import { $, characters, checkRow, chip, code, h, notice } from "./dom.js";

const EXAMPLES = ["What is federated learning?", "Write a short note that thanks a colleague.", "Name three uses of a paper clip."];
const REMOVED = "[removed]"; // what the gateway puts in place of a redacted part
const LAST_CHECKS_MS = 1000; // how long to wait for what is told of the last checks, after the answer
const ENDINGS = { allow: "Answered", redact: "Answered, with parts removed", revise: "Answered, revised", refuse: "Blocked" };
let conversation = []; // the turns that go along with the next message
let running = null; // stops the request at work

/** One message, its answer, and what is known of its checks. */
class Turn {
  text = "";
  action = "allow";
  state = { held: 0, released: 0 };
  movedAt = performance.now(); // when something last left
  answer = h("p.answer");
  waiting = h("p.held", { hidden: true });
  meter = [h("i.out"), h("i.in")];
  sums = h("span.sums");
  checks = h("ol.plain", { tabIndex: 0, ariaLabel: "Checks" }); // it scrolls, so it can be reached by keyboard
  foot = h("footer.faint");

  constructor(prompt) {
    this.id = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
    const wide = matchMedia("(min-width: 52rem)").matches;
    const summary = h("summary", h("strong", "Checks"), h("span.meter", this.meter), this.sums);
    this.element = h(
      "article.turn",
      h("p.prompt", h("span.hush", "You: "), prompt),
      h("div.said", h("span.hush", "Answer: "), this.answer, this.waiting, this.foot),
      h("details.checks", { open: wide, ariaLive: "off" }, summary, this.checks),
    );
  }

  /** Show text that was released; once the gateway redacts, what stands for the removed parts is marked. */
  say(text) {
    this.text += text;
    const parts = this.action === "redact" ? text.split(REMOVED) : [text];
    this.answer.append(...parts.flatMap((part, i) => (i ? [h("mark", REMOVED), part] : [part])));
    keepInView();
  }

  /** Take one event about the request: new decisions, how much is held, how much has left. */
  watch({ held, released, decisions }) {
    if (released !== this.state.released) this.movedAt = performance.now();
    this.state = { held, released };
    this.checks.append(...decisions.map(checkRow));
    if (decisions.length) this.checks.scrollTop = this.checks.scrollHeight;
    this.measure();
    keepInView();
  }

  measure() {
    const { held, released } = this.state;
    this.meter.forEach((part, i) => (part.style.flexGrow = [released, held][i]));
    this.sums.textContent = `${characters(released)} released, ${held} held`;
    this.waiting.hidden = !held;
    const seconds = ((performance.now() - this.movedAt) / 1000).toFixed(1);
    this.waiting.textContent = `${characters(held)} held back, ${seconds} s since the last release`;
  }

  /** Take the gateway's note on what it did with the answer, which comes with its own words for a blocked one. */
  note({ decision = "refuse", reason }, text) {
    this.action = decision;
    this.reason = reason;
    if (decision === "refuse") this.foot.before(h("p.refusal", text || "The rest of the answer was blocked."));
    else this.say(text);
  }

  fail({ message, advice }) {
    const left = this.text && "What stands above was checked before it left. ";
    this.foot.before(h("div", { role: "alert" }, notice("bad", `${message}.`, `${left}${advice}`)));
  }

  end() {
    this.state = { held: 0, released: this.state.released || [...this.text].length };
    this.measure();
    const sha256 = this.about?.system_fingerprint; // of the adapter, or of the base model without one
    const model = this.about && [" · model ", code(this.about.model)];
    const weights = sha256 && [" · weights ", code(sha256.slice(0, 12))];
    this.foot.append(chip(this.action), ` ${this.reason ?? ""}`, h("div", "request ", code(this.id), model, weights));
    keepInView();
  }
}

/** Follow the checks of a request that is about to be sent; resolves when the gateway looks out for it. */
async function follow(turn, signal) {
  const stream = events(await call(`console/api/decisions/stream?request_id=${turn.id}`, { signal }));
  await stream.next();
  const all = async () => {
    for await (const data of stream) turn.watch(JSON.parse(data));
  };
  return { ended: all().catch(() => null) };
}

/** Send the conversation and show what leaves; throws a Failure when it does not come to its end. */
async function ask(turn, messages, signal) {
  const body = JSON.stringify({ model: $("#model").value, messages, stream: true });
  const headers = { "content-type": "application/json", "x-request-id": turn.id };
  const response = await call("v1/chat/completions", { method: "POST", headers, body, signal });
  turn.action = response.headers.get("x-fedward-decision");
  status("Answering. What is shown has been checked.");
  for await (const data of events(response)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Failure(503, event.error);
    turn.about = event;
    const text = event.choices[0]?.delta.content ?? "";
    if (event.fedward) turn.note(event.fedward, text);
    else turn.say(text);
  }
  throw new Failure(0, { message: "The answer broke off" });
}

async function send(prompt) {
  if (running) return;
  const turn = new Turn(prompt);
  const messages = [...conversation, { role: "user", content: prompt }];
  running = new AbortController();
  const { signal } = running;
  status("Sent. Waiting for the verdict on your message.");
  $("#welcome")?.remove();
  $("#log").append(turn.element);
  $("#prompt").focus(); // what was pressed may be gone now
  keepInView();
  const clock = setInterval(() => turn.measure(), 100);
  try {
    const checks = await follow(turn, signal).catch(() => null); // without it the answer comes all the same
    await ask(turn, messages, signal);
    await Promise.race([checks?.ended, new Promise((resolve) => setTimeout(resolve, LAST_CHECKS_MS))]);
    if (turn.action !== "refuse" && !signal.aborted) conversation = [...messages, { role: "assistant", content: turn.text }];
  } catch (error) {
    turn.action = error.name === "AbortError" ? "stopped" : "error";
    if (turn.action === "error") turn.fail(error);
  }
  clearInterval(clock);
  running.abort();
  running = null;
  turn.end();
  status(`${ENDINGS[turn.action] ?? "Ended early"}. ${characters(turn.state.released)} released.`);
}

/** Say how things stand, and offer what can be done now: to send, or to stop. */
function status(text) {
  $("#status").textContent = text;
  $("#log").ariaBusy = String(Boolean(running));
  $("#stop").hidden = !running;
  $("#send").disabled = Boolean(running);
}

/** Scroll along with what is added, unless the reader has scrolled away from the end. */
function keepInView() {
  const { scrollHeight } = document.documentElement;
  if (scrollY + innerHeight > scrollHeight - 400) scrollTo(0, scrollHeight);
}

/** Forget the conversation. */
function startAnew() {
  running?.abort();
  conversation = [];
  const example = (text) => h("li", h("button.quiet", { type: "button", onclick: () => send(text) }, text));
  $("#log").replaceChildren($("#welcome-text").content.cloneNode(true));
  $(".examples").append(...EXAMPLES.map(example));
}

/** Wire the chat up, with the models that may be asked for. */
export function startChat(models) {
  const [form, field] = [$("#composer"), $("#prompt")];
  $("#model").append(...models.map((name) => new Option(name)));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const prompt = field.value.trim();
    if (running || !prompt) return;
    field.value = "";
    send(prompt);
  });
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
  for (const [button, act] of Object.entries({ "#stop": () => running?.abort(), "#fresh": startAnew }))
    $(button).addEventListener("click", () => {
      act();
      field.focus();
    });
  startAnew();
}
