// A click on a head of a table with the class "heatmap" sorts its rows: numbers from the highest, names from a to z.
document.querySelectorAll("table.heatmap").forEach((table) => {
  table.querySelectorAll("th").forEach((head, column) => {
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    head.tabIndex = 0;
    head.addEventListener("keydown", (event) => event.key === "Enter" && head.click());
    head.addEventListener("click", () => {
      const body = table.tBodies[0];
      const flip = head.getAttribute("aria-sort") === "descending" ? -1 : 1;
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        return flip * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : y - x);
      });
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", flip === 1 ? "descending" : "ascending");
      body.append(...rows);
    });
  });
});
