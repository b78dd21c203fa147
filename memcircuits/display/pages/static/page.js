"use strict";
// The only script of our own in the page. Text from data reaches the document through textContent
// and attributes alone; the policy forbids assigning it as HTML.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const make = (tag, text = "", attributes = {}) => {
    const element = document.createElement(tag);
    element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };

  // Run `draw` when the element is about to be seen.
  const whenSeen = (element, draw) => {
    if (!("IntersectionObserver" in window)) return draw();
    const observer = new IntersectionObserver((entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      observer.disconnect();
      draw();
    }, { rootMargin: "200px" });
    observer.observe(element);
  };

  // ---- tables: sort by a heading, show one page of rows ----
  const key = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.v ?? cell.textContent;
  };

  const table = (box) => {
    const body = box.querySelector("tbody");
    const size = Number(box.dataset.pageSize);
    let rows = [...body.rows];
    let first = 0;

    const pager = make("div", "", { class: "pager" });
    const back = make("button", "Previous", { type: "button" });
    const next = make("button", "Next", { type: "button" });
    const where = make("span", "", { role: "status" });
    pager.append(back, next, where);
    if (rows.length > size) box.querySelector(".scroll").after(pager);

    const show = () => {
      rows.forEach((row, i) => { row.hidden = i < first || i >= first + size; });
      back.disabled = first === 0;
      next.disabled = first + size >= rows.length;
      const last = Math.min(first + size, rows.length);
      where.textContent = `${first + 1} to ${last} of ${rows.length} rows`;
    };
    back.addEventListener("click", () => { first = Math.max(0, first - size); show(); });
    next.addEventListener("click", () => { first += size; show(); });

    const headings = all("th", box);
    headings.forEach((heading, column) => heading.firstElementChild.addEventListener("click", () => {
      const numeric = heading.classList.contains("num");
      const was = heading.getAttribute("aria-sort");
      const falling = was ? was === "ascending" : numeric; // numbers: largest first
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const value = (text) => (numeric ? Number(text.replace(/,/g, "").replace("−", "-")) : text);
      rows = rows
        .map((row) => [key(row, column), row])
        .sort(([a], [b]) => {
          if (a === "" || b === "") return (a === "") - (b === ""); // what is missing comes last
          const order = numeric ? value(a) - value(b)
            : a.localeCompare(b, undefined, { numeric: true });
          return falling ? -order : order;
        })
        .map(([, row]) => row);
      body.append(...rows);
      first = 0;
      show();
    }));
    show();
  };
  all(".table").forEach(table);

  // ---- charts: tell a mark's value to those who cannot hover ----
  for (const chart of all(".chart")) {
    const tip = chart.querySelector(".tip");
    const tell = (event) => {
      const title = event.target.closest("g")?.querySelector(":scope > title");
      if (!title || !tip) return;
      tip.textContent = title.textContent;
      tip.classList.add("on");
    };
    chart.addEventListener("click", tell);
    chart.addEventListener("pointerover", tell);
  }

  // ---- attention ----
  const LEVELS = 20;

  // A thumbnail: one pixel for each query and key, the unseen future grey. Brightened by a square
  // root, since most attention is far below 1.
  const thumbnail = (canvas, rows, causal) => {
    const n = rows.length;
    canvas.width = canvas.height = n;
    const context = canvas.getContext("2d");
    const image = context.createImageData(n, n);
    for (let q = 0; q < n; q++) {
      for (let k = 0; k < n; k++) {
        const share = 1 - Math.sqrt((rows[q][k] ?? 0) / 1000);
        const pixel = causal && k > q ? [225, 225, 225] : [255 * share, 255 * share, 255];
        image.data.set([...pixel, 255], 4 * (q * n + k));
      }
    }
    context.putImageData(image, 0, 0);
  };

  const attention = (view) => {
    const data = JSON.parse(view.querySelector("script").textContent);
    const n = data.tokens.length;
    const thumbs = all(".thumbs button", view);
    const tokens = all(".token", view);
    const select = view.querySelector("select");
    const ends = all(".ramp b", view);
    const looks = view.querySelector(".looks");
    const listeners = [];
    const state = { head: 0, query: Math.min(data.prefix || n - 1, n - 1) };
    let chooseInZoom = null;

    const colour = () => {
      const row = data.patterns[state.head][state.query];
      const most = Math.max(...row, 1);
      const strip = data.strips[Number(select.value)];
      tokens.forEach((token, i) => {
        const level = strip ? strip.levels[i]
          : i > state.query && data.causal ? null : Math.round(LEVELS * (row[i] ?? 0) / most);
        token.className = `token ${level === null ? "none" : "s" + level}`;
        token.classList.toggle("chosen", i === state.query);
        token.tabIndex = i === state.query ? 0 : -1;
      });
      const scale = strip ? strip.scale : ["0", (most / 1000).toFixed(most < 10 ? 3 : 2)];
      ends.forEach((end, i) => { end.textContent = scale[i]; });

      const order = row.map((value, i) => [value, i]).sort((a, b) => b[0] - a[0]).slice(0, 5);
      const list = make("ol");
      for (const [value, i] of order.filter(([value]) => value > 0)) {
        const item = make("li");
        item.append(make("code", data.tokens[i]), ` (token ${i}): ${(value / 1000).toFixed(3)}`);
        list.append(item);
      }
      const told = make("p", `Under ${data.heads[state.head]}, token ${state.query} `);
      told.append(make("code", data.tokens[state.query]), " looks most at:");
      looks.replaceChildren(told, list);
    };

    const change = (head, query, told = false) => {
      const other = head !== state.head;
      Object.assign(state, { head, query });
      thumbs.forEach((thumb, i) => thumb.setAttribute("aria-pressed", String(i === head)));
      colour();
      if (other) chooseInZoom?.(head);
      if (!told) listeners.forEach((listener) => listener(data.heads[head], query));
    };

    thumbs.forEach((thumb, i) => {
      thumbnail(thumb.firstElementChild, data.patterns[i], data.causal);
      thumb.addEventListener("click", () => change(i, state.query));
    });
    const choose = (query) => {
      select.value = "-1";
      change(state.head, query);
    };
    tokens.forEach((token, i) => token.addEventListener("click", () => choose(i)));
    view.querySelector(".text").addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const query = state.query + step;
      if (!step || !event.target.classList.contains("token") || query < 0 || query >= n) return;
      event.preventDefault();
      choose(query);
      tokens[query].focus();
    });
    select.addEventListener("change", colour);
    colour();

    // CircuitsVis' AttentionHeads keeps the chosen head and draws it large below a selector, which
    // redraws every head at each mouse move. We call it for its state and its large view, and
    // let our thumbnails do the selector's work.
    const full = data.patterns.map((rows) => rows.map(
      (row) => Array.from({ length: n }, (_, k) => (row[k] ?? 0) / 1000)));
    const Zoom = (props) => {
      const drawn = CircuitsVis.AttentionHeads(props);
      const [, selector, zoomed] = drawn.props?.children ?? [];
      if (!selector?.props?.onClick || !zoomed) return drawn; // another version: all of it, then
      chooseInZoom = selector.props.onClick;
      return zoomed;
    };
    const place = view.querySelector(".cv");
    whenSeen(place, () => {
      place.replaceChildren();
      CircuitsVis.render(place.id, Zoom, {
        attention: full,
        attentionHeadNames: data.heads,
        tokens: data.tokens,
        minValue: 0,
        maxValue: 1,
        maskUpperTri: data.causal,
      });
      if (state.head) setTimeout(() => chooseInZoom?.(state.head), 0);
    });

    return {
      listen: (listener) => listeners.push(listener),
      follow: (name, query) => {
        const head = data.heads.indexOf(name);
        change(head < 0 ? state.head : head, Math.min(query, n - 1), true);
      },
    };
  };

  // Views side by side follow one another: same head, same token.
  for (const group of all(".views")) {
    whenSeen(group, () => {
      const views = all(".view", group).map(attention);
      for (const one of views) {
        one.listen((name, query) => views.forEach((v) => v !== one && v.follow(name, query)));
      }
    });
  }
})();
