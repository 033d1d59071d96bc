"use strict";

const byId = (id) => document.getElementById(id);
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");
const DASHES = ["solid", "dash", "dot", "dashdot"];
const N_COLORS = 7;
const CHOICES = {
  curve: [["return", "Smoothed"], ["return/raw", "Raw"], ["return/evaluation", "Evaluations"]],
  axis: [["steps", "Steps"], ["seconds", "Time"]],
  spread: [["std", "Mean ± std"], ["range", "Mean, range"], ["each", "Each"]],
};
const shown = { hidden: new Set(), env: 0 };
let data;

async function unpacked(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

function element(tag, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

function swatch(place) {
  const made = element("span");
  const kind = `swatch c${place % N_COLORS} d${Math.floor(place / N_COLORS) % DASHES.length}`;
  made.innerHTML = `<svg class="${kind}" viewBox="0 0 22 10" aria-hidden="true"><path d="M1 5H21"/></svg>`;
  return made.firstChild;
}

/* Mean, spread and number of runs at each point; null where fewer than half of the runs have come. */
function statistics(runs) {
  const started = runs.filter((run) => run.some((value) => value !== null)).length;
  return runs[0].map((_, i) => {
    const values = runs.map((run) => run[i]).filter((value) => value !== null);
    const n = values.length;
    if (n === 0 || 2 * n < started) return null;
    const mean = values.reduce((sum, value) => sum + value, 0) / n;
    const squares = values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
    const std = n > 1 ? Math.sqrt(squares / (n - 1)) : 0;
    return { mean, std, n, low: Math.min(...values), high: Math.max(...values) };
  });
}

const short = (value) => Number(value.toPrecision(4)).toLocaleString("en");

const textOf = ({ mean, std, n }) => short(mean) + (n > 1 ? ` ± ${short(std)} (${n} runs)` : "");

function traces(panel) {
  const { x, runs } = panel.axes[shown.axis];
  const made = [];
  for (const [place, name] of data.groups.entries()) {
    if (!(name in runs) || shown.hidden.has(name)) continue;
    const color = style(`--c${place % N_COLORS}`);
    const line = { color, width: 2, dash: DASHES[Math.floor(place / N_COLORS) % DASHES.length] };
    const common = { x, mode: "lines", type: "scatter", showlegend: false, legendgroup: name };
    if (shown.spread === "each") {
      const thin = { ...common, line: { ...line, width: 1.2 }, opacity: 0.8, hoverinfo: "name+y" };
      made.push(...runs[name].map((run, i) => ({ ...thin, y: run, name: escaped(`${name}, run ${i + 1}`) })));
      continue;
    }
    const points = statistics(runs[name]);
    // A logarithmic axis has no place for a mean minus its deviation that is not positive: the least run stands for it.
    const isRange = shown.spread === "range";
    const lower = ({ mean, std, low }) => (isRange || (isLogarithmic(panel) && mean <= std) ? low : mean - std);
    const upper = ({ mean, std, high }) => (isRange ? high : mean + std);
    // One run has no spread.
    const known = points.map((point, i) => i).filter((i) => points[i] !== null && points[i].n > 1);
    if (known.length > 0) {
      const back = known.toReversed();
      made.push({
        ...common, x: [...known, ...back].map((i) => x[i]), fill: "toself",
        y: [...known.map((i) => upper(points[i])), ...back.map((i) => lower(points[i]))],
        fillcolor: color + "2e", line: { width: 0 }, hoverinfo: "skip", role: "band",
      });
    }
    made.push({
      ...common, y: points.map((point) => point && point.mean), line, name: escaped(name), role: "mean",
      text: points.map((point) => point && textOf(point)),
      hovertemplate: "%{text} " + escaped(name) + "<extra></extra>",
    });
  }
  return made;
}

/* Whether a quantity of the log spans so many sizes that a linear axis would hide most of it. */
function isLogarithmic(panel) {
  if (!/kl$|kl_after_update|value_loss|critic_loss|grad_norm|ratio_max/.test(panel.key)) return false;
  const values = Object.values(panel.axes.steps.runs).flat(2).filter((value) => value !== null);
  const least = values.reduce((one, other) => Math.min(one, other), Infinity);
  return least > 0 && values.reduce((one, other) => Math.max(one, other), 0) > 200 * least;
}

function layout(panel) {
  const rule = style("--rule");
  const lines = { gridcolor: rule, linecolor: rule, zerolinecolor: rule };
  const axis = { ...lines, automargin: true, nticks: 6, exponentformat: "SI" };
  const unit = { text: shown.axis, standoff: 4 };
  const middle = { x: 0.5, y: 0.5, xref: "paper", yref: "paper" };
  const isKnown = Boolean(panel.axes[shown.axis].x.at(-1));
  return {
    margin: { l: 44, r: 10, t: 26, b: 36 }, hovermode: "x unified", showlegend: false, dragmode: "zoom",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: style("--muted") },
    hoverlabel: { bgcolor: style("--panel"), bordercolor: style("--rule"), font: { color: style("--ink"), size: 12 } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: style("--muted"), activecolor: style("--ink") },
    xaxis: { ...axis, title: unit, rangemode: "tozero", hoverformat: ",.4~s" },
    yaxis: { ...axis, ...(isLogarithmic(panel) ? { type: "log", exponentformat: "power", nticks: 4 } : {}) },
    annotations: isKnown ? [] : [{ ...middle, text: "no times are known", showarrow: false }],
  };
}

function savedCsv(panel) {
  const { x, runs } = panel.axes[shown.axis];
  const names = Object.entries(runs).flatMap(([name, found]) => found.map((run, i) => [`${name}, run ${i + 1}`, run]));
  const rows = x.map((at, i) => [at, ...names.map(([, run]) => run[i] ?? "")].join(","));
  return [[shown.axis, ...names.map(([name]) => `"${name.replace(/"/g, '""')}"`)].join(","), ...rows].join("\n") + "\n";
}

function save(name, text) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type: "text/plain" })), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}

