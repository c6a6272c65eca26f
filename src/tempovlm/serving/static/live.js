// Draws the figures of the last minutes with uPlot.

const MINUTE = 60;
const HEIGHT = 190;
const at = (id) => document.getElementById(id);
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const sum = (values) => values.reduce((all, one) => all + one, 0);
const plots = new Map();
let last = null;

function axis(more) {
  const line = { stroke: color("grid"), width: 1 };
  return { stroke: color("muted"), font: `12px ${color("font")}`, grid: line, ticks: { show: false }, size: 26, gap: 4, ...more };
}

// Puts data into a plot, which is made at its first data.
function plot(id, options, data, spoken) {
  const place = at(id);
  place.setAttribute("aria-label", spoken);
  const known = plots.get(id);
  if (known) {
    known.setData(data);
    return;
  }
  const base = { width: place.clientWidth, height: HEIGHT, legend: { show: false }, cursor: { show: false } };
  plots.set(id, new uPlot({ ...base, padding: [8, 18, 0, 0], ...options }, data, place));
}

// Options of a plot over the last minutes.
function overTime(series, axisMore) {
  const minutes = (_, splits) => splits.map((s) => (s === 0 ? "now" : `−${-s / MINUTE} min`));
  return {
    scales: { x: { time: false, range: (u) => [u.data[0][0] - 3, 3] }, y: { range: (_, __, most) => [0, 1.05 * (most || 4)] } },
    axes: [axis({ splits: (u) => [-4, -3, -2, -1, 0].map((m) => m * MINUTE), values: minutes }), axis({ size: 40, ...axisMore })],
    series: [{}, ...series],
  };
}

const bars = (name) => ({
  fill: color(name), stroke: color(name), width: 0, points: { show: false }, paths: uPlot.paths.bars({ size: [0.85, 40] }),
});
const WHOLE = { incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000] };

function drawRequests(ago, requests) {
  // The highest of a pile comes first, and the others before it.
  const piled = [["met"], ["met", "no_budget"], ["met", "no_budget", "missed", "cut"], Object.keys(requests)].map((names) =>
    ago.map((_, i) => sum(names.map((name) => requests[name][i]))));
  const data = [ago, ...piled.reverse()];
  const series = ["reference", "bad", "faint", "good"].map(bars);
  plot("plot-requests", overTime(series, WHOLE), data, "requests by their end, in five seconds each; the text above has the sums");
}

function marks(low, high) {
  const found = [];
  for (let ten = 10 ** Math.floor(Math.log10(low)); ten <= high; ten *= 10) found.push(ten, 2 * ten, 5 * ten);
  return found.filter((one) => one >= low && one <= high);
}

function drawLatency({ budget_ms: budgets, total_ms: totals, deadline }) {
  if (!budgets.length) return;
  const order = budgets.map((_, i) => i).sort((a, b) => budgets[a] - budgets[b]);
  const values = [...budgets, ...totals];
  const [low, high] = [0.8 * Math.min(...values), 1.25 * Math.max(...values)];
  const met = (wanted) => [null, ...order.map((i) => ((deadline[i] === "met") === wanted ? totals[i] : null)), null];
  const x = [low, ...order.map((i) => budgets[i]), high];
  const range = (u, _, __, name) => {
    const line = u.data[3];
    return name === "x" ? [line[0], line[line.length - 1]] : [Math.min(...u.data[1].concat(u.data[2]).filter((v) => v !== null)) * 0.8, line[line.length - 1]];
  };
  const splits = (u, i) => marks(...(i === 0 ? [u.scales.x.min, u.scales.x.max] : [u.scales.y.min, u.scales.y.max]));
  const plain = { splits, filter: (_, all) => all, values: (_, all) => all.map(String) };
  const dots = (name) => ({
    stroke: color(name), paths: () => null, points: { show: true, size: 7, width: 0, stroke: color(name), fill: `${color(name)}99` },
  });
  const options = {
    scales: { x: { time: false, distr: 3, range }, y: { distr: 3, range } },
    axes: [axis(plain), axis({ size: 46, ...plain })],
    series: [{}, dots("good"), dots("bad"), { stroke: color("muted"), width: 1.5, points: { show: false }, spanGaps: true }],
  };
  plot("plot-latency", options, [x, met(true), met(false), x.map((one, i) => (i % (x.length - 1) ? null : one))], `latency of ${order.length} answers by their budgets`);
}

function drawSettings(settings) {
  const all = sum(Object.values(settings));
  const most = Math.max(...Object.values(settings));
  const items = Object.entries(settings).slice(0, 8).map(([name, count]) => {
    const item = document.createElement("li");
    const cells = ["span", "b", "span"].map((tag) => item.appendChild(document.createElement(tag)));
    cells[0].textContent = name;
    cells[1].style.width = `${(100 * count) / most}%`;
    cells[2].textContent = `${((100 * count) / all).toFixed(0)} %`;
    return item;
  });
  at("settings").replaceChildren(...items);
}

// Draws all, and returns it in a sentence.
export function draw(data) {
  last = data;
  const slots = data.waiting.length;
  const ago = data.waiting.map((_, i) => ((i + 1 - slots) * data.slot_ms) / 1000);
  const line = (name) => ({ stroke: color(name), width: 2, points: { show: false } });
  const step = { ...line("vision_encoder"), paths: uPlot.paths.stepped({ align: -1 }) };
  drawRequests(ago, data.requests);
  drawLatency(data.answers);
  plot("plot-waiting", overTime([step], WHOLE), [ago, data.waiting], `most that waited: ${Math.max(...data.waiting)}`);
  drawSettings(data.settings);
  if (data.price_per_ms.some((price) => price > 0)) {
    at("price").hidden = false;
    plot("plot-price", overTime([{ ...line("reference"), spanGaps: true }], { size: 60, values: (_, all) => all.map((one) => String(+one.toPrecision(3))) }), [ago, data.price_per_ms], "price of a millisecond");
  }
  return inWords(data);
}

function inWords(data) {
  const { met, no_budget: free, missed, cut, refused } = Object.fromEntries(Object.entries(data.requests).map(([name, all]) => [name, sum(all)]));
  const late = missed + cut;
  const share = met + late ? ` Of ${met + late} with a budget ${((100 * met) / (met + late)).toFixed(1)} % were on time.` : "";
  const now = data.is_ready ? `Now ${data.running} are answered and ${data.num_waiting} wait.` : "It takes no requests now.";
  const all = met + late + free;
  return `${all} ${all === 1 ? "answer" : "answers"}, ${refused} refused.${share} ${now}`;
}

function again() {
  for (const one of plots.values()) one.destroy();
  plots.clear();
  if (last) draw(last);
}

matchMedia("(prefers-color-scheme:dark)").addEventListener("change", again);
new ResizeObserver(() => {
  for (const [id, one] of plots) one.setSize({ width: at(id).clientWidth, height: HEIGHT });
}).observe(document.querySelector(".plots"));
