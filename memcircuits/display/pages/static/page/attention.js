// Attention views: thumbnails of the heads, the paragraph's tokens, and CircuitsVis' large picture.
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

// Where a key moves to from one of the tokens, which fill lines as text does; null if nowhere.
const tokenStep = (tokens, from, key) => {
  if (key === "Home") return 0;
  if (key === "End") return tokens.length - 1;
  if (!ARROWS[key]) return null;
  const [down, right] = ARROWS[key];
  if (right) return tokens[from + right] ? from + right : null;
  const here = tokens[from].getBoundingClientRect();
  const far = (box) => Math.abs(box.left - here.left);
  let best = null;
  for (let i = from + down, line = null; i >= 0 && i < tokens.length; i += down) {
    const box = tokens[i].getBoundingClientRect();
    if (Math.abs(box.top - here.top) < here.height / 2) continue; // still the same line
    line ??= box.top;
    if (Math.abs(box.top - line) > here.height / 2) break; // already the line after the next
    if (best === null || far(box) < far(tokens[best].getBoundingClientRect())) best = i;
  }
  return best;
};

const moveByKeys = (text, tokens, current, choose) => text.addEventListener("keydown", (event) => {
  if (!event.target.classList.contains("token")) return;
  const to = tokenStep(tokens(), current(), event.key);
  if (to === null) return;
  event.preventDefault();
  tokens()[choose(to) ?? to].focus();
});

// The keys that a query attends to most, as a list.
const mostAttended = (entries, tokens) => {
  const list = make("ol");
  for (const [key, weight] of entries.filter((entry) => entry[1] > 0)) {
    const item = make("li");
    item.append(make("code", tokens[key]), ` (token ${key}): ${weight.toFixed(3)}`);
    list.append(item);
  }
  return list;
};

const attention = (view, group) => {
  const data = dataOf(view);
  const n = data.tokens.length;
  const thumbs = all(".thumbs button", view);
  const tokens = all(".token", view);
  const select = view.querySelector("select");
  const ends = all(".ramp b", view);
  const looks = view.querySelector(".looks");
  const caption = view.querySelector(".cv-title");
  const state = { head: 0, query: Math.max(0, Math.min(data.prefix || n, n) - 1) };
  let chooseInZoom = null;

  const row = () => data.patterns[state.head][state.query];

  const colour = () => {
    const most = Math.max(1, ...group.map((one) => one.most())); // one scale for views side by side
    const strip = data.strips[Number(select.value)];
    tokens.forEach((token, i) => {
      const level = strip ? strip.levels[i]
        : i > state.query && data.causal ? null : Math.round(LEVELS * (row()[i] ?? 0) / most);
      token.className = `token ${level === null ? "none" : "s" + level}`;
      token.classList.toggle("chosen", i === state.query);
      token.tabIndex = i === state.query ? 0 : -1;
    });
    const scale = strip ? strip.scale : ["0", (most / 1000).toFixed(most < 10 ? 3 : 2)];
    ends.forEach((end, i) => { end.textContent = scale[i]; });

    const told = make("p", `Under ${data.heads[state.head]}, the query token ${state.query} `);
    told.append(make("code", data.tokens[state.query]), " attends most to these keys:");
    const order = row().map((value, i) => [i, value / 1000]).sort((a, b) => b[1] - a[1]);
    looks.replaceChildren(told, mostAttended(order.slice(0, 5), data.tokens));
    caption.textContent = `${data.heads[state.head]}: a row is a query, a column a key`;
  };

  const set = (head, query) => {
    const other = head !== state.head;
    Object.assign(state, { head, query });
    thumbs.forEach((thumb, i) => thumb.setAttribute("aria-pressed", String(i === head)));
    if (other) chooseInZoom?.(head);
  };
  const change = (head, query) => {
    for (const one of group) one.follow(data.heads[head], query);
    for (const one of group) one.colour();
  };

  thumbs.forEach((thumb, i) => {
    thumbnail(thumb.firstElementChild, data.patterns[i], data.causal);
    thumb.addEventListener("click", () => change(i, state.query));
  });
  const chooseToken = (query) => {
    select.value = "-1";
    change(state.head, query);
  };
  tokens.forEach((token, i) => token.addEventListener("click", () => chooseToken(i)));
  moveByKeys(view.querySelector(".text"), () => tokens, () => state.query, chooseToken);
  select.value = "-1";
  select.addEventListener("change", colour);

  // CircuitsVis' AttentionHeads keeps the chosen head and draws it large below a selector, which
  // redraws every head at each mouse move. We call it for its state and its large view, and
  // let our thumbnails do the selector's work.
  const full = data.patterns.map((rows) => rows.map(
    (values) => Array.from({ length: n }, (_, k) => (values[k] ?? 0) / 1000)));
  const Zoom = (props) => {
    const drawn = CircuitsVis.AttentionHeads(props);
    const [, selector, zoomed] = drawn.props?.children ?? [];
    if (!selector?.props?.onClick || !zoomed) return drawn; // another version: all of it, then
    chooseInZoom = selector.props.onClick;
    return zoomed;
  };
  const place = view.querySelector(".cv");
  whenSeen(place, () => {
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
    most: () => Math.max(...row()),
    colour,
    follow: (name, query) => {
      const head = data.heads.indexOf(name);
      set(head < 0 ? state.head : head, Math.min(query, n - 1));
    },
  };
};

// Views side by side follow one another: same head, same token, same colours.
for (const box of all(".views")) {
  whenSeen(box, () => {
    const group = [];
    for (const view of all(".view", box)) group.push(attention(view, group));
    for (const one of group) one.colour();
  });
}
