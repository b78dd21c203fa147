"use strict";
// A graph of components: the edges of the chosen node, and as many edges as the slider says.
(() => {
  const graph = (box) => {
    const edges = [...box.querySelectorAll(".edge")];
    const nodes = [...box.querySelectorAll(".node[role=button]")];
    const controls = box.querySelector(".controls");
    const slider = controls.querySelector("input");
    let chosen = null;

    const show = () => {
      const count = Number(slider.value);
      controls.querySelector("output").textContent = slider.value;
      edges.forEach((edge) => {
        const { source, target, rank } = edge.dataset;
        const touches = chosen === null || source === chosen || target === chosen;
        edge.classList.toggle("away", !touches || Number(rank) > count);
      });
      nodes.forEach((node) => {
        node.setAttribute("aria-pressed", String(node.dataset.node === chosen));
      });
    };
    const choose = (node) => {
      chosen = chosen === node.dataset.node ? null : node.dataset.node;
      show();
    };

    nodes.forEach((node) => {
      node.addEventListener("click", () => choose(node));
      node.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        choose(node);
      });
    });
    slider.addEventListener("input", show);
    controls.querySelector("button").addEventListener("click", () => { chosen = null; show(); });
    controls.hidden = false;
    show();
  };
  document.querySelectorAll(".edge-graph").forEach(graph);
})();
