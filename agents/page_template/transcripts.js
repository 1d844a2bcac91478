"use strict";
// The transcript browser: the same persona, group and seed under two methods side by side.
//
// The index names every dialogue with its mean reward; the lines of a cell (one method, budget,
// domain and seed) are unpacked when a dialogue of it is first looked at. The address after "#" holds
// what is shown, so that a link leads to the same pair. Texts are only ever set as text.

{
  const NONE = ""; // on the right: the left dialogue alone
  const byId = (id) => document.getElementById(id);
  const browser = byId("browser");

  // --- small tools ---

  function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  async function unpack(id) {
    const bytes = Uint8Array.from(atob(byId(id).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  const distinct = (values) => [...new Set(values)];
  const isKnown = (reward) => reward !== null;

  function mean(rewards) {
    const known = rewards.filter(isKnown);
    return known.length ? known.reduce((sum, reward) => sum + reward, 0) / known.length : null;
  }

  const number = (value, digits = 2) =>
    value === null ? "none" : value.toFixed(digits).replace("-", "−");
  const signed = (value, digits = 2) => (value < 0 ? "" : "+") + number(value, digits);

  // An address holds only whole characters; a name that does not is known by what is left of it.
  const inAddress = (name) => new TextDecoder().decode(new TextEncoder().encode(name));

  // --- what there is: cells, and pairs of their dialogues ---

  let cells = [];
  const unpacked = new Map();

  function prepare(index) {
    cells = index.map((cell, number) => {
      const met = new Map();
      const keys = cell.personas.map((persona, d) => {
        const key = JSON.stringify([persona, cell.groups[d]]);
        met.set(key, (met.get(key) ?? 0) + 1);
        return `${key} ${met.get(key)}`; // the same group twice: first with first
      });
      const arm = cell.budget ? `${cell.method}@${cell.budget}` : cell.method;
      return { ...cell, number, keys, arm };
    });
  }

  function linesOf(cell) {
    if (!unpacked.has(cell.number)) unpacked.set(cell.number, unpack(`cell-${cell.number}`));
    return unpacked.get(cell.number);
  }

  const armsOf = (domain) =>
    distinct(cells.filter((cell) => cell.domain === domain).map((cell) => cell.arm));
  const cellsOf = (domain, arm) =>
    cells.filter((cell) => cell.domain === domain && cell.arm === arm);

  function bestArm(domain, except) {
    const level = (arm) => mean(cellsOf(domain, arm).flatMap((cell) => cell.rewards)) ?? -Infinity;
    const others = armsOf(domain).filter((arm) => arm !== except);
    return others.reduce((best, arm) => (level(arm) > level(best) ? arm : best), others[0]) ?? NONE;
  }

  // All pairs of two arms, and how many dialogues of either have no counterpart.
  function pairsOf(domain, left, right) {
    const pairs = [];
    let alone = 0;
    for (const cell of cellsOf(domain, left)) {
      const other = cellsOf(domain, right).find((candidate) => candidate.seed === cell.seed);
      const place = new Map(other?.keys.map((key, d) => [key, d]));
      cell.keys.forEach((key, d) => {
        const pair = { persona: cell.personas[d], seed: cell.seed, left: { cell, d } };
        if (right === NONE) pairs.push(pair);
        else if (place.has(key)) pairs.push({ ...pair, right: { cell: other, d: place.get(key) } });
        else alone += 1;
      });
    }
    if (right !== NONE) {
      alone += cellsOf(domain, right).reduce((sum, cell) => sum + cell.keys.length, -pairs.length);
    }
    return { pairs, alone };
  }

  const rewardOf = (side) => side.cell.rewards[side.d];
  const sidesOf = (pair) => (pair.right ? [pair.left, pair.right] : [pair.left]);

  const level = (pair) => mean(sidesOf(pair).map(rewardOf));

  function difference(pair) {
    const rewards = sidesOf(pair).map(rewardOf);
    return rewards.length === 2 && rewards.every(isKnown) ? rewards[1] - rewards[0] : null;
  }

  // A pair's rank: the smallest goes first, pairs that have none go last, equal ones stay as stored.
  const ORDERS = {
    stored: () => 0,
    differ: (pair) => (difference(pair) === null ? Infinity : -Math.abs(difference(pair))),
    best: (pair) => (level(pair) === null ? Infinity : -level(pair)),
    worst: (pair) => level(pair) ?? Infinity,
  };

  function ordered(pairs, order) {
    const ranked = pairs.map((pair) => [ORDERS[order](pair), pair]);
    ranked.sort(([a], [b]) => (a === b ? 0 : a - b));
    return ranked.map(([, pair]) => pair);
  }

  // --- what is shown: the state, its controls, its address ---

  const CHOICES = ["domain", "left", "right", "persona", "seed", "order"];
  const state = { order: "stored", place: 0 };
  let shown = []; // the pairs that pass the filters, in order

  function fill(name, values, wanted, fallback = values[0], label = String) {
    const select = byId(name);
    select.replaceChildren(
      ...values.map((value) => element("option", { value: inAddress(value), textContent: label(value) })),
    );
    const found = values.findIndex((value) => inAddress(value) === wanted);
    select.selectedIndex = found >= 0 ? found : values.indexOf(fallback);
    state[name] = values[select.selectedIndex];
  }

  function armLabel(arm) {
    const cell = cells.find((candidate) => candidate.arm === arm);
    if (!cell) return "none";
    return cell.budget ? `${cell.method} @ ${cell.budget.toLocaleString("en")}` : cell.method;
  }

  // Takes what is wanted (texts by name), settles on what there is, and shows it.
  function choose(wanted) {
    fill("domain", distinct(cells.map((cell) => cell.domain)), wanted.domain);
    const arms = armsOf(state.domain);
    const right = wanted.right === wanted.left ? state.left : wanted.right; // sides change places
    fill("left", arms, wanted.left, arms[0], armLabel);
    const others = [...arms.filter((arm) => arm !== state.left), NONE];
    fill("right", others, right, bestArm(state.domain, state.left), armLabel);
    const { pairs, alone } = pairsOf(state.domain, state.left, state.right);
    const personas = distinct(pairs.map((pair) => pair.persona));
    fill("persona", ["", ...personas], wanted.persona, "", (name) => name || `all ${personas.length}`);
    const seeds = distinct(pairs.map((pair) => String(pair.seed)));
    fill("seed", ["", ...seeds], wanted.seed, "", (seed) => seed || `all ${seeds.length}`);
    byId("seed").parentElement.hidden = seeds.length < 2;
    if (wanted.order in ORDERS) state.order = wanted.order;
    byId("order").value = state.order;

    const passing = pairs.filter(
      (pair) =>
        (state.persona === "" || pair.persona === state.persona) &&
        (state.seed === "" || String(pair.seed) === state.seed),
    );
    shown = ordered(passing, state.order);
    state.place = Math.min(Math.max(Number(wanted.place ?? 1) - 1 || 0, 0), Math.max(shown.length - 1, 0));
    tellAlone(alone);
    return show();
  }

  function tellAlone(count) {
    byId("alone").hidden = count === 0;
    byId("alone").textContent =
      count === 1
        ? "1 dialogue of these two has no counterpart and is not shown."
        : `${count.toLocaleString("en")} dialogues of these two have no counterpart and are not shown.`;
  }

  const wish = () => Object.fromEntries(CHOICES.map((name) => [name, byId(name).value]));

  function wishOfAddress() {
    const address = location.hash.slice(1);
    return address.includes("=") ? Object.fromEntries(new URLSearchParams(address)) : null;
  }

  function writeAddress() {
    const entries = CHOICES.map((name) => [name, state[name]]);
    const address = new URLSearchParams([...entries, ["place", state.place + 1]]);
    try {
      history.replaceState(null, "", `#${address}`);
    } catch {
      // Safari takes 100 of these in 30 s; one of the next writes the address.
    }
  }

  // --- one pair on the page ---

  async function show() {
    const pair = shown[state.place];
    byId("pair").setAttribute("aria-busy", String(Boolean(pair)));
    for (const [id, end] of [["previous", 0], ["next", shown.length - 1]]) {
      byId(id).setAttribute("aria-disabled", String(!pair || state.place === end));
    }
    if (!pair) {
      byId("place").textContent = "No pair of dialogues: choose other methods or all personas.";
      byId("pair").replaceChildren();
      byId("system").hidden = true;
      return;
    }
    const records = await Promise.all(
      sidesOf(pair).map(async (side) => (await linesOf(side.cell))[side.d]),
    );
    if (pair !== shown[state.place]) return; // someone has gone on meanwhile

    const samePersona = new Set(records.map((record) => record.system)).size === 1;
    byId("system").textContent = records[0].system;
    byId("system").hidden = !samePersona || records[0].system === "";
    const articles = sidesOf(pair).map((side, s) => dialogue(side, records[s], s, samePersona));
    byId("pair").style.setProperty("--rows", Math.max(...records.map((r) => r.lines.length)) + 1);
    byId("pair").classList.toggle("single", !pair.right);
    byId("pair").replaceChildren(...articles);
    nameSides(pair);
    byId("place").replaceChildren(...place(pair));
    byId("pair").setAttribute("aria-busy", "false");
  }

  function place(pair) {
    const count = `${(state.place + 1).toLocaleString("en")} of ${shown.length.toLocaleString("en")}`;
    const parts = [element("strong", { textContent: count }), element("bdi", { textContent: pair.persona })];
    if (!byId("seed").parentElement.hidden) parts.push(element("span", { textContent: `seed ${pair.seed}` }));
    const means = sidesOf(pair).map((side) => `${nameOf(side, pair)} ${number(rewardOf(side))}`).join(", ");
    const gap = difference(pair) === null ? "" : ` (${signed(difference(pair))})`;
    parts.push(element("bdi", { className: "means", textContent: means + gap }));
    for (const part of parts.slice(1)) part.prepend(" · ");
    return parts;
  }

  function nameOf(side, pair) {
    const sameMethod = pair.left.cell.method === pair.right?.cell.method;
    return sameMethod ? armLabel(side.cell.arm) : side.cell.method;
  }

  function nameSides(pair) {
    for (const [id, side] of [["show-left", pair.left], ["show-right", pair.right]]) {
      byId(id).hidden = !pair.right;
      if (pair.right) byId(id).textContent = `${nameOf(side, pair)} ${number(rewardOf(side))}`;
    }
  }

  function dialogue(side, record, s, samePersona) {
    const heading = element(
      "h3",
      { id: `side-${s}` },
      element("bdi", { textContent: side.cell.method }),
    );
    const trained = side.cell.budget ? `${side.cell.budget.toLocaleString("en")} training dialogues, ` : "";
    const about = element("p", { className: "about", textContent: `${trained}seed ${side.cell.seed}` });
    const result = element(
      "p",
      { className: "mean" },
      element("strong", { textContent: number(rewardOf(side)) }),
      " mean reward",
    );
    const head = element("header", {}, heading, about, result, strip(record.lines));
    if (!samePersona) {
      const system = element("p", { className: "system", textContent: record.system });
      system.dir = "auto";
      head.append(system);
    }
    const list = element("ol", {}, ...record.lines.map((line, l) => message(line, `line-${s}-${l}`)));
    const article = element("article", { className: s ? "right" : "left" }, head, list);
    article.setAttribute("aria-labelledby", heading.id);
    return article;
  }

  // The rewards of the agent's lines as a row of bars: a picture of what the lines say one by one.
  function strip(lines) {
    const own = lines.filter((line) => "agent" in line);
    const bars = own.map((line) => coloured(element("span"), line.reward));
    const made = element("div", { className: "strip" }, ...bars);
    made.setAttribute("aria-hidden", "true");
    return made;
  }

  let lowest = 0;
  let highest = 1;

  function coloured(made, reward) {
    if (reward === null) made.classList.add("unscorable");
    else made.style.setProperty("--share", (reward - lowest) / (highest - lowest));
    return made;
  }

  const rewardText = (line, digits) =>
    line.reward === null ? "unscorable" : number(line.reward, digits);

  function spoken(text) {
    const made = element("p", { className: "text", textContent: text });
    made.dir = "auto";
    return made;
  }

  function message(line, id) {
    if ("partner" in line) {
      const who = element("span", { className: "unseen", textContent: "partner: " });
      return element("li", { className: "partner" }, who, spoken(line.partner));
    }
    const button = element(
      "button",
      { type: "button", className: "reward" },
      element("span", { className: "unseen", textContent: "agent, reward " }),
      element("span", { className: "value", textContent: rewardText(line, 2) }),
      element("span", { className: "bar" }),
    );
    const details = element("div", { className: "details", id }, ...explained(line));
    button.setAttribute("aria-expanded", "false");
    button.setAttribute("aria-controls", id);
    button.setAttribute("aria-describedby", id);
    return coloured(element("li", { className: "agent" }, button, spoken(line.agent), details), line.reward);
  }

  function explained(line) {
    const reason = element("p", { className: "reason", textContent: line.reason });
    reason.dir = "auto";
    const entries = [["reward", rewardText(line, 3), "main"]];
    for (const [name, value] of Object.entries(line.parts)) entries.push([name, number(value, 3), "part"]);
    if (line.credited !== null) entries.push(["credited return", number(line.credited, 3), "main"]);
    if (line.advantage !== null) entries.push(["advantage", signed(line.advantage, 3), "main"]);
    const list = entries.map(([name, value, className]) =>
      element(
        "div",
        { className },
        element("dt", {}, element("bdi", { textContent: name })),
        element("dd", { textContent: value }),
      ),
    );
    return [...(line.reason ? [reason] : []), element("dl", {}, ...list)];
  }

  // --- hands and keys ---

  function go(step) {
    const next = state.place + step;
    if (next < 0 || next >= shown.length) return;
    state.place = next;
    writeAddress();
    show();
  }

  function open(line) {
    for (const other of byId("pair").querySelectorAll(".agent.open")) {
      if (other !== line) close(other);
    }
    if (line === null) return;
    const opened = line.classList.toggle("open");
    line.classList.toggle("closed", !opened);
    line.querySelector("button").setAttribute("aria-expanded", String(opened));
  }

  function close(line) {
    line.classList.remove("open");
    line.querySelector("button").setAttribute("aria-expanded", "false");
  }

  function listen() {
    for (const name of CHOICES) {
      byId(name).addEventListener("change", () => choose(wish()).then(writeAddress));
    }
    byId("previous").addEventListener("click", () => go(-1));
    byId("next").addEventListener("click", () => go(1));
    for (const side of ["left", "right"]) {
      byId(`show-${side}`).addEventListener("click", () => {
        byId("pair").dataset.shown = side;
        byId("show-left").setAttribute("aria-pressed", String(side === "left"));
        byId("show-right").setAttribute("aria-pressed", String(side === "right"));
      });
    }
    window.addEventListener("hashchange", () => {
      const wanted = wishOfAddress();
      if (wanted) choose(wanted);
    });
    document.addEventListener("click", (event) => {
      const selecting = !getSelection().isCollapsed || event.target.closest(".details");
      if (!selecting) open(event.target.closest("#pair .agent"));
    });
    // An explanation that was put away comes back with the pointer or the focus, not before.
    const back = (event) => {
      const line = event.target.closest(".agent");
      if (line && !line.contains(event.relatedTarget)) line.classList.remove("closed");
    };
    byId("pair").addEventListener("pointerout", back);
    byId("pair").addEventListener("focusout", back);
    document.addEventListener("keydown", onKey);
  }

  function onKey(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "Escape") {
      for (const line of byId("pair").querySelectorAll(".agent:is(.open, :hover, :focus-within)")) {
        close(line);
        line.classList.add("closed");
      }
      return;
    }
    const here = event.target === document.body || browser.contains(event.target);
    if (!byId("keys").checked || !here || event.target.matches("select, input")) return;
    if (event.key === "ArrowRight" || event.key === "j") go(1);
    if (event.key === "ArrowLeft" || event.key === "k") go(-1);
  }

  async function start() {
    const index = await unpack("index");
    prepare(index.cells);
    [lowest, highest] = index.scale;
    byId("lowest").textContent = number(lowest, 0);
    byId("highest").textContent = number(highest, 0);
    listen();
    await choose(wishOfAddress() ?? {});
    browser.hidden = false;
    if (wishOfAddress()) byId("dialogues").scrollIntoView();
  }

  if (browser) {
    start().catch((error) => {
      const note = `The dialogues could not be unpacked (${error}); a browser of 2024 or later can.`;
      browser.before(element("p", { className: "note", textContent: note }));
    });
  }
}
