"use strict";
// The controls, and the loop that generates.
(() => {
  const part = name => document.getElementById(name);
  const form = part("form"), status = part("status"), reduced = matchMedia("(prefers-reduced-motion: reduce)");
  const panels = RUNS.map(run => new Panel(run, part("panels")));
  const FRAME = 16, CALM = 250;  // milliseconds between two drawings
  let current = null;  // the generation in progress: {stopped, finished}

  const shown = () => {
    const choice = new FormData(form).get("shown");
    return choice === "all" ? panels : [panels[Number(choice)]];
  };

  function say(text, state) {
    status.setAttribute("aria-live", state === "generating" ? "off" : "polite");
    status.textContent = text;
    document.documentElement.dataset.state = state;
    part("stop").disabled = state !== "generating";
  }

  function readRequest() {
    const values = new FormData(form);
    return {
      prompt: values.get("prompt").replaceAll("\r\n", "\n"),
      temperature: Number(values.get("temperature")),
      seed: Number(values.get("seed")),
      count: Number(values.get("count")),
    };
  }

  const pause = () => new Promise(resolve => { setTimeout(resolve); });

  // Generate with the panels that are shown, token by token in turn, until all are done or it is stopped. A generation
  // in progress is stopped first.
  async function generate() {
    if (!form.reportValidity()) return;
    const run = {stopped: false}, chosen = shown(), request = readRequest(), stopping = stop();
    current = run;
    run.finished = (async () => {
      await stopping;
      if (run.stopped) return;
      try {
        say(`Loading ${chosen.map(({run: {name}}) => name).join(", ")} …`, "generating");
        await Promise.all(chosen.map(panel => panel.load()));
        chosen.forEach(panel => panel.start(request));
        let drawn = performance.now();
        while (!run.stopped && !chosen.every(panel => panel.isDone)) {
          for (const panel of chosen) if (!panel.isDone) await panel.advance();
          if (performance.now() - drawn < (reduced.matches ? CALM : FRAME)) continue;
          chosen.forEach(panel => panel.draw(!reduced.matches));
          say(progress(chosen), "generating");
          await pause();  // let the browser draw, and hear keys
          drawn = performance.now();
        }
        chosen.forEach(panel => panel.finish());
        say(`${run.stopped ? "Stopped" : "Done"}: ${progress(chosen)}`, "idle");
      } catch (error) {
        say(`This failed: ${error.message ?? error}`, "failed");
      }
    })();
    await run.finished;
  }

  function progress(chosen) {
    const [{steps, promptLength, generated}] = chosen;
    return generated ? `${generated} tokens generated` : `${steps.length} of ${promptLength} tokens of the prompt read`;
  }

  async function stop() {
    if (current) current.stopped = true;
    await current?.finished;
  }

  function show() {
    const chosen = shown();
    panels.forEach(panel => { panel.root.hidden = !chosen.includes(panel); });
    part("panels").classList.toggle("beside", chosen.length > 1);
  }

  // Swapping models continues the same prompt, unless the model has done so.
  async function swap() {
    const request = panels.find(panel => panel.request)?.request;
    show();
    if (request && shown().some(panel => JSON.stringify(panel.request) !== JSON.stringify(readRequest()))) {
      await generate();
    } else {
      shown().forEach(panel => panel.draw());
    }
  }

  form.addEventListener("submit", event => {
    event.preventDefault();
    generate();
  });
  form.addEventListener("change", ({target}) => {
    if (target.name === "shown") swap();
  });
  const showTemperature = () => {
    const {value} = form.temperature;
    part("temperature-value").value = value === "0" ? "0 (greedy)" : value;
  };
  form.temperature.addEventListener("input", showTemperature);
  showTemperature();  // browsers keep values over a reload
  part("stop").addEventListener("click", stop);
  addEventListener("keydown", event => {
    if (event.key === "Escape") stop();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
  });

  const choices = part("choices");
  [...RUNS.map(({name}, i) => [name, i]), ...RUNS.length > 1 ? [["side by side", "all"]] : []].forEach(([name, value]) => {
    const label = document.createElement("label"), input = document.createElement("input");
    Object.assign(input, {type: "radio", name: "shown", value, checked: value === 0});
    label.append(input, name);
    choices.append(label);
  });
  choices.hidden = RUNS.length === 1;
  show();
  say("Ready.", "idle");
})();
