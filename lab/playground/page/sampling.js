"use strict";
// How the next token is chosen from logits.

// Probabilities of the first `count` tokens at temperature 1.
function softmax(logits, count) {
  const probabilities = logits.slice(0, count);
  let highest = -Infinity, sum = 0;
  for (const logit of probabilities) highest = Math.max(highest, logit);
  for (let i = 0; i < count; i++) sum += probabilities[i] = Math.exp(probabilities[i] - highest);
  for (let i = 0; i < count; i++) probabilities[i] /= sum;
  return probabilities;
}

// The n most probable tokens, the first one first, as [token, probability].
function mostProbable(probabilities, n) {
  const best = [];
  probabilities.forEach((probability, token) => {
    if (best.length === n && probability <= best[n - 1][1]) return;
    let place = best.length;
    while (place > 0 && best[place - 1][1] < probability) place--;
    best.splice(place, 0, [token, probability]);
    if (best.length > n) best.pop();
  });
  return best;
}

// A sampler: temperature 0 takes the most probable token; the same seed gives the same tokens.
class Sampler {
  constructor(temperature, seed) {
    this.temperature = temperature;
    this.state = seed >>> 0;
  }

  random() {  // mulberry32: a number in [0, 1) from 32 bits of state
    this.state = (this.state + 0x6d2b79f5) >>> 0;
    let x = Math.imul(this.state ^ (this.state >>> 15), this.state | 1);
    x ^= x + Math.imul(x ^ (x >>> 7), x | 61);
    return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32;
  }

  next(logits, count) {
    if (this.temperature === 0) return mostProbable(logits.subarray(0, count), 1)[0][0];
    const probabilities = softmax(logits.map(logit => logit / this.temperature), count);
    let rest = this.random();
    for (let token = 0; token < count; token++) {
      rest -= probabilities[token];
      if (rest < 0) return token;
    }
    return mostProbable(probabilities, 1)[0][0];  // the sum may be just below 1
  }
}
