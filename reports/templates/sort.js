"use strict";
// A comfort only: without it every table stands in the order of the report.
for (const table of document.querySelectorAll("table")) {
  table.querySelectorAll("th").forEach((head, column) => {
    const sort = () => {
      const ascending = head.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const body = table.tBodies[0];
      const key = (row) => row.cells[column].dataset.value;
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === undefined && y === undefined) {
          return a.cells[column].textContent.localeCompare(b.cells[column].textContent);
        }
        // Missing figures stay last in both directions.
        if (x === undefined || y === undefined) return (x === undefined ? 1 : -1) * (ascending ? 1 : -1);
        return x - y;
      };
      const rows = [...body.rows].sort(compare);
      body.append(...(ascending ? rows : rows.reverse()));
    };
    head.tabIndex = 0;
    head.title = "Sort";
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); }
    });
  });
}
// A printed page shows what a click would.
let closed = [];
window.addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  closed.forEach((details) => { details.open = true; });
});
window.addEventListener("afterprint", () => closed.forEach((details) => { details.open = false; }));
