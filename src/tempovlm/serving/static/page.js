// Asks the server, and shows its answers; live.js draws the server itself.
import { draw } from "./live.js";

const MOST_PX = 1600; // a larger picture is made smaller here, since its way and its opening cost budget
const MOST_ROWS = 5;
const REST_MS = 200; // the budget is asked at once it has rested so long
const LIVE_MS = 2000;
const at = (id) => document.getElementById(id);
const wait = (ms) => new Promise((done) => setTimeout(done, ms));

let key = ""; // in memory alone
let units = {};
let picture = null; // a data URL
let ends = null; // the slider's ends in milliseconds
let running = null; // aborts the request that runs
const rows = []; // the newest first, all about one question
let rowsAbout = "";

// Returns the parsed reply, an error's too, and asks for the key where it is missing or wrong.
async function call(path, options = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const reply = await fetch(path, { ...options, headers: { ...headers, ...options.headers } });
  at("key-form").hidden = reply.status !== 401;
  at("key-note").textContent = reply.status === 401 && key ? "That is not a key of this server." : "";
  return { status: reply.status, body: await reply.json() };
}

function make(tag, name, text) {
  const found = document.createElement(tag);
  found.className = name ?? "";
  found.textContent = text ?? "";
  return found;
}

// The budget: a slider with a logarithmic scale, from less than fits to more than is needed.

function budgetMs() {
  const [low, high] = ends ?? [20, 2000];
  const exact = low * (high / low) ** (at("budget").value / 100);
  const step = 10 ** Math.max(0, Math.floor(Math.log10(exact)) - 1);
  return Math.round(exact / step) * step;
}

function showBudget() {
  const text = `${budgetMs()} ms`;
  at("budget-shown").textContent = text;
  at("budget").setAttribute("aria-valuetext", text);
}

// Makes the slider reach from `low` to `high`; what it reached stays within its reach, and the budget as it is.
function stretch(low, high) {
  const budget = budgetMs();
  const wider = ends ? [Math.min(low, ends[0]), Math.max(high, ends[1])] : [low, high];
  if (ends?.every((end, i) => end === wider[i])) return;
  if (ends) at("budget").value = (100 * Math.log(budget / wider[0])) / Math.log(wider[1] / wider[0]);
  ends = wider;
  showBudget();
}

// Pictures.

function dataUrl(blob) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(blob);
  });
}

async function take(blob, name) {
  const canvas = at("picture");
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    at("picture-note").textContent = `${name} is no picture that this browser can read`;
    return false;
  }
  at("picture-note").textContent = "";
  const scale = Math.min(1, MOST_PX / Math.max(bitmap.width, bitmap.height));
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  canvas.setAttribute("aria-label", name);
  picture = scale < 1 ? canvas.toDataURL("image/jpeg", 0.92) : await dataUrl(blob);
  return true;
}

async function takeExample(button, asks) {
  const image = button.querySelector("img");
  if (!(await take(await (await fetch(image.src)).blob(), image.alt))) return;
  at("question").value = button.dataset.question;
  if (asks) ask();
}

// Asking.

async function ask() {
  const text = at("question").value.trim();
  if (!text) return;
  running?.abort();
  const mine = (running = new AbortController());
  const content = [{ type: "text", text }];
  if (picture) content.push({ type: "image_url", image_url: { url: picture } });
  const budget = budgetMs();
  const about = JSON.stringify(content);
  const body = JSON.stringify({ messages: [{ role: "user", content }], latency_budget_ms: budget });
  const headers = { "Content-Type": "application/json" };
  at("rows").setAttribute("aria-busy", "true");
  try {
    const reply = await call("v1/chat/completions", { method: "POST", body, headers, signal: mine.signal });
    if (mine.signal.aborted) return;
    add(reply.status === 200 ? answered(reply.body, budget) : refused(reply.body, budget), about);
  } catch {
    if (!mine.signal.aborted) add({ budget, said: "", error: "the server does not answer" }, about);
  }
  if (running === mine) at("rows").removeAttribute("aria-busy");
}

function answered(body, budget) {
  const { knobs, timings_ms: timings, deadline } = body.tempovlm;
  const { total, ...parts } = timings;
  const setting = Object.entries(knobs).map(([name, value]) => `${value} ${units[name] ?? name}`).join(" · ");
  const verdict = { met: "✓ on time", missed: "✗ late", cut: "✗ cut at its deadline" }[deadline];
  return { budget, said: body.choices[0].message.content.trim() || "(nothing)", setting, total, parts, verdict, isMet: deadline === "met" };
}

