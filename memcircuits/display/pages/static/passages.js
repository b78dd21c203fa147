"use strict";
// Passages: searched by words, filtered by kind, sorted, and shown some at a time.
(() => {
  const passages = (box) => {
    const list = box.querySelector(".list");
    const given = [...list.children];
    const size = Number(box.dataset.pageSize);
    const search = box.querySelector("input");
    const kind = box.querySelector(".kind");
    const order = box.querySelector(".order");
    const back = box.querySelector(".back");
    const next = box.querySelector(".next");
    const status = box.querySelector("[role=status]");
    const texts = new Map(given.map((one) => [one, one.textContent.toLowerCase()]));
    const name = (one) => one.querySelector("h3").textContent;
    const orders = {
      nll: (a, b) => Number(a.dataset.nll) - Number(b.dataset.nll),
      name: (a, b) => name(a).localeCompare(name(b), undefined, { numeric: true }),
    };
    let chosen = given;
    let first = 0;

    const show = () => {
      const shown = new Set(chosen.slice(first, first + size));
      given.forEach((one) => { one.hidden = !shown.has(one); });
      back.disabled = first === 0;
      next.disabled = first + size >= chosen.length;
      status.textContent = chosen.length === 0 ? "No passage has these words."
        : `${first + 1} to ${Math.min(first + size, chosen.length)} of ${chosen.length} passages`;
    };
    const choose = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      chosen = given.filter((one) => (!kind.value || one.dataset.kind === kind.value)
        && words.every((word) => texts.get(one).includes(word)));
      if (orders[order.value]) chosen = [...chosen].sort(orders[order.value]);
      list.append(...chosen);
      first = 0;
      show();
    };
    // A link to a passage, in the page or in its address, shows it whatever was chosen.
    const follow = () => {
      const target = given.find((one) => `#${one.id}` === location.hash);
      if (!target) return;
      if (!chosen.includes(target)) {
        search.value = kind.value = "";
        choose();
      }
      first = Math.floor(chosen.indexOf(target) / size) * size;
      show();
      target.scrollIntoView({ block: "start" });
    };

    search.addEventListener("input", choose);
    kind.addEventListener("change", choose);
    order.addEventListener("change", choose);
    back.addEventListener("click", () => { first -= size; show(); });
    next.addEventListener("click", () => { first += size; show(); });
    addEventListener("hashchange", follow);
    addEventListener("beforeprint", () => given.forEach((one) => { one.hidden = false; }));
    addEventListener("afterprint", show);
    box.querySelectorAll(".needs-script").forEach((part) => { part.hidden = false; });
    show();
    follow();
  };
  document.querySelectorAll(".passages").forEach(passages);
})();
