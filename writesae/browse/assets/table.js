// The table in typed arrays: loading, searching, filtering and sorting, with no part of the page.
// 589,824 rows: a search looks at 10 token numbers a row, a sort is a radix sort of whole numbers.
"use strict";

const TYPES = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, float32: Float32Array, float64: Float64Array };

class Table {
  // Reads data/ beside the page. Throws an Error in words where a file is missing or of another size.
  static async load(root) {
    const get = async (name, how) => {
      const answer = await fetch(`${root}data/${name}`);
      if (!answer.ok) throw new Error(`data/${name}: the server answered ${answer.status}`);
      return answer[how]();
    };
    const about = await get("table.json", "json");
    const table = new Table();
    table.n = about.n;
    table.sites = about.sites;
    table.partitions = about.partitions;
    table.unknown = about.unknown;
    table.columns = {};
    table.orders = new Map();
    const tokens = get("tokens.json", "json");
    await Promise.all(
      Object.entries(about.columns).map(async ([name, { type, width }]) => {
        const bytes = await get(`${name}.bin`, "arrayBuffer");
        const column = new TYPES[type](bytes); // little-endian, as every machine with a browser is
        if (column.length !== about.n * width) throw new Error(`data/${name}.bin: expected ${about.n * width} numbers, got ${column.length}`);
        table.columns[name] = column;
      }),
    );
    table.tokens = await tokens;
    table.lower = table.tokens.map((t) => t.toLowerCase());
    return table;
  }

  name(row) {
    const [layer, head] = this.sites[this.columns.site[row]];
    return `L${layer}H${head}/${this.columns.feature[row]}`;
  }

  // What a search means: {site, feature, token, exact}; each may be missing.
  static parse(text) {
    const whole = text.trim();
    const place = /^L(\d{1,6})H(\d{1,6})(?:[/:](\d{1,10}))?$/i.exec(whole) || /^(\d{1,6})[:/](\d{1,6})[:/](\d{1,10})$/.exec(whole);
    if (place) return { layer: +place[1], head: +place[2], feature: place[3] === undefined ? null : +place[3] };
    const quoted = /^"(.+)"$/s.exec(whole);
    if (quoted) return { token: quoted[1], exact: true };
    if (!whole) return {};
    return { token: whole.toLowerCase(), exact: false, number: /^\d{1,10}$/.test(whole) ? +whole : null };
  }

  // Rows that a query asks for, in its order, as a Uint32Array.
  // query: {q, in, site: [layer, head], partition, ranges: {column: [least, most]}, sort, down}
  select(query) {
    const { n, columns } = this;
    const order = this.order(query.sort, query.down);
    const wanted = Table.parse(query.q || "");
    let keep = null; // one flag a row; null keeps all
    const narrow = (test) => {
      if (!keep) {
        keep = new Uint8Array(n);
        for (let i = 0; i < n; i++) keep[i] = test(i);
      } else for (let i = 0; i < n; i++) if (keep[i]) keep[i] = test(i);
    };
    const atSite = (layer, head) => {
      const site = this.sites.findIndex(([x, y]) => x === layer && y === head);
      narrow((i) => columns.site[i] === site);
    };
    if (wanted.layer !== undefined) {
      atSite(wanted.layer, wanted.head);
      if (wanted.feature !== null) narrow((i) => columns.feature[i] === wanted.feature);
    }
    if (wanted.token) keep = this.withToken(wanted, query.in);
    if (query.site) atSite(...query.site);
    if (query.partition !== undefined && columns.partition) narrow((i) => columns.partition[i] === query.partition);
    for (const [name, [least, most]] of Object.entries(query.ranges || {})) {
      const column = columns[name];
      if (!column) continue;
      if (least !== null) narrow((i) => column[i] >= least);
      if (most !== null) narrow((i) => column[i] <= most);
    }
    if (!keep) return order;
    const out = new Uint32Array(n);
    let m = 0;
    for (let i = 0; i < n; i++) {
      const row = order[i];
      if (keep[row]) out[m++] = row;
    }
    return out.subarray(0, m);
  }

  withToken({ token, exact, number }, where) {
    const { n, columns } = this;
    const hit = new Uint8Array(this.unknown + 1 > 65536 ? this.tokens.length + 1 : 65536);
    const names = exact ? this.tokens : this.lower;
    for (let i = 0; i < names.length; i++) hit[i] = exact ? names[i] === token : names[i].includes(token);
    const keep = new Uint8Array(n);
    for (const name of ["promoted", "answers"]) {
      const column = columns[name];
      if (!column || (where && where !== name)) continue;
      const width = column.length / n;
      for (let i = 0, at = 0; i < n; i++) {
        let any = 0;
        for (const end = at + width; at < end; at++) any |= hit[column[at]]; // a number past the end gives undefined: 0
        keep[i] |= any;
      }
    }
    if (number !== null && number !== undefined) for (let i = 0; i < n; i++) if (columns.feature[i] === number) keep[i] = 1;
    return keep;
  }

  // All rows by a column, NaN last either way, equal ones as they lie; kept for the next time.
  order(name, down) {
    const key = `${name} ${down}`;
    if (!this.orders.has(key)) {
      if (this.orders.size >= 6) this.orders.delete(this.orders.keys().next().value);
      this.orders.set(key, this.sorted(name, down));
    }
    return this.orders.get(key);
  }

  sorted(name, down) {
    const { n } = this;
    let rows = Uint32Array.from({ length: 0 });
    rows = new Uint32Array(n);
    for (let i = 0; i < n; i++) rows[i] = i;
    const column = this.columns[name];
    if (name === "feature" || !column) return down ? rows.reverse() : rows; // the table's own order: site, feature
    for (const keys of Table.keys(column, down)) rows = Table.radix(rows, keys);
    return rows;
  }

  // Whole numbers that sort as the column does; of wide columns the low part first.
  static keys(column, down) {
    const n = column.length;
    const keys = new Uint32Array(n);
    if (column instanceof Float64Array) {
      const high = new Uint32Array(n);
      for (let i = 0; i < n; i++) {
        keys[i] = down ? ~(column[i] % 4294967296) : column[i] % 4294967296;
        high[i] = down ? ~(column[i] / 4294967296) : column[i] / 4294967296;
      }
      return [keys, high];
    }
    if (!(column instanceof Float32Array)) {
      for (let i = 0; i < n; i++) keys[i] = down ? ~column[i] : column[i];
      return [keys];
    }
    const bits = new Uint32Array(column.buffer, column.byteOffset, n);
    for (let i = 0; i < n; i++) {
      const x = column[i];
      if (x !== x) {
        keys[i] = 0xffffffff;
        continue;
      }
      const up = bits[i] & 0x80000000 ? ~bits[i] : bits[i] | 0x80000000;
      keys[i] = down ? ~up : up;
    }
    return [keys];
  }

  static radix(rows, keys) {
    const n = rows.length;
    let from = rows;
    let to = new Uint32Array(n);
    for (let shift = 0; shift < 32; shift += 11) {
      const places = new Uint32Array(2049);
      for (let i = 0; i < n; i++) places[((keys[i] >>> shift) & 2047) + 1]++;
      if (places.includes(n)) continue; // one digit for all
      for (let d = 0; d < 2048; d++) places[d + 1] += places[d];
      for (let i = 0; i < n; i++) to[places[(keys[from[i]] >>> shift) & 2047]++] = from[i];
      [from, to] = [to, from];
    }
    return from;
  }
}
