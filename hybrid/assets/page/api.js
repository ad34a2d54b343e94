// What the server is asked. The key lies in sessionStorage, which ends with the tab.

const KEY = "hybrid.key";

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function getKey() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function setKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

function headers() {
  const key = getKey();
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function failure(response) {
  let message = `the server answered ${response.status}`;
  try {
    const error = (await response.json()).error;
    message = error?.message ?? message;
  } catch {
    // no JSON: the status says enough
  }
  return new ApiError(response.status, message);
}

/** JSON of a path. Throws ApiError, or TypeError where nobody answers. */
export async function get(path) {
  const response = await fetch(path, { headers: headers(), cache: "no-store" });
  if (!response.ok) throw await failure(response);
  return response.json();
}

/** As `get`, whatever the status is. */
export async function getState() {
  return (await fetch("/ready", { cache: "no-store" })).json();
}

/** The chunks of an answer, as OpenAI's API streams them. */
export async function* streamChat(body, signal) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json", ...headers() },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await failure(response);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(500, chunk.error.message ?? "the answer ended by an error");
    yield chunk;
  }
  throw new ApiError(500, "the connection ended before the answer did");
}

/** The data of server-sent events, each of one line; comments are left out. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
