"use strict";

// The decoder in plain JavaScript. A value is {data: Float32Array, shape: [...]}, of one datum, without a batch
// dimension. Sums are kept in doubles and stored in float32.

const Network = (() => {
  function erf(x) {
    const t = Math.abs(x);
    if (t < 3) { // Maclaurin's series
      let term = x, sum = x;
      for (let n = 1; n < 80; n++) {
        term *= -x * x / n;
        sum += term / (2 * n + 1);
      }
      return 2 / Math.sqrt(Math.PI) * sum;
    }
    let fraction = 0; // of erfc, from its far end
    for (let n = 40; n > 0; n--) fraction = n / 2 / (t + fraction);
    return Math.sign(x) * (1 - Math.exp(-t * t) / (Math.sqrt(Math.PI) * (t + fraction)));
  }

  const sigmoid = (x) => (x >= 0 ? 1 / (1 + Math.exp(-x)) : Math.exp(x) / (1 + Math.exp(x)));
  const softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));
  const elu = (x, a) => (x > 0 ? x : a * Math.expm1(x));
  const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
  const softClip = (x, bound) => bound * Math.tanh(x / bound);

  // Of one entry, with the numbers that torch's modules have.
  const ENTRYWISE = {
    relu: (x) => Math.max(x, 0),
    leaky_relu: (x, o) => (x >= 0 ? x : o.slope * x),
    elu: (x, o) => elu(x, o.alpha),
    celu: (x, o) => (x > 0 ? x : o.alpha * Math.expm1(x / o.alpha)),
    selu: (x) => 1.0507009873554805 * elu(x, 1.6732632423543772),
    gelu: (x) => x / 2 * (1 + erf(x / Math.SQRT2)),
    gelu_tanh: (x) => x / 2 * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
    silu: (x) => x * sigmoid(x),
    mish: (x) => x * Math.tanh(softplus(x)),
    softplus: (x, o) => (o.beta * x > o.threshold ? x : softplus(o.beta * x) / o.beta),
    softsign: (x) => x / (1 + Math.abs(x)),
    tanh: (x) => Math.tanh(x),
    sigmoid: (x) => sigmoid(x),
    logsigmoid: (x) => -softplus(-x),
    hardtanh: (x, o) => clamp(x, o.low, o.high),
    hardsigmoid: (x) => clamp(x / 6 + 0.5, 0, 1),
    hardswish: (x) => x * clamp(x + 3, 0, 6) / 6,
    affine: (x, o) => x * o.factor + o.shift,
  };

  const size = (shape) => shape.reduce((a, b) => a * b, 1);

  function linear(x, o) {
    const [rows, columns] = o.weight.shape, w = o.weight.data, leading = x.data.length / columns;
    const y = new Float32Array(leading * rows);
    for (let l = 0; l < leading; l++) {
      for (let i = 0; i < rows; i++) {
        let sum = o.bias ? o.bias.data[i] : 0;
        for (let j = 0, at = i * columns; j < columns; j++, at++) sum += w[at] * x.data[l * columns + j];
        y[l * rows + i] = sum;
      }
    }
    return {data: y, shape: [...x.shape.slice(0, -1), rows]};
  }

  function conv2d(x, o) {
    const [, height, width] = x.shape, [outputs, perGroup, kh, kw] = o.weight.shape;
    const [sh, sw] = o.stride, [ph, pw] = o.padding, [dh, dw] = o.dilation;
    const h = Math.floor((height + 2 * ph - dh * (kh - 1) - 1) / sh) + 1;
    const w = Math.floor((width + 2 * pw - dw * (kw - 1) - 1) / sw) + 1;
    const y = new Float32Array(outputs * h * w), each = outputs / o.groups;
    for (let c = 0; c < outputs; c++) {
      const first = Math.floor(c / each) * perGroup;
      for (let i = 0; i < h; i++) for (let j = 0; j < w; j++) {
        let sum = o.bias ? o.bias.data[c] : 0;
        for (let b = 0; b < perGroup; b++) for (let u = 0; u < kh; u++) {
          const row = i * sh - ph + u * dh;
          if (row < 0 || row >= height) continue;
          for (let v = 0; v < kw; v++) {
            const column = j * sw - pw + v * dw;
            if (column < 0 || column >= width) continue;
            sum += o.weight.data[((c * perGroup + b) * kh + u) * kw + v]
              * x.data[((first + b) * height + row) * width + column];
          }
        }
        y[(c * h + i) * w + j] = sum;
      }
    }
    return {data: y, shape: [outputs, h, w]};
  }

  function convTranspose2d(x, o) {
    const [inputs, height, width] = x.shape, [, perGroup, kh, kw] = o.weight.shape;
    const [sh, sw] = o.stride, [ph, pw] = o.padding, [dh, dw] = o.dilation, [eh, ew] = o.outputPadding;
    const h = (height - 1) * sh - 2 * ph + dh * (kh - 1) + eh + 1;
    const w = (width - 1) * sw - 2 * pw + dw * (kw - 1) + ew + 1;
    const outputs = perGroup * o.groups, sums = new Float64Array(outputs * h * w), each = inputs / o.groups;
    if (o.bias) for (let c = 0; c < outputs; c++) sums.fill(o.bias.data[c], c * h * w, (c + 1) * h * w);
    for (let a = 0; a < inputs; a++) {
      const first = Math.floor(a / each) * perGroup;
      for (let i = 0; i < height; i++) for (let j = 0; j < width; j++) {
        const value = x.data[(a * height + i) * width + j];
        if (value === 0) continue;
        for (let b = 0; b < perGroup; b++) for (let u = 0; u < kh; u++) {
          const row = i * sh - ph + u * dh;
          if (row < 0 || row >= h) continue;
          for (let v = 0; v < kw; v++) {
            const column = j * sw - pw + v * dw;
            if (column < 0 || column >= w) continue;
            sums[((first + b) * h + row) * w + column]
              += value * o.weight.data[((a * perGroup + b) * kh + u) * kw + v];
          }
        }
      }
    }
    return {data: Float32Array.from(sums), shape: [outputs, h, w]};
  }

  function upsample(x, o) { // nearest
    const [channels, height, width] = x.shape, [, h, w] = o.shape;
    const y = new Float32Array(channels * h * w);
    for (let c = 0; c < channels; c++) for (let i = 0; i < h; i++) for (let j = 0; j < w; j++) {
      const row = Math.floor(i * height / h), column = Math.floor(j * width / w);
      y[(c * h + i) * w + j] = x.data[(c * height + row) * width + column];
    }
    return {data: y, shape: o.shape};
  }

  function perChannel(x, o) { // batch normalization in eval mode, and PReLU
    const channels = x.shape[0], each = x.data.length / channels, y = new Float32Array(x.data.length);
    for (let n = 0; n < y.length; n++) {
      const c = Math.floor(n / each), value = x.data[n];
      y[n] = o.negative
        ? (value >= 0 ? value : value * o.negative.data[c % o.negative.data.length])
        : value * o.factor.data[c] + o.shift.data[c];
    }
    return {data: y, shape: x.shape};
  }

  function layerNorm(x, o) {
    const each = size(o.shape), y = new Float32Array(x.data.length);
    for (let start = 0; start < y.length; start += each) {
      let mean = 0, square = 0;
      for (let n = 0; n < each; n++) mean += x.data[start + n] / each;
      for (let n = 0; n < each; n++) square += (x.data[start + n] - mean) ** 2 / each;
      for (let n = 0; n < each; n++) {
        const normal = (x.data[start + n] - mean) / Math.sqrt(square + o.eps);
        y[start + n] = normal * (o.weight ? o.weight.data[n] : 1) + (o.bias ? o.bias.data[n] : 0);
      }
    }
    return {data: y, shape: x.shape};
  }

  function residual(x, o) {
    const inner = run(o.layers, x);
    return {data: inner.data.map((value, n) => value + x.data[n]), shape: x.shape};
  }

  const LAYERS = {
    linear, conv2d, conv_transpose2d: convTranspose2d, upsample, per_channel: perChannel, layer_norm: layerNorm,
    residual, reshape: (x, o) => ({data: x.data, shape: o.shape}),
  };

  function run(layers, x) {
    for (const layer of layers) {
      if (layer.op in ENTRYWISE) {
        const f = ENTRYWISE[layer.op];
        x = {data: x.data.map((value) => f(value, layer)), shape: x.shape};
      } else {
        x = LAYERS[layer.op](x, layer);
      }
    }
    return x;
  }

  // The mean of p(x|z) for what the network gives; o.entries is the number of entries of x.
  const MEANS = {
    identity: (y, o) => y.slice(0, o.entries),
    sigmoid: (y, o) => y.slice(0, o.entries).map(sigmoid),
    units: (y, o) => y.slice(0, o.entries).map((value) => o.mean + o.scale * value),
    exp: (y, o) => y.slice(0, o.entries).map((value) => Math.exp(softClip(value, o.bound))),
    continuous_bernoulli: (y, o) => y.slice(0, o.entries).map((value) => {
      const l = softClip(value, o.bound), t = Math.abs(l);
      if (t < 0.05) return 0.5 + l / 12 - l ** 3 / 720 + l ** 5 / 30240;
      const below = 1 / t - 1 / Math.expm1(t);
      return l > 0 ? 1 - below : below;
    }),
    most_probable: (y, o) => Float32Array.from({length: o.entries}, (_, n) => {
      let best = 0;
      for (let c = 1; c < o.classes; c++) if (y[c * o.entries + n] > y[best * o.entries + n]) best = c;
      return best;
    }),
    discretized_logistic: (y, o) => Float32Array.from({length: o.entries}, (_, n) => {
      const top = o.levels - 1, loc = o.mean + o.scale * y[n];
      const s = o.fixed ?? o.scale * Math.exp(softClip(o.logScale + (o.own ? y[o.entries + n] : 0), o.bound));
      let sum = 0;
      for (let j = 0; j < top; j++) sum += sigmoid((loc - (j + 0.5) / top) / s);
      return sum / top;
    }),
  };

  // A function from z, an array of D numbers, to the mean of p(x|z), a Float32Array.
  function makeDecoder(spec) {
    return (z) => {
      const y = run(spec.layers, {data: Float32Array.from(z), shape: [z.length]});
      return MEANS[spec.mean.op](y.data, spec.mean);
    };
  }

  // Arrays of numbers, written in base64 with their type; where they are cited by number, in their place.
  const TYPES = {f32: Float32Array, u8: Uint8Array, u16: Uint16Array};

  function unpackArray(packed) {
    const bytes = Uint8Array.from(atob(packed.base64), (c) => c.charCodeAt(0));
    return {data: new TYPES[packed.type](bytes.buffer), shape: packed.shape};
  }

  function unpack(value) {
    if (Array.isArray(value)) return value.map(unpack);
    if (value === null || typeof value !== "object") return value;
    if (typeof value.base64 === "string") return unpackArray(value);
    return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, unpack(one)]));
  }

  return {makeDecoder, unpack};
})();

if (typeof module !== "undefined") module.exports = Network;
