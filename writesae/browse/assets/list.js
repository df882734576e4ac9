// The list: what is asked for stands in the address; a window of rows is drawn, whatever their number.
"use strict";

(() => {
  const { $, page } = W;
  const [form, grid, view, space, rowsAt, found] = ["filters", "grid", "view", "space", "rows", "found"].map($);
  const head = grid.querySelector(".head");
  const names = [...head.children].map((c) => c.dataset.name);
  const RANGES = ["density", "win_rate", "cosine"];
  const PER_CENT = new Set(["density", "win_rate"]);
  const FIRST_DOWN = new Set(["count", "density", "max", "mean", "win_rate", "cosine"]);
  const TALLEST = 8e6; // pixels; browsers draw nothing beyond some 17 million
  let table = null;
  let rows = new Uint32Array(0);
  let sort = "count";
  let down = true;
  let at = -1; // place of the chosen row in `rows`
  let top = 0; // pixels scrolled, of a list of full height
  let height = rowsAt.firstElementChild ? rowsAt.firstElementChild.offsetHeight : 34;
  let pool = [];

  // ---- the address ----------------------------------------------------------------------------------------------------

  function fromAddress() {
    const asked = new URLSearchParams(location.search);
    for (const field of form.elements) if (field.name) field.value = asked.get(field.name) || "";
    sort = names.includes(asked.get("sort")) ? asked.get("sort") : "count";
    down = asked.has("up") ? false : asked.has("down") ? true : FIRST_DOWN.has(sort);
    shown();
  }

  function address() {
    const asked = new URLSearchParams();
    for (const field of form.elements) if (field.name && field.value.trim() !== "") asked.set(field.name, field.value);
    if (sort !== "count") asked.set("sort", sort);
    if (down !== FIRST_DOWN.has(sort)) asked.set(down ? "down" : "up", "");
    const text = asked.toString().replace(/=(&|$)/g, "$1");
    const search = text ? `?${text}` : "";
    history.replaceState(history.state, "", location.pathname + search);
    try {
      sessionStorage.setItem(`writesae-list ${location.pathname}`, search || "?");
    } catch { /* storage is off */ }
  }

  // What stands beside the fields: which column sorts, whether anything is filtered.
  function shown() {
    for (const cell of head.children) {
      if (cell.dataset.name === sort) cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    }
    const filters = [...$("rest").querySelectorAll("input, select")].filter((x) => x.value !== "").length;
    $("more").textContent = filters ? `Filters (${filters})` : "Filters";
    $("clear").hidden = !filters && !$("q").value;
  }

  function query() {
    const value = (id) => ($(id) ? $(id).value : "");
    const ranges = {};
    for (const name of RANGES) {
      const ends = ["min", "max"].map((end) => {
        const text = value(`${name}-${end}`);
        return text === "" || Number.isNaN(+text) ? null : +text / (PER_CENT.has(name) ? 100 : 1);
      });
      if (ends[0] !== null || ends[1] !== null) ranges[name] = ends;
    }
    const site = value("site");
    const partition = value("partition");
    return {
      q: value("q"),
      in: value("in"),
      site: site ? site.split(":").map(Number) : undefined,
      partition: partition === "" ? undefined : +partition,
      ranges,
      sort,
      down,
    };
  }

  function update() {
    address();
    shown();
    if (!table) return;
    const start = performance.now();
    rows = table.select(query());
    at = -1;
    top = 0;
    size();
    view.scrollTop = 0;
    draw();
    const all = rows.length === table.n;
    found.replaceChildren(W.make("b", "", W.count(rows.length)), all ? " features" : ` of ${W.count(table.n)} features`);
    if (!rows.length) found.append(": none is like that. ", W.make("span", "", "Try fewer filters, or part of a token."));
    grid.setAttribute("aria-rowcount", rows.length + 1);
    performance.measure("writesae-search", { start, end: performance.now() });
  }

  // ---- drawing --------------------------------------------------------------------------------------------------------

  const full = () => rows.length * height;
  const tallest = () => Math.min(full(), TALLEST);
  const ratio = () => (full() - view.clientHeight) / Math.max(1, tallest() - view.clientHeight);

  function size() {
    const first = rowsAt.querySelector(".row:not([hidden])");
    if (first && first.offsetHeight) height = first.offsetHeight;
    space.style.height = `${Math.max(tallest(), 1)}px`;
    rowsAt.classList.add("window");
    rowsAt.style.height = `${view.clientHeight}px`;
  }

  function line() {
    const row = W.make("div", "row");
    row.setAttribute("role", "row");
    for (const name of names) {
      const cell = row.appendChild(W.make("div", `c ${name}`));
      cell.setAttribute("role", "gridcell");
      if (name === "feature") cell.appendChild(document.createElement("a")).tabIndex = -1;
    }
    return row;
  }

  const WRITE = {
    density: W.percent,
    win_rate: W.percent,
    count: W.count,
    partition: (x) => table.partitions[x] ?? "–",
  };

  function fill(element, place) {
    const row = rows[place];
    element.hidden = row === undefined;
    element.classList.toggle("at", place === at);
    if (row === undefined || element.row === row) {
      if (row !== undefined) element.setAttribute("aria-rowindex", place + 2);
      return;
    }
    element.row = row;
    element.id = `r${row}`;
    element.setAttribute("aria-rowindex", place + 2);
    names.forEach((name, i) => {
      const cell = element.children[i];
      const column = table.columns[name];
      if (name === "feature") {
        const [layer, headAt] = table.sites[table.columns.site[row]];
        cell.firstChild.textContent = table.name(row);
        if (!table.columns.linked || table.columns.linked[row]) cell.firstChild.href = W.link(layer, headAt, table.columns.feature[row]);
        else cell.firstChild.removeAttribute("href");
      } else if (name === "promoted" || name === "answers") {
        const width = column.length / table.n;
        const tokens = [];
        for (let j = row * width; j < (row + 1) * width; j++) {
          if (column[j] < table.tokens.length) tokens.push(W.token(table.tokens[column[j]]));
        }
        cell.replaceChildren(...W.chips(tokens));
      } else cell.textContent = (WRITE[name] || W.number)(column[row]);
    });
  }

  function draw() {
    const many = Math.min(rows.length, Math.ceil(view.clientHeight / height) + 2);
    while (pool.length < many) pool.push(rowsAt.appendChild(line()));
    const first = Math.max(0, Math.min(Math.floor(top / height), rows.length - 1));
    // The same element serves the same place as long as it is seen: what is hovered or read out does not change.
    pool.forEach((element, i) => {
      const place = first + ((((i - first) % pool.length) + pool.length) % pool.length);
      if (place - first >= many) {
        element.hidden = true;
        return;
      }
      fill(element, place);
      element.style.transform = `translateY(${place * height - top}px)`;
    });
    const chosen = at >= first && at < first + many ? `r${rows[at]}` : null;
    if (chosen) grid.setAttribute("aria-activedescendant", chosen);
    else grid.removeAttribute("aria-activedescendant");
  }

  // A list taller than a page may be is scrolled by two rules: a turn of the wheel moves as many pixels as anywhere, a
  // leap (the bar dragged, Home, End) goes to that share of the whole; when all is still, the bar is set right.
  let before = 0;
  let still = 0;
  view.addEventListener("scroll", () => {
    const now = view.scrollTop;
    const step = now - before;
    before = now;
    const end = tallest() - view.clientHeight;
    if (now <= 0) top = 0;
    else if (now >= end - 1) top = Math.max(0, full() - view.clientHeight);
    else if (full() <= TALLEST) top = now;
    else if (Math.abs(step) > 2 * view.clientHeight) top = now * ratio();
    else top = Math.max(0, Math.min(top + step, full() - view.clientHeight));
    if (table) draw();
    clearTimeout(still);
    still = setTimeout(settle, 150);
  }, { passive: true });

  function settle() {
    if (table) bar();
    history.replaceState({ top, at }, "");
  }

  function bar() {
    if (full() > TALLEST || view.scrollTop !== top) view.scrollTop = top / ratio();
    before = view.scrollTop;
  }

  function go(to) {
    top = Math.max(0, Math.min(to, full() - view.clientHeight));
    view.scrollTop = top / Math.max(1, ratio());
    before = view.scrollTop;
    draw();
  }

  function choose(place) {
    if (!table || !rows.length) return;
    at = Math.max(0, Math.min(place, rows.length - 1));
    if (at * height < top) go(at * height);
    else if ((at + 1) * height > top + view.clientHeight) go((at + 1) * height - view.clientHeight);
    else draw();
  }

  // ---- what the reader does -----------------------------------------------------------------------------------------

  let typed = 0;
  form.addEventListener("input", () => {
    clearTimeout(typed);
    typed = setTimeout(update, 40);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(update));
  $("more").addEventListener("click", () => {
    const open = $("rest").classList.toggle("open");
    $("more").setAttribute("aria-expanded", open);
  });
  head.addEventListener("click", (event) => {
    const cell = event.target.closest("[data-name]");
    if (!event.target.closest("button") || !cell) return;
    down = sort === cell.dataset.name ? !down : FIRST_DOWN.has(cell.dataset.name);
    sort = cell.dataset.name;
    update();
  });

  const visible = () => Math.max(1, Math.floor(view.clientHeight / height) - 1);
  const MOVES = {
    ArrowDown: () => at + 1,
    ArrowUp: () => at - 1,
    PageDown: () => at + visible(),
    PageUp: () => at - visible(),
    Home: () => 0,
    End: () => rows.length - 1,
  };
  grid.addEventListener("keydown", (event) => {
    if (event.target.closest("button, a")) return;
    if (MOVES[event.key]) {
      event.preventDefault();
      choose(MOVES[event.key]());
    } else if (event.key === "Enter" && at >= 0) {
      const element = $(`r${rows[at]}`);
      if (element) element.querySelector("a").click();
    }
  });
  $("q").addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "Enter") {
      event.preventDefault();
      clearTimeout(typed);
      update();
      grid.focus();
      choose(0);
    } else if (event.key === "Escape") {
      event.preventDefault();
      if ($("q").value) {
        $("q").value = "";
        update();
      } else grid.focus();
    }
  });
  page.search = () => {
    $("q").focus();
    $("q").select();
  };
  page.next = () => {
    grid.focus();
    choose(at + 1);
  };
  page.previous = () => {
    grid.focus();
    choose(at - 1);
  };
  rowsAt.addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (row && row.row !== undefined) at = rows.indexOf(row.row);
    history.replaceState({ top, at }, "");
  });

  // ---- beginning -------------------------------------------------------------------------------------------------------

  addEventListener("popstate", () => {
    fromAddress();
    update();
  });
  new ResizeObserver(() => {
    if (!table) return;
    const place = top / height;
    size();
    pool.forEach((element) => (element.row = undefined));
    go(place * height);
  }).observe(view);

  fromAddress();
  if (location.hash === "#search") page.search();
  const asked = location.search !== "";
  if (asked) grid.setAttribute("aria-busy", "true");
  Table.load(W.root).then(
    (loaded) => {
      table = loaded;
      pool = [...rowsAt.children];
      for (const row of pool) for (const a of row.querySelectorAll("a")) a.tabIndex = -1;
      while (pool.length > 60) pool.pop().remove();
      const back = history.state;
      update();
      grid.removeAttribute("aria-busy");
      if (back && back.top > 0) {
        at = Number.isInteger(back.at) ? Math.min(back.at, rows.length - 1) : -1;
        go(back.top);
      }
      document.documentElement.dataset.ready = "";
    },
    (error) => {
      grid.removeAttribute("aria-busy");
      found.textContent = `The table could not be read (${error.message}); these are the features with most firings.`;
    },
  );
})();
