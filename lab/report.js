/* The report's one script. First the formulas of the explorers, as functions of numbers: a test holds each
   equal to the project's Python, value and gradient. Then what moves on the page. No network, no library;
   text is set with textContent only. */
"use strict";

// ------------------------------------------------------------------------------------------- the formulas

const sigmoid = (x) => (x >= 0 ? 1 / (1 + Math.exp(-x)) : Math.exp(x) / (1 + Math.exp(x)));
const logSigmoid = (x) => Math.min(x, 0) - Math.log1p(Math.exp(-Math.abs(x)));
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

// train_rm.bradley_terry_loss: a gap of scores, and the share of labels thought to be flipped
function bradleyTerry({ gap, smoothing }) {
  const kept = 1 - smoothing;
  return {
    probability: sigmoid(gap),
    loss: -kept * logSigmoid(gap) - smoothing * logSigmoid(-gap),
    gradient: -kept * sigmoid(-gap) + smoothing * sigmoid(gap),
  };
}

// train_dpo.LOSSES: L of the margin h, and dL/dh
const preferenceLosses = {
  dpo: (h, { beta }) => [-logSigmoid(beta * h), -beta * sigmoid(-beta * h)],
  cdpo(h, { beta, smoothing }) {
    const flipped = smoothing * logSigmoid(-beta * h);
    const slope = -(1 - smoothing) * sigmoid(-beta * h) + smoothing * sigmoid(beta * h);
    return [-(1 - smoothing) * logSigmoid(beta * h) - flipped, beta * slope];
  },
  robust(h, { beta, smoothing }) {
    const value = -(1 - smoothing) * logSigmoid(beta * h) + smoothing * logSigmoid(-beta * h);
    const slope = -(1 - smoothing) * sigmoid(-beta * h) - smoothing * sigmoid(beta * h);
    return [value / (1 - 2 * smoothing), (beta * slope) / (1 - 2 * smoothing)];
  },
  ipo: (h, { beta }) => [(h - 1 / (2 * beta)) ** 2, 2 * (h - 1 / (2 * beta))],
  simpo: (h, { beta, gamma }) => [-logSigmoid(beta * h - gamma), -beta * sigmoid(gamma - beta * h)],
};

// train_dpo.preference_loss of one pair: log-ratios of the chosen and of the rejected response
function dpo({ loss, chosen, rejected, beta, smoothing, gamma }) {
  const [value, gradient] = preferenceLosses[loss](chosen - rejected, { beta, smoothing, gamma });
  const rewards = { rewardChosen: beta * chosen, rewardRejected: beta * rejected };
  return { margin: chosen - rejected, loss: value, gradient, ...rewards };
}

// train_ppo.policy_loss of one token, and its derivative by log π
function ppo({ advantage, ratio, clip }) {
  const free = -advantage * ratio;
  const kept = -advantage * clamp(ratio, 1 - clip, 1 + clip);
  return { loss: Math.max(free, kept), gradient: kept > free ? 0 : -advantage * ratio };
}

// train_kto.kto_loss of one response: its log-ratio r, the reference point z
function kto({ label, ratio, z, beta, weight }) {
  const sign = label === "desirable" ? 1 : -1;
  const value = sigmoid(sign * beta * (ratio - z));
  return { value, loss: weight * (1 - value), gradient: -weight * sign * beta * value * (1 - value) };
}

// train_orpo.log_odds of a mean log-prob m, in two branches as there
function logOdds(m) {
  m = Math.min(m, -1e-6);
  return m - (m > -Math.LN2 ? Math.log(-Math.expm1(m)) : Math.log1p(-Math.exp(m)));
}

// train_orpo.orpo_loss: mean log-probs of both responses
function orpo({ chosen, rejected, nll, lam }) {
  const ratio = logOdds(chosen) - logOdds(rejected);
  const slope = (m) => (m > -1e-6 ? 0 : -1 / Math.expm1(m)); // d log odds / dm = 1 / (1 − e^m)
  const pull = -lam * sigmoid(-ratio);
  return {
    ratio, oddsLoss: -logSigmoid(ratio), loss: nll - lam * logSigmoid(ratio),
    gradientChosen: pull * slope(chosen), gradientRejected: -pull * slope(rejected),
  };
}

// train_grpo.kl_estimate of one token, and the derivatives by log π
function kl({ logp, reference }) {
  const d = reference - logp;
  return {
    k1: -d, k2: (d * d) / 2, k3: Math.expm1(d) - d,
    gradient1: 1, gradient2: -d, gradient3: -Math.expm1(d),
  };
}

