"use strict";
// What every part of the page's script uses. Text from data reaches the document through textContent
// and attributes alone; the policy forbids assigning it as HTML.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

const make = (tag, text = "", attributes = {}) => {
  const element = document.createElement(tag);
  element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
};

const shape = (tag, attributes = {}, children = []) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};

const dataOf = (root) => JSON.parse(root.querySelector('script[type="application/json"]').textContent);

// Run `draw` once: when the element is about to be seen, or before the page is printed.
const whenSeen = (element, draw) => {
  let drawn = false;
  const once = () => {
    if (drawn) return;
    drawn = true;
    draw();
  };
  addEventListener("beforeprint", once);
  if (!("IntersectionObserver" in window)) return once();
  const observer = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    once();
  }, { rootMargin: "200px" });
  observer.observe(element);
};

// Hand text to the reader as a file.
const download = (name, type, text) => {
  const address = URL.createObjectURL(new Blob([text], { type }));
  make("a", "", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
};

const fileName = (...words) => words.join(" ").toLowerCase().replace(/[^a-z0-9]+/g, "-")
  .replace(/^-|-$/g, "").slice(0, 60);

// Copy text, and say for two seconds whether that was allowed (a notebook's frame forbids it).
const copy = async (button, text) => {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed here";
  }
  setTimeout(() => { button.textContent = label; }, 2000);
};

// The arrow that was pressed as a step in rows or columns, or null.
const ARROWS = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
