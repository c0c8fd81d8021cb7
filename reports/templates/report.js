"use strict";
// Comforts only: without them every table stands in the order of the report, and every figure's
// values in the table behind it. Names are set as text, never as markup.
const make = (tag, properties) => Object.assign(document.createElement(tag), properties);
const tip = document.getElementById("tip");
const said = document.getElementById("said");
const lead = (cell) => cell.firstChild ? cell.firstChild.textContent : "";
const part = (cell, name) => cell.querySelector(`.${name}`)?.textContent ?? "";

// Sorting: figures by value, missing ones last in both directions, anything else as text.
function sort(table, column, ascending) {
  const body = table.tBodies[0];
  const value = (row) => row.cells[column].dataset.value;
  const ordered = [...body.rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === undefined && y === undefined) {
      const order = a.cells[column].textContent.localeCompare(b.cells[column].textContent, "en", { numeric: true });
      return ascending ? order : -order;
    }
    if (x === undefined || y === undefined) return x === undefined ? 1 : -1;
    return ascending ? x - y : y - x;
  });
  body.append(...ordered);
}

function csv(table) {
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...table.tBodies[0].rows].filter((row) => !row.hidden);
  const columns = heads.flatMap((head, index) => {
    const has = (name) => rows.some((row) => part(row.cells[index], name));
    const name = head.textContent;
    return [
      [name, (row) => row.cells[index].dataset.value ?? lead(row.cells[index])],
      ...["interval", "reason"].filter(has).map((extra) => [`${name}, ${extra}`, (row) => part(row.cells[index], extra)]),
    ];
  });
  const quote = (text) => /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  const lines = [columns.map(([name]) => name), ...rows.map((row) => columns.map(([, read]) => read(row)))];
  return lines.map((line) => line.map(quote).join(",")).join("\n") + "\n";
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = make("textarea", { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

function equip(details) {
  const table = details.querySelector("table");
  const caption = details.querySelector("summary").textContent;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = make("button", { type: "button", textContent: head.textContent });
    button.addEventListener("click", () => {
      const ascending = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      sort(table, column, ascending);
    });
    head.replaceChildren(button);
  });
  const tools = make("div", { className: "tools" });
  if (table.tBodies[0].rows.length > 8) {
    const filter = make("input", { type: "search", placeholder: "Filter rows" });
    filter.setAttribute("aria-label", `Filter rows of ${caption}`);
    filter.addEventListener("input", () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of table.tBodies[0].rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        shown += !row.hidden;
      }
      said.textContent = `${shown} rows`;
    });
    tools.append(filter);
  }
  const button = make("button", { type: "button", className: "copy", textContent: "Copy as CSV" });
  button.setAttribute("aria-label", `Copy as CSV: ${caption}`);
  button.addEventListener("click", async () => {
    await copy(csv(table));
    button.textContent = said.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy as CSV"; }, 1500);
  });
  tools.append(button);
  details.querySelector(".scroll").before(tools);
}
for (const details of document.querySelectorAll("details.table")) equip(details);

// Pointing at a mark, by mouse, finger or arrow keys, shows its row of the table behind.
let current = null;
function leave() {
  current?.classList.remove("current");
  current = null;
  tip.hidden = true;
}
function show(mark) {
  if (mark === current) return;
  leave();
  const table = mark.closest("figure").querySelector("table");
  const row = table.querySelector(`tr[data-row="${mark.dataset.row}"]`);
  if (!row) return;
  current = mark;
  mark.classList.add("current");
  const heads = [...table.tHead.rows[0].cells];
  const lines = heads.map((head, index) => [head.textContent, row.cells[index].textContent]);
  tip.replaceChildren(...lines.map(([name, value]) => {
    const line = make("div", {});
    line.append(make("span", { textContent: name }), make("b", { textContent: value }));
    return line;
  }));
  tip.hidden = false;
  const box = mark.getBoundingClientRect();
  const [width, height] = [tip.offsetWidth, tip.offsetHeight];
  const left = Math.min(Math.max(8, box.x + box.width / 2 - width / 2), innerWidth - width - 8);
  const above = box.y - height - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 8 ? above : Math.min(box.bottom + 8, innerHeight - height - 8)}px`;
}
for (const chart of document.querySelectorAll(".chart")) {
  const touch = (event) => {
    const mark = event.target.closest("[data-row]");
    if (mark) show(mark); else leave();
  };
  chart.addEventListener("pointermove", touch);
  chart.addEventListener("pointerdown", touch);
  chart.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") leave(); });
  chart.addEventListener("blur", leave);
  chart.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") leave();
    if (!step) return;
    event.preventDefault();
    const marks = [...chart.querySelectorAll("[data-row]")];
    const next = marks[(marks.indexOf(current) + step + marks.length) % marks.length];
    if (next) { show(next); said.textContent = tip.innerText; }
  });
}
addEventListener("scroll", leave, { passive: true });

// A printed page shows the tables that are not behind a figure, as a click would.
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details.table:not([open], .behind)")];
  closed.forEach((details) => { details.open = true; });
});
addEventListener("afterprint", () => closed.forEach((details) => { details.open = false; }));
document.documentElement.dataset.ready = "yes";
