// The explorer: a link to the name of a component (#L0H5) opens it; #L0H5/3/57 also chooses the
// paragraph and the query.
const STEPS = 20; // of the colour scale

const bytesOf = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));

// The attention of a head on a paragraph: for each query, pairs of key and weight.
const unpacked = ({ attention: text }, nTokens, nQueries) => {
  const bytes = bytesOf(text);
  const wide = nTokens > 256;
  const nKeys = bytes.length / nQueries / (wide ? 3 : 2);
  const total = nQueries * nKeys;
  const key = (i) => (wide ? bytes[2 * i] + 256 * bytes[2 * i + 1] : bytes[i]);
  const weight = (i) => bytes[(wide ? 2 * total : total) + i] / 250;
  return Array.from({ length: nQueries }, (_, query) => Array.from({ length: nKeys }, (__, place) => {
    const i = query * nKeys + place;
    return [key(i), weight(i)];
  }));
};

const explorer = (box) => {
  const data = dataOf(box);
  const part = (name) => box.querySelector(`.${name}`);
  const state = { index: 0, paragraph: 0, query: data.firstQuery };
  const links = new Map();
  for (const a of all('main a[href^="#"]')) {
    const name = a.getAttribute("href").slice(1);
    if (data.names.includes(name)) links.set(name, [...(links.get(name) ?? []), a]);
  }
  let tokens = [];
  let attentionRows = [];

  const entry = () => data.components[state.index];
  const shownParagraph = () => data.paragraphs[state.paragraph];
  const nQueries = () => shownParagraph().tokens.length - data.firstQuery - 1;

  const drawFacts = () => {
    part("facts-of").replaceChildren(...entry().facts.map(([label, text]) => {
      const row = make("div");
      const value = make("dd");
      value.append(make("strong", text));
      row.append(make("dt", label), value);
      return row;
    }));
    part("rank").textContent = `rank ${state.index + 1} of ${data.names.length}`;
    part("name").selectedIndex = state.index;
    part("back").disabled = state.index === 0;
    part("next").disabled = state.index === data.names.length - 1;
  };

  const drawCharts = () => {
    const { estimates, effects, topTokens } = entry();
    part("estimates").replaceChildren(...intervalRows(estimates, data.units));
    if (estimates.length === 1 && data.few) part("estimates").append(make("p", data.few, { class: "note" }));
    const dots = effectDots(effects, data.losses, data.units);
    part("effects").replaceChildren(...(dots ?? [make("p", "Not in this ranking.", { class: "note" })]));
    part("bars-of").replaceChildren(...(topTokens.length ? tokenBars(topTokens)
      : [make("p", "Not measured for this component.", { class: "note" })]));
  };

  const drawPattern = () => {
    const canvas = part("pattern");
    const n = shownParagraph().tokens.length;
    canvas.width = n;
    canvas.height = nQueries();
    const context = canvas.getContext("2d");
    const image = context.createImageData(n, nQueries());
    for (let i = 0; i < image.data.length; i += 4) image.data.set([255, 255, 255, 255], i);
    attentionRows.forEach((row, query) => row.forEach(([key, weight]) => {
      const light = 255 * (1 - Math.sqrt(weight));
      image.data.set([light, light, 255, 255], 4 * (query * n + key));
    }));
    context.putImageData(image, 0, 0);
  };

  const colour = () => {
    const packed = entry().onParagraphs[state.paragraph];
    const query = state.query - data.firstQuery;
    const byWrites = part("by").value === "writes" && packed.writes;
    const values = new Map();
    let most = 0.004;
    if (byWrites) {
      // What is written at a position counts for the token after it.
      new Int8Array(bytesOf(packed.writes).buffer).forEach((step, i) => {
        values.set(data.firstQuery + i + 1, Math.max(0, step / 127 * packed.largest));
      });
      most = packed.largest;
    } else {
      for (const [key, weight] of attentionRows[query]) values.set(key, weight);
      most = Math.max(most, ...values.values());
    }
    tokens.forEach((token, i) => {
      const value = values.get(i) ?? 0;
      const open = byWrites ? values.has(i) : i <= state.query;
      token.className = `token ${open ? `s${Math.round(STEPS * value / most)}` : "none"}`;
      token.classList.toggle("chosen", i === state.query);
      token.tabIndex = i === state.query ? 0 : -1;
    });
    part("attention-of").querySelectorAll(".ramp b")[1].textContent = digits(most);
    const told = make("p", `Under ${data.names[state.index]}, the query token ${state.query} `);
    told.append(make("code", shownParagraph().tokens[state.query]), " attends most to these keys:");
    part("looks").replaceChildren(told, mostAttended(attentionRows[query], shownParagraph().tokens));
  };

  const setQuery = (query) => {
    const last = data.firstQuery + nQueries() - 1;
    state.query = Math.max(data.firstQuery, Math.min(query, last));
    colour();
    return state.query;
  };

  // The address leads back here. A notebook's frame has none that could be written.
  const remember = (method = "replaceState") => {
    const hash = `#${data.names[state.index]}/${state.paragraph}/${state.query}`;
    try {
      history[method](null, "", hash);
    } catch { /* the page works without an address */ }
  };

  const chooseQuery = (query) => {
    const place = setQuery(query);
    remember();
    return place;
  };

  const drawTokens = () => {
    tokens = shownParagraph().tokens.map((text, i) => {
      const token = make("button", text, { type: "button", title: `token ${i}` });
      token.addEventListener("click", () => chooseQuery(i));
      return token;
    });
    part("prefix").replaceChildren(...tokens.slice(0, data.firstQuery + 1));
    part("continuation").replaceChildren(...tokens.slice(data.firstQuery + 1));
  };

  const drawAttention = () => {
    const known = entry().onParagraphs;
    part("attention-of").classList.toggle("empty", !known.length);
    part("attention-of").classList.toggle("attends-not", !entry().attends);
    part("missing").textContent = known.length < data.paragraphs.length ? data.missing : "";
    if (!known.length) return;
    state.paragraph = Math.min(state.paragraph, known.length - 1);
    part("paragraph").replaceChildren(
      ...known.map((_, i) => make("option", data.paragraphs[i].name, { value: i })));
    part("paragraph").value = state.paragraph;
    attentionRows = unpacked(known[state.paragraph], shownParagraph().tokens.length, nQueries());
    drawTokens();
    drawPattern();
    setQuery(state.query);
  };

  const mark = (name, isChosen) => {
    for (const a of links.get(name) ?? []) {
      if (isChosen) a.setAttribute("aria-current", "true");
      else a.removeAttribute("aria-current");
      a.closest("tr")?.classList.toggle("chosen", isChosen);
    }
  };

  const show = () => {
    const { top, bottom } = box.getBoundingClientRect();
    if (top > innerHeight * 0.75 || bottom < innerHeight * 0.25) {
      box.closest("section").scrollIntoView({ block: "start" });
    }
  };

  const open = (index) => {
    mark(data.names[state.index], false);
    state.index = index;
    mark(data.names[index], true);
    drawFacts();
    drawCharts();
    drawAttention();
  };
  const choose = (index) => {
    open(index);
    remember("pushState");
    show();
  };

  // Permalinks: a name, a paragraph and a query, of which the last two may be absent or wrong.
  const openAddress = () => {
    const [name, paragraph, query] = location.hash.slice(1).split("/");
    const index = data.names.indexOf(name);
    if (index < 0) return false;
    const last = Math.max(0, data.paragraphs.length - 1);
    if (paragraph) state.paragraph = Math.min(Math.max(0, parseInt(paragraph, 10) || 0), last);
    if (query) state.query = parseInt(query, 10) || data.firstQuery;
    open(index);
    box.closest("section").scrollIntoView({ block: "start" });
    return true;
  };

  document.addEventListener("click", (event) => {
    const name = event.target.closest?.('a[href^="#"]')?.getAttribute("href").slice(1);
    const index = data.names.indexOf(name);
    if (index < 0) return;
    event.preventDefault();
    choose(index);
  });
  addEventListener("popstate", () => openAddress() || open(0));
  part("name").addEventListener("change", (event) => choose(event.target.selectedIndex));
  part("back").addEventListener("click", () => choose(state.index - 1));
  part("next").addEventListener("click", () => choose(state.index + 1));
  part("link").addEventListener("click", (event) => copy(event.target, location.href));
  part("paragraph").addEventListener("change", (event) => {
    state.paragraph = Number(event.target.value);
    drawAttention();
    remember();
  });
  part("by").addEventListener("change", colour);
  part("pattern").addEventListener("click", (event) => {
    const { top, height } = part("pattern").getBoundingClientRect();
    chooseQuery(data.firstQuery + Math.floor((event.clientY - top) / height * nQueries()));
  });
  moveByKeys(part("text"), () => tokens, () => state.query, chooseQuery);
  if (!openAddress()) open(0);
};
all(".explorer").forEach(explorer);
