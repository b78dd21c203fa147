"use strict";
// A long text: chunks near the screen are coloured by the chosen measure, the others are plain text.
// Text is only ever moved between text nodes.
(() => {
  const LEVELS = 20;

  const level = (value, { low, high }) => (value === null ? null
    : Math.round(LEVELS * Math.min(1, Math.max(0, (value - low) / (high - low)))));
  const shade = (value, measure) => {
    const step = level(value, measure);
    return step ? `s${step}` : "";
  };
  const power = (value) => `1e${String(value).replace("-", "−")}`;
  const told = (value, { unit, low, high }) => {
    if (value === null) return "–";
    if (unit === "share") return value.toFixed(2);
    if (unit === "count") return `${value} of ${high}`;
    if (value <= low) return `at most ${power(low)}`;
    return value > -2.5 ? (10 ** value).toFixed(3) : power(value.toFixed(1));
  };

  const documentView = (view) => {
    const data = JSON.parse(view.querySelector("script").textContent);
    const chunks = [...view.querySelectorAll(".chunk")];
    const strip = view.querySelector(".overview svg");
    const bars = [...strip.querySelectorAll("a rect:not(.passage)")];
    const links = [...strip.querySelectorAll("a")];
    const here = strip.querySelector(".here");
    const select = view.querySelector("select");
    const ends = [...view.querySelectorAll(".ramp b")];
    const tip = view.querySelector(".tip");
    const plain = chunks.map(() => null); // the nodes of a chunk without its colours
    const seen = new Set();
    let measure = 0;

    // One element per stretch with values, in the chunk's own text.
    const colour = (index) => {
      const chunk = chunks[index];
      const anchors = new Set([...chunk.querySelectorAll("mark[id]")].map((mark) => mark.id));
      const characters = Array.from(chunk.textContent);
      const pieces = document.createDocumentFragment();
      let place = 0;
      for (const [length, passage, ...values] of data.chunks[index]) {
        const text = characters.slice(place, place + length).join("");
        place += length;
        const piece = document.createElement(passage ? "mark" : "span");
        piece.textContent = text;
        piece.className = shade(values[measure], data.measures[measure]);
        if (passage && anchors.delete(`p${passage}`)) piece.id = `p${passage}`;
        piece.dataset.tip = data.measures
          .map((one, i) => `${one.name}: ${told(values[i], one)}`).join("; ");
        pieces.append(piece);
      }
      plain[index] ??= [...chunk.childNodes];
      chunk.replaceChildren(pieces);
    };
    const clear = (index) => {
      if (plain[index]) chunks[index].replaceChildren(...plain[index]);
      plain[index] = null;
    };

    const near = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        const index = chunks.indexOf(target);
        if (isIntersecting) colour(index);
        else clear(index);
      }
    }, { rootMargin: "1500px" });
    const onScreen = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        const index = chunks.indexOf(target);
        if (isIntersecting) seen.add(index);
        else seen.delete(index);
      }
      const bins = [...seen].flatMap((index) => [...links[index].querySelectorAll("rect")]);
      const places = bins.map((bin) => Number(bin.getAttribute("x")));
      const first = places.length ? Math.min(...places) : 0;
      here.setAttribute("x", first);
      here.setAttribute("width", places.length ? Math.max(...places) - first + 1 : 0);
    });
    chunks.forEach((chunk) => { near.observe(chunk); onScreen.observe(chunk); });

    const choose = () => {
      measure = Number(select.value);
      const { low, high, unit } = data.measures[measure];
      ends[0].textContent = unit === "log10" ? power(low) : String(low);
      ends[1].textContent = unit === "log10" ? String(10 ** high) : String(high);
      data.bins.forEach((bin, i) => {
        const step = bin[1 + measure];
        bars[i].setAttribute("class", step === null ? "none" : `s${step}`);
      });
      plain.forEach((nodes, index) => { if (nodes) { clear(index); colour(index); } });
    };
    select.addEventListener("change", choose);
    choose();

    const tell = (event) => {
      const text = event.target.dataset?.tip;
      if (!text) return;
      tip.textContent = text;
      tip.classList.add("on");
    };
    const text = view.querySelector(".chunks");
    text.addEventListener("pointerover", tell);
    text.addEventListener("click", tell);

    // From passage to passage, also by keyboard.
    const passages = [...view.querySelectorAll(".chunks mark[id]")].map((mark) => mark.id);
    let current = -1;
    const go = (step) => {
      current = (current + step + passages.length) % passages.length;
      show(passages[current]);
    };
    const show = (id) => {
      const target = document.getElementById(id);
      if (!target) return;
      target.scrollIntoView({ block: "center" });
      // Chunks that were not laid out yet may have had other heights than was guessed.
      requestAnimationFrame(() => document.getElementById(id)?.scrollIntoView({ block: "center" }));
    };
    const [back, next] = [view.querySelector(".back"), view.querySelector(".next")];
    back.disabled = next.disabled = !passages.length;
    back.addEventListener("click", () => go(current < 0 ? 0 : -1));
    next.addEventListener("click", () => go(1));
    addEventListener("click", (event) => {
      const id = event.target.closest?.("a")?.getAttribute("href")?.slice(1);
      if (!id || !(passages.includes(id) || /^c\d+$/.test(id))) return;
      event.preventDefault();
      current = passages.includes(id) ? passages.indexOf(id) : current;
      show(id);
    });
  };
  document.querySelectorAll(".document").forEach(documentView);
})();
