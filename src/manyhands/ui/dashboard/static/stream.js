// The live connection to the server: one EventSource, told apart as connecting, live or lost.
// The server sends a beat every few seconds, so a connection that is silent is known to be dead; we then connect
// again ourselves, with the position to go on from in the address.

const SILENT_MS = 12000;
const RETRY_MS = [500, 1000, 2000, 4000, 8000];

/** Calls onView(view) with each change and onState("connecting" | "live" | "lost") as the connection changes. */
export function follow(address, onView, onState) {
  let source = null;
  let failures = 0;
  let watchdog = 0;

  function heard() {
    clearTimeout(watchdog);
    watchdog = setTimeout(lose, SILENT_MS);
    if (failures !== -1) { failures = -1; onState("live"); }
  }

  function lose() {
    clearTimeout(watchdog);
    if (source) source.close();
    source = null;
    failures = Math.max(failures, 0);
    onState("lost");
    setTimeout(connect, RETRY_MS[Math.min(failures, RETRY_MS.length - 1)]);
    failures += 1;
  }

  function connect() {
    source = new EventSource(address());
    watchdog = setTimeout(lose, SILENT_MS);
    source.addEventListener("view", (event) => { heard(); onView(JSON.parse(event.data)); });
    source.addEventListener("beat", heard);
    source.addEventListener("error", lose);
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
