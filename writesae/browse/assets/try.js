// The model with features changed beside the plain one, token by token.
"use strict";

(() => {
  const { $, make } = W;
  const [form, list, state] = ["ask", "edits", "state"].map($);
  const AMOUNT = { erase: null, scale: "factor", install: "strength" };
  let edits = [];
  let stop = null;

  const place = (e) => `L${e.layer}H${e.head}/${e.feature}`;
  const amount = (e) => (AMOUNT[e.kind] ? e[AMOUNT[e.kind]] : null);

  function parse(text) {
    const m = /^\s*L(\d{1,6})H(\d{1,6})[/:](\d{1,9})\s*$/i.exec(text) || /^\s*\/?(\d{1,6})[:/](\d{1,6})[:/](\d{1,9})\s*$/.exec(text);
    return m && { layer: +m[1], head: +m[2], feature: +m[3] };
  }

  // edit=scale:5:3:1258:2 in the address, once for each change; the prompt beside it.
  function fromAddress() {
    const asked = new URLSearchParams(location.search);
    edits = asked.getAll("edit").slice(0, 64).flatMap((text) => {
      const [kind, layer, head, feature, size] = text.split(":");
      const where = parse(`${layer}:${head}:${feature}`);
      if (!where || !(kind in AMOUNT)) return [];
      const by = AMOUNT[kind];
      return [{ kind, ...where, ...(by && { [by]: Number.isFinite(parseFloat(size)) ? parseFloat(size) : 2 }) }];
    });
    if (asked.get("prompt")) $("prompt").value = asked.get("prompt");
    if (/^\d{1,4}$/.test(asked.get("tokens") || "")) $("length").value = asked.get("tokens");
  }

  function address() {
    const asked = new URLSearchParams();
    for (const e of edits) asked.append("edit", [e.kind, e.layer, e.head, e.feature, amount(e)].filter((x) => x !== null).join(":"));
    if ($("prompt").value && $("prompt").value.length < 2000) asked.set("prompt", $("prompt").value);
    if ($("length").value !== "48") asked.set("tokens", $("length").value);
    const text = asked.toString().replaceAll("%3A", ":");
    history.replaceState(null, "", location.pathname + (text ? `?${text}` : ""));
  }

  function draw() {
    list.replaceChildren(
      ...edits.map((e, i) => {
        const item = make("li");
        item.append(make("b", "", e.kind), " ");
        item.appendChild(make("a", "", place(e))).href = W.link(e.layer, e.head, e.feature);
        const by = AMOUNT[e.kind];
        if (by) {
          const label = item.appendChild(make("label", "", e.kind === "scale" ? " × " : " with strength "));
          const field = label.appendChild(make("input"));
          Object.assign(field, { type: "number", step: "any", value: e[by] });
          field.setAttribute("aria-label", `${by} of ${place(e)}`);
          field.addEventListener("input", () => {
            if (Number.isFinite(field.valueAsNumber)) e[by] = field.valueAsNumber;
            address();
          });
        }
        const remove = item.appendChild(make("button", "plain", "Remove"));
        remove.type = "button";
        remove.setAttribute("aria-label", `Remove ${e.kind} ${place(e)}`);
        remove.addEventListener("click", () => {
          edits.splice(i, 1);
          draw();
          address();
          $("feature").focus();
        });
        return item;
      }),
    );
    if (!edits.length) list.appendChild(make("li", "none", "None yet."));
  }

  function kind() {
    $("amount-label").hidden = !AMOUNT[$("kind").value];
    const says = $("kind").selectedOptions[0].title;
    $("says").textContent = `${$("kind").value}: ${says}.`;
  }

  function add() {
    const where = parse($("feature").value);
    if (!where) {
      say("feature: expected one such as L5H3/1258", true);
      $("feature").focus();
      return;
    }
    const by = AMOUNT[$("kind").value];
    const size = $("amount").valueAsNumber;
    edits.push({ kind: $("kind").value, ...where, ...(by && { [by]: Number.isFinite(size) ? size : 2 }) });
    $("feature").value = "";
    say("");
    draw();
    address();
  }

  function say(text, bad) {
    state.className = bad ? "bad" : "";
    state.textContent = text;
  }

  async function run() {
    if (!$("prompt").value || stop) return;
    if (!edits.length) {
      say("changes: expected at least one, got none", true);
      $("feature").focus();
      return;
    }
    address();
    stop = new AbortController();
    $("go").disabled = true;
    $("stop").disabled = false;
    $("sides").hidden = false;
    $("done").hidden = true;
    const sides = { plain: [], edited: [] };
    for (const name of Object.keys(sides)) {
      $(name).replaceChildren(make("span", "prompt", W.plain($("prompt").value)));
      $(name).parentElement.setAttribute("aria-busy", "true");
    }
    let drawn = 0;
    const token = ({ side, token, id }) => {
      const element = $(side).appendChild(make("span", "new", W.plain(token).replaceAll("\n", "⏎\n")));
      sides[side].push({ id, element });
      drawn ||= requestAnimationFrame(() => {
        drawn = 0;
        mark(sides);
      });
    };
    say("generating…");
    let end = "stopped";
    let bad = false;
    try {
      const answer = await W.ask("api/compare", { prompt: $("prompt").value, edits, max_new_tokens: +$("length").value }, stop.signal);
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        const parts = (rest + value).split("\n");
        rest = parts.pop();
        for (const part of parts) {
          const event = JSON.parse(part);
          if (event.error) throw new Error(event.error);
          if (event.side in sides) token(event);
          if (event.done) {
            end = "done";
            facts(event.done, sides);
          }
        }
        const many = Math.max(sides.plain.length, sides.edited.length);
        if (many % 10 === 0) say(`generating… ${many} tokens`);
      }
    } catch (error) {
      if (error.name !== "AbortError") {
        end = error.message;
        bad = true;
      }
    }
    const many = `${sides.plain.length} and ${sides.edited.length} tokens`;
    stop = null;
    mark(sides);
    const first = sides.plain.findIndex((x, i) => x.id !== sides.edited[i]?.id) + 1;
    const differs = first < 1 ? "no difference" : `they differ from token ${first} on`;
    say(bad ? end : `${end}: ${many}, ${differs}`, bad);
    for (const name of Object.keys(sides)) $(name).parentElement.removeAttribute("aria-busy");
    $("go").disabled = false;
    $("stop").disabled = true;
  }

  // Marks the tokens of either side that are not in the longest run of tokens, gaps allowed, which both have.
  function mark({ plain, edited }) {
    const [n, m] = [plain.length, edited.length];
    const best = Array.from({ length: n + 1 }, () => new Uint16Array(m + 1)); // of what is left from (i, j) on
    for (let i = n - 1; i >= 0; i--) {
      for (let j = m - 1; j >= 0; j--) {
        best[i][j] = plain[i].id === edited[j].id ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]);
      }
    }
    let [i, j] = [0, 0];
    const flag = (x, differs) => x.element.classList.toggle("differs", differs);
    while (i < n && j < m) {
      if (plain[i].id === edited[j].id) {
        flag(plain[i++], false);
        flag(edited[j++], false);
      } else if (best[i + 1][j] >= best[i][j + 1]) flag(plain[i++], true);
      else flag(edited[j++], true);
    }
    // The side that is ahead, as long as both are written, is not marked: the other may yet say the same.
    while (i < n) flag(plain[i++], !stop);
    while (j < m) flag(edited[j++], !stop);
  }

  // What the model's side adds at the end: where each change acted, and how far predictions moved (KL, in nats).
  function facts({ applied, kl }, { plain }) {
    const shown = [];
    (applied || []).forEach((n, i) => {
      if (edits[i]) shown.push([`${edits[i].kind} ${place(edits[i])}`, n ? `at ${W.count(n)} token${n === 1 ? "" : "s"}` : "never fired"]);
    });
    if (kl && kl.length) {
      const most = kl.indexOf(Math.max(...kl));
      shown.push(["KL, mean", `${W.number(kl.reduce((a, b) => a + b, 0) / kl.length)} nats`]);
      shown.push(["KL, largest", `${W.number(kl[most])} nats at token ${most + 1}`]);
      plain.forEach(({ element }, i) => i < kl.length && (element.dataset.v = `KL ${W.number(kl[i])} nats`));
    }
    $("done").replaceChildren(
      ...shown.map(([name, x]) => {
        const pair = make("div");
        pair.append(make("dt", "", name), make("dd", "", x));
        return pair;
      }),
    );
    $("done").hidden = !shown.length;
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
  });
  $("feature").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    add();
  });
  $("add").addEventListener("click", add);
  $("stop").addEventListener("click", () => stop && stop.abort());
  $("kind").addEventListener("change", kind);
  $("prompt").addEventListener("change", address);
  $("length").addEventListener("change", address);
  fromAddress();
  kind();
  draw();
})();
