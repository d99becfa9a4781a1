// The frame: who is signed in, which view is shown, and what is refreshed while it is.

import { get, hasKey, storeKey } from "./api.js";
import { startChat } from "./chat.js";
import { $, categories, notice } from "./dom.js";
import { startViews, views } from "./views.js";

const REFRESH_MS = 3000;
let signedIn = false;

/** Show the view that the address names, or the sign-in form while nobody is signed in. */
function show() {
  const wanted = location.hash.slice(1);
  const name = !signedIn ? "sign-in" : wanted in views ? wanted : "chat";
  for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== name;
  for (const link of document.querySelectorAll("nav a")) link.ariaCurrent = link.hash === `#${name}` ? "page" : null;
  const title = $(`#${name}-title`);
  document.title = `${title.textContent} · Fedward console`;
  refresh();
  return title;
}

/** Bring what is shown up to date; what fails is told above it. */
async function refresh() {
  if (!signedIn || document.hidden) return;
  try {
    tell(await get("session"));
    await views[$("main > section:not([hidden])").id]();
    $("#trouble").hidden = true;
  } catch (failure) {
    $("#trouble").hidden = false;
    $("#trouble").replaceChildren(notice("bad", `${failure.message}.`, failure.advice));
  }
}

/** Say who is signed in, and loudly where nothing is enforced. */
function tell({ tenant, key_name, auth, shadow }) {
  $("#who span").textContent = `Tenant ${tenant}${key_name ? `, key ${key_name}` : ""}`;
  $("#who button").hidden = auth === "none";
  $("#shadow").hidden = !shadow.length;
  $("#shadow").textContent = `Shadow mode: for tenant ${tenant} nothing is blocked on ${shadow.join(", ")}. Decisions are only recorded.`;
}

/** Begin a session with the stored key; without a valid one show the sign-in form. Returns the title of what is shown. */
async function begin() {
  try {
    const session = await get("session");
    Object.assign(categories, session.categories);
    startChat(session.models);
    startViews(refresh);
    $("#who").hidden = $("nav").hidden = false;
    signedIn = true;
  } catch (failure) {
    $("#key-error").textContent = hasKey() || failure.status !== 401 ? `${failure.message}. ${failure.advice}` : "";
    storeKey(null);
  }
  return show();
}

/** Forget the key, and all that this page has shown. */
function signOut() {
  storeKey(null);
  location.reload();
}

$("#sign-in form").addEventListener("submit", async (event) => {
  event.preventDefault();
  storeKey($("#key").value.trim());
  const title = await begin();
  (signedIn ? title : $("#key")).focus();
});
$("#who button").addEventListener("click", signOut);
$(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  $("#main").focus();
});
document.addEventListener("signed-out", () => signedIn && signOut());
document.addEventListener("visibilitychange", refresh);
window.addEventListener("hashchange", () => show().focus());
setInterval(refresh, REFRESH_MS);
await begin();
