// The views beside the chat: recent decisions, the policy in force, release and health.

import { get } from "./api.js";
import * as dom from "./dom.js";

const { $, card, characters, chip, code, directions, facts, h, notice, readable } = dom;
const FILTERS = { "": "all", allow: "allowed", redact: "redacted", revise: "revised", refuse: "blocked", error: "error" };
const loaded = new Map(); // the records with their rows, by id
let next = null; // the cursor of the records before them

function recordRow(record) {
  const at = new Date(record.at);
  const shadowed = record.decisions.find((decision) => decision.shadow);
  const summary = h(
    "summary",
    h("time", { dateTime: record.at, title: at.toLocaleString() }, at.toLocaleTimeString()),
    h("span", chip(record.action), shadowed && [" ", dom.decided(shadowed)]),
    h("span.named", dom.named(record.decisions) || record.error),
    h("span.faint", `${characters(record.released_characters)} released`),
    h("span.faint", dom.ms(record.latency_ms)),
  );
  const about = facts({
    Request: code(record.request_id),
    Route: `${record.route} (${record.protocol})`,
    Key: record.key_name,
    Error: record.error,
    Repairs: record.repairs?.map(({ action, outcome }) => `${action}: ${outcome}`).join(", "),
    Model: record.model,
    Adapter: code(record.adapter_sha256),
    Policy: code(record.policy_sha256),
    Constitution: code(record.constitution_sha256),
    Classifier: record.classifier_id,
  });
  return h("li", h("details.card.record", summary, h("ol.plain", record.decisions.map(dom.checkRow)), about));
}

function addRecords(records, place) {
  const fresh = records.filter(({ id }) => !loaded.has(id)).map((record) => ({ record, row: recordRow(record) }));
  for (const entry of fresh) loaded.set(entry.record.id, entry);
  $("#records")[place](...fresh.map(({ row }) => row));
  filter();
}

function filter() {
  const [action, category] = [$("#by-action").value, $("#by-category").value];
  let found = 0;
  for (const { record, row } of loaded.values()) {
    const ofCategory = !category || record.decisions.some((decision) => decision.categories.includes(category));
    row.hidden = !ofCategory || (action && record.action !== action);
    found += !row.hidden;
  }
  $("#found").textContent = loaded.size ? `${found} of ${loaded.size} loaded` : "No request has been recorded yet.";
  $("#older").hidden = !next;
}

async function decisions() {
  if (loaded.size && !$("#live").checked) return;
  const page = await get("decisions");
  if (!loaded.size) next = page.next;
  addRecords(page.records, "prepend");
}

async function older() {
  const page = await get(`decisions?before=${next}`);
  next = page.next;
  addRecords(page.records, "append");
}

function direction(title, part) {
  const own = ([id, { threshold, action }]) => [readable(id), threshold ?? "as overall", action ?? part.action];
  const overall = ["Overall", part.threshold ?? "the classifier's own", part.action];
  return card(title, dom.table(["Category", "From score", "Action"], [overall, ...Object.entries(part.categories).map(own)]));
}

async function policy() {
  const { routes, amiss, from_file } = await get("policy");
  const picker = $("#route");
  if (!picker.options.length) picker.append(...Object.keys(routes).map((name) => new Option(name)));
  const now = routes[picker.value];
  const general = facts({
    Mode: now.shadow ? chip("refuse", "Shadow: nothing is blocked") : chip("allow", "Enforced"),
    Source: from_file ? "policy file" : "the gateway's settings",
    sha256: code(now.sha256),
    Models: now.models.join(", "),
    "System prompt": now.system_prompt_characters ? `${characters(now.system_prompt_characters)}, not shown` : "none",
    "Check deadline": `${now.check_deadline_ms} ms, then 503`,
    "Stream unit": `${now.stream.unit}, at most ${now.stream.max_characters} characters, or a pause of ${now.stream.idle_ms} ms`,
  });
  const warning = amiss ? [notice("bad", "The newest policy file is not in force.", amiss)] : [];
  const parts = h("div.columns", direction("Prompts", now.prompt), direction("Answers", now.response));
  $("#in-force").replaceChildren(...warning, card("In general", general), parts);
}

function service(title, { error, about }, told) {
  const state = chip(error ? "refuse" : "allow", error ? "Does not answer" : "Answers");
  const more = about ? facts(told(about)) : h(error ? "p.error" : "p.faint", error ?? "It does not tell what it runs.");
  return card(title, state, more);
}

async function health() {
  const { not_ready, services, served_model, amiss, counters } = await get("health");
  const early = counters.released_before_verdict[0].count;
  const records = Object.fromEntries(counters.audit_records.map(({ result, count }) => [result, count]));
  const verdict = early
    ? "They were stopped on the way. This is a bug: report it."
    : "Since the gateway's start. Anything else would be a bug.";
  const number = h(early ? "p.number.error" : "p.number.good", String(early));
  const tripwire = card("Characters that were about to leave before their verdict", number, h("p.faint", verdict));
  const model = service("Model", services.inference, (release) => ({
    "Served name": served_model,
    Adapter: release.adapter ?? "none: the base model",
    sha256: code(release.sha256),
    Canary: release.canary && `${release.canary.adapter}, ${release.canary.percent} % of requests`,
  }));
  const above = (threshold) => threshold?.toFixed(3) ?? "its own";
  const classifier = service("Classifier", services.safety, (info) => ({
    Model: info.model_id,
    Tier: info.tier,
    Thresholds: `prompts ${above(info.threshold)}, answers ${above(info.response_threshold ?? info.threshold)}`,
    "Operating point": info.operating_point,
    sha256: code(info.sha256),
  }));
  const checks = counters.checks.map((check) => [directions[check.direction], check.outcome, String(check.count)]);
  const since = card(
    "Since the start, all tenants",
    dom.table(["Checked", "Outcome", "Times"], checks),
    facts({
      "Generations stopped": String(counters.generations_stopped[0].count),
      "Audit records": ["written", "kept", "refused"].map((result) => `${records[result] ?? 0} ${result}`).join(", "),
    }),
  );
  $("#state").replaceChildren(
    not_ready ? notice("bad", "Not ready.", not_ready) : notice("good", "Ready.", "Requests are served."),
    ...Object.entries(amiss).map(([name, why]) => notice("warn", `Of the ${name}:`, why)),
    h("div.columns", tripwire, model, classifier, since),
  );
}

/** Each view by its name, as a function that brings it up to date. */
export const views = { chat() {}, decisions, policy, health };

/** Wire the views up; some of what is picked needs a refresh. */
export function startViews(refresh) {
  $("#by-action").append(...Object.entries(FILTERS).map(([value, name]) => new Option(name, value)));
  $("#by-category").append(new Option("all", ""), ...Object.keys(dom.categories).map((id) => new Option(readable(id), id)));
  for (const picker of ["#by-action", "#by-category"]) $(picker).addEventListener("change", filter);
  for (const picker of ["#route", "#live"]) $(picker).addEventListener("change", refresh);
  $("#older").addEventListener("click", () => older().catch(refresh));
}
