// Every text from the adapter goes in as text, never as markup: htm builds elements, not strings.
import { html, render, useEffect, useRef, useState } from "./preact-htm.js";

const KEPT = 300; // seconds of the chart
const stored = () => sessionStorage.getItem("key") || "";
const headers = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

async function post(key, path, body) {
  const reply = await fetch(path, {
    method: "POST", headers: headers(key), body: body && JSON.stringify(body),
  });
  if (!reply.ok) throw new Error((await reply.json()).error);
}

// Server-sent events by fetch: an EventSource cannot send a key.
async function follow(key, signal, tell) {
  const reply = await fetch("events", { headers: headers(key), cache: "no-store", signal });
  if (!reply.ok) throw Object.assign(new Error((await reply.json()).error), { status: reply.status });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the adapter stopped");
    const events = (text + value).split("\n\n");
    text = events.pop();
    for (const one of events) if (one.startsWith("data: ")) tell(JSON.parse(one.slice(6)));
  }
}

function useStatus(key) {
  const [seen, set] = useState({ status: null, problem: "connecting…", locked: false });
  useEffect(() => {
    const stop = new AbortController();
    const again = async () => {
      while (!stop.signal.aborted) {
        let locked = false;
        try {
          await follow(key, stop.signal, (status) => set({ status, problem: null, locked: false }));
        } catch (error) {
          if (stop.signal.aborted) return;
          locked = error.status === 401 || error.status === 403;
          const problem = error.status ? error.message : "the adapter does not answer";
          set((before) => ({ ...before, problem, locked }));
        }
        if (locked) return;
        await new Promise((resume) => setTimeout(resume, 1000));
      }
    };
    again();
    return () => stop.abort();
  }, [key]);
  return seen;
}

function Traffic({ status }) {
  const place = useRef(null);
  const chart = useRef(null);
  const points = useRef([[], []]);
  const requests = useRef(0);
  const [rate, setRate] = useState(0);
  requests.current = status.requests;
  useEffect(() => {
    const series = [{}, { label: "requests a second", stroke: "#0b6e69", width: 2, fill: "#0b6e6918" }];
    const size = () => ({ width: place.current.clientWidth, height: 160 });
    const ink = { stroke: "#5b6875", grid: { stroke: "#dfe5ea" } };
    chart.current = new uPlot({
      ...size(), series, legend: { show: false }, cursor: { show: false }, axes: [ink, ink],
      scales: { x: { range: () => [Date.now() / 1000 - KEPT, Date.now() / 1000] }, y: { range: (_, low, high) => [0, Math.max(1, high || 0)] } },
    }, [[], []], place.current);
    const watch = new ResizeObserver(() => chart.current.setSize(size()));
    watch.observe(place.current);
    return () => { watch.disconnect(); chart.current.destroy(); };
  }, []);
  useEffect(() => {
    // By the clock and not by events: of quiet times nothing is told.
    let last = { requests: requests.current, now: Date.now() / 1000 };
    const timer = setInterval(() => {
      const now = Date.now() / 1000;
      const measured = Math.max(0, requests.current - last.requests) / Math.max(now - last.now, 0.1);
      last = { requests: requests.current, now };
      points.current = [[...points.current[0], now], [...points.current[1], measured]];
      points.current = points.current.map((values) => values.slice(-KEPT));
      chart.current.setData(points.current);
      setRate(measured);
    }, 1000);
    return () => clearInterval(timer);
  }, []);
  return html`<section><h2>Traffic</h2>
    <p><strong>${rate.toFixed(1)}</strong> requests a second,
      ${" "}${status.requests} in all</p>
    <div class="chart" ref=${place}></div></section>`;
}