function draw(figure, panel) {
  const drawn = traces(panel);
  const filename = panel.key.replace(/\W+/g, "_");
  const whole = { "xaxis.autorange": true, "yaxis.autorange": true };
  const saveAs = (format, scale) => (plot) => Plotly.downloadImage(plot, { format, scale, filename });
  const button = (title, icon, click) => ({ name: title, title, icon, click });
  Plotly.react(figure.querySelector(".plot"), drawn, layout(panel), {
    responsive: true, displaylogo: false, scrollZoom: false,
    modeBarButtons: [[
      button("Save as PNG", Plotly.Icons.camera, saveAs("png", 3)),
      button("Save as SVG", Plotly.Icons.disk, saveAs("svg", 1)),
      button("Save as CSV", Plotly.Icons.spikeline, () => save(`${filename}.csv`, savedCsv(panel))),
      button("Whole range", Plotly.Icons.home, (plot) => Plotly.relayout(plot, whole)),
    ]],
  });
}

const figures = new Map();

/* Replace the figures of a part of the page. All are in their places before one is drawn: Plotly measures them. */
function drawPart(parent, found) {
  for (const figure of parent.children) figures.delete(figure);
  parent.replaceChildren(...found.map(([title, panel]) => {
    const caption = element("figcaption", {}, title, element("small", { textContent: panel.unit }));
    const plot = element("div", { className: "plot", role: "img", ariaLabel: `${title} against ${shown.axis}` });
    const figure = element("figure", {}, caption, plot);
    figure.dataset.key = panel.key;
    figures.set(figure, panel);
    return figure;
  }));
  for (const figure of parent.children) draw(figure, figures.get(figure));
}

function drawReturns() {
  const found = data.envs.map((env) => [nameOf(env), env.panels.find((one) => one.key === shown.curve)])
    .filter(([, panel]) => panel);
  byId("returns").classList.toggle("one", found.length === 1);
  drawPart(byId("returns"), data.envs.length > 1 ? found : found.map(([, panel]) => [panel.title, panel]));
}

