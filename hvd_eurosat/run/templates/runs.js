const runs = JSON.parse(document.getElementById("runs-data").textContent);
const [one, other] = ["one", "other"].map((id) => document.getElementById(id));

function compare() {
  const rows = runs.keys
    .map((key) => [key, runs.configs[one.value][key] ?? "none", runs.configs[other.value][key] ?? "none"])
    .filter(([, a, b]) => a !== b);
  const table = document.getElementById("differences");
  table.tHead.rows[0].cells[1].textContent = one.selectedOptions[0].textContent;
  table.tHead.rows[0].cells[2].textContent = other.selectedOptions[0].textContent;
  table.tBodies[0].replaceChildren(...rows.map((values) => {
    const row = document.createElement("tr");
    values.forEach((value, n) => {
      const cell = row.insertCell();
      cell.className = n ? "text" : "";
      cell.append(Object.assign(document.createElement("code"), { textContent: value }));
    });
    return row;
  }));
  table.hidden = rows.length === 0;
  document.getElementById("same").hidden = rows.length > 0;
}
if (one) {
  for (const select of [one, other]) select.addEventListener("change", compare);
  compare();
}
