"use strict";
const body = document.body;
const memory = {  // of a page that reloads itself
  get(place) { try { return sessionStorage.getItem(`${location.pathname} ${place}`); } catch { return null; } },
  set(place, value) { try { sessionStorage.setItem(`${location.pathname} ${place}`, value); } catch { /* not kept, then */ } },
};

function sort(table, column, descending) {
  const heads = [...table.tHead.rows[0].cells];
  const key = (row) => {
    const cell = row.cells[column];
    const value = cell.dataset.value ?? cell.textContent.trim();
    return value !== "" && !isNaN(value) ? Number(value) : value;
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
  rows.sort((a, b) => (descending ? compare(b[0], a[0]) : compare(a[0], b[0])));
  table.tBodies[0].append(...rows.map((row) => row[1]));
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", descending ? "descending" : "ascending");
}

for (const table of document.querySelectorAll("table.sortable")) {
  const place = `sort ${table.id}`;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.querySelector("button")?.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      sort(table, column, descending);
      memory.set(place, JSON.stringify([column, descending]));
    });
  });
  const kept = JSON.parse(memory.get(place));
  if (kept?.[0] < table.tHead.rows[0].cells.length) sort(table, ...kept);
}

const SVG = "http://www.w3.org/2000/svg";
for (const chart of document.querySelectorAll("svg[data-chart]")) {
  const data = JSON.parse(chart.dataset.chart);
  const legend = chart.closest("figure").querySelector(".legend");
  const asItWas = legend.innerHTML;
  const rule = document.createElementNS(SVG, "path");
  rule.setAttribute("class", "rule");
  const spots = data.curves.map((curve) => {
    const spot = document.createElementNS(SVG, "circle");
    spot.setAttribute("class", `dot ${curve.kind}`);
    return spot;
  });
  chart.append(rule, ...spots);
  let at = -1;
  const show = (n) => {
    at = n;
    rule.setAttribute("d", n < 0 ? "" : `M${data.x[n]} 12V210`);
    data.curves.forEach((curve, one) => {
      const seen = n >= 0 && curve.y[n] !== null;
      for (const [key, value] of Object.entries({ cx: data.x[n], cy: curve.y[n], r: 4.5 })) {
        spots[one].setAttribute(key, seen ? value : 0);
      }
    });
    if (n < 0) { legend.innerHTML = asItWas; return; }
    legend.textContent = "";
    const add = (name, text, kind) => {
      const span = document.createElement("span"), value = document.createElement("b");
      if (kind) span.append(Object.assign(document.createElement("i"), { className: kind }));
      value.textContent = text;
      span.append(name, " ", value);
      legend.append(span);
    };
    add("epoch", data.epochs[n]);
    for (const curve of data.curves) if (curve.text[n] !== null) add(curve.name, curve.text[n], curve.kind);
  };
  const nearest = (event) => {
    const box = chart.getBoundingClientRect();
    const x = ((event.clientX - box.left) * 520) / box.width;
    return data.x.reduce((best, value, n) => (Math.abs(value - x) < Math.abs(data.x[best] - x) ? n : best), 0);
  };
  chart.addEventListener("pointermove", (event) => show(nearest(event)));
  chart.addEventListener("pointerleave", () => show(-1));
  chart.addEventListener("blur", () => show(-1));
  chart.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    show(Math.min(data.x.length - 1, Math.max(0, at < 0 ? (step > 0 ? 0 : data.x.length - 1) : at + step)));
  });
}

const viewer = document.getElementById("viewer");
for (const button of document.querySelectorAll("button.cell")) {
  button.addEventListener("click", () => {
    const kept = document.getElementById("rest");
    const figures = [...document.querySelectorAll(".gallery figure"), ...kept.content.querySelectorAll("figure")];
    const wanted = figures.filter((figure) => figure.dataset.cell === button.dataset.cell && !viewer.contains(figure));
    wanted.sort((a, b) => b.dataset.sure - a.dataset.sure);
    viewer.querySelector("h3").textContent = button.title;
    viewer.querySelector(".note").textContent =
      wanted.length < Number(button.textContent) ? `${wanted.length} of ${button.textContent.trim()} are kept here.` : "";
    viewer.querySelector(".gallery").replaceChildren(...wanted.map((figure) => figure.cloneNode(true)));
    viewer.showModal();
  });
}
viewer?.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });

for (const button of document.querySelectorAll("button.copy")) {
  button.hidden = !navigator.clipboard;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.previousElementSibling.textContent);
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });
}

for (const note of document.querySelectorAll("[data-since]")) {
  const minutes = Math.floor((Date.now() / 1000 - Number(note.dataset.since)) / 60);
  if (minutes > 0) note.textContent = minutes < 120 ? `${minutes} min old` : `${Math.floor(minutes / 60)} h old`;
}

for (const details of document.querySelectorAll("details")) {
  const place = `open ${details.querySelector("summary").firstChild.textContent.trim()}`;
  const kept = memory.get(place);
  if (kept) details.open = kept === "yes";
  details.addEventListener("toggle", () => memory.set(place, details.open ? "yes" : "no"));
}

if (body.dataset.live) {
  const silent = () => Date.now() / 1000 - Number(body.dataset.written) > Number(body.dataset.patience);
  document.getElementById("silent").hidden = !silent();
  setInterval(() => {
    if (document.visibilityState === "visible" && !viewer?.open) location.reload();
  }, 1000 * Number(body.dataset.reload));
}