// lab.oracle.World.optimum of one prompt: π* ∝ π_ref exp(r/β) over all responses
function optimum({ beta, logReference, reward }) {
  const logits = logReference.map((logp, i) => logp + reward[i] / beta);
  const highest = Math.max(...logits);
  const total = logits.reduce((sum, x) => sum + Math.exp(x - highest), 0);
  const logPolicy = logits.map((x) => x - highest - Math.log(total));
  const policy = logPolicy.map(Math.exp);
  return {
    policy,
    reward: policy.reduce((sum, p, i) => sum + p * reward[i], 0),
    kl: policy.reduce((sum, p, i) => sum + p * (logPolicy[i] - logReference[i]), 0),
  };
}

// train_ppo.gae of one response
function gae({ rewards, values, gamma, lam }) {
  const advantages = rewards.map(() => 0);
  for (let t = rewards.length - 1, carried = 0; t >= 0; t--) {
    const following = t + 1 < values.length ? values[t + 1] : 0;
    carried = rewards[t] + gamma * following - values[t] + gamma * lam * carried;
    advantages[t] = carried;
  }
  return { advantages, returns: advantages.map((a, t) => a + values[t]) };
}

const explorers = { "bradley-terry": bradleyTerry, dpo, ppo, kto, orpo, kl, optimum, gae };

// ------------------------------------------------------------------------------------------------ the page

// four significant digits, a minus sign
function written(x) {
  if (!Number.isFinite(x)) return String(x);
  const small = x !== 0 && Math.abs(x) < 1e-3;
  const text = small ? x.toExponential(2) : String(Number(x.toPrecision(4)));
  return text.replace(/-/g, "\u2212");
}

// the index of the value nearest to x
function nearestIndex(values, x) {
  return values.reduce((best, value, i) => (Math.abs(value - x) < Math.abs(values[best] - x) ? i : best), 0);
}

const SVG = "http://www.w3.org/2000/svg";
const [LEFT, TOP, WIDE, HIGH] = [44, 12, 288, 148]; // where a plot lies within its svg, as in charts.py

function drawn(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

// round numbers within [low, high], as in charts.py
function ticks(low, high, most = 4) {
  const span = high - low || 1;
  const power = 10 ** Math.floor(Math.log10(span / most));
  const step = [1, 2, 2.5, 5, 10, 20].map((m) => m * power).find((size) => span / size < most);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => (first + i) * step);
}

// lines [{name, xs, ys, kind}], a mark at x → an svg's content
function plot(svg, lines, mark) {
  const finite = (values) => values.filter(Number.isFinite);
  const xs = finite(lines.flatMap((line) => line.xs));
  const ys = finite(lines.flatMap((line) => line.ys));
  const [left, right] = [Math.min(...xs), Math.max(...xs)];
  let [low, high] = [Math.min(...ys), Math.max(...ys)];
  if (high - low < 1e-9) [low, high] = [low - 1, high + 1];
  const X = (x) => LEFT + ((x - left) / (right - left)) * WIDE;
  const Y = (y) => TOP + (1 - (y - low) / (high - low)) * HIGH;
  const parts = [];
  for (const y of ticks(low, high)) {
    parts.push(drawn("line", { class: "grid", x1: LEFT, x2: LEFT + WIDE, y1: Y(y), y2: Y(y) }));
    parts.push(drawn("text", { class: "tick end", x: LEFT - 5, y: Y(y) + 3 }, written(y)));
  }
  for (const x of ticks(left, right, 6))
    parts.push(drawn("text", { class: "tick middle", x: X(x), y: TOP + HIGH + 16 }, written(x)));
  for (const line of lines) {
    const points = line.xs.map((x, i) => `${X(x).toFixed(1)},${Y(line.ys[i]).toFixed(1)}`);
    parts.push(drawn("polyline", { class: `line ${line.kind || ""}`, points: points.join(" ") }));
    if (mark === undefined) continue;
    const near = nearestIndex(line.xs, mark);
    const place = { cx: X(line.xs[near]), cy: Y(line.ys[near]) };
    parts.push(drawn("circle", { class: `dot ${line.kind || ""}`, r: 3.5, ...place }));
  }
  svg.replaceChildren(...parts);
}

