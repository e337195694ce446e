"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const panel = document.getElementById("detail");
  const tokens = [...document.querySelectorAll("[data-t]")];
  let shown = null;
  const make = (tag, text, name) => {
    const one = document.createElement(tag);
    if (text !== undefined) one.textContent = text;
    if (name) one.className = name;
    return one;
  };
  const candidates = (rows) => {
    const table = make("table");
    for (const [text, probability, here] of rows) {
      const row = table.appendChild(make("tr", undefined, here ? "here" : ""));
      row.appendChild(make("td", text));
      const bar = row.appendChild(make("td")).appendChild(make("div", undefined, "bar"));
      bar.style.width = `${100 * probability}%`;
      row.appendChild(make("td", probability < 0.0001 ? "<0.0001" : probability.toFixed(4)));
    }
    return table;
  };
  const show = (span) => {
    if (span === shown) return;
    if (shown) { shown.classList.remove("on"); shown.tabIndex = -1; }
    shown = span;
    span.classList.add("on");
    span.tabIndex = 0;
    const one = data[Number(span.dataset.t)];
    panel.replaceChildren(make("h3", one.heading));
    for (const side of one.sides) {
      if (side.name) panel.appendChild(make("h4", side.name));
      const list = panel.appendChild(make("dl"));
      for (const [name, words] of side.said) { list.appendChild(make("dt", name)); list.appendChild(make("dd", words)); }
      if (side.top.length) panel.appendChild(candidates(side.top));
    }
  };
  const of = (event) => (event.target instanceof Element ? event.target.closest("[data-t]") : null);
  for (const name of ["mouseover", "focusin", "click"]) {
    document.addEventListener(name, (event) => { const span = of(event); if (span) show(span); });
  }
  document.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 };
    if (!of(event) || !(event.key in steps)) return;
    const place = tokens.indexOf(of(event)) + steps[event.key];
    tokens[Math.min(Math.max(place, 0), tokens.length - 1)].focus();
    event.preventDefault();
  });
  const first = document.querySelector(".picked") || tokens[0];
  if (first) show(first);
})();
