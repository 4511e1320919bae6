"use strict";
// A picture of decays: one row per head, with its half-life on a logarithmic axis, and the range over the text.
class HalfLives {
  static low = -1;  // decimal logarithms of the ends of the axis, in tokens
  static high = 4;

  // Tokens after which half of a memory is left, if each token keeps this share.
  static of(decay) {
    if (decay >= 1) return Infinity;
    return decay <= 0 ? 0 : Math.log(0.5) / Math.log(decay);
  }

  static place(halfLife) {
    const share = (Math.log10(halfLife) - HalfLives.low) / (HalfLives.high - HalfLives.low);
    return 100 * Math.min(Math.max(share, 0), 1);
  }

  static words(halfLife) {
    if (halfLife === Infinity) return "∞";
    if (halfLife >= 9950) return ">10k";
    return halfLife < 10 ? halfLife.toFixed(1) : Math.round(halfLife).toLocaleString("en");
  }

  constructor(box, rows) {
    this.rows = rows.map(({layer, mixer, head, heads}) => {
      const row = document.createElement("div");
      const label = heads > 1 ? `${layer + 1} ${mixer} · ${head + 1}` : `${layer + 1} ${mixer}`;
      row.innerHTML = '<span></span><span class="track"><i class="range"></i><i class="dot"></i></span><output></output>';
      row.firstChild.textContent = label;
      box.append(row);
      return {range: row.querySelector(".range"), dot: row.querySelector(".dot"), output: row.querySelector("output")};
    });
  }

  // Show decays by row, of one token; lowest and highest are those of the text.
  show(decays, lowest, highest) {
    this.rows.forEach(({range, dot, output}, i) => {
      const [now, from, to] = [decays, lowest, highest].map(all => HalfLives.of(all[i]));
      dot.style.left = `${HalfLives.place(now)}%`;
      range.style.left = `${HalfLives.place(from)}%`;
      range.style.right = `${100 - HalfLives.place(to)}%`;
      output.value = HalfLives.words(now);
    });
  }
}