function Drift({ drift }) {
  if (!drift.length) {
    return html`<p class="soft">Drift: this release has no reference, or nobody asked yet.</p>`;
  }
  const row = (one) => html`<tr class=${one.alarm ? "alarm" : ""}><td>${one.name}</td>
    <td class="number">${one.psi.toFixed(3)}</td><td class="number">${one.ks.toFixed(3)}</td>
    <td class="number">${one.rows}</td></tr>`;
  return html`<table><thead><tr><th>Field</th><th class="number">PSI</th><th class="number">KS</th>
    <th class="number">Values</th></tr></thead><tbody>${drift.slice(0, 8).map(row)}</tbody></table>`;
}

function Model({ model, waiting, rollout, act }) {
  const measured = model.calibration;
  const name = encodeURIComponent(model.model);
  const back = () => confirm(`Serve version ${model.previous} of ${model.model} again?`)
    && act(`manage/models/${name}/roll-back`);
  const decide = (verb) => confirm(`${verb} version ${waiting} of ${model.model}?`)
    && act(`manage/models/${name}/${verb}`, { version: waiting });
  return html`<article id=${`model-${model.model}`}>
    <h2>${model.model} <small>version ${model.version}</small></h2>
    <p>${model.privacy}</p>
    ${measured.outcomes
      ? html`<p>${measured.outcomes} outcomes: Brier score ${measured.brier.toFixed(3)}, calibration
          error ${measured.ece.toFixed(3)}</p>`
      : html`<p class="soft">No outcomes were reported yet.</p>`}
    ${rollout && html`<p>Version ${rollout.version} is in stage ${rollout.stage}${
      rollout.reason ? `: ${rollout.reason}` : ""}</p>`}
    <${Drift} drift=${model.drift} />
    <p>${waiting && html`<button onClick=${() => decide("approve")}>Approve version ${waiting}</button>
        ${" "}<button onClick=${() => decide("decline")}>Decline version ${waiting}</button>${" "}`}
      ${model.previous !== null
        && html`<button onClick=${back}>Roll back to version ${model.previous}</button>`}</p>
  </article>`;
}

function alarmsOf(status) {
  const found = [...status.alarms];
  for (const [model, version] of Object.entries(status.waiting)) {
    found.push(`${model} version ${version} waits for approval`);
  }
  if (status.stale) found.push(`Stale: ${status.stale}`);
  for (const model of status.models) {
    for (const shift of model.drift.filter((one) => one.alarm)) {
      found.push(`Drift in ${shift.name} of ${model.model}: PSI ${shift.psi.toFixed(2)}`);
    }
  }
  return found;
}

function Page() {
  const [key, setKey] = useState(stored());
  const { status, problem, locked } = useStatus(key);
  const signIn = (event) => {
    event.preventDefault();
    const typed = event.target.elements.key.value.trim();
    sessionStorage.setItem("key", typed);
    setKey(typed);
  };
  const act = (path, body) => post(key, path, body).catch((error) => alert(error.message));
  const alarms = status ? alarmsOf(status) : [];
  const said = problem || (status.stale ? "serving, stale" : "serving");
  return html`<header><h1>Fedward adapter</h1><p id="state" role="status">${said}</p></header>
    <main>
    ${locked && html`<form onSubmit=${signIn}>
      <label for="key">API key of an operator or an auditor</label>
      <input id="key" name="key" type="password" autocomplete="off" required />
      <button>Open</button></form>`}
    ${alarms.length > 0 && html`<section id="alarms" aria-live="polite"><h2>Alarms</h2>
      <ul>${alarms.map((text) => html`<li>${text}</li>`)}</ul></section>`}
    ${status && html`<div id="models">${status.models.map((model) => html`<${Model} key=${model.model}
        model=${model} act=${act} waiting=${status.waiting[model.model]}
        rollout=${(status.rollout || {})[model.model]} />`)}</div>
      <${Traffic} status=${status} />
      <section><h2>Audit log</h2><p class="soft">Head, to be written down elsewhere:${" "}
        <code>${status.audit_head || "none"}</code></p></section>`}
    </main>`;
}

render(html`<${Page} />`, document.body);
