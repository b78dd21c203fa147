// The charts of the explorer: rows with an interval, bars, and one dot for each paragraph.
const digits = (value) => {
  if (value === null) return "–";
  const size = Math.abs(value);
  const text = size !== 0 && size < 0.001 ? value.toExponential(1) : value.toFixed(size < 10 ? 3 : 1);
  return text.replaceAll("-", "−");
};

// The text of a round number at an axis.
const tickText = (value) => String(value).replaceAll("-", "−");

// Round numbers that cover a range, in steps of 1, 2 or 5 times a power of ten.
const roundSteps = (low, high, count = 4) => {
  const span = high > low ? high - low : 1;
  const power = 10 ** Math.floor(Math.log10(span / count));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= span / count * 0.999);
  const first = Math.floor(low / step + 1e-9);
  const last = Math.ceil((low + span) / step - 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(6)));
};

const scaleOf = (values, from, to) => {
  const steps = roundSteps(Math.min(...values), Math.max(...values));
  const [low, high] = [steps[0], steps.at(-1)];
  return { steps, place: (value) => from + (to - from) * (value - low) / (high - low) };
};

// One row for each estimate: its label, a dot in its interval, its numbers.
const intervalRows = (estimates, units) => {
  const values = estimates.flatMap(([, ...numbers]) => numbers.filter((value) => value !== null));
  const { place } = scaleOf([0, ...values], 2, 98);
  const zero = `${place(0)}%`;
  return estimates.map(([label, value, low, high]) => {
    const row = make("div", "", { class: "interval" });
    const marks = [shape("line", { x1: zero, x2: zero, y1: 0, y2: 22, class: "zero" })];
    const known = low !== null && high !== null;
    if (known) {
      const ends = { x1: `${place(low)}%`, x2: `${place(high)}%`, y1: 11, y2: 11 };
      marks.push(shape("line", { ...ends, class: "whisker" }));
    }
    if (value !== null) marks.push(shape("circle", { cx: `${place(value)}%`, cy: 11, r: 4.5, class: "dot" }));
    row.append(
      make("span", label),
      shape("svg", { width: "100%", height: 22, class: "c0", "aria-hidden": "true" }, marks),
      make("span", `${digits(value)}${known ? ` [${digits(low)}, ${digits(high)}]` : ""} ${units}`),
    );
    return row;
  });
};

const tokenBars = (entries) => {
  const largest = Math.max(...entries.map(([, value]) => Math.abs(value)), 1e-9);
  return entries.map(([token, value]) => {
    const row = make("div", "", { class: "interval" });
    const bar = shape("rect", { width: `${100 * Math.abs(value) / largest}%`, height: 14, y: 4, class: "bar0" });
    row.append(make("code", token),
      shape("svg", { width: "100%", height: 22, class: "c0", "aria-hidden": "true" }, [bar]),
      make("span", digits(value)));
    return row;
  });
};

// Effect against the loss of the whole model, memorized paragraphs beside controls.
const effectDots = (effects, losses, units) => {
  const sets = Object.keys(effects).filter((name) => effects[name].length === losses[name]?.length);
  const points = sets.flatMap((name, series) => effects[name]
    .map((effect, i) => ({ name, series, effect, loss: losses[name][i] }))
    .filter(({ effect, loss }) => effect !== null && loss !== null));
  if (!points.length) return null;
  const across = scaleOf([0, ...points.map((point) => point.loss)], 52, 470);
  const up = scaleOf([0, ...points.map((point) => point.effect)], 222, 26);
  const label = `effect (${units}) against the loss of the whole model (${units})`;
  const svg = shape("svg", { viewBox: "0 0 480 264", class: "plot", role: "img", "aria-label": label });
  const write = (text, attributes) => {
    const element = shape("text", attributes);
    element.textContent = text;
    svg.append(element);
  };
  for (const step of up.steps) {
    const y = up.place(step);
    svg.append(shape("line", { x1: 52, x2: 470, y1: y, y2: y, class: step === 0 ? "zero" : "grid" }));
    write(tickText(step), { x: 46, y, "text-anchor": "end", "dominant-baseline": "central" });
  }
  for (const step of across.steps) write(tickText(step), { x: across.place(step), y: 239, "text-anchor": "middle" });
  write(`effect (${units})`, { x: 4, y: 13, class: "axis" });
  write(`loss of the whole model (${units})`, { x: 261, y: 258, "text-anchor": "middle", class: "axis" });
  for (const { name, series, effect, loss } of points) {
    const [x, y] = [across.place(loss), up.place(effect)];
    const dot = series ? shape("rect", { x: x - 3, y: y - 3, width: 6, height: 6 })
      : shape("circle", { cx: x, cy: y, r: 3.4 });
    const title = shape("title");
    title.textContent = `${name}: effect ${digits(effect)}, loss ${digits(loss)}`;
    svg.append(shape("g", { class: `c${series} dot` }, [title, dot]));
  }
  const legend = make("p", "", { class: "legend" });
  sets.forEach((name, series) => {
    const mark = series ? shape("rect", { x: 3, y: 3, width: 6, height: 6 }) : shape("circle", { cx: 6, cy: 6, r: 3.4 });
    const key = make("span", "", { class: `c${series}` });
    key.append(shape("svg", { width: 14, height: 12, class: "dot", "aria-hidden": "true" }, [mark]), ` ${name}`);
    legend.append(key);
  });
  return [legend, svg];
};
