"use strict";
// Draws every figure of the page, and redraws figures when a switch changes: visible series, log axes, smoothing.
(async () => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const hidden = new Set();
  let smoothing = 0;

  // exponential moving average of each series, unbiased: it starts at the series' first value
  function smoothed(rows) {
    const last = {};
    return rows.map(row => {
      const key = `${row.series} ${row.faint}`, made = {...row};
      for (const field of ["y", "low", "high"].filter(field => field in row)) {
        const before = last[key + field] ?? [0, 0];
        const [sum, weight] = [row[field], 1].map((value, i) => smoothing * before[i] + (1 - smoothing) * value);
        last[key + field] = [sum, weight];
        made[field] = sum / weight;
      }
      return made;
    });
  }

  const figures = all(".chart").map(box => {
    const {spec, scales, smooth} = specs[box.dataset.figure], source = spec.data.name, rows = spec.datasets[source];
    const shown = spec.params.find(param => param.name === "shown"), names = shown.value;
    let view;
    const seen = () => names.filter(name => !hidden.has(name));
    const data = () => structuredClone(smooth && smoothing ? smoothed(rows) : rows);  // a copy, since Vega modifies the rows
    return {
      async draw() {
        for (const input of all(".log", box.closest("figure"))) {
          const {axis} = input.dataset;
          spec.encoding[axis].scale = scales[axis][input.checked ? "log" : "linear"];
        }
        spec.datasets[source] = data();
        shown.value = seen();
        const tooltip = {disableDefaultStyle: true};
        const drawn = await vegaEmbed(box, spec, {actions: false, renderer: "svg", defaultStyle: false, tooltip});
        view?.finalize();
        view = drawn.view;
      },
      update: () => view?.signal("shown", seen()).data(source, data()).runAsync(),
      box,
    };
  });

  const update = () => figures.forEach(figure => figure.update());
  addEventListener("change", ({target}) => {
    if (target.matches(".log")) {
      figures.find(figure => figure.box === target.closest("figure").querySelector(".chart")).draw();
    } else if (target.matches(".series")) {
      hidden[target.checked ? "delete" : "add"](target.value);
      all(".series").filter(one => one.value === target.value).forEach(one => { one.checked = target.checked; });
      update();
    }
  });
  addEventListener("input", ({target}) => {
    if (!target.matches(".smoothing")) return;
    smoothing = Number(target.value);
    all(".smoothing").forEach(one => { one.value = smoothing; one.nextElementSibling.value = smoothing; });
    update();
  });
  for (const figure of figures) await figure.draw();
  document.documentElement.dataset.drawn = figures.length;
})();
