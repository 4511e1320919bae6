"use strict";
// The text of a run, token by token: tokens can be selected, and tinted by attention.
class TextPane {
  // `select(i)` is called with the index of a token, or with null when the pointer leaves the text.
  constructor(element, select) {
    this.element = element;
    this.spans = [];
    this.selected = null;
    const indexOf = target => this.spans.indexOf(target.closest("span"));
    element.addEventListener("pointerover", ({target}) => {
      if (target !== element) select(indexOf(target));
    });
    element.addEventListener("pointerleave", () => select(null));
    element.addEventListener("keydown", event => {
      const last = this.spans.length - 1, at = this.selected ?? last;
      const place = {ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last}[event.key];
      if (place === undefined || last < 0) return;
      event.preventDefault();
      select(Math.min(Math.max(place, 0), last));
    });
  }

  clear() {
    this.element.replaceChildren();
    this.spans = [];
    this.selected = null;
  }

  append({text, isBegin, isPrompt}) {
    const span = document.createElement("span");
    span.textContent = text;
    if (isBegin) span.className = "begin";
    else if (isPrompt) span.className = "prompt";
    if (text === "\n") span.classList.add("newline");
    this.spans.push(span);
    this.element.append(span);
  }

  // Mark a token; the pane scrolls to it, unless the pointer is in the pane.
  mark(i) {
    this.spans[this.selected]?.removeAttribute("aria-current");
    this.selected = i;
    const span = this.spans[i], pane = this.element;
    span?.setAttribute("aria-current", "true");
    if (!span || pane.matches(":hover")) return;
    const top = span.offsetTop - pane.offsetTop, bottom = top + span.offsetHeight;
    if (top < pane.scrollTop || bottom > pane.scrollTop + pane.clientHeight) pane.scrollTop = bottom - pane.clientHeight / 2;
  }

  // Tint the tokens 0, 1, ... by weights relative to the largest; without weights, none is tinted.
  tint(weights) {
    const largest = Math.max(...weights ?? [], 1e-9);
    this.spans.forEach((span, i) => {
      const share = Math.round(100 * (weights?.[i] ?? 0) / largest);
      if (share) span.style.setProperty("--tint", `${share}%`);
      else span.style.removeProperty("--tint");
    });
  }
}
