// The live connection to the server: one EventSource, told apart as connecting, live or lost.
// A server that sends `beat` events while nothing changes is known to be gone when it falls silent. After a loss we
// connect again ourselves and are sent everything anew, so whoever listens must take a view twice.

const SILENT_MS = 12000;
const RETRY_MS = [500, 1000, 2000, 4000, 8000];

/** Calls onView(view) with each change and onState("connecting" | "live" | "lost") as the connection changes. */
export function follow(address, onView, onState) {
  let source = null;
  let live = false;
  let failures = 0;
  let beats = false;
  let watchdog = 0;

  function heard() {
    clearTimeout(watchdog);
    if (beats) watchdog = setTimeout(lose, SILENT_MS);
    failures = 0;
    if (!live) onState("live");
    live = true;
  }

  function lose() {
    clearTimeout(watchdog);
    source.close();
    live = false;
    onState("lost");
    setTimeout(connect, RETRY_MS[Math.min(failures, RETRY_MS.length - 1)]);
    failures += 1;
  }

  function connect() {
    source = new EventSource(address);
    source.addEventListener("message", (event) => { heard(); onView(JSON.parse(event.data)); });
    source.addEventListener("beat", () => { beats = true; heard(); });
    source.addEventListener("error", lose);
    watchdog = setTimeout(lose, SILENT_MS); // the first view comes at once
  }

  onState("connecting");
  connect();
}

/** Shows the state of the connection in the bar. */
export function showLink(state) {
  const link = document.getElementById("link");
  link.dataset.state = state;
  link.textContent = { connecting: "connecting", live: "live", lost: "connection lost" }[state];
}
