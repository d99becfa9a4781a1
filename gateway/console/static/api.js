// Talking to the gateway. The key stays in this tab's session storage and leaves only in the Authorization header.

const KEY = "fedward-key";
export const hasKey = () => sessionStorage.getItem(KEY) !== null;
export const storeKey = (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY));

/** What went wrong, in the gateway's words, and what the user can do about it. */
export class Failure extends Error {
  constructor(status, detail = {}, retryAfter = null) {
    super(detail.message ?? `The gateway answered HTTP ${status}`);
    this.status = status;
    this.advice = advice(status, detail.code, retryAfter);
  }
}

function advice(status, code, retryAfter) {
  const again = retryAfter ? `Try again in ${retryAfter} s.` : "Try again.";
  if (status === 0) return "Check that it runs and that this machine can reach it.";
  if (status === 401) return "Sign in with a valid key.";
  if (status === 429) return `A limit is reached, nothing was sent to the model. ${again}`;
  if (status === 503 || code === "upstream_unavailable")
    return `Without a verdict nothing is released. ${again} If it stays so, look at Health.`;
  if (status >= 500) return "The gateway's log has the details, under the request id.";
  return "Change the request.";
}

/** Ask the gateway; throws a Failure unless it answers well. A 401 also tells the page that nobody is signed in. */
export async function call(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Failure(0, { message: "The gateway cannot be reached" });
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const failure = new Failure(response.status, body.error, response.headers.get("retry-after"));
  if (response.status === 401) document.dispatchEvent(new Event("signed-out"));
  throw failure;
}

export const get = async (path) => (await call(`console/api/${path}`)).json();

/** The data of a response's server-sent events. The gateway writes each as one line. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Failure(0, { message: "The connection broke off" });
    });
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
  }
}
