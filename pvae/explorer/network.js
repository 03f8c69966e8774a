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

  // One weight of a convolution joins pixel (i, j) of the smaller image with pixel (i * stride + u * dilation - padding,
  // ...) of the larger. This is where in the larger one, for each pixel of the smaller; -1 where there is none.
  function findPartners(o, u, v, [h, w], [height, width]) {
    const places = new Int32Array(h * w);
    for (let i = 0, n = 0; i < h; i++) for (let j = 0; j < w; j++, n++) {
      const row = i * o.stride[0] + u * o.dilation[0] - o.padding[0];
      const column = j * o.stride[1] + v * o.dilation[1] - o.padding[1];
      places[n] = row < 0 || row >= height || column < 0 || column >= width ? -1 : row * width + column;
    }
    return places;
  }

  const reach = (o, a) => o.dilation[a] * (o.weight.shape[2 + a] - 1) + 1;

  function biased(o, outputs, pixels) {
    const y = new Float64Array(outputs * pixels);
    if (o.bias) for (let c = 0; c < outputs; c++) y.fill(o.bias.data[c], c * pixels, (c + 1) * pixels);
    return y;
  }

  function conv2d(x, o) {
    const [inputs, ...large] = x.shape, [outputs, perGroup, kh, kw] = o.weight.shape, each = outputs / o.groups;
    const small = [0, 1].map((a) => Math.floor((large[a] + 2 * o.padding[a] - reach(o, a)) / o.stride[a]) + 1);
    const pixels = size(small), area = size(large), y = biased(o, outputs, pixels), moved = new Float64Array(pixels);
    for (let u = 0; u < kh; u++) for (let v = 0; v < kw; v++) {
      const places = findPartners(o, u, v, small, large);
      for (let a = 0; a < inputs; a++) {
        for (let n = 0; n < pixels; n++) moved[n] = places[n] < 0 ? 0 : x.data[a * area + places[n]];
        const group = Math.floor(a / perGroup), b = a % perGroup;
        for (let c = group * each; c < (group + 1) * each; c++) {
          const factor = o.weight.data[((c * perGroup + b) * kh + u) * kw + v], start = c * pixels;
          for (let n = 0; n < pixels; n++) y[start + n] += factor * moved[n];
        }
      }
    }
    return {data: Float32Array.from(y), shape: [outputs, ...small]};
  }

  function convTranspose2d(x, o) {
    const [inputs, ...small] = x.shape, [, perGroup, kh, kw] = o.weight.shape, each = inputs / o.groups;
    const large = [0, 1].map((a) =>
      (small[a] - 1) * o.stride[a] - 2 * o.padding[a] + reach(o, a) + o.outputPadding[a]);
    const outputs = perGroup * o.groups, pixels = size(small), area = size(large);
    const y = biased(o, outputs, area), sums = new Float64Array(pixels);
    for (let u = 0; u < kh; u++) for (let v = 0; v < kw; v++) {
      const places = findPartners(o, u, v, small, large);
      for (let c = 0; c < outputs; c++) {
        const group = Math.floor(c / perGroup), b = c % perGroup;
        sums.fill(0);
        for (let a = group * each; a < (group + 1) * each; a++) {
          const factor = o.weight.data[((a * perGroup + b) * kh + u) * kw + v], start = a * pixels;
          for (let n = 0; n < pixels; n++) sums[n] += factor * x.data[start + n];
        }
        for (let n = 0; n < pixels; n++) if (places[n] >= 0) y[c * area + places[n]] += sums[n];
      }
    }
    return {data: Float32Array.from(y), shape: [outputs, ...large]};
  }

  // Where each of `to` rows comes from, of `from`, rounded as torch does: by the factor asked for, which may differ from
  // that of the sizes.
  function findSources(from, to, factor) {
    const step = Math.fround(factor ? 1 / factor : from / to);
    return Array.from({length: to}, (_, i) => Math.min(Math.floor(Math.fround(i * step)), from - 1));
  }

  function upsample(x, o) { // nearest
    const [channels, height, width] = x.shape, [, h, w] = o.shape;
    const rows = findSources(height, h, o.factors[0]), columns = findSources(width, w, o.factors[1]);
    const y = new Float32Array(channels * h * w);
    for (let c = 0; c < channels; c++) for (let i = 0; i < h; i++) for (let j = 0; j < w; j++) {
      y[(c * h + i) * w + j] = x.data[(c * height + rows[i]) * width + columns[j]];
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
