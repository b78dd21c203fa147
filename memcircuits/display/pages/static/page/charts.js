// Charts: tell a mark's value to those who cannot hover, walk through cells by arrows, save as SVG.
const SVG_PROPERTIES = ["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linejoin",
  "opacity", "fill-opacity", "font-family", "font-size", "text-anchor", "dominant-baseline"];

// A copy of a chart that looks the same outside of this page: its size in pixels, its styles inline.
const standalone = (svg) => {
  const clone = svg.cloneNode(true);
  const box = svg.getBoundingClientRect();
  clone.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  clone.setAttribute("width", Math.round(box.width));
  clone.setAttribute("height", Math.round(box.height));
  const copies = [clone, ...all("*", clone)];
  [svg, ...all("*", svg)].forEach((element, i) => {
    const style = getComputedStyle(element);
    for (const name of SVG_PROPERTIES) copies[i].setAttribute(name, style.getPropertyValue(name));
    copies[i].removeAttribute("class");
  });
  const ground = getComputedStyle(document.body).backgroundColor;
  clone.prepend(shape("rect", { width: "100%", height: "100%", fill: ground }));
  return new XMLSerializer().serializeToString(clone);
};

// Cells that lead somewhere are one tab stop: arrows move between them.
const walkThrough = (svg) => {
  const links = all("a[data-row]", svg);
  const at = new Map(links.map((a) => [`${a.dataset.row} ${a.dataset.col}`, a]));
  const focus = (from, to) => {
    from.tabIndex = -1;
    to.tabIndex = 0;
    to.focus({ preventScroll: false });
  };
  svg.addEventListener("keydown", (event) => {
    const cell = event.target.closest("a[data-row]");
    if (!cell) return;
    const row = Number(cell.dataset.row);
    const col = Number(cell.dataset.col);
    let to = null;
    if (event.key === "Home") to = at.get(`${row} 0`);
    else if (event.key === "End") to = links.filter((a) => Number(a.dataset.row) === row).at(-1);
    else if (ARROWS[event.key]) {
      const [down, right] = ARROWS[event.key];
      to = at.get(`${row - down} ${col + right}`); // row 0 is at the bottom
    }
    if (!to) return;
    event.preventDefault();
    focus(cell, to);
  });
};

for (const chart of all(".chart")) {
  const tip = chart.querySelector(".tip");
  const svg = chart.querySelector("svg.plot, svg.heatmap");
  const tell = (event) => {
    const title = event.target.closest("g, a")?.querySelector(":scope > title");
    if (!title || !tip) return;
    tip.textContent = title.textContent;
    tip.classList.add("on");
  };
  for (const kind of ["click", "pointerover", "focusin"]) chart.addEventListener(kind, tell);
  if (svg.querySelector("a[data-row]")) walkThrough(svg);
  const save = make("button", "SVG", { type: "button", class: "save" });
  save.setAttribute("aria-label", `Download ${svg.getAttribute("aria-label")} as SVG`);
  save.addEventListener("click", () => download(
    `${fileName(document.title, svg.getAttribute("aria-label"))}.svg`, "image/svg+xml", standalone(svg)));
  chart.querySelector("figcaption").append(save);
}
