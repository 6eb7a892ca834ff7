"use strict";
// The rollouts of the page. Everything a run wrote is set as text or as a property, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const TEACHERS = data.teachers, COLOURS = ["perception", "reasoning", "reference"];
  const shadeOf = (k) => (k < 3 ? k : 3 + ((k - 3) % 6)); // own teachers, however many, take turns in six colours
  const colourOf = (k) => `var(--${COLOURS[k] ?? `series-${shadeOf(k) - 2}`})`;
  const PAGE = 20, PAGE_TOKENS = 8000; // cards drawn at once, and the tokens after which it is fewer
  const $ = (id) => document.getElementById(id);
  const list = $("list"), tip = $("tip"), root = document.documentElement;

  function el(tag, options = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(options)) {
      if (name === "text") node.textContent = value;
      else if (name === "class") node.className = value;
      else node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child !== null));
    return node;
  }
  const shownText = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·");
  const number = (x) => (x === null ? "–" : x === 0 ? "0" : x >= 1 ? x.toFixed(2) : x.toPrecision(2));
  const percent = (logprob) => (logprob === null ? "–" : (100 * Math.exp(logprob)).toPrecision(3) + " %");

  // --- What is searched, sorted and shaded ---------------------------------------------------------------------------

  let largest = 0;
  for (const r of data.rollouts) {
    r.text = r.tokens.map((i) => data.texts[i]).join("");
    r.searched = `${r.id}\n${r.problem}\n${r.answer}\n${r.text}`.toLowerCase();
    r.kl = 0;
    r.clips = 0;
    for (const t of r.taught) {
      r.kl = Math.max(r.kl, t[3] ?? 0);
      r.clips += t[4];
    }
    largest = Math.max(largest, r.kl);
  }
  const FLOOR = 0.002, top_kl = Math.max(largest, 0.05);
  const depth = (kl) => Math.min(1, Math.log1p((kl ?? 0) / FLOOR) / Math.log1p(top_kl / FLOOR));
  $("scale-top").textContent = number(top_kl);

  // Rollouts of one row in one step stand together: those of two runs side by side.
  const groups = [], by_key = new Map();
  for (const r of data.rollouts) {
    let n = 0, key;
    do key = JSON.stringify([r.step, r.id, n++]);
    while (by_key.get(key)?.members.some((m) => m.run === r.run));
    if (!by_key.has(key)) {
      const group = { step: r.step, members: [] };
      by_key.set(key, group);
      groups.push(group);
    }
    by_key.get(key).members.push(r);
  }
  for (const g of groups) {
    g.kl = Math.max(...g.members.map((r) => r.kl));
    g.clip = Math.max(...g.members.map((r) => r.clips));
    g.long = Math.max(...g.members.map((r) => r.tokens.length));
  }

  const counts = new Map();
  for (const r of data.rollouts) if (!r.valid) counts.set(r.reason, (counts.get(r.reason) ?? 0) + 1);
  for (const [reason, n] of [...counts].sort((a, b) => b[1] - a[1])) {
    $("format").append(el("option", { value: "=" + reason, text: `${reason.replaceAll("_", " ")} (${n})` }));
  }

  // --- Filters -------------------------------------------------------------------------------------------------------

  let found = [], drawn = 0;

  function matches(r) {
    const words = $("q").value.toLowerCase().split(/\s+/).filter(Boolean);
    const format = $("format").value, right = $("right").value, from = $("from").value, to = $("to").value;
    return (
      words.every((word) => r.searched.includes(word)) &&
      (format === "" || (format === "valid" && r.valid) || (format === "invalid" && !r.valid) || format === "=" + r.reason) &&
      (right === "" || (right === "yes" ? r.right === true : r.right === false)) &&
      (from === "" || r.step >= Number(from)) &&
      (to === "" || r.step <= Number(to))
    );
  }
  const ORDERS = {
    step: (a, b) => a.step - b.step,
    "-step": (a, b) => b.step - a.step,
    kl: (a, b) => b.kl - a.kl,
    clip: (a, b) => b.clip - a.clip,
    long: (a, b) => b.long - a.long,
  };

  function filter() {
    hide();
    found = groups.filter((g) => g.members.some(matches)).sort(ORDERS[$("order").value]);
    list.replaceChildren();
    drawn = 0;
    draw();
    const n = found.reduce((sum, g) => sum + g.members.length, 0);
    $("count").textContent =
      n === data.rollouts.length ? `${n} rollouts` : `${n} of ${data.rollouts.length} rollouts` + (n ? "" : ": nothing fits the filters");
  }

  function draw() {
    const end = Math.min(drawn + PAGE, found.length);
    for (let tokens = 0; drawn < end && tokens < PAGE_TOKENS; drawn++) {
      list.append(card(found[drawn]));
      for (const r of found[drawn].members) tokens += r.tokens.length;
    }
    for (const text of list.querySelectorAll(".text")) text.classList.toggle("long", text.scrollHeight > text.clientHeight + 1);
    $("more").hidden = drawn >= found.length;
    $("more").textContent = `Show more (${found.length - drawn} left)`;
  }

  // --- A rollout -----------------------------------------------------------------------------------------------------

  function card(group) {
    const first = group.members[0];
    const shot = (i, alt) => {
      const image = data.images[i];
      const small = Math.max(image.width, image.height) < 120 ? "small" : "";
      return el("img", { src: image.src, alt, class: small, loading: "lazy", width: image.width, height: image.height });
    };
    const shots = el("div", { class: "shots" }, ...first.images.map((i) => shot(i, `image of row ${first.id}`)));
    const views = new Map();
    for (const r of group.members)
      for (const [role, images] of r.views)
        views.set((data.runs.length > 1 ? "AB"[r.run] + ", " : "") + role, images);
    for (const [role, images] of views) {
      const pictures = images.length ? images.map((i) => shot(i, `what ${role} sees`)) : ["no image"];
      shots.append(el("figure", { class: "view" }, ...pictures, el("figcaption", { class: "muted", text: `${role} sees` })));
    }
    const ask = el("p", { class: "ask" }, el("b", { text: first.problem }), el("br"), el("span", { class: "muted", text: "reference: " }), first.answer);
    const pair = el("div", { class: group.members.length > 1 ? "pair" : "" });
    for (const r of group.members) pair.append(rollout(r));
    const aside = shots.children.length ? el("div", { class: "aside" }, shots, ask) : el("div", { class: "aside" }, ask);
    const meta = el("p", { class: "meta" }, el("span", { text: `step ${group.step}` }), el("span", { text: first.id }));
    return el("li", { class: "card" }, meta, el("div", { class: shots.children.length ? "body" : "body bare" }, aside, pair));
  }

  function rollout(r) {
    const who = el("p", { class: "meta" });
    if (data.runs.length > 1) who.append(el("span", { class: "letter", text: "AB"[r.run] }));
    who.append(el("span", { class: "tag " + (r.valid ? "good" : "bad"), text: r.valid ? "valid" : r.reason.replaceAll("_", " ") }));
    if (r.right !== null) who.append(el("span", { class: "tag " + (r.right ? "good" : "bad"), text: r.right ? "right" : "wrong" }));
    if (r.said !== null) who.append(el("span", { text: `answered ${r.said}` }));
    if (r.age) who.append(el("span", { text: `sampled ${r.age} ${r.age > 1 ? "steps" : "step"} earlier` }));

    const taught = new Map();
    for (const t of r.taught) if (!taught.has(t[0]) || (taught.get(t[0])[3] ?? 0) < (t[3] ?? 0)) taught.set(t[0], t);
    const text = el("div", { class: "text", role: "group", "aria-label": "completion, one token at a time with the arrow keys" });
    r.tokens.forEach((id, i) => {
      const t = taught.get(i), piece = data.texts[id];
      const span = el("span", { class: "tok " + (t ? `t${shadeOf(t[1])}${t[4] ? " clip" : ""}` : "off"), text: piece, tabindex: i ? "-1" : "0" });
      if (piece.includes("\n")) span.classList.add("nl");
      if (t) span.style.setProperty("--k", `calc(4% + ${depth(t[3]).toFixed(3)} * var(--deep))`);
      text.append(span);
    });
    text.rollout = r;
    text.taught = taught;

    const sums = el("ul", { class: "sums" });
    TEACHERS.forEach((name, k) => {
      const own = r.taught.filter((t) => t[1] === k);
      if (!own.length) return;
      const mean = own.reduce((sum, t) => sum + (t[3] ?? 0), 0) / own.length, clips = own.filter((t) => t[4]).length;
      const words = `${name}: ${own.length} tokens, mean KL ${number(mean)}` + (clips ? `, ${clips} clipped` : "");
      const mark = el("i", { "aria-hidden": "true" });
      mark.style.setProperty("--c", colourOf(k));
      sums.append(el("li", {}, mark, words));
    });
    if (!r.taught.length) sums.append(el("li", { text: "no token of it was supervised" }));
    return el("div", {}, who, text, sums);
  }

  // --- The details of a token ----------------------------------------------------------------------------------------

  let active = null;

  function tops(title, flat, chosen, colour) {
    const box = el("div", {}, el("h5", { text: title })), items = el("ol");
    for (let i = 0; i < flat.length; i += 2) {
      const piece = data.texts[flat[i]], item = el("li", {}, el("span", { text: shownText(piece) || "∅" }), el("span", { text: (flat[i + 1] / 10).toFixed(1) }));
      item.style.setProperty("--p", flat[i + 1] / 10 + "%");
      item.style.setProperty("--c", colour);
      if (piece === chosen) item.className = "hit";
      items.append(item);
    }
    box.append(items);
    return box;
  }

  function show(span) {
    if (active) leave(active);
    active = span;
    const holder = span.parentNode, i = [...holder.children].indexOf(span);
    const t = holder.taught.get(i), piece = data.texts[holder.rollout.tokens[i]];
    const head = el("h4", {}, el("code", { text: shownText(piece) }), ` token ${i + 1} of ${holder.rollout.tokens.length}`);
    tip.replaceChildren(head);
    if (!t) tip.append(el("p", { class: "muted", text: "no teacher supervises it" }));
    else {
      const [, teacher, segment, kl, clipped, p, q, top_p, top_q] = t, colour = colourOf(teacher);
      tip.append(el("p", { text: `${TEACHERS[teacher]} teacher, token of the ${segment === "other" ? "rest" : segment}` }));
      tip.append(el("p", { text: `KL ${number(kl)} nats${clipped ? ", above the clip: no gradient" : ""}` }));
      tip.append(el("p", { text: `student ${percent(p)}, teacher ${percent(q)}` }));
      if (top_p && top_q) tip.append(el("div", { class: "tops" }, tops("student, %", top_p, piece, "var(--muted)"), tops("teacher, %", top_q, piece, colour)));
    }
    span.classList.add("on");
    span.setAttribute("aria-describedby", "tip");
    tip.hidden = false;
    const at = span.getBoundingClientRect(), size = tip.getBoundingClientRect();
    const below = at.bottom + 8 + size.height <= innerHeight || at.top < size.height + 16;
    tip.style.left = Math.max(8, Math.min(at.left, innerWidth - size.width - 8)) + "px";
    tip.style.top = (below ? at.bottom + 8 : at.top - size.height - 8) + "px";
  }
  function leave(span) {
    span.classList.remove("on");
    span.removeAttribute("aria-describedby");
  }
  function hide() {
    if (active) leave(active);
    active = null;
    tip.hidden = true;
  }
  const token = (target) => (target instanceof Element ? target.closest(".text > .tok") : null);

  list.addEventListener("pointerover", (event) => {
    if (event.pointerType === "touch") return;
    const span = token(event.target);
    if (span) show(span);
    else hide();
  });
  list.addEventListener("pointerleave", hide);
  list.addEventListener("scroll", () => document.activeElement !== active && hide(), { capture: true });
  list.addEventListener("click", (event) => {
    const span = token(event.target);
    if (span) span.focus({ preventScroll: true });
    else hide();
  });
  list.addEventListener("focusin", (event) => {
    const span = token(event.target);
    if (!span) return;
    for (const other of span.parentNode.children) other.tabIndex = -1;
    span.tabIndex = 0;
    show(span);
  });
  list.addEventListener("focusout", hide);
  list.addEventListener("keydown", (event) => {
    const span = token(event.target);
    if (!span) return;
    const all = span.parentNode.children, i = [...all].indexOf(span);
    const next = { ArrowRight: i + 1, ArrowDown: i + 1, ArrowLeft: i - 1, ArrowUp: i - 1, Home: 0, End: all.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    all[Math.max(0, Math.min(all.length - 1, next))].focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
  });

  // --- Values of a chart under the pointer ---------------------------------------------------------------------------

  for (const drawing of document.querySelectorAll(".drawing")) {
    const chart = data.charts[drawing.dataset.chart];
    if (!chart) continue;
    const line = el("div", { class: "at", hidden: "" });
    drawing.append(line);
    drawing.addEventListener("pointermove", (event) => {
      hide();
      const box = drawing.getBoundingClientRect();
      const share = ((event.clientX - box.left) / box.width - chart.left) / (chart.right - chart.left);
      const wanted = chart.low + Math.min(1, Math.max(0, share)) * (chart.high - chart.low);
      const steps = chart.curves.flatMap(([, steps]) => steps);
      const step = steps.reduce((best, s) => (Math.abs(s - wanted) < Math.abs(best - wanted) ? s : best), steps[0]);
      const rows = chart.curves.map(([label, steps, values]) => [label, values[steps.indexOf(step)]]).filter(([, value]) => value !== undefined);
      tip.replaceChildren(el("h4", { text: `step ${step}` }), ...rows.map(([label, value]) => el("p", { text: `${label}: ${value}` })));
      tip.hidden = false;
      line.hidden = false;
      line.style.left = 100 * (chart.left + ((step - chart.low) / (chart.high - chart.low)) * (chart.right - chart.left)) + "%";
      const size = tip.getBoundingClientRect();
      tip.style.left = Math.max(8, Math.min(event.clientX + 14, innerWidth - size.width - 8)) + "px";
      tip.style.top = Math.max(8, Math.min(event.clientY + 14, innerHeight - size.height - 8)) + "px";
    });
    drawing.addEventListener("pointerleave", () => {
      line.hidden = true;
      hide();
    });
  }

  // --- Theme, start --------------------------------------------------------------------------------------------------

  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  const theme = $("theme");
  const label = () => (theme.textContent = dark() ? "Light" : "Dark");
  theme.hidden = false;
  theme.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    label();
  });
  label();

  let waiting = 0;
  $("q").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, 120);
  });
  for (const id of ["format", "right", "from", "to", "order"]) $(id).addEventListener("input", filter);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("more").addEventListener("click", () => {
    const next = drawn;
    draw();
    list.children[next]?.querySelector(".tok")?.focus();
  });
  filter();
})();