function refused(body, budget) {
  return { budget, said: "", error: body.error?.message ?? "the server failed" };
}

function add(row, about) {
  if (about !== rowsAbout) rows.length = 0;
  rowsAbout = about;
  rows.unshift(row);
  rows.length = Math.min(rows.length, MOST_ROWS);
  const scale = 1.01 * Math.max(...rows.map((one) => Math.max(one.budget, one.total ?? 0)));
  at("rows").replaceChildren(...rows.map((one) => shown(one, scale)));
  if (row.parts) showStages(row.parts);
  at("status").textContent =
    row.error ?? `${row.said}: ${row.verdict.slice(2)}, ${row.total.toFixed(0)} of ${row.budget} milliseconds, ${row.setting}`;
}

function shown(row, scale) {
  const found = make("div", "row");
  const line = make("div", "line");
  const said = make("span", "said", row.said);
  if (row.error) said.append(make("span", "bad", row.error));
  else said.append(make("span", row.isMet ? "good" : "bad", row.verdict));
  line.append(make("span", "budget", `within ${row.budget} ms`), said, make("span", "knobs", row.setting));
  const bar = make("div", "bar");
  const time = make("div", "time");
  const band = make("i", "band");
  band.style.width = `${(100 * row.budget) / scale}%`;
  time.append(band);
  let start = 0;
  for (const [stage, ms] of Object.entries(row.parts ?? {})) {
    const part = make("i", `part ${stage}`);
    part.title = `${nameOf(stage)} ${ms.toFixed(1)} ms`;
    part.style.left = `${(100 * start) / scale}%`;
    part.style.width = `${(100 * ms) / scale}%`;
    start += ms;
    time.append(part);
  }
  time.setAttribute("role", "img");
  time.setAttribute("aria-label", Object.entries(row.parts ?? {}).map(([stage, ms]) => `${nameOf(stage)} ${ms.toFixed(1)} ms`).join(", "));
  const mark = make("i", "mark");
  mark.style.left = band.style.width;
  time.append(mark);
  bar.append(time, make("span", "total", row.total === undefined ? "" : `${row.total.toFixed(0)} ms`));
  found.append(line, bar);
  return found;
}

const nameOf = (stage) => stage.split("_")[0];

function showStages(parts) {
  const keys = Object.keys(parts).map((stage) => {
    const one = make("span");
    one.append(make("i", stage), nameOf(stage));
    return one;
  });
  const deadline = make("span");
  deadline.append(make("i", "mark"), "deadline");
  at("stages").replaceChildren(...keys, deadline);
  at("stages").hidden = false;
}

// The server.

async function look() {
  let reply;
  try {
    reply = await call("live");
  } catch {
    at("live-line").textContent = "The server does not answer.";
    return;
  }
  const data = reply.body;
  if (reply.status !== 200) {
    at("live-line").textContent = data.error?.message ?? "The server failed.";
    return;
  }
  units = data.units;
  const [least, most] = data.feasible_ms;
  if (most > 0) stretch(Math.max(1, 0.6 * least), 2.5 * most);
  at("about").textContent = `This server runs ${data.model}.`;
  at("range").hidden = !(most > 0);
  const [some, all] = at("range").children;
  some.textContent = `expected to fit now: some setting from ${least} ms`;
  all.textContent = `all from ${most} ms`;
  at("live-line").textContent = draw(data);
}

async function watch() {
  for (;;) {
    if (!document.hidden && at("key-form").hidden) await look();
    await wait(LIVE_MS);
  }
}

let rest;
at("budget").addEventListener("input", () => {
  showBudget();
  clearTimeout(rest);
  if (rows.length) rest = setTimeout(ask, REST_MS);
});
at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key").value;
  at("key").value = "";
  look();
});
at("file").addEventListener("change", ({ target }) => target.files.length && take(target.files[0], target.files[0].name));
for (const button of document.querySelectorAll(".example")) button.addEventListener("click", () => takeExample(button, true));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  at("drop").classList.add("over");
});
document.addEventListener("dragleave", () => at("drop").classList.remove("over"));
for (const [kind, part] of [["drop", "dataTransfer"], ["paste", "clipboardData"]]) {
  document.addEventListener(kind, (event) => {
    const [file] = event[part].files;
    if (kind === "drop" || file) event.preventDefault();
    at("drop").classList.remove("over");
    if (file) take(file, file.name);
  });
}

showBudget();
watch();
takeExample(document.querySelector(".example"), false);
