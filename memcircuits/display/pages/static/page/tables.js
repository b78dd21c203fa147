// Tables: search, filter, sort by a heading, show one page of rows, copy and download.
const MANY_ROWS = 8; // tables with fewer rows are read as they are
const MAX_CHOICES = 8; // of a filter

const keyOf = (cell) => cell.dataset.v ?? cell.textContent;

const tableView = (box) => {
  const body = box.querySelector("tbody");
  const size = Number(box.dataset.pageSize);
  const headings = all("th", box);
  const labels = headings.map((heading) => heading.textContent);
  const isNumeric = headings.map((heading) => heading.classList.contains("num"));
  let rows = [...body.rows];
  let shown = rows;
  let first = 0;

  const pager = make("div", "", { class: "pager" });
  const back = make("button", "Previous", { type: "button" });
  const next = make("button", "Next", { type: "button" });
  const where = make("span", "", { role: "status" });
  pager.append(back, next, where);
  if (rows.length > size) box.querySelector(".scroll").after(pager);

  const show = () => {
    const page = new Set(shown.slice(first, first + size));
    for (const row of rows) row.hidden = !page.has(row);
    back.disabled = first === 0;
    next.disabled = first + size >= shown.length;
    const last = Math.min(first + size, shown.length);
    where.textContent = shown.length ? `${first + 1} to ${last} of ${shown.length} rows` : "No rows";
  };
  back.addEventListener("click", () => { first = Math.max(0, first - size); show(); });
  next.addEventListener("click", () => { first += size; show(); });

  // ---- search and filters ----
  const tools = make("div", "", { class: "tools" });
  const conditions = [];
  const narrow = () => {
    shown = rows.filter((row) => conditions.every((holds) => holds(row)));
    first = 0;
    show();
  };
  const addSearch = () => {
    const input = make("input", "", { type: "search", placeholder: "Search" });
    input.setAttribute("aria-label", "Search the table");
    input.addEventListener("input", narrow);
    conditions.push((row) => row.textContent.toLowerCase().includes(input.value.trim().toLowerCase()));
    tools.append(input);
  };
  const addFilter = (column) => {
    const choices = [...new Set(rows.map((row) => row.cells[column].textContent))];
    if (choices.length < 2 || choices.length > MAX_CHOICES) return;
    const select = make("select", "", { "aria-label": labels[column] });
    select.append(make("option", `${labels[column]}: all`, { value: "" }));
    choices.sort().forEach((text) => select.append(make("option", text, { value: text })));
    select.addEventListener("change", narrow);
    conditions.push((row) => !select.value || row.cells[column].textContent === select.value);
    tools.append(select);
  };

  // ---- the rows that the search leaves, on all pages, as text ----
  // A spreadsheet would run a text that begins like a formula.
  const field = (text, column) => {
    const safe = !isNumeric[column] && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
    return /[",\n\r]/.test(safe) ? `"${safe.replace(/"/g, '""')}"` : safe;
  };
  const cells = () => shown.map((row) => [...row.cells].map(keyOf));
  const csv = () => [labels, ...cells()]
    .map((row) => row.map(field).join(",")).join("\r\n").concat("\r\n");
  const tsv = () => [labels, ...cells()]
    .map((row) => row.map((text) => text.replace(/[\t\r\n]/g, " ")).join("\t")).join("\n");
  const value = (text, column) => {
    if (!isNumeric[column]) return text;
    return text === "" ? null : Number(text);
  };
  const json = () => JSON.stringify(cells().map((row) => Object.fromEntries(
    row.map((text, column) => [labels[column], value(text, column)]))), null, 1);
  const addButton = (label, act) => {
    const button = make("button", label, { type: "button" });
    button.addEventListener("click", () => act(button));
    tools.append(button);
  };
  if (rows.length > MANY_ROWS) {
    addSearch();
    headings.forEach((_, column) => { if (!isNumeric[column]) addFilter(column); });
  }
  if (rows.length > 1) {
    const name = fileName(document.title, box.dataset.name);
    addButton("Copy", (button) => copy(button, tsv()));
    addButton("CSV", () => download(`${name}.csv`, "text/csv", csv()));
    addButton("JSON", () => download(`${name}.json`, "application/json", json()));
    box.prepend(tools);
  }

  // ---- sorting ----
  headings.forEach((heading, column) => heading.firstElementChild.addEventListener("click", () => {
    const was = heading.getAttribute("aria-sort");
    const falling = was ? was === "ascending" : isNumeric[column]; // numbers: largest first
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const number = (text) => Number(text.replace(/,/g, "").replace("−", "-"));
    rows = rows
      .map((row) => [keyOf(row.cells[column]), row])
      .sort(([a], [b]) => {
        if (a === "" || b === "") return (a === "") - (b === ""); // what is missing comes last
        const order = isNumeric[column] ? number(a) - number(b)
          : a.localeCompare(b, undefined, { numeric: true });
        return falling ? -order : order;
      })
      .map(([, row]) => row);
    body.append(...rows);
    narrow();
  }));
  addEventListener("beforeprint", () => { for (const row of rows) row.hidden = !shown.includes(row); });
  addEventListener("afterprint", show);
  show();
};
all(".table").forEach(tableView);
