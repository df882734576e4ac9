// Your own text: what fires at each token, by token or by feature.
"use strict";

(() => {
  const { $, make } = W;
  const MOST = 200; // features listed
  const [form, state, result, tokens] = ["ask", "state", "result", "tokens"].map($);
  const body = $("features").tBodies[0];
  let answer = null;
  let at = -1; // chosen token
  let only = -1; // chosen feature

  const share = (feature, activation) => {
    const { max } = answer.features[feature];
    return max ? activation / max : 1;
  };

  function draw() {
    const best = answer.tokens.map(() => null);
    for (const [position, feature, activation] of answer.firings) {
      if (activation === null || (only >= 0 && feature !== only)) continue;
      const s = share(feature, activation);
      if (best[position] === null || s > best[position].s) best[position] = { s, feature, activation };
    }
    [...tokens.children].forEach((element, i) => {
      const b = best[i];
      element.className = `t a${b ? W.level(b.s) : 0}${i === at ? " here" : ""}`;
      if (b) element.dataset.v = `${answer.features[b.feature].name}  ${W.number(b.activation)}`;
      else delete element.dataset.v;
      element.setAttribute("aria-selected", i === at);
    });
    list();
  }

  function list() {
    const strongest = new Map();
    for (const [position, feature, activation] of answer.firings) {
      if (activation === null || (at >= 0 && position !== at)) continue;
      if (!strongest.has(feature) || strongest.get(feature) < activation) strongest.set(feature, activation);
    }
    const sorted = [...strongest].sort((a, b) => share(...b) - share(...a));
    body.replaceChildren(
      ...sorted.slice(0, MOST).map(([feature, activation]) => {
        const about = answer.features[feature];
        const row = make("tr", feature === only ? "at" : "");
        const name = row.appendChild(make("th"));
        name.scope = "row";
        if (about.link) name.appendChild(make("a", "", about.name)).href = W.root + about.link;
        else name.textContent = about.name;
        row.appendChild(make("td", "toks")).append(...W.chips(about.writes));
        row.appendChild(make("td", "num", W.number(activation)));
        const cell = row.appendChild(make("td", "num"));
        const shade = cell.appendChild(make("button", "plain", about.max ? W.percent(activation / about.max) : "–"));
        shade.type = "button";
        shade.title = feature === only ? "Shade by all features again" : "Shade the text by this feature alone";
        shade.setAttribute("aria-pressed", feature === only);
        shade.setAttribute("aria-label", `${shade.textContent} per cent of ${about.name}’s largest; ${shade.title}`);
        shade.addEventListener("click", () => {
          only = only === feature ? -1 : feature;
          draw();
          says();
        });
        return row;
      }),
    );
    $("h-features").replaceChildren(at < 0 ? "Strongest features" : "At ", at < 0 ? "" : W.chip(W.token(answer.tokens[at])));
    $("all").hidden = at < 0;
    if (!sorted.length) body.appendChild(make("tr")).appendChild(make("td", "none", "Nothing fires here.")).colSpan = 4;
  }

  function says() {
    const by = only < 0 ? "the strongest feature of each token" : answer.features[only].name;
    $("shading").textContent = `Shaded by ${by}, as a share of that feature’s largest activation in the store.`;
  }

  function choose(i) {
    at = i === at ? -1 : i;
    draw();
    if (at >= 0) tokens.setAttribute("aria-activedescendant", `t${at}`);
    else tokens.removeAttribute("aria-activedescendant");
  }

  async function run() {
    const text = $("text").value;
    if (!text) return;
    state.className = "";
    state.textContent = "running…";
    form.querySelector(".go").disabled = true;
    const site = $("site") && $("site").value;
    const start = performance.now();
    try {
      const got = await (await W.ask("api/text", { text, sites: site ? [site.split(":").map(Number)] : null })).json();
      answer = got;
      at = only = -1;
      tokens.replaceChildren(
        ...got.tokens.map((t, i) => {
          const element = make("span", "t", W.plain(t).replaceAll("\n", "⏎\n"));
          element.id = `t${i}`;
          element.setAttribute("role", "option");
          return element;
        }),
      );
      result.hidden = false;
      draw();
      says();
      const seconds = ((performance.now() - start) / 1000).toFixed(1);
      state.textContent = `${W.count(got.firings.length)} firings of ${W.count(got.features.length)} features at ${W.count(got.tokens.length)} tokens, ${seconds} s`;
    } catch (error) {
      state.className = "bad";
      state.textContent = error.message;
    }
    form.querySelector(".go").disabled = false;
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  $("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
  });
  tokens.addEventListener("click", (event) => {
    const i = [...tokens.children].indexOf(event.target.closest(".t"));
    if (i >= 0) choose(i);
  });
  let here = -1;
  tokens.addEventListener("keydown", (event) => {
    const all = tokens.children;
    if (["ArrowRight", "ArrowLeft"].includes(event.key) && all.length) {
      event.preventDefault();
      here = (here + (event.key === "ArrowRight" ? 1 : -1) + all.length) % all.length;
      all[here].scrollIntoView({ block: "nearest" });
      W.hint(all[here], `${W.token(answer.tokens[here])}  ${all[here].dataset.v || "silent"}`);
      tokens.setAttribute("aria-activedescendant", `t${here}`);
    } else if (event.key === "Enter" && here >= 0) choose(here);
  });
  $("all").addEventListener("click", () => choose(at));
})();