// bars [[heights of a kind]…] side by side, a name under each group
function bars(svg, groups, names) {
  const all = groups.flat();
  const [low, high] = [Math.min(0, ...all), Math.max(0, ...all)];
  const Y = (y) => TOP + (1 - (y - low) / (high - low || 1)) * HIGH;
  const step = WIDE / names.length;
  const thick = (step * 0.8) / groups.length;
  const parts = [drawn("line", { class: "grid", x1: LEFT, x2: LEFT + WIDE, y1: Y(0), y2: Y(0) })];
  for (const y of ticks(low, high))
    parts.push(drawn("text", { class: "tick end", x: LEFT - 5, y: Y(y) + 3 }, written(y)));
  names.forEach((name, i) => {
    const x = LEFT + step * (i + 0.5);
    parts.push(drawn("text", { class: "tick middle", x, y: TOP + HIGH + 16 }, name));
    groups.forEach((heights, k) => {
      const [y, h] = [Y(Math.max(heights[i], 0)), Math.abs(Y(heights[i]) - Y(0))];
      const left = x + (k - groups.length / 2) * thick;
      parts.push(drawn("rect", { class: `bar k${k}`, x: left, y, width: thick * 0.9, height: h }));
    });
  });
  svg.replaceChildren(...parts);
}

// what an explorer shows beside its numbers: [lines, where the mark is] or bars
const sweep = (low, high, count = 120) =>
  Array.from({ length: count + 1 }, (_, i) => low + ((high - low) * i) / count);
function curve(name, values, along, [low, high], shown) {
  const xs = sweep(low, high);
  const found = xs.map((x) => explorers[name]({ ...values, [along]: x }));
  return shown.map(([output, kind]) => ({ xs, kind, ys: found.map((one) => one[output]) }));
}

function explore(section) {
  const name = section.dataset.explorer;
  const inputs = [...section.querySelectorAll("input, select")];
  const fixed = JSON.parse(section.querySelector("script").textContent); // arrays, and what to plot
  const svg = section.querySelector("svg");
  const show = () => {
    const values = { ...fixed.arrays };
    for (const input of inputs) {
      values[input.name] = input.type === "range" ? Number(input.value) : input.value;
      const output = section.querySelector(`output[for="${input.id}"]`);
      if (output) output.textContent = written(Number(input.value));
    }
    const found = explorers[name](values);
    for (const output of section.querySelectorAll("output[data-output]")) {
      const value = found[output.dataset.output];
      output.textContent = Array.isArray(value) ? value.map(written).join("  ") : written(value);
    }
    if (fixed.plot) {
      const { along, range, lines } = fixed.plot;
      plot(svg, curve(name, values, along, range, lines), values[along]);
    } else {
      const { outputs, names } = fixed.bars;
      bars(svg, outputs.map((key) => found[key] || fixed.arrays[key]), names);
    }
  };
  for (const input of inputs) input.addEventListener("input", show);
  show();
}

// a choice shows the parts whose data-of names it, or all of them for an empty value
function choose(control) {
  const parts = [...document.querySelectorAll(`[data-group="${control.dataset.shows}"]`)];
  const show = () => {
    for (const part of parts) part.hidden = control.value !== "" && part.dataset.of !== control.value;
  };
  control.addEventListener("change", show);
  show();
}

// the slider over β: the measured run nearest to it
function nearest(slider) {
  const parts = [...document.querySelectorAll(`[data-group="${slider.dataset.nearest}"]`)];
  const output = document.querySelector(`output[for="${slider.id}"]`);
  const show = () => {
    const x = Number(slider.value);
    const best = parts[nearestIndex(parts.map((part) => Number(part.dataset.of)), x)];
    for (const part of parts) part.hidden = part !== best;
    output.textContent = `${written(x)}, nearest measured run: ${written(Number(best.dataset.of))}`;
  };
  slider.addEventListener("input", show);
  show();
}

// a pointer over a curve reads it: step, value, band
function read(figure) {
  const svg = figure.querySelector("svg");
  const output = figure.querySelector(".reading");
  const curve = JSON.parse(figure.dataset.curve); // {x: [], y: [], x0, x1}
  const cross = drawn("line", { class: "cross", y1: TOP, y2: TOP + HIGH, visibility: "hidden" });
  svg.append(cross);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const at = curve.x0 + ((x - LEFT) / WIDE) * (curve.x1 - curve.x0);
    const i = nearestIndex(curve.x, at);
    const place = LEFT + ((curve.x[i] - curve.x0) / (curve.x1 - curve.x0 || 1)) * WIDE;
    cross.setAttribute("x1", place);
    cross.setAttribute("x2", place);
    cross.setAttribute("visibility", "visible");
    output.textContent = `step ${curve.x[i]}: ${written(curve.y[i])}`;
  });
  svg.addEventListener("pointerleave", () => {
    cross.setAttribute("visibility", "hidden");
    output.textContent = "";
  });
}

if (typeof document !== "undefined") {
  document.querySelectorAll("[data-explorer]").forEach(explore);
  document.querySelectorAll("select[data-shows]").forEach(choose);
  document.querySelectorAll("input[data-nearest]").forEach(nearest);
  document.querySelectorAll("[data-curve]").forEach(read);
}
if (typeof module !== "undefined") module.exports = { explorers, written };
