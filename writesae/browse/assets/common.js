// What every page has: how numbers and tokens are written (as show.py), colours, keys, the value of a token.
// Text of a store reaches the page as textContent alone, never as markup.
"use strict";

const W = (() => {
  const LEVELS = 10;
  const LONGEST = 40;
  const HIDDEN =
    /[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\u{e0000}-\u{e007f}]|[\ud800-\udfff]/gu;
  const body = document.body;
  const root = body.dataset.root;
  const $ = (id) => document.getElementById(id);

  // ---- writing -----------------------------------------------------------------------------------------------------

  const plain = (text) => text.replace(HIDDEN, (c) => `\\u{${c.codePointAt(0).toString(16)}}`);

  function token(text) {
    text = plain(text);
    if ([...text.slice(0, 2 * LONGEST + 2)].length > LONGEST) text = [...text.slice(0, 2 * LONGEST)].slice(0, LONGEST - 1).join("") + "…";
    text = text.replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));
    return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "(empty)";
  }

  const count = (x) => Math.trunc(x).toLocaleString("en-US");

  function number(x) {
    if (x === null || Number.isNaN(x)) return "–";
    const size = Math.abs(x);
    let text;
    if (size === Infinity) text = "∞";
    else if (size === 0 || (size >= 0.01 && size < 10)) text = size.toFixed(2);
    else if (size >= 10 && size < 1000) text = size.toFixed(size < 100 ? 1 : 0);
    else text = size.toExponential(1).replace("e+", "e");
    return x < 0 ? `−${text}` : text;
  }

  function percent(x) {
    if (x === null || !Number.isFinite(x)) return "–";
    const p = 100 * x;
    if (p >= 10) return p.toFixed(1);
    if (p >= 1) return p.toFixed(2);
    if (p >= 0.1) return p.toFixed(3);
    return p <= 0 ? "0" : p >= 0.0001 ? p.toFixed(4) : "<0.0001";
  }

  function level(share) {
    return share > 0 ? Math.min(LEVELS, Math.max(1, Math.ceil(LEVELS * share))) : 0;
  }

  // An element with a class and, as text, what is given.
  function make(tag, kind, text) {
    const it = document.createElement(tag);
    if (kind) it.className = kind;
    if (text !== undefined) it.textContent = text;
    return it;
  }

  function link(layer, head, feature) {
    const path = body.dataset.link.replace("{layer}", layer).replace("{head}", head).replace("{feature}", feature);
    return root + path;
  }

  // A token that stands alone, as `token` writes it; its leading spaces are faint.
  function chip(t) {
    const it = make("bdi", "tok");
    const spaces = /^␣*/.exec(t)[0];
    if (spaces) it.appendChild(make("i", "", spaces));
    it.append(t.slice(spaces.length));
    return it;
  }

  function chips(tokens) {
    return tokens.map(chip);
  }

  // ---- colours -----------------------------------------------------------------------------------------------------

  const THEMES = ["", "light", "dark"];
  const NAMES = { "": "as the system’s", light: "light", dark: "dark" };
  const theme = $("theme");

  function show(name) {
    theme.title = `Colours: ${NAMES[name]}`;
    theme.setAttribute("aria-label", theme.title);
  }
  show(document.documentElement.dataset.theme || "");
  theme.addEventListener("click", () => {
    const now = document.documentElement.dataset.theme || "";
    const next = THEMES[(THEMES.indexOf(now) + 1) % THEMES.length];
    if (next) document.documentElement.dataset.theme = next;
    else delete document.documentElement.dataset.theme;
    try {
      if (next) localStorage.setItem("writesae-theme", next);
      else localStorage.removeItem("writesae-theme");
    } catch { /* storage is off: kept for this page alone */ }
    show(next);
  });

  // ---- back to the list as it was left ------------------------------------------------------------------------------

  try {
    const left = sessionStorage.getItem(`writesae-list ${new URL(body.dataset.list, location.href).pathname}`);
    if (left && left.startsWith("?")) for (const a of document.querySelectorAll("a[data-back]")) a.search = left;
  } catch { /* storage is off: the list begins anew */ }

  // ---- the value of a token ------------------------------------------------------------------------------------------

  const tip = $("tip");
  let shown = null;

  function hint(at, text) {
    if (shown) shown.classList.remove("on");
    shown = at;
    tip.hidden = !at;
    if (!at) return;
    at.classList.add("on");
    tip.textContent = text;
    const box = at.getClientRects()[0] || at.getBoundingClientRect();
    const left = Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 4));
    const above = box.top - tip.offsetHeight - 4;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 4}px`;
  }

  document.addEventListener("pointerover", (event) => {
    const at = event.target.closest ? event.target.closest("[data-v]") : null;
    if (at) hint(at, at.dataset.v);
    else if (shown && !shown.contains(event.target)) hint(null);
  });
  document.addEventListener("scroll", () => shown && hint(null), { passive: true, capture: true });

  // Arrows in a text move from one token with a value to the next.
  document.addEventListener("keydown", (event) => {
    const text = document.activeElement;
    if (!text || !text.matches("p.text[role=group]") || !["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    const marks = [...text.querySelectorAll("[data-v]")];
    if (!marks.length) return;
    const here = text.querySelector(".on");
    const start = here ? marks.indexOf(here) : -1;
    const next = event.key === "ArrowRight" ? start + 1 : start < 0 ? marks.length - 1 : start - 1;
    const to = marks[(next + marks.length) % marks.length];
    to.scrollIntoView({ block: "nearest" });
    hint(to, `${to.textContent.trim()}: ${to.dataset.v}`);
    event.preventDefault();
  });
  document.addEventListener("focusout", (event) => event.target.matches("p.text") && hint(null));

  // ---- keys ---------------------------------------------------------------------------------------------------------

  const keys = $("keys");
  $("help").addEventListener("click", () => keys.showModal());

  const typing = (at) => at && (at.matches("input, textarea, select") || at.isContentEditable);
  const page = { search: null, next: null, previous: null, leave: null }; // what a page does at these keys

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || keys.open) return;
    if (typing(event.target)) return;
    const done = () => event.preventDefault();
    if (event.key === "?") {
      done();
      keys.showModal();
    } else if (event.key === "/") {
      done();
      if (page.search) page.search();
      else location.href = `${body.dataset.list}#search`;
    } else if (event.key === "j" && page.next) {
      done();
      page.next();
    } else if (event.key === "k" && page.previous) {
      done();
      page.previous();
    } else if (event.key === "Escape") {
      if (shown) hint(null);
      else if (page.leave) page.leave();
    }
  });
  if (!body.classList.contains("list")) page.leave = () => document.querySelector("a.brand").click();

  // A question to the server; its answer, or an error in words.
  async function ask(path, question, signal) {
    const answer = await fetch(root + path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(question),
      signal,
    });
    if (answer.ok) return answer;
    let words = `the server answered ${answer.status}`;
    try {
      words = (await answer.json()).error || words;
    } catch { /* no JSON: the status must do */ }
    throw new Error(words);
  }

  return { $, plain, token, count, number, percent, level, make, link, chip, chips, hint, page, ask, root, LEVELS };
})();
