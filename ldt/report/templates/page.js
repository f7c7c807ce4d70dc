// A click on a heading sorts its table: numbers by value, what was not measured last.
function compare(a, b) {
  const empty = (a === "" || a === "nan") - (b === "" || b === "nan");
  if (empty) return { last: empty };
  const difference = Number(a) - Number(b);
  return { order: Number.isNaN(difference) ? a.localeCompare(b, "en", { numeric: true }) : difference };
}

for (const heading of document.querySelectorAll("table.sortable th")) {
  heading.querySelector("button").addEventListener("click", () => {
    const column = heading.cellIndex, body = heading.closest("table").tBodies[0];
    const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const key = (row) => row.cells[column].dataset.sort;
    const rows = [...body.rows].sort((a, b) => {
      const found = compare(key(a), key(b));
      return found.last ?? sign * found.order;
    });
    for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    body.append(...rows);
  });
}

const large = document.getElementById("large");
for (const button of document.querySelectorAll(".picture button")) {
  button.addEventListener("click", () => {
    large.querySelector("img").src = button.querySelector("img").src;
    large.showModal();
  });
}
large.addEventListener("click", () => large.close());
