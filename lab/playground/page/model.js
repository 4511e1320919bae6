"use strict";
// A model in ONNX Runtime: one step reads one token, and gives logits and what is measured inside.

const ARRAYS = {float32: Float32Array, float64: Float64Array, int64: BigInt64Array, int32: Int32Array, bool: Uint8Array};

let runtime;
function startRuntime() {
  runtime ??= (async () => {
    const [wasm, glue] = await Promise.all([assets.get("runtime/wasm"), assets.get("runtime/glue")]);
    ort.env.wasm.numThreads = 1;  // threads need headers that a folder on disk does not have
    ort.env.wasm.wasmBinary = wasm;
    ort.env.wasm.wasmPaths = {mjs: URL.createObjectURL(new Blob([glue], {type: "text/javascript"}))};
  })();
  return runtime;
}

// Norm of the finite numbers of a stretch: logarithms in a state begin at -Infinity.
function norm(array, start, end) {
  let sum = 0;
  for (let i = start; i < end; i++) if (Number.isFinite(array[i])) sum += array[i] ** 2;
  return Math.sqrt(sum);
}

class Model {
  static async load(run) {
    await startRuntime();
    const options = {executionProviders: ["wasm"], logSeverityLevel: 3};  // errors only
    const session = await ort.InferenceSession.create(await assets.get(run.file), options);
    return new Model(run, session);
  }

  constructor(run, session) {
    this.run = run;
    this.session = session;
    this.memories = run.states
      .filter(({name}) => name.endsWith(".memory"))
      .map(state => ({...state, heads: headsOf(state, run)}));
    this.heads = new Map(this.memories.map(({layer, heads}) => [layer, heads]));
    this.caches = new Map(run.states.filter(({name}) => name.endsWith(".keys")).map(({name, layer}) => [layer, name]));
    this.reset();
  }

  // Go back to the state before the first token.
  reset() {
    this.states = {};
    for (const {name, dtype, shape, initial} of this.run.states) {
      const sizes = shape.map(size => size === "batch" ? 1 : typeof size === "string" ? 0 : size);
      const array = new ARRAYS[dtype](sizes.reduce((product, size) => product * size, 1));
// one number for all elements, or numbers of one row in nested lists; infinities are strings
      const values = [initial].flat(Infinity).map(dtype === "int64" ? BigInt : Number);
      if (values.length === 1) array.fill(values[0]);
      else array.set(values);
      this.states[name] = new ort.Tensor(dtype, array, sizes);
    }
  }

  get stateBytes() {
    return Object.values(this.states).reduce((sum, state) => sum + state.data.byteLength, 0);
  }

  // Read one token. Returns logits, the seconds that the model took, and per layer: changes and norms of the state by
  // head, decays by head, and attention by head and key.
  async step(token) {
    const feeds = {tokens: new ort.Tensor("int64", BigInt64Array.of(BigInt(token)), [1, 1]), ...this.states};
    const start = performance.now();
    const outputs = await this.session.run(feeds);
    const seconds = (performance.now() - start) / 1000;
    const before = this.states;
    this.states = Object.fromEntries(this.run.states.map(({name}) => [name, outputs[`new_${name}`]]));
    const result = {logits: outputs.logits.data, seconds, changes: [], decays: [], attention: []};
    for (const {name, layer, heads} of this.memories) {
      result.changes.push({layer, ...changeOf(before[name].data, this.states[name].data, heads)});
    }
    for (const {name, layer, kind} of this.run.views) {
      const {data, dims} = outputs[name];
      if (kind === "decay") result.decays.push({layer, values: decaysOf(data, this.heads.get(layer))});
      if (kind === "attention") {
        const slots = before[this.caches.get(layer)].dims[1];
        result.attention.push({layer, heads: dims[1], weights: data.slice(), slots});
      }
    }
    return result;
  }
}

// Number of heads of a layer: a state [batch heads keys values] has heads, unless its decays are by channel.
function headsOf({layer, shape}, {views}) {
  const decay = views.find(view => view.kind === "decay" && view.layer === layer);
  return shape.length === 4 && [undefined, shape[1]].includes(decay?.shape[2]) ? shape[1] : 1;
}

// Norm of each head's state, and of its change.
function changeOf(before, after, heads) {
  const size = after.length / heads, places = [...Array(heads).keys()];
  const difference = after.map((value, i) => value - before[i]);
  return {
    changes: places.map(head => norm(difference, head * size, (head + 1) * size)),
    norms: places.map(head => norm(after, head * size, (head + 1) * size)),
  };
}

// Decays as {low, middle, high}, one per head. Those of channels are one, with the median and the range.
function decaysOf(decays, heads) {
  if (decays.length === heads) return [...decays].map(decay => ({low: decay, middle: decay, high: decay}));
  const sorted = decays.slice().sort();
  return [{low: sorted[0], middle: sorted[sorted.length >> 1], high: sorted.at(-1)}];
}
