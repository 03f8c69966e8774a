
const Explorer = (() => {
  const page = Network.unpack(JSON.parse(document.getElementById("contents").textContent));
  const decode = Network.makeDecoder(page.decoder);
  const element = (id) => document.getElementById(id);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const {codes, basis, origin, view} = page;
  const numData = codes.shape[0], latentDim = codes.shape[1];
  const codeOf = (n) => codes.data.subarray(n * latentDim, (n + 1) * latentDim);
  const fixed = (value, digits = 2) => value.toFixed(digits).replace("-", "\u2212").replace(/^\u2212(0\.?0*)$/, "$1");
  const whole = (value) => Math.round(value).toLocaleString("en");

  // --- State: where the cursor is on the map, which datum is chosen, how many draws are shown ----------------------

  const state = {cursor: null, chosen: null, draws: page.numSamples};

  // The map's plane: coordinates of a latent, and the latent at some coordinates. What the plane leaves open is as in
  // the chosen datum's code, or in the origin.
  function project(z) {
    const at = [0, 0];
    for (let d = 0; d < latentDim; d++) for (let a = 0; a < 2; a++) at[a] += (z[d] - origin[d]) * basis[d][a];
    return at;
  }

  function lift(at) {
    const base = state.chosen === null ? origin : codeOf(state.chosen), from = project(base);
    return Float64Array.from(base, (value, d) =>
      value + (at[0] - from[0]) * basis[d][0] + (at[1] - from[1]) * basis[d][1]);
  }

  const places = Array.from({length: numData}, (_, n) => {
    const at = project(codeOf(n));
    return page.heights ? [at[0], page.heights[n]] : at;
  });

  const nameOf = (n) => `${page.indices[n]}` + (page.labels ? `, label ${page.labels[n]}` : "");

  // --- Log-weights of one datum, and what is computed of them ------------------------------------------------------

  function unpackWeights(packed, n) {
    const K = page.numSamples, rate = Math.log1p(packed.deepest) / 65534;
    return Float64Array.from({length: K}, (_, k) => {
      const code = packed.depths.data[n * K + k];
      return code === 65535 ? -Infinity : packed.top[n] - Math.expm1(code * rate);
    });
  }

  const logAdd = (a, b) => {
    const top = Math.max(a, b);
    return top === -Infinity ? top : top + Math.log(Math.exp(a - top) + Math.exp(b - top));
  };

  function unpackDraws(n) {
    const K = page.numSamples, result = {};
    for (const name of ["guide", "prior"]) {
      const packed = page[name], logWeights = unpackWeights(packed, n);
      const estimates = new Float64Array(K), effective = new Float64Array(K);
      for (let k = 0, sum = -Infinity, squares = -Infinity; k < K; k++) {
        sum = logAdd(sum, logWeights[k]);
        squares = logAdd(squares, 2 * logWeights[k]);
        estimates[k] = sum - Math.log(k + 1);
        effective[k] = sum === -Infinity ? 0 : Math.exp(2 * sum - squares);
      }
      const steps = 2 ** (8 * packed.points.data.BYTES_PER_ELEMENT) - 1;
      const points = Array.from({length: K}, (_, k) => [0, 1].map((a) => {
        const low = packed.low.data[2 * n + a], high = packed.high.data[2 * n + a];
        return low + packed.points.data[2 * (n * K + k) + a] / steps * (high - low);
      }));
      result[name] = {logWeights, estimates, effective, points, khat: packed.khat[n]};
    }
    const late = page.later;
    result.later = late ? late.draws.map((k, i) => [k, late.estimates.data[n * late.draws.length + i]]) : [];
    return result;
  }

  let drawn = null; // of the chosen datum

  // --- Pictures of data --------------------------------------------------------------------------------------------

  const rgb = (text) => [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));

  function paintImage(canvas, values) {
    const {height, width, channels, lastChannel} = page.picture, [low, high] = page.range;
    const paper = rgb(colour("paper")), ink = rgb(colour("ink"));
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d"), image = context.createImageData(width, height);
    for (let p = 0; p < height * width; p++) {
      for (let c = 0; c < 3; c++) {
        const at = channels === 1 ? p : lastChannel ? p * channels + c : c * height * width + p;
        const share = Math.min(Math.max((values[at] - low) / (high - low), 0), 1);
        image.data[4 * p + c] = channels === 1 ? paper[c] + share * (ink[c] - paper[c]) : 255 * share;
      }
      image.data[4 * p + 3] = 255;
    }
    context.putImageData(image, 0, 0);
  }

  function paintBars(canvas, values) {
    const side = 320, [low, high] = [Math.min(page.range[0], 0), Math.max(page.range[1], 0)];
    canvas.width = canvas.height = side;
    canvas.style.imageRendering = "auto";
    const context = canvas.getContext("2d"), margin = 12, step = (side - 2 * margin) / values.length;
    const y = (value) => margin + (high - Math.min(Math.max(value, low), high)) / (high - low) * (side - 2 * margin);
    context.fillStyle = colour("line");
    context.fillRect(margin, y(0) - 1, side - 2 * margin, 2);
    context.fillStyle = colour("ink");
    values.forEach((value, n) => {
      const thick = Math.max(step * 0.8, 1);
      context.fillRect(margin + n * step, Math.min(y(value), y(0)), thick, Math.max(Math.abs(y(value) - y(0)), 1));
    });
  }

  function paint(id, values, words) {
    const canvas = element(id);
    if (values) (page.picture ? paintImage : paintBars)(canvas, values);
    else canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
    canvas.setAttribute("aria-label", words);
  }

  function datumValues(n) {
    const each = page.data.data.length / numData, [low, high] = page.range;
    return Float32Array.from({length: each}, (_, e) => low + page.data.data[n * each + e] / 255 * (high - low));
  }

  function showDecoded() {
    const at = state.cursor, z = lift(at);
    const words = page.axes.map((axis, a) => `${axis.short}\u00a0${fixed(at[a])}`).slice(0, latentDim);
    paint("decoded", decode(z), `What the decoder makes of the point at the cursor, ${words.join(", ")}`);
    element("decoded-words").textContent = words.join(", ");
  }

  function showDatum() {
    const n = state.chosen;
    if (n === null) {
      for (const id of ["datum", "reconstruction"]) paint(id, null, "No datum is chosen");
      element("datum-words").textContent = "none is chosen";
      element("reconstruction-words").textContent = "";
      return;
    }
    paint("datum", datumValues(n), `Datum ${nameOf(n)}`);
    paint("reconstruction", decode(codeOf(n)), `What the decoder makes of the code of datum ${nameOf(n)}`);
    element("datum-words").textContent = nameOf(n);
    element("reconstruction-words").textContent = "reconstruction";
  }

  // --- The map -----------------------------------------------------------------------------------------------------

  const map = element("map");
  // Ten colours for labels, none of which is the guide's blue or the prior's orange; marks are their label, too.
  const LIGHT = [
    "#882255", "#117733", "#332288", "#8a6d00", "#aa4499", "#2f7f73", "#a33a48", "#666666", "#6b4c2a", "#4d6b00",
  ];
  const DARK = [
    "#d67ba5", "#5fbf7f", "#a79cf0", "#ddcc77", "#d98ccb", "#66ccbb", "#e58a94", "#b5b5b5", "#c9a27c", "#b5cc5e",
  ];
  const classes = page.labels ? [...new Set(page.labels)] : [];
  const isWord = page.labels !== null && page.labels.every((label) => label.length <= 2);
  const isColoured = classes.length > 1 && classes.length <= LIGHT.length;
  const isDark = matchMedia("(prefers-color-scheme: dark)");

  const side = () => map.clientWidth;
  const toScreen = (at) => [
    (at[0] - view.low[0]) / (view.high[0] - view.low[0]) * side(),
    (view.high[1] - at[1]) / (view.high[1] - view.low[1]) * side(),
  ];
  const toPlane = (x, y) => [
    view.low[0] + x / side() * (view.high[0] - view.low[0]),
    view.high[1] - y / side() * (view.high[1] - view.low[1]),
  ];

  function niceStep(width, count) {
    const rough = width / count, power = 10 ** Math.floor(Math.log10(rough));
    return [1, 2, 5, 10].map((m) => m * power).find((step) => step >= rough);
  }

  function drawAxes(context, size) {
    context.font = "600 12.5px system-ui, sans-serif";
    const taken = context.measureText(`${page.axes[0].long} \u2192`).width + 24;
    context.font = "12px system-ui, sans-serif";
    const step = niceStep(view.high[0] - view.low[0], size < 450 ? 5 : 8), digits = step < 1 ? 1 : 0;
    context.strokeStyle = colour("line");
    context.fillStyle = colour("soft");
    for (let a = 0; a < (latentDim > 1 ? 2 : 1); a++) {
      for (let v = Math.ceil(view.low[a] / step) * step; v < view.high[a]; v += step) {
        const [x, y] = toScreen(a === 0 ? [v, view.low[1]] : [view.low[0], v]);
        context.globalAlpha = Math.abs(v) < step / 2 ? 1 : 0.5;
        context.beginPath();
        context.moveTo(a === 0 ? x : 0, a === 0 ? 0 : y);
        context.lineTo(a === 0 ? x : size, a === 0 ? size : y);
        context.stroke();
        context.globalAlpha = 1;
        context.textAlign = a === 0 ? "center" : "left";
        const clear = a === 0 ? x > taken && x < size - 14 : y > 40 && y < size - 26;
        if (clear) context.fillText(fixed(v, digits), a === 0 ? x : 5, a === 0 ? size - 6 : y + 4);
      }
    }
    context.font = "600 12.5px system-ui, sans-serif";
    context.textAlign = "left";
    context.fillText(`${page.axes[0].long} \u2192`, 5, size - 6);
    if (latentDim > 1) context.fillText(`\u2191 ${page.axes[1].long}`, 5, 16);
  }

  function drawCodes(context, size) {
    const palette = isDark.matches ? DARK : LIGHT, faded = state.chosen !== null;
    context.font = `600 ${size < 450 ? 12 : 13}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    places.forEach((at, n) => {
      const [x, y] = toScreen(at);
      context.globalAlpha = faded ? 0.3 : 0.9;
      context.fillStyle = isColoured && !faded ? palette[classes.indexOf(page.labels[n])] : colour("soft");
      if (isWord) context.fillText(page.labels[n], x, y);
      else disc(context, x, y, 3.5);
    });
    context.textBaseline = "alphabetic";
    if (isWord || !isColoured) return;
    context.globalAlpha = faded ? 0.4 : 1;
    for (const [c, label] of classes.entries()) { // at the middle of its marks
      const own = places.filter((_, n) => page.labels[n] === label).map(toScreen);
      const middle = [0, 1].map((a) => own.map((at) => at[a]).sort((p, q) => p - q)[own.length >> 1]);
      context.lineWidth = 4;
      context.strokeStyle = colour("paper");
      context.strokeText(label, ...middle);
      context.fillStyle = faded ? colour("soft") : palette[c];
      context.fillText(label, ...middle);
    }
  }

  function disc(context, x, y, radius) {
    context.beginPath();
    context.arc(x, y, radius, 0, 2 * Math.PI);
    context.fill();
  }

  function drawDraws(context) { // the area of a dot is its share in the sum of the weights
    for (const name of ["prior", "guide"]) {
      const {logWeights, points} = drawn[name], K = state.draws;
      let top = -Infinity, sum = 0;
      for (let k = 0; k < K; k++) top = Math.max(top, logWeights[k]);
      for (let k = 0; k < K; k++) sum += Math.exp(logWeights[k] - top);
      context.fillStyle = colour(name);
      for (let k = 0; k < K; k++) {
        const share = top === -Infinity ? 0 : Math.exp(logWeights[k] - top) / sum;
        context.globalAlpha = 0.35;
        disc(context, ...toScreen(points[k]), 1.6);
        if (share < 0.002) continue;
        context.globalAlpha = 0.6;
        disc(context, ...toScreen(points[k]), Math.sqrt(3 + 160 * share));
      }
    }
    context.globalAlpha = 1;
  }

  function drawMap() {
    const size = side(), ratio = window.devicePixelRatio || 1;
    if (!size) return;
    map.width = map.height = Math.round(size * ratio);
    const context = map.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    drawAxes(context, size);
    drawCodes(context, size);
    context.globalAlpha = 1;
    if (drawn) drawDraws(context);
    context.lineWidth = 2;
    context.strokeStyle = colour("ink");
    if (state.chosen !== null) {
      const [x, y] = toScreen(places[state.chosen]);
      context.strokeRect(x - 9, y - 9, 18, 18);
    }
    const [x, y] = toScreen(state.cursor);
    context.beginPath();
    context.arc(x, y, 7, 0, 2 * Math.PI);
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      context.moveTo(x + 7 * dx, y + 7 * dy);
      context.lineTo(x + 13 * dx, y + 13 * dy);
    }
    context.stroke();
  }

  function nearest(at) {
    const [x, y] = toScreen(at);
    let best = 0, least = Infinity;
    places.forEach((place, n) => {
      const [u, v] = toScreen(place), distance = Math.hypot(u - x, v - y);
      if (distance < least) [best, least] = [n, distance];
    });
    return {n: best, distance: least};
  }

  function moveTo(at) {
    state.cursor = at.map((value, a) => Math.min(Math.max(value, view.low[a]), view.high[a]));
    schedule();
  }

  // --- The chart ---------------------------------------------------------------------------------------------------

  const svg = (name, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };

  function limits(reference) {
    const K = page.numSamples, {guide, prior, later} = drawn;
    const ends = [guide.estimates[K - 1], prior.estimates[K - 1], ...later.map(([, value]) => value)];
    const known = reference ? [reference.low, reference.high, reference.value] : [];
    const shown = [...guide.estimates, ...ends, ...known].filter(Number.isFinite);
    const high = Math.max(...shown, ...prior.estimates.filter(Number.isFinite)), last = ends[ends.length - 1];
    // The prior's first draws may be thousands of nats below: its line comes in from below the chart.
    const low = Math.min(...shown, high - 2 * (high - (Number.isFinite(last) ? last : high)));
    const width = Math.max(high - low, 1);
    return [low - 0.06 * width, high + 0.08 * width];
  }

  function drawChart() {
    const width = element("chart").clientWidth;
    if (!width || !drawn) return;
    const height = width < 450 ? 230 : 270, left = 52, right = 62, top = 12, bottom = 38;
    const reference = referenceOf(state.chosen), [low, high] = limits(reference);
    const most = drawn.later.length ? drawn.later[drawn.later.length - 1][0] : page.numSamples;
    const x = (k) => left + Math.log(k) / Math.log(Math.max(most, 2)) * (width - left - right);
    const y = (v) => top + (high - v) / (high - low) * (height - top - bottom);
    const root = svg("svg", {viewBox: `0 0 ${width} ${height}`, height, role: "img"});
    root.append(svg("title", {}, chartWords(reference)));
    const clip = svg("clipPath", {id: "inside"});
    clip.append(svg("rect", {x: left, y: top, width: width - left - right, height: height - top - bottom}));
    root.append(clip);

    const step = niceStep(high - low, 5), digits = step < 1 ? (step < 0.1 ? 2 : 1) : 0;
    for (let v = Math.ceil(low / step) * step; v <= high; v += step) {
      root.append(svg("line", {class: "grid", x1: left, x2: width - right, y1: y(v), y2: y(v)}));
      root.append(svg("text", {x: left - 6, y: y(v) + 4, "text-anchor": "end"}, fixed(v, digits)));
    }
    for (let k = 1; k <= most; k *= 10) {
      root.append(svg("text", {x: x(k), y: height - bottom + 17, "text-anchor": "middle"}, whole(k)));
    }
    root.append(svg("text", {x: width - right, y: height - 4, "text-anchor": "end"}, "draws K"));
    root.append(svg("text", {x: 0, y: height - 4}, "estimate of log p(x), nats"));

    const inside = svg("g", {"clip-path": "url(#inside)"}), ends = [];
    if (reference) {
      const from = y(reference.high), to = y(reference.low), span = {x1: left, x2: width - right};
      const band = {x: left, width: width - left - right, y: from, height: Math.max(to - from, 1)};
      inside.append(svg("rect", {class: "reference", ...band}));
      inside.append(svg("line", {class: "reference", ...span, y1: y(reference.value), y2: y(reference.value)}));
      ends.push(["reference", "log p(x)", y(reference.value)]);
    }
    inside.append(svg("line", {class: "now", x1: x(state.draws), x2: x(state.draws), y1: top, y2: height - bottom}));
    const line = (points) => points.filter(([, v]) => Number.isFinite(v))
      .map(([k, v], i) => `${i ? "L" : "M"}${x(k).toFixed(1)} ${Math.min(y(v), 1e5).toFixed(1)}`).join("");
    const K = page.numSamples;
    for (const name of ["prior", "guide"]) {
      const points = Array.from(drawn[name].estimates, (value, k) => [k + 1, value]);
      inside.append(svg("path", {class: name, d: line(points)}));
      if (name === "prior" && drawn.later.length) {
        inside.append(svg("path", {class: "prior later", d: line([points[K - 1], ...drawn.later])}));
      }
      const now = drawn[name].estimates[state.draws - 1];
      if (Number.isFinite(now)) inside.append(svg("circle", {class: name, cx: x(state.draws), cy: y(now), r: 4}));
    }
    root.append(inside);
    const last = drawn.later.length ? drawn.later[drawn.later.length - 1][1] : drawn.prior.estimates[K - 1];
    if (Number.isFinite(last)) ends.push(["prior", "prior", y(last)]);
    if (drawn.later.length === 0) ends.push(["guide", "guide", y(drawn.guide.estimates[K - 1])]);
    else if (Number.isFinite(drawn.guide.estimates[K - 1])) {
      const end = drawn.guide.estimates[K - 1], below = !reference || end <= reference.value;
      root.append(svg("text", {class: "halo guide", x: x(K) + 4, y: y(end) + (below ? 16 : -8)}, "guide"));
    }
    ends.sort((a, b) => a[2] - b[2]);
    for (let i = 1; i < ends.length; i++) ends[i][2] = Math.max(ends[i][2], ends[i - 1][2] + 15);
    for (const [name, text, at] of ends) {
      const corner = {x: width - right + 6, y: Math.min(at + 4, height - bottom)};
      root.append(svg("text", {class: `halo ${name}`, ...corner}, text));
    }
    element("chart").replaceChildren(root);
  }

  function referenceOf(n) {
    const {value, low, high} = page.reference;
    return value[n] === null || low[n] === null ? null : {value: value[n], low: low[n], high: high[n]};
  }

  function chartWords(reference) {
    const K = page.numSamples, [guide, prior] = ["guide", "prior"].map((name) => fixed(drawn[name].estimates[K - 1], 1));
    const truth = reference ? ` The reference is ${fixed(reference.value, 1)}.` : "";
    return `Estimates of log p(x) as draws are added. After ${K}: guide ${guide}, prior ${prior} nats.${truth}`;
  }

  // --- Words and numbers beside it ---------------------------------------------------------------------------------

  function showNumbers() {
    const K = state.draws, effective = {};
    element("draws-words").textContent = whole(K);
    element("draws").setAttribute("aria-valuetext", `${K} draws`);
    for (const name of ["guide", "prior"]) {
      const cells = document.querySelectorAll(`tr.${name} td`), {estimates, khat} = drawn[name];
      effective[name] = drawn[name].effective[K - 1];
      cells[0].textContent = Number.isFinite(estimates[K - 1]) ? fixed(estimates[K - 1], 1) : "\u2212\u221e";
      const few = effective[name] < 10 ? fixed(effective[name], 1) : whole(effective[name]);
      cells[1].textContent = `${few} of ${whole(K)}`;
      cells[2].textContent = K === page.numSamples ? khat.replace("-", "\u2212") : "\u2013";
      cells[2].title = `of all ${page.numSamples} draws`;
    }
    const counts = (value) => Math.max(1, Math.round(value)), reference = referenceOf(state.chosen);
    const sentence = `Of ${whole(K)} draws about ${counts(effective.guide)} of the guide\u2019s count, and `
      + `${counts(effective.prior)} of the prior\u2019s.`;
    const off = ["guide", "prior"].map((name) => reference && drawn[name].estimates[K - 1] - reference.value);
    const way = (value) => !Number.isFinite(value) ? "without a number yet"
      : Math.abs(value) < 0.05 ? "within 0.05 nats" : `${fixed(Math.abs(value), 1)} nats ${value < 0 ? "below" : "above"}`;
    const say = reference ? ` Against the level line: guide ${way(off[0])}, prior ${way(off[1])}.` : "";
    element("verdict").textContent = sentence + say;
  }

  function showReference() {
    const n = state.chosen, reference = referenceOf(n);
    element("reference").textContent = reference
      ? `The level line is log p(x) = ${fixed(reference.value)} nats, 95% interval ${fixed(reference.low)} to `
        + `${fixed(reference.high)}, as pvae.log_evidence found it by the proposal \u201c${page.reference.stage[n]}\u201d.`
      : "There is no level line: pvae.log_evidence left log p(x) of this datum unresolved, as "
        + `${page.reference.withheld[n]}.`;
    const late = page.later && page.later.draws[page.later.draws.length - 1];
    if (late) {
      element("reference").textContent += ` Dotted: the prior\u2019s estimate from up to ${whole(late)} draws, of which `
        + `the map shows ${whole(page.numSamples)}.`;
    }
  }

  function showKey() {
    element("map-key").innerHTML = state.chosen === null
      ? (isWord ? "Marks are labels, at the code E[z|x] of each datum." : "Marks are the codes E[z|x] of the data.")
      : "<b class=\"guide\">\u25cf guide draws</b> &nbsp; <b class=\"prior\">\u25cf prior draws</b> &nbsp; "
        + "The larger a dot, the more of the weight it has. \u25a1 is the datum\u2019s code.";
    const rest = latentDim - 2, held = state.chosen === null ? page.held : "the chosen datum\u2019s code";
    element("plane").textContent = page.plane
      + (rest > 0 ? ` What the map leaves out is held at ${held}. Points that look near may be far apart there.` : "");
  }

  function choose(n) {
    state.chosen = n;
    drawn = n === null ? null : unpackDraws(n);
    setDraws(page.numSamples);
    element("choice").value = n === null ? "" : String(n);
    element("hint").hidden = n !== null;
    element("answer").hidden = n === null;
    if (n !== null) {
      state.cursor = [...places[n]];
      showReference();
      showNumbers();
    }
    showDatum();
    showKey();
    schedule();
    say(n === null ? "No datum is chosen."
      : `Datum ${nameOf(n)}. ${chartWords(referenceOf(n))} ${element("verdict").textContent}`);
  }

  function setDraws(count) {
    state.draws = Math.min(Math.max(Math.round(count), 1), page.numSamples);
    element("draws").value = String(Math.round(200 * Math.log(state.draws) / Math.log(Math.max(page.numSamples, 2))));
    if (drawn) showNumbers();
    schedule();
  }

  let said = 0;
  function say(words) {
    clearTimeout(said);
    said = setTimeout(() => { element("live").textContent = words; }, 250);
  }

  // One drawing for each frame, however many events there were.
  let waiting = false;
  function schedule() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      drawMap();
      drawChart();
      showDecoded();
    });
  }

  // --- Events ------------------------------------------------------------------------------------------------------

  const at = (event) => {
    const box = map.getBoundingClientRect();
    return toPlane(event.clientX - box.left, event.clientY - box.top);
  };
  let pressed = null;
  map.addEventListener("pointerdown", (event) => {
    pressed = [event.clientX, event.clientY];
    map.setPointerCapture(event.pointerId);
    moveTo(at(event));
  });
  map.addEventListener("pointermove", (event) => moveTo(at(event)));
  map.addEventListener("pointerup", (event) => {
    const still = pressed && Math.hypot(event.clientX - pressed[0], event.clientY - pressed[1]) < 8;
    const found = nearest(at(event));
    pressed = null;
    if (still && found.distance < 24) choose(found.n);
  });
  map.addEventListener("keydown", (event) => {
    const step = (view.high[0] - view.low[0]) * (event.shiftKey ? 0.1 : 0.02);
    const moves = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1]}[event.key];
    if (moves) {
      moveTo(state.cursor.map((value, a) => value + step * moves[a]));
      const found = nearest(state.cursor);
      const where = page.axes.map((axis, a) => `${axis.short} ${fixed(state.cursor[a])}`).join(", ");
      say(`${where}. Nearest: datum ${nameOf(found.n)}.`);
    } else if (event.key === "Enter" || event.key === " ") choose(nearest(state.cursor).n);
    else if (event.key === "Escape") choose(null);
    else return;
    event.preventDefault();
  });

  const choice = element("choice");
  choice.append(new Option("choose one", ""));
  for (let n = 0; n < numData; n++) choice.append(new Option(nameOf(n), String(n)));
  choice.addEventListener("change", () => choose(choice.value === "" ? null : Number(choice.value)));
  const go = (step) => choose(((state.chosen ?? (step > 0 ? -1 : 0)) + step + numData) % numData);
  element("previous").addEventListener("click", () => go(-1));
  element("next").addEventListener("click", () => go(1));

  let playing = 0;
  const stop = () => { cancelAnimationFrame(playing); playing = 0; element("play").textContent = "Play"; };
  element("draws").addEventListener("input", (event) => {
    stop();
    const value = Number(event.target.value);
    setDraws(Math.exp(value / 200 * Math.log(page.numSamples)));
    element("draws").value = String(value);
  });
  element("play").addEventListener("click", () => {
    if (playing) return stop();
    element("play").textContent = "Stop";
    const began = performance.now(), datum = state.chosen;
    const frame = (now) => {
      const share = Math.min((now - began) / 6000, 1);
      if (datum !== state.chosen) return stop();
      setDraws(page.numSamples ** share);
      if (share < 1) playing = requestAnimationFrame(frame);
      else stop();
    };
    playing = requestAnimationFrame(frame);
  });

  // --- Beginning ---------------------------------------------------------------------------------------------------

  // The decoder here against torch's, at latents that were drawn when the page was written.
  function compare() {
    const {z, means} = page.examples, each = means.shape[1];
    let worst = 0;
    for (let n = 0; n < z.shape[0]; n++) {
      decode(z.data.subarray(n * latentDim, (n + 1) * latentDim)).forEach((value, e) => {
        const theirs = means.data[n * each + e];
        const off = Math.abs(value - theirs) / Math.max(1, Math.abs(theirs));
        worst = off <= worst ? worst : off; // nan is worst of all
      });
    }
    return worst;
  }

  const difference = compare(), agrees = difference <= 1e-4;
  element("about").textContent = (agrees
    ? `The decoder runs in this page, and agrees with PyTorch\u2019s to ${difference.toExponential(0).replace("-", "\u2212")}, as was just `
      + `measured at ${page.examples.z.shape[0]} latents. `
    : "The decoder in this page does not agree with PyTorch\u2019s: do not trust its pictures. ") + page.about;
  if (!agrees) element("about").style.fontWeight = "700";

  state.cursor = [...(page.start ?? [0, 0])];
  showDatum();
  showKey();
  new ResizeObserver(schedule).observe(document.body);
  isDark.addEventListener("change", () => { showDatum(); schedule(); });
  drawMap();
  showDecoded();

  return {decode, choose, state, difference, places, toScreen};
})();
