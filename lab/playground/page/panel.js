"use strict";
// The panel of a run: its text, its facts, and the pictures of the selected token.

const CANDIDATES = 8;

function bytesInWords(bytes) {
  return bytes < 1000 ? `${bytes} B` : bytes < 1e6 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

function rounded(number, digits) {
  return number.toLocaleString("en", {maximumSignificantDigits: digits});
}

function percent(share) {
  return share > 0 && share < 0.001 ? "<0.1 %" : `${rounded(100 * share, 2)} %`;
}

// A token as a label: white space and bytes that are no character alone are made visible.
function labelOf(text) {
  if (text.includes("\ufffd") || text === "") return "part of a character";
  return `“${text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣")}”`;
}

class Panel {
  constructor(run, parent) {
    this.run = run;
    this.tokenizer = tokenizerOf(run);
    this.steps = [];
    this.root = document.getElementById("panel").content.firstElementChild.cloneNode(true);
    this.root.dataset.run = run.name;
    this.part("name").textContent = run.name;
    this.part("text").setAttribute("aria-label", `Text of ${run.name}: arrow keys select a token`);
    parent.append(this.root);
    this.select = this.select.bind(this);
    this.pane = new TextPane(this.part("text"), this.select);
    this.part("heads").addEventListener("change", () => this.tint());
    this.showFacts();
  }

  part(name) {
    return this.root.querySelector(`[data-part=${name}]`);
  }

  async load() {
    this.model ??= await Model.load(this.run);
  }

  start(request) {
    this.request = request;
    this.sampler = new Sampler(request.temperature, request.seed);
    this.decode = decoderOf(this.tokenizer);
    this.tokens = [this.run.begin_token, ...this.tokenizer.encode(request.prompt)];
    this.promptLength = this.tokens.length;
    this.length = this.promptLength + request.count;
    this.steps = [];
    this.selected = null;  // null: the last token
    this.isRunning = true;
    this.generationSeconds = 0;
    this.lowest = this.highest = null;  // decays by head, over the text so far
    this.largest = null;  // norms of changes, likewise
    this.model.reset();
    this.pane.clear();
  }

  finish() {
    this.isRunning = false;
    this.draw();
  }

  get isDone() {
    return this.steps.length === this.length;
  }

  get generated() {
    return Math.max(0, this.steps.length - this.promptLength);
  }

  // Read the next token of the prompt, or sample one and read it.
  async advance() {
    const i = this.steps.length, before = this.steps[i - 1], isPrompt = i < this.promptLength;
    if (!isPrompt) this.tokens.push(this.sampler.next(this.logits, this.run.text_tokens));
    const token = this.tokens[i], isBegin = i === 0;
    const {logits, seconds, changes, decays, attention} = await this.model.step(token);
    if (Number.isNaN(logits[0])) throw new Error(`${this.run.name} gave logits that are not numbers`);
    if (!isPrompt) this.generationSeconds += seconds;
    this.logits = logits;
    const probabilities = softmax(logits, this.run.text_tokens);
    this.steps.push({
      token, isPrompt, isBegin, attention,
      text: isBegin ? "" : this.decode(token),
      probability: before?.probabilities[token],
      changes: changes.flatMap(layer => layer.changes),
      norms: changes.flatMap(layer => layer.norms),
      decays: decays.flatMap(layer => layer.values),
      top: mostProbable(probabilities, CANDIDATES),
      probabilities,
    });
    if (before) delete before.probabilities;
    if (i === 0) this.makePictures(changes, decays, attention);
    const step = this.steps[i];
    this.lowest = step.decays.map(({low}, row) => Math.min(low, this.lowest?.[row] ?? low));
    this.highest = step.decays.map(({high}, row) => Math.max(high, this.highest?.[row] ?? high));
    this.largest = step.changes.map((change, row) => Math.max(change, this.largest?.[row] ?? change));
  }

  // The pictures' rows are known after the first token.
  makePictures(changes, decays, attention) {
    const mixers = this.run.layers;
    const rows = (layers, values) => layers.flatMap(each => [...values(each)].map((_, head, {length}) =>
      ({layer: each.layer, mixer: mixers[each.layer], head, heads: length})));
    if (this.strips) return;
    const changeRows = rows(changes, each => each.changes), decayRows = rows(decays, each => each.values);
    const column = this.run.tokenizer === "bytes" ? 12 : 34;
    this.strips = new Strips(this.part("changes"), changeRows, column, this.select);
    this.halfLives = new HalfLives(this.part("decays"), decayRows);
    this.part("candidates-figure").hidden = false;
    this.part("changes-figure").hidden = !changeRows.length;
    this.part("decays-figure").hidden = !decayRows.length;
    this.part("attention-figure").hidden = !attention.length;
    this.part("no-attention").hidden = attention.length > 0;
    this.root.querySelectorAll(".beside-attention").forEach(words => { words.hidden = !attention.length; });
    const heads = this.part("heads");
    heads.append(new Option("all heads of all layers, mean", "mean"));
    attention.forEach(({layer, heads: count}, place) => {
      for (let head = 0; head < count; head++) {
        heads.append(new Option(`layer ${layer + 1}, head ${head + 1}`, `${place} ${head}`));
      }
    });
    heads.append(new Option("no tint", "none"));
  }

  // Select token i; null, when the pointer leaves, goes back to the last token while the model generates.
  select(i) {
    if (!this.steps.length || (i === null && !this.isRunning)) return;
    this.selected = i;
    this.draw();
  }

  draw(withPictures = true) {
    const last = this.steps.length - 1;
    for (let i = this.pane.spans.length; i <= last; i++) this.pane.append(this.steps[i]);
    this.showFacts();
    if (last < 0) return;
    const i = this.selected ?? last;
    this.pane.mark(i);
    if (!withPictures) return;
    this.describe(i);
    this.showCandidates(i);
    this.tint();
    const {steps} = this;
    this.strips.show({
      length: steps.length,
      text: at => steps[at].isBegin ? "▸" : steps[at].text || "·",
      value: (at, row) => steps[at].changes[row] / (this.largest[row] || 1),
      number: (at, row) => percent(steps[at].changes[row] / (steps[at].norms[row] || 1)),
    }, i, this.selected === null);
    this.halfLives.show(steps[i].decays.map(({middle}) => middle), this.lowest, this.highest);
  }

  showFacts() {
    const {run, model} = this, speed = this.generated / this.generationSeconds;
    this.part("parameters").textContent = run.parameters.toLocaleString("en");
    this.part("layers").textContent = run.summary;
    const grows = run.states.some(({shape}) => shape.slice(1).some(size => typeof size === "string"));
    const state = model && this.steps.length ? bytesInWords(model.stateBytes) : "–";
    this.part("state").textContent = `${state}, ${grows ? "grows with the text" : "constant"}`;
    this.part("speed").textContent = speed > 0
      ? `${Math.round(speed).toLocaleString("en")} tokens/s (${(1000 / speed).toFixed(2)} ms per token)` : "–";
  }

  describe(i) {
    const {token, text, isBegin, isPrompt, probability, changes, norms} = this.steps[i];
    const label = isBegin ? "the begin token" : `${labelOf(text)} (id ${token})`;
    const words = [`Token ${i} of ${this.steps.length - 1}: ${label}`, isPrompt ? "given" : "generated"];
    if (probability !== undefined) words.push(`the model expected it with probability ${(100 * probability).toFixed(1)}\u00a0%`);
    if (changes.length) {
      const [change, norm] = [changes, norms].map(all => Math.hypot(...all));
      words.push(`state of norm ${rounded(norm, 3)} changed by ${rounded(change, 3)}`);
    }
    this.part("selected").textContent = `${words.join(", ")}.`;
  }

  showCandidates(i) {
    const next = this.steps[i + 1]?.token;
    this.part("candidates").replaceChildren(...this.steps[i].top.map(([token, probability]) => {
      const row = document.createElement("li");
      const text = new TextDecoder().decode(this.tokenizer.bytes(token));
      row.innerHTML = '<span class="label"></span><span class="bar"><i></i></span><output></output>';
      row.querySelector(".label").textContent = text.includes("\ufffd") ? `byte ${token}` : labelOf(text);
      row.querySelector("i").style.width = `${100 * probability}%`;
      row.querySelector("output").value = `${(100 * probability).toFixed(1)} %`;
      if (token === next) row.className = "chosen";
      return row;
    }));
  }

  // Tint the text by the attention of the selected token.
  tint() {
    const i = this.selected ?? this.steps.length - 1, choice = this.part("heads").value;
    const {attention} = this.steps[i] ?? {attention: []};
    if (!attention.length || choice === "none") return this.pane.tint(null);
    const maps = attention.flatMap((layer, n) => [...Array(layer.heads).keys()]
      .filter(head => choice === "mean" || choice === `${n} ${head}`)
      .map(head => weightsOf(layer, head, i)));
    return this.pane.tint(maps[0].map((_, n) => maps.reduce((sum, map) => sum + map[n], 0)));
  }
}

// Weights by which token i reads the tokens 0 to i. Keys are the slots of the cache, then the token itself; token p is
// in slot p mod the number of slots.
function weightsOf({weights, heads, slots}, head, i) {
  const first = head * weights.length / heads, result = new Float32Array(i + 1);
  for (let p = Math.max(0, i - slots); p < i; p++) result[p] = weights[first + p % slots];
  result[i] = weights[first + slots];
  return result;
}
