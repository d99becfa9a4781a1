// Building the page. Text only ever becomes text nodes: nothing that a model or a service says is read as markup.

export const $ = (selector, within = document) => within.querySelector(selector);

/** An element: its tag with classes ("p.faint"), perhaps an object of properties or attributes, then its children.
 * Strings become text; what is null or false is left out. */
export function h(name, ...content) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  element.classList.add(...classes);
  const properties = content[0]?.constructor === Object ? content.shift() : {};
  for (const [key, value] of Object.entries(properties)) key in element ? (element[key] = value) : element.setAttribute(key, value);
  element.append(...content.flat().filter((child) => child != null && child !== false));
  return element;
}

export const code = (text) => text && h("code", text);
export const card = (title, ...content) => h("section.card", h("h3", title), ...content);
export const notice = (kind, title, text) => h(`div.notice.${kind}`, h("strong", title), " ", h("span.lines", text));

/** A table with a header row; the first cell of each row names it. */
export function table(heads, rows) {
  const head = heads.map((text) => h("th", { scope: "col" }, text));
  const row = ([name, ...cells]) => h("tr", h("th", { scope: "row" }, name), ...cells.map((text) => h("td", text)));
  return h("table", h("thead", h("tr", head)), h("tbody", rows.map(row)));
}

/** Terms with what is said of them; terms without a value are left out. */
export function facts(pairs) {
  const told = Object.entries(pairs).filter(([, value]) => value != null && value !== "");
  const parts = told.flatMap(([term, value]) => [h("dt", term), h("dd", value)]);
  return h("dl", parts);
}

const ACTIONS = {
  allow: ["✓", "Allowed"],
  redact: ["▬", "Redacted", "Would redact"],
  revise: ["✎", "Revised", "Would revise"],
  refuse: ["✕", "Blocked", "Would block"],
  error: ["!", "Error"],
  stopped: ["■", "Stopped"],
};

/** What was done, as a sign and a word; colour only repeats it. */
export function chip(action, name) {
  const [sign, word] = ACTIONS[action] ?? ["•", action];
  return h(`span.chip.${action}`, h("span", { ariaHidden: "true" }, sign), ` ${name || word}`);
}

/** What was decided; in shadow mode, what would have been done. */
export const decided = ({ action, shadow }) => chip(action, shadow && ACTIONS[action][2]);

export const directions = { prompt: "Prompt", response: "Answer" };
export const characters = (number) => `${number.toLocaleString("en")} character${number === 1 ? "" : "s"}`;
export const ms = (value) => value != null && `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;

/** The names of the hazard categories by their ids; filled when a session begins. */
export const categories = {};
export const readable = (id) => (categories[id] ? `${categories[id]} (${id})` : id);

/** The highest score over decisions: overall, or of one category; null where there is none. */
function highest(decisions, category) {
  const verdicts = decisions.flatMap((decision) => decision.verdicts);
  const scores = verdicts.map((verdict) => (category ? verdict.categories[category] : verdict.score)).filter((score) => score != null);
  return scores.length ? Math.max(...scores) : null;
}

/** The categories that led to decisions, each with its highest score. */
export function named(decisions) {
  const ids = [...new Set(decisions.flatMap((decision) => decision.categories))];
  return ids.map((id) => `${readable(id)} ${highest(decisions, id)?.toFixed(2) ?? ""}`).join(", ");
}

/** One check: what was looked at, its score, how long it took, and what was decided. */
export function checkRow(decision) {
  const score = highest([decision]);
  const level = h("i");
  level.style.width = `${(score ?? 0) * 100}%`;
  const what = h("span", h("strong", directions[decision.direction]), ` ${characters(decision.characters)}`);
  const scored = h("span.score", h("span.bar", level), score == null ? "no score" : `score ${score.toFixed(2)}`);
  const reasons = h("span.named", named([decision]));
  return h(`li.check.${decision.action}`, h("div", what, decided(decision)), h("div.faint", scored, ms(decision.check_ms)), reasons);
}