const nameOf = (env) => env.id || "unknown environment";
const isOfLog = (panel) => !panel.key.startsWith("return");

function drawMetrics() {
  byId("log").hidden = !data.envs.some((env) => env.panels.some(isOfLog));
  drawPart(byId("metrics"), data.envs[shown.env].panels.filter(isOfLog).map((panel) => [panel.title, panel]));
}

function drawAgain() {
  byId("ended").hidden = shown.axis === "steps";
  for (const [figure, panel] of figures) draw(figure, panel);
}

function addSwitch(name, isAvailable, change) {
  const choices = CHOICES[name].filter(([value]) => isAvailable(value));
  shown[name] = choices.length ? choices[0][0] : CHOICES[name][0][0];
  byId(name).hidden = choices.length < 2;
  for (const [value, label] of choices) {
    const input = element("input", { type: "radio", name, value, checked: value === shown[name] });
    input.addEventListener("change", () => { shown[name] = value; change(); });
    byId(name).append(element("label", {}, input, label));
  }
}

function addLegend() {
  byId("legend").hidden = data.groups.length < 2;
  for (const [place, name] of data.groups.entries()) {
    const chip = element("button", { type: "button" }, swatch(place), name);
    chip.setAttribute("aria-pressed", "true");
    chip.addEventListener("click", () => {
      const isShown = shown.hidden.delete(name) || !shown.hidden.add(name);
      chip.setAttribute("aria-pressed", String(isShown));
      drawAgain();
    });
    byId("legend").append(chip);
  }
}

function addEnvironments() {
  byId("env").hidden = data.envs.length < 2;
  const select = byId("env").querySelector("select");
  select.append(...data.envs.map((env, i) => element("option", { value: i, textContent: nameOf(env) })));
  select.addEventListener("change", () => { shown.env = Number(select.value); drawMetrics(); });
}

function addButtons() {
  byId("theme").addEventListener("click", () => {
    const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = document.documentElement.dataset.theme ?? (isDark ? "dark" : "light");
    document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
    drawAgain();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAgain);
  for (const button of document.querySelectorAll("[data-save]"))
    button.addEventListener("click", () => save(`report.${button.dataset.save}`, data.tables[button.dataset.save]));
  byId("all").addEventListener("change", (event) => {
    for (const table of document.querySelectorAll(".settings")) table.classList.toggle("all", event.target.checked);
  });
  if (navigator.clipboard)
    for (const block of document.querySelectorAll(".command")) {
      const copy = element("button", { type: "button", textContent: "Copy" });
      copy.addEventListener("click", async () => {
        await navigator.clipboard.writeText(block.querySelector("pre").textContent);
        copy.textContent = "Copied";
      });
      block.append(copy);
    }
}

const ready = () => (document.documentElement.dataset.ready = "true");

async function start() {
  data = JSON.parse(await unpacked("data"));
  addButtons();
  const keys = new Set(data.envs.flatMap((env) => env.panels.map((panel) => panel.key)));
  if (keys.size === 0) return ready();
  document.head.append(element("script", { textContent: await unpacked("plotly") }));
  byId("curves").hidden = false;
  addLegend();
  addSwitch("curve", (value) => keys.has(value), drawReturns);
  const all = data.envs.flatMap((env) => env.panels);
  addSwitch("axis", (value) => all.some((panel) => panel.axes[value].x.at(-1)), drawAgain);
  const hasSeeds = all.some((panel) => Object.values(panel.axes.steps.runs).some((runs) => runs.length > 1));
  addSwitch("spread", () => hasSeeds, drawAgain);
  addEnvironments();
  drawReturns();
  drawMetrics();
  ready();
}

start().catch((error) => {
  const text = `The figures could not be drawn (${error}). A newer browser may draw them; the tables need none.`;
  document.querySelector("main").prepend(element("aside", { className: "problems", textContent: text }));
  throw error;
});
