"use strict";
// Every text from the adapter goes in as text, never as markup.

const byId = (id) => document.getElementById(id);
const make = (tag, text, className) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
};

let key = sessionStorage.getItem("key") || "";
let last = null;
const rates = [];

async function ask(path, options = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const reply = await fetch(path, { ...options, headers, cache: "no-store" });
  const value = await reply.json();
  if (!reply.ok) throw Object.assign(new Error(value.error), { status: reply.status });
  return value;
}

function driftTable(drift) {
  if (!drift.length) return make("p", "Drift: this release has no reference, or nobody asked yet.", "soft");
  const table = make("table");
  const head = table.createTHead().insertRow();
  for (const name of ["Field", "PSI", "KS", "Values"]) {
    head.append(make("th", name, name === "Field" ? "" : "number"));
  }
  const body = table.createTBody();
  for (const shift of drift.slice(0, 8)) {
    const row = body.insertRow();
    if (shift.alarm) row.className = "alarm";
    row.append(make("td", shift.name));
    for (const value of [shift.psi.toFixed(3), shift.ks.toFixed(3), shift.rows]) {
      row.append(make("td", value, "number"));
    }
  }
  return table;
}

function modelCard(model) {
  const card = make("article");
  card.id = `model-${model.model}`;
  const title = make("h2", `${model.model} `);
  title.append(make("small", `version ${model.version}`));
  card.append(title, make("p", model.privacy));
  const measured = model.calibration;
  if (measured.outcomes) {
    card.append(make("p", `${measured.outcomes} outcomes: Brier score ${measured.brier.toFixed(3)}, `
      + `calibration error ${measured.ece.toFixed(3)}`));
  } else {
    card.append(make("p", "No outcomes were reported yet.", "soft"));
  }
  card.append(driftTable(model.drift));
  if (model.previous !== null) {
    const back = make("button", `Roll back to version ${model.previous}`);
    back.addEventListener("click", () => rollBack(model));
    const line = make("p");
    line.append(back);
    card.append(line);
  }
  return card;
}

async function rollBack(model) {
  if (!confirm(`Serve version ${model.previous} of ${model.model} instead of ${model.version}?`)) return;
  try {
    await ask(`manage/models/${encodeURIComponent(model.model)}/roll-back`, { method: "POST" });
  } catch (error) {
    alert(error.message);
  }
}

function showAlarms(status) {
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
  byId("alarms").hidden = !found.length;
  byId("alarms").querySelector("ul").replaceChildren(...found.map((text) => make("li", text)));
}

function showTraffic(status) {
  const now = performance.now() / 1000;
  if (last) rates.push((status.requests - last.requests) / (now - last.now));
  last = { requests: status.requests, now };
  while (rates.length > 120) rates.shift();
  const most = Math.max(1, ...rates);
  const points = rates.map((rate, i) => `${(i * 600) / 119},${78 - (rate / most) * 74}`);
  byId("traffic").querySelector("polyline").setAttribute("points", points.join(" "));
  byId("rate").textContent = (rates.at(-1) || 0).toFixed(1);
  byId("total").textContent = status.requests;
}

function show(status) {
  byId("sign-in").hidden = true;
  byId("state").textContent = status.stale ? "serving, stale" : "serving";
  byId("models").replaceChildren(...status.models.map(modelCard));
  byId("head").textContent = status.audit_head || "none";
  showAlarms(status);
  showTraffic(status);
}

async function look() {
  try {
    show(await ask("status"));
  } catch (error) {
    byId("sign-in").hidden = error.status !== 401 && error.status !== 403;
    byId("state").textContent = error.status ? error.message : "the adapter does not answer";
  }
  setTimeout(look, 1000);
}

byId("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  key = byId("key").value.trim();
  sessionStorage.setItem("key", key);
});
look();
