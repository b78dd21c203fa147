// The table of contents marks the section that is read.
document.documentElement.classList.add("scripted");

const contents = new Map(all("nav a").map((a) => [a.getAttribute("href").slice(1), a]));
if (contents.size && "IntersectionObserver" in window) {
  const inSight = new Set();
  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) inSight.add(target.id);
      else inSight.delete(target.id);
    }
    const first = [...contents.keys()].find((id) => inSight.has(id));
    for (const [id, a] of contents) {
      if (id === first) a.setAttribute("aria-current", "true");
      else a.removeAttribute("aria-current");
    }
  }, { rootMargin: "-20% 0px -60% 0px" });
  for (const id of contents.keys()) observer.observe(document.getElementById(id));
}
